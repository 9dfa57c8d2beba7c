"""The programs of a generation, compiled side by side: each takes seconds, mostly on one core."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from gemma3_jax.generation.decode import Task, go_on, read
from gemma3_jax.run.compiled import lowered_if_new
from gemma3_jax.run.sharing import unshared
from gemma3_jax.types import Params


def compile_together(
    params: Params, task: Task, tokens: jax.Array, start: jax.Array, *, new: int, keep_logits: bool
) -> None:
    """Compile the prefill and the decode loop at the same time, if the prefill is new. Arguments as in `read`.

    Both run as they would without this call. If parameters or edits are committed to devices, as on a mesh, the text
    will be, too. Its shapes do not show that, so these programs are compiled when they run.
    """
    if any(isinstance(leaf, jax.Array) and leaf.committed for leaf in jax.tree.leaves((params, task))):
        return
    prefill = lowered_if_new(read, params, task, tokens, start, new=new, keep_logits=keep_logits)
    if prefill is None:
        return
    text = unshared(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), prefill.out_info))
    # A program that is too large is refused again when it runs, with a message about memory.
    with contextlib.suppress(jax.errors.JaxRuntimeError), ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(prefill.compile)
        decode = lowered_if_new(go_on, params, task, text, jnp.int32(1), donate=1)
        if decode is not None:
            decode.compile()
        compiled.result()
