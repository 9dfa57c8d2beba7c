"""Hooks by interception: how a value inside the model gets a name, is captured and is edited.

Every Linen module of the model is a component with two sites, `hook_in` (its first argument) and `hook_out` (its
result). A value that is no module's argument or result passes through a `HookPoint`, whose path is its site.
`flax.linen.intercept_methods` sees all of them; nothing is registered on a module and nothing has to be reset.

Under a scan over layers a body is traced once for several of them (`Repeated`). An edit of one layer is then a branch
that the scan takes at that layer, and a capture writes the rows of a buffer that the scan carries.

An interceptor acts while a function is traced. Enter it inside the function that is jitted, as `forward` does: one
that is set around an already jitted function is ignored, silently.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gemma3_jax.sites import layer_of
from gemma3_jax.steps import Rows, edited_at, no_rows, written_at

Phase = Literal["prompt", "generation"]
CAPTURES = "captures"  # the Linen collection that holds captured values while the model runs


class HookPoint(nn.Module):
    """Gives a value a name: returns its argument, and adds no parameter and no operation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Repeated(nn.Module):
    """A body of a scan: at each step its child `block` is the block of another layer.

    It is called with the step [] as second argument.

    Attributes:
        layers: those that the child stands for, step by step. Of one only, it has the name that it has outside of a
            scan.
    """

    layers: tuple[int, ...]

    def names(self, site: str) -> list[str]:
        """The canonical names, step by step, of a site of the body: block.attn.hook_out -> blocks.3.attn.hook_out."""
        return [f"blocks.{layer}.{site.removeprefix('block.')}" for layer in self.layers]


@flax.struct.dataclass
class Hook:
    """What an edit is told about the place where it runs.

    Attributes:
        name: canonical site name, such as "blocks.5.hook_out" (static).
        layer: block index, or None outside the blocks (static).
        positions: [b, p] int32, the absolute position of every token; at the unembedding with `logits_at` [b, n], of
            those tokens, and so is the mask.
        attention_mask: [b, p], 1 at real tokens; None where all are.
        key_positions: [b, k] int32, those of the keys where they are not the same tokens, as behind a cache; or None.
        key_mask: [b, k], 1 at real keys; with `key_positions`.
        phase: "prompt", or "generation" for a token that the model itself has written (static).
        layout: einops pattern from the table's layout to that of the value, where a Hugging Face path named the site
            and has another (static); or None.
    """

    name: str = flax.struct.field(pytree_node=False)
    layer: int | None = flax.struct.field(pytree_node=False)
    positions: jax.Array
    attention_mask: jax.Array | None = None
    key_positions: jax.Array | None = None
    key_mask: jax.Array | None = None
    phase: Phase = flax.struct.field(pytree_node=False, default="prompt")
    layout: str | None = flax.struct.field(pytree_node=False, default=None)


Edit = Callable[[jax.Array, Hook], jax.Array]


@flax.struct.dataclass
class Placed:
    """An edit that was checked against its site and speaks its layout: to be placed again without more ado."""

    edit: Any

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        return self.edit(value, hook)


@flax.struct.dataclass
class InLayout:
    """An edit that sees its value in another layout: `layout` is the einops pattern from ours to that one."""

    edit: Any
    layout: str = flax.struct.field(pytree_node=False)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        shown = hook.replace(layout=self.layout)  # type: ignore[attr-defined] # flax adds it
        edited = _call(self.edit, einops.rearrange(value, self.layout), shown)
        ours, theirs = self.layout.split(" -> ")
        axes = ours.removeprefix("... ").split()
        sizes = dict(zip(axes, value.shape[-len(axes) :], strict=True))
        return einops.rearrange(edited, f"{theirs} -> {ours}", **sizes)

    def axes(self, ours: Sequence[str]) -> list[str]:
        """The axes that the edit sees of a value with ours; merged ones are one, "(n e)"."""
        before, after = (side.removeprefix("... ") for side in self.layout.split(" -> "))
        return [*ours[: -len(before.split())], *re.findall(r"\([^)]*\)|\S+", after)]


@flax.struct.dataclass
class Kept:
    """What is kept of a captured value: one entry of `CAPTURES`, whatever pytree a reduction has made of it."""

    value: Any


def apply_edits(edits: Sequence[Edit], value: jax.Array, hook: Hook) -> jax.Array:
    """Run the edits of one site in order, in float32 where the site has less, and cast to the site's dtype once.

    Each edit's result must have the site's shape.
    """
    narrow = jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4
    edited = value.astype(jnp.float32) if edits and narrow else value
    for edit in edits:
        edited = _call(edit, edited, hook).astype(edited.dtype)
    return edited.astype(value.dtype)


