"""The choice between forms of the same computation."""

from collections.abc import Callable

import jax

from gemma3_jax.meshes import several_devices


def on_one_cpu(form: Callable[..., jax.Array], usual: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`form(*arrays)` on one CPU device, and `usual(*arrays)` elsewhere; both compute the same function.

    On several devices, a form for one would make XLA gather the weights that it rearranges.
    """
    if several_devices(*arrays):
        return usual(*arrays)
    result: jax.Array = jax.lax.platform_dependent(*arrays, cpu=form, default=usual)
    return result
