"""Loads a dictionary from a directory or from the hub; the files and their keys say which format it is."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from jax.sharding import Mesh

from gemma3_jax.conversion.hub import locate
from gemma3_jax.features.formats import circuit_tracer, dictionary_learning, gemma_scope, saelens, sparsify
from gemma3_jax.features.formats.folder import Folder, SiteNames
from gemma3_jax.features.hookpoints import check_size
from gemma3_jax.features.pages.neuronpedia import note_id
from gemma3_jax.features.placement import Dictionary, place
from gemma3_jax.features.unchecked import mark
from gemma3_jax.reading import CheckpointError, check_file

_FORMATS: dict[str, ModuleType] = {
    "Gemma Scope 2": gemma_scope,
    "SAELens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "circuit-tracer": circuit_tracer,
}
_SUFFIXES = (".safetensors", ".pt")


def load(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    *,
    site_in: SiteNames | None = None,
    site_out: SiteNames | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Load a dictionary, in any of the formats of docs/features.md.

    From the hub, only the files of the dictionary are downloaded: not its examples, nor other dictionaries.

    Args:
        source: a directory, or the id of a repository on the hub.
        path: folder in it, or one file, such as "resid_post/layer_9_width_16k_l0_medium".
        revision: branch, tag or commit on the hub.
        site_in: name of the site that is read, if the files do not say it, or say it in a name that has meant several
            tensors. For several layers a list, or a name with "*" for the layer.
        site_out: name of the site that is written, likewise.
        mesh: devices over which the features are cut, as `gemma3_jax.placing.make_mesh` makes it. Without one,
            everything is on JAX's default device, and the decoders of a `CrossLayerTranscoder` or `Crosscoder` stay in
            their files, which are mapped.

    Returns:
        A `SparseAutoencoder`, `Transcoder`, `CrossLayerTranscoder` or `Crosscoder`, with the dtypes of the file; or a
        list of transcoders, of a folder with those of several layers (circuit-tracer's `layer_{i}.safetensors`). A
        log message at the first use in a model says so if `check` has not been called.

    Raises:
        CheckpointError: there are no such files, or they are damaged; the format is unknown; or the files do not say
            at which site the dictionary was trained, or name one although the dictionary has the size of another.
    """
    folder = _located(source, None if path is None else os.fspath(path).strip("/"), revision, site_in, site_out)
    for reader in _FORMATS.values():
        if reader.is_here(folder):
            found = reader.read(folder)
            several = isinstance(found, list)
            placed = [_checked(one, reader.model_name(folder), folder, mesh) for one in (found if several else [found])]
            for one in placed:
                mark(one, True)
                note_id(one, folder)
            return placed if several else placed[0]
    offered = ", ".join(sorted(file.name for file in folder.path.iterdir())[:10]) or "nothing"
    raise CheckpointError(
        f"{folder.path} has no dictionary of a known format ({', '.join(_FORMATS)}); it has {offered}; give the folder "
        "of one dictionary as path"
    )


def _checked(dictionary: Dictionary, model_name: object, folder: Folder, mesh: Mesh | None) -> Dictionary:
    """The dictionary on its devices, after a check of its sizes at its sites."""
    for argument, weights, axis in (("site_in", dictionary.W_enc, 0), ("site_out", dictionary.W_dec, -1)):
        sites, first = getattr(dictionary, argument), weights[0] if isinstance(weights, tuple) else weights
        for name in (sites,) if isinstance(sites, str) else sites:
            check_size(name, first.shape[axis], model_name or folder.path, folder.path, argument)
    return place(dictionary, mesh, folder.path)


def _located(
    source: str | os.PathLike[str],
    path: str | None,
    revision: str | None,
    site_in: SiteNames | None,
    site_out: SiteNames | None,
) -> Folder:
    """The folder on this machine, of which the files are downloaded if it is on the hub."""
    root = Path(source)
    if path is None and root.is_file():
        return Folder(root.parent, root.name, site_in, site_out)
    if not root.is_dir():
        root = locate(source, revision, files=_patterns(path))
    whole = root / (path or "")
    file = None
    if whole.suffix in _SUFFIXES:
        check_file(whole)
        whole, file = whole.parent, whole.name
    if not whole.is_dir():
        raise CheckpointError(f"{source} has no folder {path}, or none with the files of a dictionary")
    return Folder(whole, file, site_in, site_out)


def _patterns(path: str | None) -> list[str]:
    """The files of a path on the hub that belong to a dictionary."""
    names = sorted({name for reader in _FORMATS.values() for name in reader.FILES})
    folder = path or ""
    if folder.endswith(_SUFFIXES):
        folder, _, file = folder.rpartition("/")
        names = [file, *(name for name in names if not name.endswith(_SUFFIXES))]
    return [f"{folder}/{name}".removeprefix("/") for name in names]