def as_pytree(function: Any) -> Any:
    """A callable that can be an argument of a jitted function: a plain function is wrapped, with no leaves.

    `jax.jit` then compiles it in, by identity; one that is a pytree has its leaves traced.
    """
    plain = callable(function) and jax.tree_util.all_leaves([function])
    return jax.tree_util.Partial(function) if plain else function


def _call(edit: Edit, value: jax.Array, hook: Hook) -> jax.Array:
    alone = '; new tokens come one by one: edits.only(edit, phase="prompt") keeps an edit to the prompt'
    remedy = alone if hook.phase == "generation" else ""
    try:
        edited = edit(value, hook)
    except Exception as error:
        error.add_note(f"in the edit at {hook.name}, which holds {value.dtype} of shape {value.shape}{remedy}")
        raise
    if edited is None:
        raise TypeError(f"the edit at {hook.name} returned None; it must return the value, changed or not")
    edited = jnp.asarray(edited)
    if edited.shape != value.shape:
        raise ValueError(f"the edit at {hook.name} returned shape {edited.shape}; the site holds {value.shape}{remedy}")
    return edited


def site_of(module: nn.Module, *names: str) -> str:
    """The canonical name of `module`, or of a site below it: blocks_3/attn -> "blocks.3.attn"."""
    return ".".join((*module.path, *names)).replace("blocks_", "blocks.")


def interceptor(
    capture: Mapping[str, Callable[[jax.Array, Hook], Any] | None],
    edits: Mapping[str, Sequence[Edit]],
    positions: jax.Array,
    unembedded: tuple[jax.Array, jax.Array] | None = None,
    **told: Any,
) -> Callable[..., Any]:
    """Build the interceptor that edits, then captures, the sites that are named; all other calls pass through.

    Args:
        capture: by canonical name what to keep of the sites' values, a function of the value and the hook, or None
            for the whole; it goes to the collection `CAPTURES`.
        edits: for each canonical name the edits to apply, in order.
        positions: [b, p] int32, handed to the edits.
        unembedded: positions and mask, each [b, n], of the tokens whose logits are computed, where these are not all.
        **told: what else a `Hook` tells them.
    """

    scans: list[tuple[Repeated, jax.Array]] = []  # the body that is being traced, with its step

    def told_at(name: str) -> Hook:
        hook = Hook(name, layer_of(name), positions, **told)
        if unembedded is None or not name.startswith("unembed."):
            return hook
        return hook.replace(positions=unembedded[0], attention_mask=unembedded[1])  # type: ignore[attr-defined]

    def edited(name: str, value: Any) -> Any:
        return apply_edits(edits[name], value, told_at(name))

    def kept(name: str, value: Any) -> Any:
        reduce = capture[name]
        return value if reduce is None else reduce(value, told_at(name))

    def visit(module: nn.Module, hook: str, site: str, value: Any) -> Any:
        if scans:
            body, step = scans[-1]
            names = body.names(site)
            value = edited_at(step, [name if name in edits else None for name in names], edited, value)
            wanted = [name if name in capture else None for name in names]
            if any(wanted):
                empty = functools.partial(no_rows, wanted, kept, value)
                write = functools.partial(written_at, step, wanted, kept, lambda name: capture[name] is None)
                module.sow(CAPTURES, hook, value, init_fn=empty, reduce_fn=write)
            return value
        if site in edits:
            value = edited(site, value)
        if site in capture:
            module.sow(CAPTURES, hook, Kept(kept(site, value)), init_fn=lambda: None, reduce_fn=lambda _, new: new)
        return value

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        if isinstance(module, Repeated) and context.method_name == "__call__" and len(module.layers) > 1:
            scans.append((module, args[1]))
            try:
                return next_fun(*args, **kwargs)
            finally:
                scans.pop()
        if context.method_name != "__call__" or not module.path:
            return next_fun(*args, **kwargs)
        if isinstance(module, HookPoint):
            return visit(module, "value", site_of(module), next_fun(*args, **kwargs))
        first = visit(module, "hook_in", site_of(module, "hook_in"), args[0])
        return visit(module, "hook_out", site_of(module, "hook_out"), next_fun(first, *args[1:], **kwargs))

    return intercept


def captured(variables: Mapping[str, Any]) -> dict[str, Any]:
    """What was captured by canonical name, from the variables that `apply(..., mutable=[CAPTURES])` returned."""
    entries = jax.tree_util.tree_leaves_with_path(
        variables.get(CAPTURES, {}), lambda node: isinstance(node, Kept | Rows)
    )
    values: dict[str, Any] = {}
    for path, entry in entries:
        values |= entry.by_name() if isinstance(entry, Rows) else {_name([key.key for key in path]): entry.value}
    return values


def _name(path: Sequence[str]) -> str:
    return ".".join(path).removesuffix(".value").replace("blocks_", "blocks.")
