"""What a model says of itself at the prompt."""

from __future__ import annotations

import jax

from gemma3_jax.config import shape_text
from gemma3_jax.descriptions import Description, size_text
from gemma3_jax.hooked.protocol import Model
from gemma3_jax.meshes import mesh_of
from gemma3_jax.model.layout import is_stacked


def describe(model: Model) -> Description:
    """Shape, size, dtypes, place and tokenizer of a model, on four lines.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> print(HookedGemma3.from_pretrained(TINY, tokenizer=TINY))  # doctest: +ELLIPSIS
    HookedGemma3: 4 layers (2 full, 2 sliding by 16), d 96, 4 heads of 24 over 2 key/value heads, MLP 192, ...
      343,584 parameters, 674.6 KiB, bfloat16 and float32
      on ...
      tokenizer: TokenizersBackend
    """
    leaves = jax.tree.leaves(model.params)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    number, size = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    tokenizer = None if model.tokenizer is None else type(model.tokenizer).__name__
    stacked = ", stacked for scan_layers" if is_stacked(model.params) else ""
    rows = (
        f"{number:,} parameters, {size_text(size)}, {' and '.join(dtypes)}{stacked}",
        _place(model),
        f"tokenizer: {tokenizer or 'none, so inputs are token ids'}",
    )
    return Description(f"HookedGemma3: {shape_text(model.config)}", tuple((row,) for row in rows))


def _place(model: Model) -> str:
    """The devices that hold the parameters."""
    mesh = mesh_of(model.params)
    if mesh is not None:
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        return f"on a mesh of {mesh.size} {mesh.devices.flat[0].platform} devices: {axes}"
    arrays = [leaf for leaf in jax.tree.leaves(model.params) if isinstance(leaf, jax.Array)]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in arrays):
        return "traced"
    devices = sorted({str(device) for leaf in arrays for device in leaf.devices()})
    return f"on {', '.join(devices)}" if devices else "in host memory"
