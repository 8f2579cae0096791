"""Finds a base model on this machine and reads its configuration, dtype and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from shardwise.base.finding import asked_for, find
from shardwise.base.quantized import find_quantized, is_quantized, quant_settings
from shardwise.base.source import BaseSource
from shardwise.comm import Group
from shardwise.disk.names import exists, is_directory, is_file
from shardwise.dtypes import FLOATS
from shardwise.format.json_file import read_json
from shardwise.format.sniff import Kind, what_is_file
from shardwise.format.weight_files import TORCH, is_index
from shardwise.sources.directory_contents import holds_safetensors, holds_torch_files
from shardwise.sources.sources import open_source
from shardwise.sources.torch_files import open_bin

#: Files in which AutoGPTQ and AutoAWQ kept their settings before these had a place in ``config.json`` -> the method,
#: where the file does not name it.
_QUANTIZERS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def find_base(root_dir: str | Path | None, model_name: str, cache: str | Path | None = None) -> Path:
    """The directory or file of a base model; the network is never asked.

    Args:
        root_dir: The hub cache, or a directory that models lie in; the hub's own cache if not given.
        model_name: A directory, a model's directory in a hub cache, a file, a name below ``root_dir``, or a hub id
            (``org/name``, or ``org/name@revision`` with a branch, a tag or a commit).
        cache: The hub cache where ``root_dir`` is not given.

    Raises:
        CheckpointNotFoundError: It is not there; the message lists all places that were looked at.
        FormatError: It is a file of another format.
    """
    return find(asked_for(root_dir, model_name, cache))


def base_config(path: Path) -> dict[str, object]:
    """The base's ``config.json``, empty where there is none.

    Tools older than ``quantization_config`` keep their quantization settings in a file of their own; its content
    becomes that entry where the config has none.
    """
    directory = path if is_directory(path) else path.parent
    config = _json_object(directory / "config.json")
    if is_quantized(config):
        return config
    for name, method in _QUANTIZERS_FILES.items():
        found = _json_object(directory / name)
        if found:
            return {**config, "quantization_config": {"quant_method": method, **found}}
    return config


def _json_object(file: Path) -> dict[str, object]:
    if not is_file(file):
        return {}
    found = read_json(file)
    return dict(found) if isinstance(found, dict) else {}


def ties_head(config: Mapping[str, object]) -> bool:
    """Whether the base may tie its head to the embedding: all but a config that says no."""
    places = [config.get("text_config"), config]
    said = [
        place["tie_word_embeddings"] for place in places if isinstance(place, dict) and "tie_word_embeddings" in place
    ]
    return not said or any(bool(value) for value in said)


def base_dtype(model_name: str | Path, root_dir: str | Path | None = None) -> str:
    """The dtype that a base model was trained or published in, as torch names it: ``"bfloat16"``.

    Loading never changes the model's dtype; build the model in this one to have the base's values unchanged:
    ``torch.set_default_dtype(getattr(torch, base_dtype(...)))`` or ``from_config(config, dtype=...)``. Each rank calls
    for itself; headers are read, and nothing is downloaded.

    Args:
        model_name: A hub id (``org/name`` or ``org/name@revision``), a directory, or a file.
        root_dir: The hub cache, or a directory that base models lie in; ``None`` for the hub's own cache.

    Returns:
        What ``config.json`` says (``dtype``, ``torch_dtype``); otherwise the floating-point dtype of most of the
        weights' bytes; ``bfloat16`` for a quantized base that does not say.

    Raises:
        CheckpointNotFoundError: There is no such base.

    Examples:
        >>> checkpointer.save_model(model.bfloat16(), "weights")
        >>> base_dtype("weights/model")
        'bfloat16'
    """
    path = find_base(root_dir, str(model_name))
    config = base_config(path)
    for place in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            said = place.get(key) if isinstance(place, dict) else None
            if isinstance(said, str) and said.removeprefix("torch.") in FLOATS.values():
                return said.removeprefix("torch.")
    source = open_base_source(path, Group(None), config)
    sizes: dict[str, int] = {}
    for name in source.names():
        spec = source.stored(name)
        if spec is not None and spec.dtype in FLOATS and name not in source.behind:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    if source.behind or not sizes:
        return "bfloat16"
    return FLOATS[max(sizes, key=sizes.__getitem__)]


def open_base_source(
    path: Path,
    group: Group,
    config: Mapping[str, object],
    *,
    dequantize: bool | None = None,
    allow_legacy_pickle: bool = False,
) -> BaseSource:
    """Find the tensors of a base model (`find_base`, `base_config`). All ranks of the group call.

    ``dequantize`` says whether values and scales become floating point: ``None`` if the config says that the base is
    quantized, ``True`` wherever values have scales, ``False`` never. ``allow_legacy_pickle`` unpickles ``.bin`` files
    without restrictions.
    """
    if group.broadcast_result(lambda: is_torch_base(path), "looking at the base model's files"):
        bins = open_bin(path, group, allow_legacy_pickle)
        source = BaseSource(bins.source, bins)
    else:
        source = BaseSource(open_source(path, group))
    with group.together("looking for quantized tensors"):
        settings = quant_settings(config)
        block = settings.block if settings is not None and settings.supported else None
        found, behind = find_quantized(source.plain.tensors, block)
        wanted = dequantize is True or (dequantize is None and settings is not None and settings.supported)
        return replace(
            source,
            quantized=found if wanted else {},
            behind=behind if wanted else frozenset(),
            scaled=frozenset(found),
            settings=None if dequantize is False else settings,
        )


def is_torch_base(path: Path) -> bool:
    """Whether a base's weights are files of ``torch.save``, as they are where it has no others. Local."""
    if is_file(path):
        if is_index(path.name):
            return TORCH.index_stem(path.name) is not None
        found = what_is_file(path)
        if found is None:
            return path.suffix != ".safetensors" and TORCH.stem_of(path.name) is not None
        return found.kind is Kind.TORCH
    if exists(path / ".metadata") or holds_safetensors(path):
        return False
    return is_directory(path) and holds_torch_files(path)
