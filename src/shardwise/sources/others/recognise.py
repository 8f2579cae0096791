"""Which tool's checkpoint a directory is."""

from __future__ import annotations

from pathlib import Path

from shardwise.disk.names import is_directory, names_in
from shardwise.sources.others.accelerate import accelerates
from shardwise.sources.others.layout import Layout
from shardwise.sources.others.rank_files import saved_shards, verl_files


def recognise(directory: Path) -> Layout | None:
    """Which other tool's checkpoint stands in a directory.

    Returns:
        ``None`` where it is none of them; a directory with Hugging Face files or DCP metadata is what these are.

    Raises:
        AmbiguousFilesError: There are several.
    """
    if not is_directory(directory):
        return None
    names = names_in(directory)
    if ".metadata" in names or any(name.endswith(".safetensors") for name in names):
        return None
    return accelerates(directory, names) or verl_files(directory, names) or saved_shards(directory, names)
