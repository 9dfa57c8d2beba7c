"""circuit-tracer: transcoders of single layers (`layer_{i}.safetensors`) and cross-layer transcoders
(`W_enc_{i}.safetensors` and `W_dec_{i}.safetensors`), with `config.yaml`.

Encoders are [f, d]. A JumpReLU keeps x where x > threshold, also negative x. `W_skip` is [d_out, d_in]:
`x @ W_skip.T`. The decoders of a cross-layer transcoder have target layers by their index relative to the layer.

Axes: i features of the input, o of the output, f features of the dictionary, m layers that are written.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from gemma3_jax.features.activations import Activation, JumpRelu, Relu
from gemma3_jax.features.dictionaries import Transcoder
from gemma3_jax.features.formats.folder import Folder
from gemma3_jax.features.formats.tensors import Tensors, of_safetensors
from gemma3_jax.features.hookpoints import canonical, expanded, site_of
from gemma3_jax.features.layered import CrossLayerTranscoder
from gemma3_jax.reading import CheckpointError, check_file
from gemma3_jax.sites.names import block
from gemma3_jax.types import Settings

CONFIG, LAYER, ENCODER, DECODER = "config.yaml", "layer_{}.safetensors", "W_enc_{}.safetensors", "W_dec_{}.safetensors"
FILES = (CONFIG, *(name.replace("{}", "*") for name in (LAYER, ENCODER, DECODER)))
THRESHOLD = "activation_function.threshold"


def is_here(folder: Folder) -> bool:
    """Whether a folder has files of this format."""
    return bool(_layers(folder) or folder.numbered(ENCODER))


def _layers(folder: Folder) -> list[int]:
    """The layers with a transcoder of their own; the one that was asked for, if it was one."""
    before, after = LAYER.split("{}")
    names = [file.name for file in folder.path.glob(LAYER.replace("{}", "*")) if folder.has(file.name)]
    numbers = (name[len(before) : -len(after)] for name in names)
    return sorted(int(number) for number in numbers if number.isdecimal())


def model_name(folder: Folder) -> object:
    """The name of the model, as the config has it; None if it has none."""
    return _config(folder.path / CONFIG).get("model_name")


def read(folder: Folder) -> Transcoder | list[Transcoder] | CrossLayerTranscoder:
    """A cross-layer transcoder, or the transcoders of the layers, with mapped arrays; one alone is not in a list.

    Raises:
        CheckpointError: a file is missing, damaged or not as the format says; or the sites are not known.
    """
    layers = _layers(folder)
    if not layers:
        return _cross_layer(folder)
    transcoders = [_transcoder(folder, layer) for layer in layers]
    return transcoders if len(transcoders) > 1 else transcoders[0]


def _transcoder(folder: Folder, layer: int) -> Transcoder:
    tensors = of_safetensors(folder.path / LAYER.format(layer))
    return Transcoder(
        W_enc=tensors.take("W_enc", "f i").T,
        b_enc=tensors.take("b_enc", "f"),
        W_dec=tensors.take("W_dec", "f o"),
        b_dec=tensors.take("b_dec", "o"),
        activation=_activation(tensors, THRESHOLD),
        skip=tensors.take("W_skip", "o i").T if "W_skip" in tensors else None,
        site_in=_sites(folder, "site_in", [layer])[0],
        site_out=_sites(folder, "site_out", [layer])[0],
    )


def _cross_layer(folder: Folder) -> CrossLayerTranscoder:
    files = folder.numbered(ENCODER)
    layers = range(len(files))
    encoders = [of_safetensors(file) for file in files]
    decoders = [of_safetensors(folder.path / DECODER.format(layer)) for layer in layers]
    for layer in layers:
        encoders[layer].sizes = encoders[0].sizes  # so sizes are equal across files too
        decoders[layer].sizes = {**encoders[0].sizes, "m": len(files) - layer}
    return CrossLayerTranscoder(
        W_enc=tuple(tensors.take(f"W_enc_{layer}", "f i").T for layer, tensors in enumerate(encoders)),
        b_enc=tuple(tensors.take(f"b_enc_{layer}", "f") for layer, tensors in enumerate(encoders)),
        b_dec=tuple(tensors.take(f"b_dec_{layer}", "o") for layer, tensors in enumerate(encoders)),
        W_dec=tuple(tensors.take(f"W_dec_{layer}", "f m o") for layer, tensors in enumerate(decoders)),
        activation=tuple(_activation(tensors, f"threshold_{layer}") for layer, tensors in enumerate(encoders)),
        site_in=_sites(folder, "site_in", layers),
        site_out=_sites(folder, "site_out", layers),
    )


def _activation(tensors: Tensors, key: str) -> Activation:
    return JumpRelu(tensors.take(key, "f"), rectify=False) if key in tensors else Relu()


def _sites(folder: Folder, argument: str, layers: Sequence[int]) -> tuple[str, ...]:
    """The sites of the layers, as the caller says, or as the config says with the name of a site in a block."""
    given = getattr(folder, argument)
    if given is not None:
        names = expanded(given, layers)
        if len(names) != len(layers) or len(set(names)) < len(layers):
            raise CheckpointError(
                f"{argument} has {len(set(names))} sites, for {len(layers)} layers; give '*' for the layer, or a list"
            )
        return tuple(canonical(name, argument, argument) for name in names)
    file = folder.path / CONFIG
    key = "feature_input_hook" if argument == "site_in" else "feature_output_hook"
    hook = _config(file).get(key)
    named = [block(layer, hook) if isinstance(hook, str) else hook for layer in layers]
    return tuple(site_of(name, f"{file}: {key}", argument) for name in named)


def _config(file: Path) -> Settings:
    """The settings of config.yaml; {} if it is missing."""
    if not file.exists():
        return {}
    check_file(file)
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} has a {type(content).__name__}, not a mapping of settings")
    return content
