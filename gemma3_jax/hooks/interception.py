"""Hooks by interception: values inside the model have names, and are captured and edited by name.

Every Linen module of the model is a component with two sites, `hook_in` (its first argument) and `hook_out` (its
result). Other values pass through a `HookPoint`, whose path is their site. `flax.linen.intercept_methods` sees all of
them. Modules do not store hooks, so there is nothing to reset.

A scan over layers traces its body once for several layers (`Repeated`). An edit of one layer is then a branch that the
scan takes at that layer, and a capture writes rows of a buffer that the scan carries.

An interceptor acts while a function is traced. Enter it inside the jitted function, as `forward` does. If you enter it
around a function that is already jitted, JAX silently ignores it.
"""

import dataclasses
import functools
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gemma3_jax.elsewhere import missing
from gemma3_jax.hooks.scanned import Rows, edited_at, no_rows, written_at
from gemma3_jax.meshes import constrained, cut_residual
from gemma3_jax.sites import table
from gemma3_jax.sites.names import block, layer_of, name_of
from gemma3_jax.types import PyTree

Phase = Literal["prompt", "generation"]
CAPTURES = "captures"  # the Linen collection that holds captured values while the model runs


class HookPoint(nn.Module):
    """Names a value: returns its argument, without parameters or operations."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Repeated(nn.Module):
    """The scan body: at each step, its child `block` is the block of another layer.

    Its second argument is the step [].

    Attributes:
        layers: the layer of the child at each step. With only one layer, the child has the same name as outside a scan.
    """

    layers: tuple[int, ...]

    def names(self, site: str) -> list[str]:
        """The canonical name at each step of a site of the body: block.attn.hook_out -> blocks.3.attn.hook_out."""
        return [block(layer, site.removeprefix("block.")) for layer in self.layers]


@dataclasses.dataclass(eq=False)
class Seen:
    """The values of the sites that a run has passed, by canonical name.

    Attributes:
        values: outside scans.
        scanned: in the scan body that is being traced; those of the layer of its step.
    """

    values: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    scanned: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Tokens(TypedDict):
    """The fields of a `Hook` that describe the tokens of a site."""

    positions: jax.Array
    attention_mask: jax.Array | None
    segment_ids: jax.Array | None


@flax.struct.dataclass
class Hook:
    """The context of an edit: the site where it runs and the tokens there.

    Attributes:
        name: canonical site name, such as "blocks.5.hook_out" (static).
        layer: block index, or None outside the blocks (static).
        positions: [b, p] int32, the absolute position of every token. Padding has positions, too: 0 on the left, and
            those after the text on the right. Leave it out with `attention_mask`, as `edits.only` does. With
            `logits_at`, at the unembedding this covers only the chosen tokens: positions, mask and segment ids then
            have shape [b, n].
        attention_mask: [b, p], 1 at real tokens; None if all tokens are real.
        segment_ids: [b, p] int32, the document of each token, numbered from 0 in each row; documents may be given or
            inferred from positions. None if each row is one text. Positions restart in each document.
        key_positions: [b, k] int32, positions of the keys if these are other tokens, as with a KV cache; or None.
        key_mask: [b, k], 1 at real keys; set together with `key_positions`.
        phase: "prompt", or "generation" for a token that the model has generated (static).
        layout: einops pattern from the table's layout to the layout of the value, if a Hugging Face path with another
            layout named the site (static); or None.
        read: the values of the sites that an edit reads beside its own, by canonical name: see `Reading`. Or None.
        seen: the values that `Reading` finds them in (static).
    """

    name: str = flax.struct.field(pytree_node=False)
    layer: int | None = flax.struct.field(pytree_node=False)
    positions: jax.Array
    attention_mask: jax.Array | None = None
    segment_ids: jax.Array | None = None
    key_positions: jax.Array | None = None
    key_mask: jax.Array | None = None
    phase: Phase = flax.struct.field(pytree_node=False, default="prompt")
    layout: str | None = flax.struct.field(pytree_node=False, default=None)
    read: Mapping[str, jax.Array] | None = None
    seen: Seen | None = flax.struct.field(pytree_node=False, default=None, repr=False)

    if not TYPE_CHECKING:  # a type checker is to report missing attributes itself

        def __getattr__(self, name):
            raise missing(self, name)


Edit = Callable[[jax.Array, Hook], jax.Array]
# As `flax.linen.intercept_methods` takes it.
Context = nn.module.InterceptorContext
Interceptor = Callable[[Callable[..., PyTree], tuple[PyTree, ...], Mapping[str, PyTree], Context], PyTree]


@flax.struct.dataclass
class InLayout:
    """An edit that sees its value in another layout: `layout` is the einops pattern from ours to that one."""

    edit: Edit
    layout: str = flax.struct.field(pytree_node=False)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        shown = dataclasses.replace(hook, layout=self.layout)
        edited = call_edit(self.edit, einops.rearrange(value, self.layout), shown)
        ours, theirs = self.layout.split(" -> ")
        axes = ours.removeprefix("... ").split()
        sizes = dict(zip(axes, value.shape[-len(axes) :], strict=True))
        return einops.rearrange(edited, f"{theirs} -> {ours}", **sizes)

    def axes(self, ours: Sequence[str]) -> list[str]:
        """The axes that the edit sees, for a value with axes `ours`; merged axes count as one, "(n e)"."""
        before, after = (side.removeprefix("... ") for side in self.layout.split(" -> "))
        return [*ours[: -len(before.split())], *re.findall(r"\([^)]*\)|\S+", after)]


@flax.struct.dataclass
class Reading:
    """An edit that also reads the values of earlier sites of the same run, after their edits: `hook.read[name]`.

    With scanned layers, the sites must be in the layer of the edit.

    Attributes:
        edit: any edit.
        sites: canonical names (static).
    """

    edit: Edit
    sites: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, value: jax.Array, hook: Hook) -> jax.Array:
        """The result of the edit."""
        read = {name: _value_of(name, hook) for name in self.sites}
        return call_edit(self.edit, value, dataclasses.replace(hook, read=read, seen=None))


def _value_of(name: str, hook: Hook) -> jax.Array:
    """The value of an earlier site."""
    seen = hook.seen or Seen()
    found = seen.scanned.get(name) if layer_of(name) == hook.layer else None
    found = seen.values.get(name) if found is None else found
    if found is not None:
        return found
    if seen.scanned:
        raise ValueError(
            f"the edit at {hook.name} reads {name}, in another layer, which scanned layers do not keep: run the model "
            "without scan_layers (in `forward`: with unstack_layers)"
        )
    raise ValueError(f"the edit at {hook.name} reads {name}, which this run does not reach before it")


@flax.struct.dataclass
class Kept:
    """Wrapper for one captured value, or for the pytree that a reduction returned: one entry of `CAPTURES`."""

    value: PyTree


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """float32 in place of narrower floating-point types: edits see values in it. Other dtypes stay."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype("float32") if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 else dtype


