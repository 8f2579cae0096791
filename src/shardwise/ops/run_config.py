"""The settings that a checkpoint was saved with, as its ``config.yaml`` has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from shardwise.disk.names import is_file
from shardwise.errors import StateFormatError

if TYPE_CHECKING:
    from shardwise.ops.consolidate_input import ModelInput

CONFIG_NAME = "config.yaml"
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
