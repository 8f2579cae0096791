"""Tensors of the base model that the model's class does not load, and that its export copies unchanged."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from shardwise.base.files import find_base
from shardwise.comm import Group
from shardwise.errors import CheckpointNotFoundError, DtypeMismatchError, MissingTensorError
from shardwise.format.notes import EXPORT, FILE_DTYPES, METADATA_DIR, PASSED_THROUGH
from shardwise.ops.consolidate_input import ModelInput
from shardwise.ops.run_config import run_settings
from shardwise.plan.reads import SourceTensor
from shardwise.sources.sources import Source, open_source

_HINT = "Say where the base model is: --base PATH (base=PATH)."
_ANOTHER = "It is another model than the one that was trained. " + _HINT


def carry_over(found: ModelInput, base: str | os.PathLike[str] | None) -> Source:
    """The tensors of the export: the model's, and those that the save recorded as carried over from its base.

    Raises:
        CheckpointNotFoundError: The base model was not found.
        MissingTensorError: The base model lacks such a tensor.
        DtypeMismatchError: Its tensor has another dtype than when the model was saved.
    """
    notes = found.directory / METADATA_DIR
    export = found.read_json(notes / EXPORT)
    noted = (found.read_json(notes / PASSED_THROUGH), export.get("carried") if isinstance(export, dict) else None)
    names = dict.fromkeys(str(name) for each in noted if isinstance(each, list) for name in each)
    absent = [name for name in names if name not in found.source.tensors]
    if not absent:
        return found.source
    path = _base_path(found, base, absent[0])
    source = open_source(path, Group(None))
    dtypes = found.read_json(notes / FILE_DTYPES)
    tensors = dict(found.source.tensors)
    first = len(found.source.files)
    for name in absent:
        known = source.tensors.get(name)
        if known is None:
            why = "the export carries this tensor over from the base model, which has none of this name"
            raise MissingTensorError(why, path=path, tensor=name, hint=_ANOTHER)
        recorded = dtypes.get(name) if isinstance(dtypes, dict) else None
        if recorded is not None and recorded != known.spec.dtype:
            why = f"the base model has this tensor in {known.spec.dtype}; when the model was saved it was {recorded}"
            raise DtypeMismatchError(why, path=path, tensor=name, hint=_ANOTHER)
        chunks = tuple(chunk._replace(file=chunk.file + first) for chunk in known.chunks)
        tensors[name] = SourceTensor(known.spec, chunks)
    return replace(found.source, files=(*found.source.files, *source.files), tensors=tensors)


def _base_path(found: ModelInput, base: str | os.PathLike[str] | None, tensor: str) -> Path:
    if base is not None:
        return find_base(None, os.fspath(base))
    note = found.read_json(found.directory / METADATA_DIR / EXPORT)
    noted = note.get("base") if isinstance(note, dict) else None
    tried: list[tuple[str | None, str]] = [(None, noted)] if isinstance(noted, str) else []
    settings = run_settings(found)
    name, root, cache = (settings.get(key) for key in ("model_repo_id", "original_model_root_dir", "model_cache_dir"))
    tried += [(str(place), str(name)) for place in (root, cache) if place and name]
    tried += [(None, str(place)) for place in (root, name) if place]
    failures = []
    for place, model in tried:
        try:
            return find_base(place, model)
        except CheckpointNotFoundError as error:
            failures.append(error)
    raise CheckpointNotFoundError(
        "the export carries this tensor over from the base model, which is not there"
        + (f" (looked for {', '.join(dict.fromkeys(model for _, model in tried))})" if tried else ""),
        path=failures[0].path if failures else found.directory,
        tensor=tensor,
        hint=_HINT,
    )
