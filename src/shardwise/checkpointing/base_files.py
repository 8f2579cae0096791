"""Finding a base model on this machine and saying what its files hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from shardwise.checkpointing.base import snapshot_directory
from shardwise.comm import Group
from shardwise.engine.load_base import BaseSource
from shardwise.errors import CheckpointNotFoundError, FormatError
from shardwise.io.bin_source import has_torch_files, open_bin
from shardwise.io.quantized import find_quantized, is_quantized, quant_settings
from shardwise.io.sources import open_source

#: A hub id, with a revision behind an ``@``.
_HUB_ID = re.compile(r"^(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?$")
#: Files in which AutoGPTQ and AutoAWQ kept their settings before these had a place in ``config.json`` -> the method,
#: where the file does not name it.
_QUANTIZERS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def find_base(root_dir: str | Path | None, model_name: str) -> Path:
    """The directory or file of a base model; the network is never asked.

    Args:
        root_dir: The hub cache, or a directory that models lie in; the hub's own cache if not given.
        model_name: A directory, a model's directory in a hub cache, a file, a name below ``root_dir``, or a hub id
            (``org/name``, or ``org/name@revision`` with a branch, a tag or a commit).

    Raises:
        CheckpointNotFoundError: It is not there.
        FormatError: It is a GGUF file.
    """
    place = Path(model_name)
    root = None if root_dir is None else Path(root_dir)
    places = [place] if root is None else [place, root / model_name]
    for candidate in places:
        if candidate.is_file() and candidate.suffix == ".gguf":
            raise FormatError(
                "GGUF files cannot be loaded", path=candidate, hint="Use the model's safetensors or .bin files."
            )
        if candidate.is_file() or (candidate.is_dir() and _holds_weights(candidate)):
            return candidate.absolute()
        if candidate.name.startswith("models--") and (candidate / "snapshots").is_dir():
            # The model's own directory in a hub cache.
            root, model_name = candidate.absolute().parent, candidate.name.removeprefix("models--").replace("--", "/")
            break
    found = _HUB_ID.match(model_name)
    if root is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        root = Path(HF_HUB_CACHE)
    snapshot = snapshot_directory(root, found["id"], found["revision"] or "main") if found else None
    if snapshot is None or not _holds_weights(snapshot):
        raise _not_there(model_name, [p for p in places if p.exists()], snapshot, root)
    return snapshot.absolute()


def _not_there(model_name: str, present: Sequence[Path], snapshot: Path | None, root: Path) -> CheckpointNotFoundError:
    """The error that says which directory was looked into, and what else is in it."""
    empty = snapshot if snapshot is not None else next(iter(present), None)
    if empty is None:
        return CheckpointNotFoundError(
            f"the base model {model_name} is not there",
            path=root,
            hint="Download it first (hf download), or pass a directory or a file.",
        )
    other = next((path.name for path in sorted(empty.glob("*.gguf"))), None)
    return CheckpointNotFoundError(
        f"the base model {model_name} has no safetensors and no .bin weights" + (f", only {other}" if other else ""),
        path=empty,
        hint="Download its weights (hf download), or pass another directory or a file.",
    )


def _holds_weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors")) or (directory / ".metadata").exists() or has_torch_files(directory)


def base_config(path: Path) -> dict[str, object]:
    """The base's ``config.json``, empty where there is none.

    Tools older than ``quantization_config`` say in a file of their own how they quantized; that is put in its place
    where the config has none.

    Raises:
        FormatError: One of the files is not JSON.
    """
    directory = path if path.is_dir() else path.parent
    config = _json_object(directory / "config.json")
    if is_quantized(config):
        return config
    for name, method in _QUANTIZERS_FILES.items():
        found = _json_object(directory / name)
        if found:
            return {**config, "quantization_config": {"quant_method": method, **found}}
    return config


def _json_object(file: Path) -> dict[str, object]:
    if not file.is_file():
        return {}
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"not JSON: {error}", path=file, hint="Fetch the file again.") from error
    return cast(dict[str, object], found) if isinstance(found, dict) else {}


def ties_head(config: Mapping[str, object]) -> bool:
    """Whether the base may tie its head to the embedding: all but a config that says no."""
    places = [config.get("text_config"), config]
    said = [
        place["tie_word_embeddings"] for place in places if isinstance(place, dict) and "tie_word_embeddings" in place
    ]
    return not said or any(bool(value) for value in said)


def base_dtype(root_dir: str | Path | None, model_name: str) -> str:
    """The dtype that a base model was trained or published in, as torch names it: ``"bfloat16"``.

    Loading never changes the model's dtype; build the model in this one to have the base's values unchanged:
    ``torch.set_default_dtype(getattr(torch, base_dtype(...)))`` or ``from_config(config, dtype=...)``. Not collective.

    Returns:
        What ``config.json`` says (``dtype``, ``torch_dtype``); otherwise the floating-point dtype of most of the
        weights' bytes; ``bfloat16`` for a quantized base that does not say.

    Raises:
        CheckpointNotFoundError: There is no such base.
    """
    path = find_base(root_dir, model_name)
    config = base_config(path)
    for place in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            said = place.get(key) if isinstance(place, dict) else None
            if isinstance(said, str) and said.removeprefix("torch.") in _FLOATS.values():
                return said.removeprefix("torch.")
    source = open_base_source(path, Group(None), config)
    sizes: dict[str, int] = {}
    for name in source.names():
        spec = source.stored(name)
        if spec is not None and spec.dtype in _FLOATS and name not in source.behind:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    if source.behind or not sizes:
        return "bfloat16"
    return _FLOATS[max(sizes, key=sizes.__getitem__)]


def open_base_source(
    path: Path,
    group: Group,
    config: Mapping[str, object],
    *,
    dequantize: bool | None = None,
    allow_legacy_pickle: bool = False,
) -> BaseSource:
    """Find the tensors of a base model. All ranks of the group call.

    Args:
        path: From `find_base`.
        group: The ranks that load together.
        config: From `base_config`.
        dequantize: Whether values and scales become floating point: ``None`` if the config says that the base is
            quantized, ``True`` wherever values have scales, ``False`` never.
        allow_legacy_pickle: Unpickle ``.bin`` files without restrictions.

    Raises:
        CheckpointNotFoundError, FormatError, QuantizationError: It cannot be opened.
    """
    if group.tell(lambda: _is_bin(path), "looking at the base model's files"):
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


def _is_bin(path: Path) -> bool:
    if path.is_file():
        return path.suffix != ".safetensors" and has_torch_files(path)
    below = (path, path / "consolidated")
    others = any(any(place.glob("*.safetensors")) for place in below) or (path / ".metadata").exists()
    return not others and has_torch_files(path)
