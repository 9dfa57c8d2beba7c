"""The activations that a run captured: a read-only mapping that takes any of a site's names, and a pytree."""

import copy
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import einops
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from gemma3_jax.config import Gemma3Config
from gemma3_jax.decomposition import Decompositions
from gemma3_jax.sites import get_act_name, resolve, site, site_names

Name = str | tuple[Any, ...]
_GRAD = "_grad"


@jax.tree_util.register_pytree_with_keys_class
class ActivationCache(Decompositions, Mapping[str, jax.Array]):
    """Captured values by site. Iterates over canonical names; index it by any name, or by TransformerLens' shorthand.

    A name is canonical, legacy or a Hugging Face path; a shorthand is (name, layer) or (name, layer, part), as
    `get_act_name` takes it, and negative layers count from the end. A Hugging Face path gives the value in Hugging
    Face's layout: `model.layers.5.self_attn.o_proj.input` is `blocks.5.attn.o.hook_in` with the heads flattened,
    [b, p, h * e]. The suffix `_grad` on any of them asks for the gradient.

    As a pytree its leaves are the values and the gradients, so it passes through `jit`, `vmap` and `jax.tree.map`.
    The parameters are no leaves, and what comes out of these has none: see `with_params`.

    Of a site that was reduced (see `gemma3_jax.reductions`) it holds, under all its names, what the reduction returned:
    an array or a pytree. What needs whole values refuses it.

    Attributes:
        config: shape of the model.
        params: the model's parameters, which decompositions into heads and neurons, norms and attributions read; or
            None.
        grads: the gradients, a cache of their own; or None.
        batched: whether the values have their batch axis.
        reduced: by canonical name what has reduced a site, in words.

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
        params: Any = None,
        grads: Any = None,
        batched: bool = True,
        reduced: Mapping[str, str] | None = None,
    ):
        self.config = config
        self.params = params
        self.grads = grads
        self.batched = batched
        self.reduced = dict(reduced or {})
        self._values = dict(values)

    def __getitem__(self, name: Name) -> jax.Array:
        first, *rest = (name,) if isinstance(name, str) else name
        if first.endswith(_GRAD):
            if self.grads is None:
                raise KeyError(f"{name}: this cache has no gradients; run_with_cache(..., incl_bwd=True) keeps them")
            first = first.removesuffix(_GRAD)
            return self.grads[(first, *rest) if rest else first]
        full = name if isinstance(name, str) else get_act_name(*name, config=self.config)
        match = resolve(full, self.config)
        if match.name not in self._values:
            raise KeyError(f"{match.name} was not captured; this cache holds {_listed(self._values)}")
        value = self._values[match.name]
        return value if match.layout is None or match.name in self.reduced else einops.rearrange(value, match.layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"ActivationCache({_listed(self._values)})"

    def tree_flatten_with_keys(self):
        children = [(jax.tree_util.DictKey(name), value) for name, value in self._values.items()]
        grads = (jax.tree_util.GetAttrKey("grads"), self.grads)
        return [*children, grads], (self.config, tuple(self._values), self.batched, tuple(self.reduced.items()))

    @classmethod
    def tree_unflatten(cls, aux, children):
        config, names, batched, reduced = aux
        *values, grads = children
        return cls(config, dict(zip(names, values, strict=True)), grads=grads, batched=batched, reduced=dict(reduced))

    def with_params(self, params: Any) -> Self:
        """This cache with the model's parameters, as `conversion.convert_checkpoint` returns them. Copies no array."""
        new = copy.copy(self)
        new.params = params
        return new

    def sliced(self, batch: int | slice | None = None, positions: int | slice | None = None) -> Self:
        """The cache of some batch rows and some positions only, the gradients' too.

        Args:
            batch: rows to keep. An int keeps its axis, of length 1, so that every name keeps its axes.
            positions: positions to keep, likewise. They are query positions: `hook_attn_scores` and `hook_pattern`
                keep all their keys, and `hook_rot_k` is sliced along its keys. Sites that `logits_at` made shorter
                count the positions that they have.

        Raises:
            ValueError: nothing is selected, or there is no batch axis to slice; a site was reduced.
        """
        if batch is not None and not self.batched:
            raise ValueError("this cache has no batch axis: leave `batch` out")

        def cut(name: str, value: jax.Array) -> jax.Array:
            axes = site(name).axes.split()
            value = _cut(value, batch, axes.index("b") - len(axes), "batch")
            return _cut(value, positions, axes.index("p" if "p" in axes else "k") - len(axes), "positions")

        return self._map(cut)

    def remove_batch_dim(self) -> Self:
        """The cache without its batch axis, which must have length 1; the gradients' too.

        Raises:
            ValueError: there is more than one row; a site was reduced.
        """

        def drop(name: str, value: jax.Array) -> jax.Array:
            axis = -len(site(name).axes.split())
            if value.shape[axis] != 1:
                raise ValueError(f"remove_batch_dim needs a batch of 1; {name} has {value.shape[axis]} rows")
            return value.squeeze(axis)

        return self._map(drop, batched=False) if self.batched else self

    def numpy(self) -> Self:
        """The cache with its values and gradients as numpy arrays in host memory; bfloat16 stays what it is."""
        return jax.device_get(self).with_params(self.params)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write values, gradients and config into one safetensors file, all or nothing; parameters are not saved.

        An existing file is replaced. Every value is stored as it is, bit for bit, under its canonical name, a gradient
        with the suffix `_grad`. Takes the cache's size in host memory.

        Raises:
            ValueError: a reduction made a pytree of a value, which has no place in the file.
        """
        trees = [name for name, value in self.items() if not jax.tree_util.all_leaves([value])]
        if trees:
            raise ValueError(
                f"{trees[0]} holds what {self.reduced.get(trees[0])} returned, which is no array; save it by yourself"
            )
        target = Path(file).absolute()
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent} is no directory; nothing was written")
        held = {name: self._values[name] for name in self} | {
            f"{name}{_GRAD}": value for name, value in (self.grads or {}).items()
        }
        # safetensors writes the buffer as it lies, whatever its strides say.
        arrays = {name: np.ascontiguousarray(value) for name, value in jax.device_get(held).items()}
        metadata = {"config": json.dumps(self.config.to_hf()), "batched": json.dumps(self.batched)}
        metadata |= {"grads": json.dumps(self.grads is not None), "reduced": json.dumps(self.reduced)}
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            safetensors.numpy.save_file(arrays, temporary, metadata)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, onto JAX's default device. Weights come with `with_params`.

        Raises:
            ValueError: the file is damaged, or holds no activation cache.
        """
        try:
            with safe_open(file, "numpy") as stored:
                metadata = stored.metadata() or {}
                arrays = {key: jnp.asarray(stored.get_tensor(key)) for key in stored.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if not {"config", "batched", "grads"} <= set(metadata):
            raise ValueError(f"{file} holds no activation cache, as `save` writes it")
        config = Gemma3Config.from_hf(json.loads(metadata["config"]))
        batched = json.loads(metadata["batched"])
        # Back in the model's order, which the file does not keep.
        values = {name: arrays[name] for name in site_names(config) if name in arrays}
        grads = {name: arrays[name + _GRAD] for name in site_names(config) if name + _GRAD in arrays}
        if len(values) + len(grads) != len(arrays):
            raise ValueError(f"{file} holds names that no site of its model has")
        kept = cls(config, grads, batched=batched) if json.loads(metadata["grads"]) else None
        return cls(config, values, grads=kept, batched=batched, reduced=json.loads(metadata.get("reduced", "{}")))

    def _map(self, change: Callable[[str, jax.Array], jax.Array], batched: bool | None = None) -> Self:
        """The cache whose every value, and gradient, is `change(name, value)`."""
        self._require_whole(self)
        new = copy.copy(self)
        new._values = {name: change(name, value) for name, value in self.items()}
        new.grads = None if self.grads is None else self.grads._map(change, batched)
        new.batched = self.batched if batched is None else batched
        return new


def _cut(value: jax.Array, wanted: int | slice | None, axis: int, what: str) -> jax.Array:
    """Slice one axis, counted from the right; an int keeps it."""
    if wanted is None:
        return value
    kept = wanted if isinstance(wanted, slice) else slice(wanted, wanted + 1 or None)
    size = value.shape[axis]
    if not range(size)[kept]:
        raise ValueError(f"{what} {wanted} selects none of the {size} that the cache has")
    return value[(..., kept, *[slice(None)] * (-axis - 1))]


def _listed(values: Mapping[str, jax.Array], most: int = 8) -> str:
    names = list(values)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest
