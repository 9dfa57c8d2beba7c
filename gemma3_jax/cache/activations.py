"""The captured activations of a run: a read-only mapping, indexed by any name of a site, and a pytree."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar, cast

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gemma3_jax import atomic
from gemma3_jax.cache import files, residual
from gemma3_jax.cache.components import require_whole
from gemma3_jax.cache.description import describe
from gemma3_jax.cache.files import GRAD, listed
from gemma3_jax.config import Gemma3Config
from gemma3_jax.descriptions import Described
from gemma3_jax.elsewhere import missing
from gemma3_jax.inputs import as_array, section
from gemma3_jax.meshes import own_rows
from gemma3_jax.processes import in_first, in_this, own_part, spans_processes, to_host
from gemma3_jax.sites.names import Match, Name, UnknownSite, get_act_name, resolve, searchable_names, spellings
from gemma3_jax.sites.table import site, token_axis
from gemma3_jax.types import Integers, Params, PyTree

Value = TypeVar("Value", bound=Integers)
# The part of a cache that is not arrays: the config, the names, whether there is a batch axis, the reductions, and
# whether logits_at chose positions.
_Static: TypeAlias = tuple[Gemma3Config, tuple[str, ...], bool, tuple[tuple[str, str], ...], bool]
_UNEMBED = "unembed."


@jax.tree_util.register_pytree_with_keys_class
class ActivationCache(Described, Mapping[str, jax.Array]):
    """Captured values by site. Index it by any name, or by TransformerLens' shorthand.

    It iterates over canonical names that are found by their TransformerLens names, too:
    `[name for name in cache if "resid_post" in name]` has `blocks.3.hook_out` (`gemma3_jax.sites.names.SiteName`).

    A name is canonical, legacy or a Hugging Face path; a shorthand is (name, layer) or (name, layer, part), as
    `get_act_name` takes it, and negative layers count from the end. A Hugging Face path gives the value in Hugging
    Face's layout: `model.layers.5.self_attn.o_proj.input` is `blocks.5.attn.o.hook_in` with the heads flattened,
    [b, p, h * e]. With the suffix `_grad`, a name gives the gradient.

    As a pytree its leaves are the values and the gradients, so it passes through `jit`, `vmap` and `jax.tree.map`.
    The parameters and the tokens are not leaves, so a cache that has passed through one of these has none: add them
    with `with_params` and `with_inputs`.

    For a site that was reduced (see `gemma3_jax.reductions`), the cache has the result of the reduction, an array or a
    pytree, under all names of the site. Methods that need whole values raise an error for it.

    Attributes:
        config: shape of the model.
        params: the model's parameters, or None. Decompositions into heads and neurons, norms and attributions need
            them.
        grads: the gradients, as another cache; or None.
        tokens: [b, p] int32 ids of the run, [p] without the batch axis; or None.
        attention_mask: same shape as tokens, 1 at real tokens and 0 at padding; or None.
        batched: whether the values have a batch axis.
        reduced: names of the reductions, by canonical name of the site.
        some_logits: whether the cache has sites of the unembedding at the positions of `logits_at`, not the input's.

    >>> import jax.numpy as jnp
    >>> cache = ActivationCache(Gemma3Config.preset("270m"), {"blocks.17.hook_out": jnp.ones((1, 4, 640))})
    >>> cache["blocks.17.hook_resid_post"].shape, cache["resid_post", -1].shape
    ((1, 4, 640), (1, 4, 640))
    >>> cache.sliced(positions=-1).remove_batch_dim()["model.layers.17.output"].shape
    (1, 640)
    """

    def __init__(
        self,
        config: Gemma3Config,
        values: Mapping[str, jax.Array],
        params: Params | None = None,
        grads: ActivationCache | None = None,
        batched: bool = True,
        reduced: Mapping[str, str] | None = None,
        some_logits: bool = False,
    ):
        self.config = config
        self.params = params
        self.grads = grads
        self.batched = batched
        self.reduced = dict(reduced or {})
        self.some_logits = some_logits and any(name.startswith(_UNEMBED) for name in values)
        self.tokens: Integers | None = None
        self.attention_mask: Integers | None = None
        self._values = {name: cast(jax.Array, as_array(value)) for name, value in values.items()}

    def __getitem__(self, name: Name) -> jax.Array:
        parts = (name,) if isinstance(name, str) else name
        if not (isinstance(parts, tuple | list) and parts and isinstance(parts[0], str)):
            raise UnknownSite(f"{name!r} does not name a site: give a name, or a shorthand, as in ('resid_post', 3)")
        first = parts[0]
        if first.endswith(GRAD):
            if self.grads is None:
                raise KeyError(f"{name}: this cache has no gradients; run with run_with_cache(..., incl_bwd=True)")
            first = first.removesuffix(GRAD)
            return self.grads[first if isinstance(name, str) else (first, *name[1:])]
        match = self._match(name)
        if match.name not in self._values:
            raise KeyError(f"{match.name} was not captured; this cache has {listed(self._values)}")
        value = self._values[match.name]
        return value if match.layout is None or match.name in self.reduced else einops.rearrange(value, match.layout)

    def _match(self, name: Name) -> Match:
        """The site of a name, ignoring the suffix for gradients."""
        if not isinstance(name, str):
            return resolve(get_act_name(*name, config=self.config).removesuffix(GRAD), self.config)
        whole = name.removesuffix(GRAD)
        try:
            return resolve(whole, self.config)
        except UnknownSite:
            with contextlib.suppress(UnknownSite):
                return resolve(get_act_name(whole, config=self.config), self.config)
            raise

    def __iter__(self) -> Iterator[str]:
        known = searchable_names(self.config)
        return (known.get(name, name) for name in self._values)

    def __len__(self) -> int:
        return len(self._values)

    _description = describe

    def _ipython_key_completions_(self) -> list[str]:
        """What a notebook offers after `cache["`: every name of every captured site."""
        return spellings(self, self.config)

    if not TYPE_CHECKING:  # a type checker is to report missing attributes itself

        def __getattr__(self, name):
            raise missing(self, name)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Hashable, PyTree]], _Static]:
        children = [(jax.tree_util.DictKey(name), value) for name, value in self._values.items()]
        grads = (jax.tree_util.GetAttrKey("grads"), self.grads)
        reduced = tuple(self.reduced.items())
        return [*children, grads], (self.config, tuple(self._values), self.batched, reduced, self.some_logits)

    @classmethod
    def tree_unflatten(cls, aux: _Static, children: Iterable[PyTree]) -> Self:
        config, names, batched, reduced, some_logits = aux
        *values, grads = children
        return cls(config, dict(zip(names, values, strict=True)), None, grads, batched, dict(reduced), some_logits)

    def with_params(self, params: Params) -> Self:
        """This cache with the model's parameters, as `convert_checkpoint` returns them, without copying arrays."""
        new = copy.copy(self)
        new.params = params
        return new

    def with_inputs(self, tokens: Integers, attention_mask: Integers | None = None) -> Self:
        """This cache with the tokens [b, p] of the run and their mask, by default all 1. Arrays are not copied."""
        new = copy.copy(self)
        new.tokens = as_array(tokens)
        new.attention_mask = np.ones(tokens.shape, np.int32) if attention_mask is None else as_array(attention_mask)
        new.grads = None if self.grads is None else self.grads.with_inputs(new.tokens, new.attention_mask)
        return new

    def real(self, name: Name) -> jax.Array:
        """The values of a site at real tokens: [n, ...], row by row in the order of the text, without padding.

        For scores and patterns this selects queries and keeps all keys. It cannot be used in `jit`, since n depends on
        the mask.

        Args:
            name: any of the site's names, as in `cache[name]`.

        Raises:
            ValueError: the cache does not have its tokens, or the site was reduced or has the positions of `logits_at`.

        >>> from gemma3_jax import TINY, HookedGemma3
        >>> model = HookedGemma3.from_pretrained(TINY)
        >>> _, cache = model.run_with_cache(["ba ke", "ba ke lo mu"], "blocks.1.hook_resid_post")
        >>> cache.attention_mask.sum(axis=1).tolist(), cache.real("blocks.1.hook_resid_post").shape
        ([3, 5], (8, 96))
        """
        if self.attention_mask is None:
            raise ValueError(
                "this cache does not have its tokens; add them with cache.with_inputs(tokens, attention_mask)"
            )
        value, match = self[name], self._match(name)
        require_whole(self, [match.name])
        # [b, p, ...], or [p, ...]
        numpy = np if isinstance(value, np.ndarray) else jnp
        value = numpy.moveaxis(value, token_axis(match.name, match.layout) - (not self.batched), int(self.batched))
        mask = np.asarray(self.attention_mask, bool)
        shape = value.shape[: mask.ndim]
        if shape != mask.shape or (self.some_logits and match.name.startswith(_UNEMBED)):
            raise ValueError(
                f"{match.name} has {shape} positions in this cache, which are not those of the input {mask.shape}: "
                "positions that logits_at has chosen cannot be matched with the mask"
            )
        return value[mask]

    def sliced(self, batch: int | slice | None = None, positions: int | slice | None = None) -> Self:
        """The cache with some batch rows and some positions; gradients are sliced too.

        Args:
            batch: rows to keep. An int keeps an axis of length 1, so every name keeps its axes.
            positions: positions to keep, likewise. These are positions of queries: `hook_attn_scores` and
                `hook_pattern` keep all keys, and `hook_rot_k` is sliced along its keys. At sites with `logits_at`,
                positions are indices of the chosen positions. Sites with one value for each text do not change.

        Raises:
            ValueError: the selection is empty, the cache has no batch axis to slice, or a site was reduced.
        """
        if batch is not None and not self.batched:
            raise ValueError("this cache has no batch axis: leave `batch` out")

        def cut(name: str, value: jax.Array) -> jax.Array:
            axes = site(name).axes.split()
            value = _cut(value, batch, axes.index("b") - len(axes), "batch")
            if positions is None or not {"p", "k"} & set(axes):
                return value
            return _cut(value, positions, token_axis(name) - len(axes), "positions")

        def cut_inputs(array: Integers) -> Integers:
            rows = _cut(array, batch, -2, "batch") if self.batched else array
            return _cut(rows, positions, -1, "positions")

        return self._map(cut, cut_inputs)

    def remove_batch_dim(self) -> Self:
        """The cache, and its gradients, without the batch axis, which must have length 1.

        Raises:
            ValueError: there is more than one row; a site was reduced.
        """

        def drop(name: str, value: jax.Array) -> jax.Array:
            axis = -len(site(name).axes.split())
            if value.shape[axis] != 1:
                raise ValueError(f"remove_batch_dim needs a batch of 1; {name} has {value.shape[axis]} rows")
            return value.squeeze(axis)

        return self._map(drop, lambda array: array.squeeze(0), batched=False) if self.batched else self

    accumulated_resid = residual.accumulated_resid
    apply_ln_to_stack = residual.apply_ln_to_stack
    decompose_resid = residual.decompose_resid
    get_full_resid_decomposition = residual.get_full_resid_decomposition
    get_neuron_results = residual.get_neuron_results
    logit_attrs = residual.logit_attrs
    neuron_logit_attrs = residual.neuron_logit_attrs
    stack_activation = residual.stack_activation
    stack_head_results = residual.stack_head_results
    stack_neuron_results = residual.stack_neuron_results

    def compute_head_results(self) -> Self:
        """A new cache that also has `blocks.i.attn.hook_result` [b, p, h, d] float32 of every layer with `hook_z`.

        As at that site, this is z W_O before ln1_post; `stack_head_results` has the contribution to the stream. Results
        that were captured do not change. Needs HEADS of `gemma3_jax.cache.residual`. Memory: 4 L b p h d bytes.
        """
        new = copy.copy(self)
        new._values = self._values | residual.missing_head_results(self)
        return new

    def numpy(self, *, whole: bool = False, dtype: DTypeLike | None = None) -> Self:
        """The cache with its values and gradients as NumPy arrays in host memory; bfloat16 stays bfloat16.

        NumPy has no bfloat16 of its own: `np.save` writes such an array as two bytes without a type, and `np.load`
        returns `|V2`. Write it with `save`, which keeps the type, or with `np.save` after `dtype="float32"`.

        Args:
            whole: with several processes (`jax.distributed`), give each of them the whole of every array. By default a
                process gets what its own devices hold: its rows, with their tokens, and its part of every other axis
                that is cut over processes. All processes must call this.
            dtype: a floating-point dtype for the values that have one; integers do not change. None keeps each dtype.

        Raises:
            ValueError: `dtype` is not a floating-point dtype.

        >>> import jax.numpy as jnp
        >>> values = {"blocks.0.hook_out": jnp.ones((1, 2, 640), jnp.bfloat16)}
        >>> cache = ActivationCache(Gemma3Config.preset("270m"), values)
        >>> [cache.numpy(dtype=dtype)["resid_post", 0].dtype.name for dtype in (None, "float32")]
        ['bfloat16', 'float32']
        """
        if dtype is not None and not _is_floating(dtype):
            raise ValueError(f"dtype is {dtype!r}; it must be a floating-point dtype, such as float32")
        part = to_host if whole else own_part
        host = jax.tree.map(part, self) if spans_processes(self) else jax.device_get(self)
        if dtype is not None:
            host = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, host)
        host = host.with_params(self.params)
        if self.tokens is None:
            return host
        tokens, mask = np.asarray(self.tokens), np.asarray(self.attention_mask)
        rows = slice(None) if whole or not self.batched else own_rows(jax.tree.leaves(self), len(tokens))
        return host.with_inputs(tokens[rows], mask[rows])

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the cache, without parameters, to one safetensors file, whole or not at all.

        The file has values, gradients, tokens, mask and config. An existing file is replaced. Every value is stored bit
        for bit under its canonical name, and a gradient with the suffix `_grad`. Takes the cache's size in host memory.
        If the values are on devices of several processes, all of these call this: each gathers the whole cache, and the
        first writes the file. To write a file in each process, write `cache.numpy()`.

        Raises:
            ValueError: a reduction returned a pytree, which the file cannot store.
            OSError: the file cannot be written: see `gemma3_jax.atomic.new_file`.
        """
        trees = [name for name, value in self.items() if not jax.tree_util.all_leaves([value])]
        if trees:
            raise ValueError(
                f"{trees[0]} has the result of {self.reduced.get(trees[0])}, which is not an array; save it separately"
            )
        # One process writes a cache that several share; each writes one of its own.
        once = in_first if spans_processes(self) else in_this
        target = Path(once(lambda: str(atomic.check_new_file(file))))
        values: dict[str, Integers] = dict(self._values)
        values |= {f"{name}{GRAD}": value for name, value in (self.grads or {}).items()}
        if self.tokens is not None and self.attention_mask is not None:
            values |= dict(zip(files.INPUTS, (self.tokens, self.attention_mask), strict=True))
        settings = {"config": self.config.to_hf(), "batched": self.batched, "grads": self.grads is not None}
        settings |= {"reduced": self.reduced, "some_logits": self.some_logits}
        arrays = {name: to_host(value) for name, value in values.items()}
        once(lambda: files.write(target, arrays, settings))

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote, onto JAX's default device. Add weights with `with_params`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, not a regular file, or not an activation cache.
        """
        found = files.read(Path(file))
        build = functools.partial(cls, found.config, batched=found.batched, some_logits=found.some_logits)
        grads = None if found.grads is None else build(found.grads)
        cache = build(found.values, grads=grads, reduced=found.reduced)
        return cache if found.inputs is None else cache.with_inputs(*found.inputs)

    def _map(
        self,
        change: Callable[[str, jax.Array], jax.Array],
        change_inputs: Callable[[Integers], Integers],
        batched: bool | None = None,
    ) -> Self:
        """The cache with every value and gradient replaced by `change(name, value)`; tokens and mask likewise."""
        require_whole(self, self)
        new = copy.copy(self)
        new._values = {name: change(name, value) for name, value in self.items()}
        new.grads = None if self.grads is None else self.grads._map(change, change_inputs, batched)
        if self.tokens is not None and self.attention_mask is not None:
            new.tokens, new.attention_mask = change_inputs(self.tokens), change_inputs(self.attention_mask)
        new.batched = self.batched if batched is None else batched
        return new


def _is_floating(dtype: DTypeLike) -> bool:
    """Whether it is a floating-point dtype; other values, which may be no dtype at all, are not."""
    try:
        return bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:
        return False


def _cut(value: Value, index: int | slice | None, axis: int, what: str) -> Value:
    """Slice one axis, counted from the right; an int keeps the axis."""
    if index is None:
        return value
    kept, size = section(what, index), value.shape[axis]
    if not range(size)[kept]:
        raise ValueError(f"{what} {index} selects none of the {size} entries")
    at: tuple[EllipsisType | slice, ...] = (..., kept, *[slice(None)] * (-axis - 1))
    return cast(Value, value[at])
