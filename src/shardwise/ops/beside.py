"""The files beside a model's weights: configuration, tokenizer, code; and the settings of a run (``config.yaml``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import yaml

from shardwise.disk.names import files_under, is_directory, is_file, names_in
from shardwise.errors import ShardwiseError, StateFormatError
from shardwise.format.json_file import read_json
from shardwise.format.manifest import MANIFEST_NAME
from shardwise.format.notes import METADATA_DIR, NOTES

if TYPE_CHECKING:
    from shardwise.ops.consolidate_input import ModelInput

CONFIG_NAME = "config.yaml"
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".distcp", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".tensors", ".safetensors.index.json", ".bin.index.json", ".h5.index.json", ".msgpack.index.json"),
)
#: Files that saves and tools leave in such a directory and that no reader of the model opens.
_OTHERS = frozenset(
    {
        *(MANIFEST_NAME, "consolidate.sh", "dcp_values.json", "losses.json", CONFIG_NAME),
        *("trainer_state.json", "fsdp_config.json", "latest", "zero_to_fp32.py"),
    }
)
_TEMPLATES = "additional_chat_templates"


def side_files(directory: Path) -> dict[str, Path]:
    """Path in the export -> file, for every file but the weights that belongs to the model in a directory.

    Where a save wrote ``.hf_metadata``, only its content.
    """
    noted = directory / METADATA_DIR
    if is_directory(noted):
        named = {path.relative_to(noted).as_posix(): path for path in files_under(noted)}
        return {name: path for name, path in named.items() if name not in NOTES}
    if not is_directory(directory):
        return {}
    found = {
        name: directory / name
        for name in names_in(directory)
        if not name.startswith(".")
        and name not in _OTHERS
        and not name.endswith(_WEIGHTS)
        and is_file(directory / name)  # a link to a file as well: a hub cache consists of them
    }
    for folder in _folders(directory):
        found |= {path.relative_to(directory).as_posix(): path for path in files_under(directory / folder)}
    return found


def _folders(directory: Path) -> Iterator[str]:
    """Folders that belong to the model: chat templates, and the modules of a sentence-transformers model."""
    if is_directory(directory / _TEMPLATES):
        yield _TEMPLATES
    try:
        modules = cast(list[dict[str, str]], read_json(directory / "modules.json"))
        paths = [str(module["path"]) for module in modules]
    except (ShardwiseError, KeyError, TypeError):
        return
    for path in paths:
        parts = PurePosixPath(path).parts
        if parts and not PurePosixPath(path).is_absolute() and ".." not in parts and is_directory(directory / path):
            yield path


# --- the settings of the run -----------------------------------------------------------------------------------------


_RESTORE = "Restore the file."


def run_settings(found: ModelInput) -> Mapping[str, object]:
    """The settings; none where the checkpoint has no such file, as a component by itself."""
    for directory in dict.fromkeys((found.checkpoint, found.directory.parent)):
        path = directory / CONFIG_NAME
        settings = settings_in(found.read(path), path) if is_file(path) else None
        if settings is not None:
            return settings
    return {}


def settings_in(data: bytes, path: Path, hint: str = _RESTORE) -> Mapping[str, Any] | None:
    """The settings in the content of such a file; ``None`` where it has none. ``hint`` is for one that is damaged."""
    content = parse_yaml(data, path, hint)
    settings = content.get("checkpoint") if isinstance(content, dict) else None
    return settings if isinstance(settings, dict) else None


def parse_yaml(data: bytes, path: Path, hint: str = _RESTORE) -> object:
    """The content of a file of YAML; ``hint`` is for what is none."""
    try:
        return cast(object, yaml.safe_load(data))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StateFormatError(f"not YAML: {error}", path=path, hint=hint) from error
