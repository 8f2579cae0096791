"""Which tool's checkpoint a directory is."""

from __future__ import annotations

from pathlib import Path

from shardwise.disk.names import is_directory, names_in
from shardwise.sources.others.deepspeed import deepspeeds
from shardwise.sources.others.layout import Layout
from shardwise.sources.others.rank_files import accelerates, saved_shards, verl_files


def recognise(directory: Path, master_weights: bool = False) -> Layout | None:
    """Which other tool's checkpoint stands in a directory; ``None`` where it is Hugging Face's, DCP's, or none.

    With ``master_weights`` fp32 master weights are preferred to 16-bit ones where both are there. Several checkpoints
    are an `AmbiguousFilesError`.
    """
    if not is_directory(directory):
        return None
    names = names_in(directory)
    if master_weights:
        return deepspeeds(directory, names, True)
    if ".metadata" in names or any(name.endswith(".safetensors") for name in names):
        return None
    named = deepspeeds(directory, names, False) or accelerates(directory, names) or verl_files(directory, names)
    return named or saved_shards(directory, names)
