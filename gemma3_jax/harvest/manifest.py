"""What a store has, in `manifest.json`: written first, and compared with the arguments of every later run.

Axes: b row, p column.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from gemma3_jax.harvest.documents import documents
from gemma3_jax.harvest.errors import StoreError
from gemma3_jax.harvest.files import MANIFEST
from gemma3_jax.harvest.sources import Corpus, digest_of
from gemma3_jax.harvest.storage import Place
from gemma3_jax.harvest.units import KEPT, Keep, Layout, Plan
from gemma3_jax.hooked.protocol import Model
from gemma3_jax.hooks.interception import Hook
from gemma3_jax.hooks.reductions import Steps
from gemma3_jax.hooks.tracing import traced
from gemma3_jax.positions import Extent
from gemma3_jax.reading import parse_json
from gemma3_jax.run.forward import forward
from gemma3_jax.run.selection import ReducedCapture, captures
from gemma3_jax.run.traced import activation_dtype
from gemma3_jax.sites.names import layer_of
from gemma3_jax.sites.table import shape_of, site, token_axis
from gemma3_jax.types import JsonObject, Params, PyTree, Settings
from gemma3_jax.version import __version__

FORMAT = 2
_DOCUMENTS = 16  # whose ids stand for the tokenizer


@dataclasses.dataclass(frozen=True)
class Array:
    """One array that a site leaves behind.

    Attributes:
        key: its name in the files: that of the site, and for a reduction with several results that of the result.
        site: canonical name.
        axis: its axis of tokens; None if it has one entry for each row, which then holds one document.
        shape: of one entry.
        dtype: its NumPy name.
    """

    key: str
    site: str
    axis: int | None
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of one entry."""
        return int(np.prod(self.shape, dtype=int)) * jnp.dtype(self.dtype).itemsize


