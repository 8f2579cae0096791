"""Directories of accelerate, and of transformers' Trainer, in which FSDP saved a model.

Source: accelerate's ``save_fsdp_model``. ``pytorch_model_fsdp_0/`` is a DCP directory, ``pytorch_model_fsdp.bin`` the
full state dict, ``pytorch_model_fsdp_0_rank1.bin`` one rank's shards, and ``pytorch_model_fsdp_rank1.bin`` one rank's
flat pieces (LOCAL_STATE_DICT). A number other than 0 is that of a further model. ``save_fsdp_optimizer`` writes the DCP
directory ``optimizer_0/`` beside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from shardwise.disk.names import exists
from shardwise.errors import AmbiguousFilesError, MisuseError
from shardwise.sources.others.layout import Layout, OtherModel
from shardwise.sources.others.rank_files import RankFiles

_TOOL = "accelerate (FSDP)"
_DIRECTORY = re.compile(r"pytorch_model_fsdp_(\d+)")
_FULL = re.compile(r"pytorch_model_fsdp(_\d+)?\.bin")
_OF_RANK = re.compile(r"pytorch_model_fsdp(_\d+)?_rank(\d{1,6})\.bin")


def accelerates(directory: Path, names: Sequence[str]) -> Layout | None:
    """What accelerate's FSDP saved in a directory; `AmbiguousFilesError` where it is not one model in one form."""
    sharded = [name for name in names if _DIRECTORY.fullmatch(name) and exists(directory / name / ".metadata")]
    full = [name for name in names if _FULL.fullmatch(name)]
    by_model: dict[str, list[str]] = {}
    for name in names:
        match = _OF_RANK.fullmatch(name)
        if match is not None:
            by_model.setdefault(match[1] or "", []).append(name)
    found = [*sharded, *full, *(group[0] for group in by_model.values())]
    if len(found) > 1:
        raise AmbiguousFilesError(
            f"the directory holds several models, or one in several forms: {', '.join(found)}",
            path=directory,
            hint="Name one of the directories among them, or leave the files of one model in a directory.",
        )
    if sharded:
        dcp = directory / sharded[0]
        return Layout(_TOOL, directory, directory, partial(_refuse_dcp, dcp), dcp)
    files = full or [name for group in by_model.values() for name in group]
    ranks = RankFiles(directory, dict(enumerate(files)), None)
    return Layout(_TOOL, directory, directory, ranks.open) if files else None


def _refuse_dcp(directory: Path) -> OtherModel:
    raise MisuseError("this is a DCP directory", path=directory, hint="Open it as one.")


def optimizer_beside(model: Path) -> Path | None:
    """Where the optimizer of a model in such a DCP directory is; ``None`` for any other path."""
    match = _DIRECTORY.fullmatch(model.name)
    return None if match is None else model.with_name(f"optimizer_{match[1]}")
