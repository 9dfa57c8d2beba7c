"""`gemma3-jax generate`: text from a model, with a steering vector."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

import gemma3_jax
from gemma3_jax.cli.shared import Adapter, Dtype, Revision, Source, Tied, check_devices, working
from gemma3_jax.reading import check_file, map_tensor, read_header

if TYPE_CHECKING:
    import jax

    from gemma3_jax import Gemma3Config, Hook
    from gemma3_jax.generation.sampling import Options

    Edit = Callable[[jax.Array, Hook], jax.Array]


def generate(
    source: Source = str(gemma3_jax.TINY),
    prompt: Annotated[str, typer.Option(help="The text to continue; with --chat, the user's turn.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; needs --temperature.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens with this probability; needs --temperature.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    steer: Annotated[Path | None, typer.Option(help="A vector to add: .npy, or .safetensors with one tensor.")] = None,
    site: Annotated[str | None, typer.Option(help="Site of the vector, such as blocks.5.hook_resid_post.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Factor of the vector. Default: 1.")] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    adapter: Adapter = None,
    tied: Tied = None,
) -> None:
    """Continue a text and print it token by token; --steer adds a steering vector."""
    from gemma3_jax.conversion.dtypes import parameter_dtype
    from gemma3_jax.conversion.sources import load_tokenizer, locate_sources, read_config
    from gemma3_jax.generation.sampling import sampling
    from gemma3_jax.hooked.chat import render_chat

    if not prompt:
        raise ValueError("there is no text to continue; give --prompt")
    parameter_dtype(dtype)
    hooks = _steering(steer, site, alpha)
    check_devices()
    options: Options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling(1, **options)
    config = read_config(locate_sources(source, revision, adapter, download=False))
    _check(config, max_new_tokens, hooks, options)

    sources = locate_sources(source, revision, adapter)
    tokenizer, text = None, prompt
    messages = [{"role": "user", "content": prompt}]
    if chat:
        tokenizer = load_tokenizer(sources)
        render_chat(tokenizer, messages)
    with working(f"loading {source}"):
        model = gemma3_jax.HookedGemma3.from_pretrained(
            source, dtype, revision, tokenizer=tokenizer, adapter=adapter, tie_word_embeddings=tied
        )
    with working("reading the prompt"):
        pieces = model.generate_stream(messages if chat else text, max_new_tokens, fwd_hooks=hooks, **options)
    if not chat:
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _check(config: "Gemma3Config", new: int, hooks: list[tuple[str, "Edit"]], options: "Options") -> None:
    """Raise the errors of a generation that do not depend on weights or on the prompt: here, of one token."""
    from gemma3_jax.generation.loop import prepare

    if new >= config.max_position_embeddings:
        raise ValueError(
            f"--max-new-tokens is {new}; prompt and new tokens must fit the model's context of "
            f"{config.max_position_embeddings} tokens"
        )
    # Functions are called for shapes alone, ready-made edits are not.
    edits = [(site, functools.partial(_call, edit)) for site, edit in hooks]
    prepare(config, np.dtype("float32"), [[config.padding]], new, attention_mask=[[1]], edits=edits, **options)


def _call(edit: "Edit", value: "jax.Array", hook: "Hook") -> "jax.Array":
    return edit(value, hook)


def _steering(steer: Path | None, site: str | None, alpha: float | None) -> list[tuple[str, "Edit"]]:
    """The edit that adds the vector at the site, as a list; an empty one without a vector.

    Raises:
        ValueError: an option is given without the others, or a value cannot be used.
        FileNotFoundError: there is no such file.
    """
    if (steer is None) != (site is None):
        raise ValueError("--steer and --site belong together: the vector and the site to add it at; give both")
    if steer is None and alpha is not None:
        raise ValueError("--alpha is the factor of a steering vector; give --steer and --site too")
    alpha = 1.0 if alpha is None else alpha
    if not np.isfinite(alpha):
        raise ValueError(f"--alpha is {alpha}; it must be a finite number")
    if steer is None or site is None:
        return []
    vector = _vector(steer)
    check_devices()
    return [(site, gemma3_jax.edits.Add(vector, alpha))]


def _vector(file: Path) -> np.ndarray:
    """The one array of a file, in float32."""
    if file.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{file.name} is neither .npy nor .safetensors")
    if not os.path.lexists(file):
        raise FileNotFoundError(f"there is no file {file}")
    check_file(file)
    if file.suffix == ".safetensors":
        tensors = {key: map_tensor(key, stored) for key, stored in read_header(file).items()}
    else:
        try:
            tensors = {"": np.load(file, allow_pickle=False)}
        except Exception as error:
            raise ValueError(f"{file.name} cannot be read as .npy ({error}); write it again") from error
    if len(tensors) != 1:
        raise ValueError(f"{file.name} has {len(tensors)} tensors ({', '.join(tensors)}); a vector is one tensor")
    [vector] = tensors.values()
    if vector.dtype.kind not in "fiu" and vector.dtype != "bfloat16":
        raise ValueError(f"{file.name} has dtype {vector.dtype}; a steering vector must have numbers")
    vector = np.asarray(vector, np.float32)
    if not vector.size or not np.isfinite(vector).all():
        raise ValueError(f"{file.name} has shape {vector.shape} and NaN, infinity or no values; it cannot be added")
    return vector
