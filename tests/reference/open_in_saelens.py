"""Whether SAELens opens what `features.save(format="saelens")` writes, and computes the same with it.

SAELens needs an environment of its own, so there are two steps, of which the first one needs gemma3_jax:

    python tests/reference/open_in_saelens.py write DIRECTORY      # a new directory
    pip install 'sae-lens==6.54.*' 'transformer-lens<4' && python tests/reference/open_in_saelens.py read DIRECTORY

The dictionaries are trained ones of each kind, for an autoencoder and a transcoder.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

BOUND = 1e-5  # of the largest value
SITES = {"sae": ("blocks.0.hook_out", None), "transcoder": ("blocks.0.ln2.hook_out", "blocks.0.ln2_post.hook_out")}


def write(directory):
    """Train, save, and write beside each dictionary what it computes."""
    from gemma3_jax import features

    directory.mkdir()
    draw = np.random.default_rng(0)
    x = ((draw.random((2048, 24)) < 0.1) @ draw.normal(size=(24, 16)) * 30 + 5).astype(np.float32)
    for name, (site_in, site_out) in SITES.items():
        for kind in ("batchtopk", "jumprelu", *(["topk"] if site_out is None else [])):
            given = {"k": 2, "steps": 200, "batch": 128, "site_in": site_in, "site_out": site_out}
            trained = features.train(x if site_out is None else (x, 2 * x[:, ::-1]), 24, kind, **given)
            features.save(trained, directory / f"{name}-{kind}", format="saelens", model_name="google/gemma-3-270m")
            computed = {"x": x[:64], "f": np.array(trained.encode(x[:64])), "y": np.array(trained(x[:64]))}
            save_file(computed, directory / f"{name}-{kind}.expected")


def read(directory):
    """Open each dictionary in SAELens and compare; exit with an error if one differs."""
    import torch
    from sae_lens import SAE

    for file in sorted(directory.glob("*.expected")):
        expected, sae = load_file(file), SAE.load_from_disk(file.with_suffix(""))
        x = torch.from_numpy(expected["x"])
        with torch.inference_mode():
            found = {"f": sae.encode(x), "y": sae(x)}
        errors = {
            name: float(np.abs(each.numpy() - expected[name]).max() / np.abs(expected[name]).max())
            for name, each in found.items()
        }
        print(f"{file.stem}: {type(sae).__name__} at {sae.cfg.metadata.hook_name}, relative errors {errors}")
        if max(errors.values()) > BOUND:
            raise SystemExit(f"{file.stem} differs by more than {BOUND}")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
