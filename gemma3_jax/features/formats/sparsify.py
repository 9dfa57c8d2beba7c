"""sparsify: `cfg.json` and `sae.safetensors`, in a folder with the name of a module, such as `layers.5.mlp`.

An autoencoder is of the module's output, and subtracts `b_dec` from it; a transcoder reads the module's input. The k
largest features of a token are active, or the largest of each of k groups of neighbours. `W_skip` is [d_out, d_in]:
`x @ W_skip.T`.

Axes: i features of the input, o of the output, f features of the dictionary.
"""

from pathlib import Path

from gemma3_jax.features.activations import Activation, GroupMax, TopK
from gemma3_jax.features.dictionaries import SparseAutoencoder, Transcoder
from gemma3_jax.features.formats.folder import Folder
from gemma3_jax.features.formats.tensors import Arguments, of_k, of_safetensors
from gemma3_jax.features.hookpoints import canonical, module_site
from gemma3_jax.reading import CheckpointError
from gemma3_jax.types import Settings

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
FILES = (CONFIG, WEIGHTS)


def is_here(folder: Folder) -> bool:
    """Whether a folder has files of this format."""
    return folder.has(WEIGHTS)


def model_name(folder: Folder) -> object:
    """None: the files do not name the model."""
    return None


def read(folder: Folder) -> SparseAutoencoder | Transcoder:
    """The dictionary with mapped arrays.

    Raises:
        CheckpointError: a file is missing, damaged or not as the format says; or the folder is not named for a module.
    """
    file = folder.path / CONFIG
    config, tensors = folder.config(CONFIG), of_safetensors(folder.path / WEIGHTS)
    transcode = bool(config.get("transcode", False))
    arguments: Arguments = {
        "W_enc": tensors.take("encoder.weight", "f i").T,
        "b_enc": tensors.take("encoder.bias", "f"),
        "W_dec": tensors.take("W_dec", "f o"),
        "b_dec": tensors.take("b_dec", "o"),
        "activation": _activation(config, tensors.sizes["f"], file),
        "subtracts_b_dec": not transcode,
    }
    site_in = _site(folder, "site_in", "input" if transcode else "output")
    skip = tensors.take("W_skip", "o i").T if "W_skip" in tensors else None
    if not transcode and skip is None:
        return SparseAutoencoder(**arguments, site_in=site_in)
    return Transcoder(**arguments, site_in=site_in, site_out=_site(folder, "site_out", "output"), skip=skip)


def _activation(config: Settings, width: int, file: Path) -> Activation:
    name, k = config.get("activation", "topk"), of_k(config.get("k"), width, file)
    if name == "topk":
        return TopK(k)
    if name != "groupmax" or width % k:
        raise CheckpointError(f"{file}: the activation {name!r} with k {k} and {width} features is not supported")
    return GroupMax(width // k)


def _site(folder: Folder, argument: str, end: str) -> str:
    given = getattr(folder, argument)
    return canonical(given, argument, argument) if given else module_site(folder.path.name, end, folder.path, argument)
