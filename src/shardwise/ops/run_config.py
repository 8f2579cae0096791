"""The settings that a checkpoint was saved with, as its ``config.yaml`` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import yaml

from shardwise.disk.names import is_file
from shardwise.errors import StateFormatError
from shardwise.ops.consolidate_input import ModelInput

_CONFIG_NAME = "config.yaml"


def run_settings(found: ModelInput) -> Mapping[str, object]:
    """The settings; none where the checkpoint has no such file, as a component by itself.

    Raises:
        StateFormatError: The file is damaged.
        IntegrityError: It has changed since the save.
    """
    for directory in dict.fromkeys((found.checkpoint, found.directory.parent)):
        path = directory / _CONFIG_NAME
        if not is_file(path):
            continue
        try:
            content: object = yaml.safe_load(found.read(path))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise StateFormatError(f"not YAML: {error}", path=path, hint="Restore the file.") from error
        settings = content.get("checkpoint") if isinstance(content, dict) else None
        if isinstance(settings, dict):
            return cast(Mapping[str, object], settings)
    return {}