def arrays_of(model: Model, sites: ReducedCapture, layout: Layout) -> list[Array]:
    """The arrays of all sites, in the model's order.

    Raises:
        UnknownSite, TypeError, ValueError: as for every capture.
        StoreError: a result has neither the rows and tokens of its input, nor the rows of one document each.
    """
    b, p = layout.rows, layout.length
    integers = [jax.ShapeDtypeStruct((b, p), np.int32)] * (4 if layout.pack else 2)

    def run(
        params: Params,
        tokens: jax.Array,
        attention_mask: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> dict[str, PyTree]:
        _, cache = forward(
            model.config,
            params,
            tokens,
            sites,
            attention_mask=attention_mask,
            return_type=None,
            positions=positions,
            segment_ids=segment_ids,
        )
        return {str(name): cache[name] for name in cache}

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    found = []
    for name, tree in jax.eval_shape(run, shapes, *integers).items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            part = jax.tree_util.keystr(path, simple=True, separator="/")
            found.append(_array(name, f"{name}/{part}" if part else name, leaf, layout))
    return found


def _array(name: str, key: str, leaf: jax.ShapeDtypeStruct, layout: Layout) -> Array:
    axis, shape = token_axis(name), tuple(leaf.shape)
    if shape[:1] == (layout.rows,) and len(shape) > axis and shape[axis] == layout.length:
        rest = [size for i, size in enumerate(shape) if i not in (0, axis)]
        if "k" in site(name).axes.split() and not layout.pack:
            raise StoreError(f"{name} has an axis of keys, whose length differs between units: leave pack=False out")
        return Array(key, name, axis, tuple(rest), leaf.dtype.name)
    if shape[:1] == (layout.rows,) and not layout.pack:
        return Array(key, name, None, shape[1:], leaf.dtype.name)
    raise StoreError(
        f"the reduction at {name} returns {list(shape)} for [{layout.rows}, {layout.length}] tokens; it must keep both "
        "axes. With pack=False, where a row is one document, it may also return a value for each row"
    )


def new_manifest(model: Model, corpus: Corpus, sites: ReducedCapture, layout: Layout) -> JsonObject:
    """The manifest of a run, as JSON has it, without what the plan says."""
    arrays = arrays_of(model, sites, layout)
    reductions = captures(model.config, sites, Extent(layout.rows, None))
    described = {
        name: {
            "reduction": None if steps is None else str(steps),
            "digest": None if steps is None else _digest(model, name, steps, layout),
            "arrays": {array.key: _as_json(array) for array in arrays if array.site == name},
        }
        for name, steps in reductions.items()
    }
    settings = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    leaves = jax.tree.leaves(model.params)
    manifest = {
        "format": FORMAT,
        "versions": {"gemma3_jax": __version__, "jax": jax.__version__},
        "platform": next(iter(leaves[0].devices())).platform if isinstance(leaves[0], jax.Array) else "cpu",
        "config": model.config.to_hf(),
        "parameters": {"dtype": activation_dtype(model.params).name, "digest": digest_of_parameters(model.params)},
        "corpus": {"documents": len(corpus), "digest": digest_of(corpus), "first_ids": first_ids(model, corpus)},
        "layout": {**settings, "keep": None if layout.keep is None else _name_of(layout.keep)},
        "sites": described,
    }
    return cast(JsonObject, json.loads(json.dumps(manifest)))


def with_plan(manifest: Settings, plan: Plan) -> JsonObject:
    """The manifest with the numbers of units and of real tokens."""
    return {**manifest, "units": plan.units, "tokens": plan.tokens}


def read_manifest(place: Place) -> JsonObject:
    """The manifest of a store.

    Raises:
        StoreError: there is none, or it is damaged or of another version.
    """
    file = place.full(MANIFEST)
    if place.size(MANIFEST) is None:
        raise StoreError(f"{place} is not an activation store: it has no {MANIFEST}")
    try:
        manifest = parse_json(file, place.read(MANIFEST).tobytes())
    except (ValueError, OSError) as error:
        raise StoreError(error) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{file} is not the manifest of an activation store of this version")
    return manifest


def write_manifest(place: Place, manifest: Settings) -> None:
    """Write the manifest, whole or not at all."""
    place.write(MANIFEST, [(json.dumps(manifest, indent=1) + "\n").encode()])


def check_same(place: Place, old: Settings, new: Settings) -> None:
    """Raise StoreError, which names the first differences, if a run does not continue a store."""
    before, now = (dict(_flat(manifest)) for manifest in (old, new))
    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    if names:
        several = [f"{name} is {_shown(now, name)}, and was {_shown(before, name)}" for name in names[:3]]
        more = f", and {len(names) - 3} more" if len(names) > 3 else ""
        raise StoreError(
            f"{place} has the activations of another run: {'; '.join(several)}{more}. Give the same arguments to "
            "continue it, or another folder"
        )


def bytes_of_token(arrays: list[Array]) -> int:
    """The bytes that a kept token takes in the store."""
    beside = sum(np.dtype(dtype).itemsize for dtype in KEPT.values())
    return beside + sum(array.bytes for array in arrays if array.axis is not None)


def arrays_in(manifest: Settings) -> list[Array]:
    """The arrays of a manifest."""
    return [
        Array(key, name, entry["axis"], tuple(entry["shape"]), entry["dtype"])
        for name, described in manifest["sites"].items()
        for key, entry in described["arrays"].items()
    ]


def _as_json(array: Array) -> JsonObject:
    return {"axis": array.axis, "shape": list(array.shape), "dtype": array.dtype}


def _flat(value: object, path: str = "") -> list[tuple[str, object]]:
    """The leaves of nested JSON by path, of which `units` and `tokens` follow from the others."""
    if not isinstance(value, Mapping) or not value:
        return [(path, value)]
    return list(
        itertools.chain.from_iterable(
            _flat(each, f"{path}: {name}" if path else name)
            for name, each in value.items()
            if path or name not in ("units", "tokens")
        )
    )


def _shown(values: Settings, name: str) -> str:
    return json.dumps(values[name]) if name in values else "not there"


def _digest(model: Model, name: str, steps: Steps, layout: Layout) -> str:
    """The digest of what a reduction computes, and of the arrays that it reads."""
    row, b, p = site(name), layout.rows, layout.length
    dtype = activation_dtype(model.params) if row.dtype == "activation" else row.dtype
    value = jax.ShapeDtypeStruct(shape_of(name, model.config, b, p), dtype)
    integers = cast(jax.Array, jax.ShapeDtypeStruct((b, p), np.int32))
    hook = Hook(name, layer_of(name), integers, integers, integers if layout.pack else None)
    computed = traced(steps, value, hook, where=f"the reduction {steps} at {name}")
    digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", str(computed.computation.jaxpr)).encode())
    for array in computed.arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def digest_of_parameters(params: PyTree) -> str:
    """The digest of all parameters, from sums of their bits that are computed where they are."""
    digest = hashlib.sha256()
    sums = [(path, leaf, _sums(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for path, leaf, each in sums:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {np.asarray(each).tolist()}".encode())
    return digest.hexdigest()


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """[2] uint32: sums of the bits of x, each multiplied by a number of its own; exact in any order."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).ravel()
    places = jax.lax.iota(jnp.uint32, bits.size)
    mixed = [(places * jnp.uint32(factor)) ^ (places >> 7) | 1 for factor in (2654435761, 2246822519)]
    return jnp.stack([jnp.sum(bits * each, dtype=jnp.uint32) for each in mixed])


def first_ids(model: Model, corpus: Corpus) -> str:
    """The digest of the ids of a few documents, which another tokenizer would change."""
    digest = hashlib.sha256()
    for ids in documents(model, corpus, 0, min(len(corpus), _DOCUMENTS)):
        digest.update(ids.tobytes() + b"|")
    return digest.hexdigest()


def _name_of(keep: Keep) -> str:
    """The name of a predicate, and the digest of its source."""
    try:
        source = inspect.getsource(keep)
    except (OSError, TypeError):
        source = ""
    name = getattr(keep, "__qualname__", type(keep).__qualname__)
    return f"{name} {hashlib.sha256(source.strip().encode()).hexdigest()[:16]}"
