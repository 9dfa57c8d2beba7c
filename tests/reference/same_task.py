"""Whether the blocks of docs/tutorials/same_task.md give the same numbers in TransformerLens, nnsight and here.

The peers need an environment of their own, which `benchmarks/peers.sh` makes:

    .peers/bin/python tests/reference/same_task.py CHECKPOINT    # a directory, such as that of the 270m
"""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from gemma3_jax import HookedGemma3, edits
from gemma3_jax import patching as our_patching

PAGE = Path(__file__).parents[2] / "docs/tutorials/same_task.md"
CLEAN, CORRUPTED, ANSWER = "The cat sat on the mat and the cat", "The dog sat on the mat and the dog", " sat"
SITE = "blocks.1.hook_resid_post"
BOUND = 1e-4  # of the largest value, in float32


def blocks(library: str) -> list[str]:
    """The code of a library on the page, in order."""
    return re.findall(rf"^In {library}[^\n]*\n\n```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def run(code: str, names: dict) -> None:
    """Run a block from a file, because nnsight reads the source of what it traces."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(code)
    exec(compile(code, file.name, "exec"), names)


def numbers_of(logits, ablated, patched, gradient, answer: int) -> dict[str, np.ndarray]:
    """What is compared: the answer's logit with and without the head; the patched ones that are known; the gradient."""
    known = {
        "clean": logits[0, -1, answer],
        "ablated": ablated[0, -1, answer],
        "patched": patched,
        "gradient": gradient,
    }
    return {name: np.asarray(each.detach() if isinstance(each, torch.Tensor) else each) for name, each in known.items()}


def of_transformer_lens(checkpoint: str, answer: int) -> dict[str, np.ndarray]:
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(checkpoint, dtype=torch.float32)
    names = {"model": model, "clean": CLEAN, "patching": patching, "metric": lambda logits: logits[0, -1, answer]}
    names["corrupted_tokens"] = model.to_tokens(CORRUPTED)
    keep, ablate, patch, gradient = blocks("TransformerLens")
    run(keep, names)
    logits = names["logits"]
    run(ablate, names)
    ablated = names["logits"]
    run(patch, names)
    run(gradient, names)
    return numbers_of(logits, ablated, names["grid"], next(iter(names["kept"].values())), answer)


def of_nnsight(checkpoint: str, answer: int) -> dict[str, np.ndarray]:
    import nnsight

    model = nnsight.LanguageModel(checkpoint, device_map="cpu", dtype=torch.float32, dispatch=True)
    names = {"model": model, "clean": CLEAN, "corrupted": CORRUPTED, "nnsight": nnsight}
    names |= {"metric": lambda logits: logits[0, -1, answer], "head_dim": model.config.head_dim}
    names["length"] = len(model.tokenizer(CLEAN)["input_ids"])
    keep, ablate, patch, gradient = blocks("nnsight")
    run(keep, names)
    logits = names["logits"]
    run(ablate, names)
    ablated = names["logits"]
    run(patch, names)
    run(gradient, names)
    return numbers_of(logits, ablated, names["value"], names["gradient"], answer)


def ours(model: HookedGemma3, answer: int) -> dict[str, np.ndarray]:
    head = edits.only(edits.Replace(0.0), heads=1)
    grid = our_patching.get_act_patch_resid_pre(
        model, CORRUPTED, CLEAN, lambda logits: logits[0, -1, answer], logits_at=-1, progress=False
    )
    _, cache = model.run_with_cache(CLEAN, SITE, incl_bwd=True, loss_fn=lambda logits: logits[0, -1, answer])
    ablated = model.run_with_hooks(CLEAN, [("blocks.1.attn.hook_z", head)])
    return numbers_of(model(CLEAN), ablated, np.asarray(grid), cache.grads["resid_post", 1], answer)


def main(checkpoint: str) -> None:
    model = HookedGemma3.from_pretrained(checkpoint, dtype="float32")
    answer = model.to_single_token(ANSWER)
    expected, wrong = ours(model, answer), []
    for library, found in (
        ("TransformerLens", of_transformer_lens(checkpoint, answer)),
        ("nnsight", of_nnsight(checkpoint, answer)),
    ):
        if abs(found["ablated"] - found["clean"]) < 1e-3:  # the control: a hook that does nothing
            wrong.append(f"{library} without the head")
        for name, value in found.items():
            # nnsight's loop leaves the value of the last layer and position
            reference = expected[name] if value.shape == expected[name].shape else expected[name][-1, -1]
            error = float(np.abs(value - reference).max() / np.abs(reference).max())
            print(f"{library} {name}: {np.ravel(value)[-1]:.4f}, here {np.ravel(reference)[-1]:.4f}, error {error:.1e}")
            wrong += [f"{library} {name}"] if error > BOUND else []
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main(sys.argv[1])