def apply_edits(edits: Sequence[Edit], value: jax.Array, hook: Hook) -> jax.Array:
    """Run the edits of one site in order, at least in float32, and cast to the site's dtype once.

    The result of each edit must have the site's shape.
    """
    edited = value.astype(at_least_float32(value.dtype)) if edits else value
    for edit in edits:
        edited = call_edit(edit, edited, hook).astype(edited.dtype)
    return edited.astype(value.dtype)


def as_pytree(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """A callable as a pytree: a plain function becomes a `Partial` without leaves."""
    plain = callable(function) and jax.tree_util.all_leaves([function])
    return jax.tree_util.Partial(function) if plain else function


def check_callable(function: object, what: str, remedy: str) -> None:
    """Raise TypeError for an edit or a reduction that is not callable, or that is a class and not an instance of it.

    >>> check_callable(3, "edit at hook_embed", "an edit is a callable, edit(value, hook) -> value")
    Traceback (most recent call last):
    TypeError: the edit at hook_embed is 3; an edit is a callable, edit(value, hook) -> value
    """
    if isinstance(function, type):
        name = function.__name__
        raise TypeError(f"the {what} is the class {name}; it must be an instance of it: {name}(...)")
    if not callable(function):
        raise TypeError(f"the {what} is {reprlib.repr(function)}; {remedy}")


def call_edit(edit: Edit, value: jax.Array, hook: Hook) -> jax.Array:
    """The result of an edit, after a check that it is an array with the value's shape."""
    advice = '; new tokens come one by one: edits.only(edit, phase="prompt") restricts an edit to the prompt'
    remedy = advice if hook.phase == "generation" else ""
    try:
        edited = edit(value, hook)
    except Exception as error:
        error.add_note(f"in the edit at {hook.name}, which holds {value.dtype} of shape {value.shape}{remedy}")
        if isinstance(error, TypeError) and "object is not callable" in str(error):
            error.add_note("if this calls hook.layer(): it is an attribute here, hook.layer (see docs/migration.md)")
        raise
    if edited is None:
        raise TypeError(f"the edit at {hook.name} returned None; it must return the value, changed or not")
    edited = jnp.asarray(edited)
    if edited.shape != value.shape:
        raise ValueError(f"the edit at {hook.name} returned shape {edited.shape}; the site holds {value.shape}{remedy}")
    if not _holds(value.dtype, edited.dtype):
        raise TypeError(
            f"the edit at {hook.name} returned {edited.dtype}; the site holds {value.dtype}, and a cast would drop a "
            "part of the numbers"
        )
    return edited


def _holds(site: np.dtype, result: np.dtype) -> bool:
    """Whether a site can hold the numbers of a result, up to rounding: real numbers, and integers at token ids."""
    kind = jnp.floating if jnp.issubdtype(site, jnp.floating) else jnp.integer
    return any(jnp.issubdtype(result, each) for each in (kind, jnp.integer, jnp.bool_))


def site_of(module: nn.Module, *names: str) -> str:
    """The canonical name of `module`, or of a site below it: blocks_3/attn -> "blocks.3.attn"."""
    return name_of((*module.path, *names))


def interceptor(
    capture: Mapping[str, Callable[[jax.Array, Hook], PyTree] | None],
    edits: Mapping[str, Sequence[Edit]],
    positions: jax.Array,
    unembedded: Tokens | None = None,
    **fields: Any,
) -> Interceptor:
    """Build the interceptor that edits, then captures, the named sites; all other calls pass through.

    Args:
        capture: by canonical name, a reduction of value and hook, or None to capture the whole value. Captured values
            go to the collection `CAPTURES`.
        edits: for each canonical name, the edits to apply, in order.
        positions: [b, p] int32, passed to the edits.
        unembedded: positions, mask and segment ids, each [b, n], of the tokens with logits, if not all tokens have
            logits.
        **fields: other fields of `Hook`.
    """

    scans: list[tuple[Repeated, jax.Array]] = []  # the scan body that is being traced, and its step
    seen = Seen()

    def hook_at(name: str) -> Hook:
        hook = Hook(name, layer_of(name), positions, **fields, seen=seen)
        if unembedded is None or not name.startswith("unembed."):
            return hook
        return dataclasses.replace(hook, **unembedded)

    def edited(name: str, value: jax.Array) -> jax.Array:
        return apply_edits(edits[name], value, hook_at(name))

    def kept(name: str, value: jax.Array) -> PyTree:
        reduce = capture[name]
        return cut_residual(value, table.site(name).axes) if reduce is None else reduce(value, hook_at(name))

    def visit(module: nn.Module, hook: str, site: str, value: jax.Array) -> jax.Array:
        if scans:
            body, step = scans[-1]
            names = body.names(site)
            value = edited_at(step, [name if name in edits else None for name in names], edited, value)
            seen.scanned |= dict.fromkeys(names, value)
            captured_names = [name if name in capture else None for name in names]
            if any(captured_names):
                value = constrained(value, table.site(next(filter(None, captured_names))).axes)
                empty = functools.partial(no_rows, captured_names, kept, value)
                write = functools.partial(written_at, step, captured_names, kept, lambda name: capture[name] is None)
                module.sow(CAPTURES, hook, value, init_fn=empty, reduce_fn=write)
            return value
        if site in edits:
            value = edited(site, value)
        seen.values[site] = value
        if site in capture:
            value = constrained(value, table.site(site).axes)
            module.sow(CAPTURES, hook, Kept(kept(site, value)), init_fn=lambda: None, reduce_fn=lambda _, new: new)
        return value

    def intercept(
        next_fun: Callable[..., PyTree], args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree], context: Context
    ) -> PyTree:
        module = context.module
        if isinstance(module, Repeated) and context.method_name == "__call__" and len(module.layers) > 1:
            scans.append((module, args[1]))
            try:
                return next_fun(*args, **kwargs)
            finally:
                scans.pop()
                seen.scanned.clear()
        if context.method_name != "__call__" or not module.path:
            return next_fun(*args, **kwargs)
        if isinstance(module, HookPoint):
            return visit(module, "value", site_of(module), next_fun(*args, **kwargs))
        first = visit(module, "hook_in", site_of(module, "hook_in"), args[0])
        return visit(module, "hook_out", site_of(module, "hook_out"), next_fun(first, *args[1:], **kwargs))

    return intercept


def captured(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The captured values by canonical name, from the variables that `apply(..., mutable=[CAPTURES])` returned."""
    entries = jax.tree_util.tree_leaves_with_path(
        variables.get(CAPTURES, {}), lambda node: isinstance(node, Kept | Rows)
    )
    values: dict[str, PyTree] = {}
    for path, entry in entries:
        values |= entry.by_name() if isinstance(entry, Rows) else {_name([key.key for key in path]): entry.value}
    return values


def _name(path: Sequence[str]) -> str:
    return name_of(path).removesuffix(".value")
