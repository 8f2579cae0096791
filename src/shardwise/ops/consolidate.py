"""Writes the Hugging Face export of a checkpoint saved without one: one process, bounded memory, checkpoint unchanged.

A checkpoint that `verify` calls damaged is refused here. Digests are compared with those of the save while the bytes
are read for the export, so that damage is an error and not an export with fresh digests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shardwise.addons.files import as_text
from shardwise.addons.hf_config import CONFIG, CONFIG_V5, untied, with_dtype
from shardwise.base.files import find_base
from shardwise.checkpointing.hub import differing_ties
from shardwise.checkpointing.saving.checks import check_described
from shardwise.comm import Group
from shardwise.disk.names import is_file
from shardwise.disk.storage import Storage, current, using
from shardwise.dtypes import FLOATS, torch_dtype
from shardwise.engine.collector import without_collector
from shardwise.engine.load import saved_aliases
from shardwise.errors import (
    CheckpointNotFoundError,
    ConfigError,
    ConversionError,
    DtypeMismatchError,
    MissingTensorError,
    MisuseError,
    StateFormatError,
    some,
)
from shardwise.format import notes
from shardwise.format.dcp_metadata import parsed_once
from shardwise.format.json_file import parse_json
from shardwise.format.manifest import TensorRecord
from shardwise.format.strict_json import JsonValue
from shardwise.geometry import TensorSpec
from shardwise.ops.beside import run_settings, side_files
from shardwise.ops.consolidate_input import ModelInput, SourceHints, find_input
from shardwise.ops.exporting import batches_of, publish, refuse_existing
from shardwise.ops.tensors_to_write import TensorToWrite, tensors_to_write
from shardwise.ops.torchtitan_names import Rope
from shardwise.ops.verify import Progress
from shardwise.plan.layout import MAX_FILE_BYTES, Layout, index_name, lay_out
from shardwise.plan.reads import SourceTensor
from shardwise.sources.reader import VerifyingReader
from shardwise.sources.sources import Source, open_source
from shardwise.sources.tensor_bytes import as_bytes

__all__ = ["ConsolidateReport", "consolidate"]


@dataclass(frozen=True, slots=True)
class ConsolidateReport:
    """The files that were written.

    Attributes:
        path: The export's directory.
        files: Names of its tensor files.
        tensors: Number of tensors.
        nbytes: Bytes of the tensor files.
        verified: Every byte was compared with the digests in the checkpoint's manifest.
        notes: What was left out, or could not be checked, one sentence each.
        recast: Names of the tensors that were cast because ``dtype`` asked for it.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    verified: bool = True
    notes: tuple[str, ...] = ()
    recast: tuple[str, ...] = ()


def consolidate(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    max_file_bytes: int | None = None,
    progress: Progress | None = None,
    storage: Storage | None = None,
    prefix: str | None = None,
    base: str | os.PathLike[str] | None = None,
    diffusers_compatible: bool | None = None,
    assume_complete: bool = False,
    master_weights: bool = False,
    verify_export: bool | None = None,
    config: str | os.PathLike[str] | None = None,
    rope: Rope | None = None,
    dtype: str | None = None,
) -> ConsolidateReport:
    """Write the export of a checkpoint, with the base model's file split and dtypes where they were recorded.

    The export is written beside its final directory and renamed into place, with a manifest of its own: the
    checkpoint's manifest is never rewritten. A failure leaves no files.

    Args:
        path: A checkpoint saved as shards or with ``torch_save``, its ``model`` directory, or a root with ``LATEST``.
            Other tools' too: a directory of shards, a DCP directory, a Hugging Face directory, files of ``torch.save``.
        output: The export's directory; ``consolidated`` in the ``model`` directory by default.
        max_file_bytes: Largest file; by default the split of the base model, where it was recorded, or the limit of the
            save.
        progress: Called with the bytes written and the bytes to write.
        storage: Where files are read and written.
        prefix: Prefix of the model's names in a DCP directory, or a file of ``torch.save``, that holds more than a
            model, where its structure does not show it; "" for all of them.
        base: The base model; its tensors that the model's class does not load are carried over. The save's by default.
        diffusers_compatible: Whether files are named as diffusers expects; as the save was configured by default.
        assume_complete: Believe that no file is absent where nothing says how large tensors in pieces were.
        master_weights: Take the fp32 master weights of DeepSpeed where 16-bit weights are saved too.
        verify_export: Whether the class that ``config.json`` names has to load the export; by default as the save was
            configured, else true.
        config: Directory with ``config.json`` and what goes with it, if it is not beside the tensors.
        rope: How a Llama under torchtitan's names rotates q and k, which its tensors do not show: ``interleaved``
            (torchtitan's own, and Meta's) or ``halves``.
        dtype: ``float64``, ``float32``, ``float16`` or ``bfloat16``: what all floating tensors are cast to; others
            stay. By default as they are in the base model, where that was recorded, or as they were saved.

    Raises:
        CheckpointExistsError: There is an export already.
        ExportMismatchError: The class that ``config.json`` names would not load the export.
        CheckpointNotFoundError: There is nothing to export, or no base model to carry tensors over from.
        IncompleteCheckpointError: The path is an interrupted save.
        IntegrityError: A file is absent, too short, or has other bytes than were saved.
        FormatError: A file, or the manifest, is damaged.
        TensorError: A tensor is not whole, or not that of the class that ``config.json`` names.
        MisuseError: It is not a model (an optimizer, an adapter, a pipeline), or it is unclear which part is the model;
            ``dtype`` is none of these, or the model is quantized.
        ConversionError: A value is too large for ``dtype``.
        UnverifiableError: Nothing says whether the tensors are whole.

    Examples:
        >>> path = checkpointer.save(step=10, model=model)  # shards
        >>> consolidate(path).path.name
        'consolidated'
    """
    if dtype is not None and dtype not in FLOATS.values():
        raise MisuseError(f"dtype is {dtype!r}", hint=f"Use one of {', '.join(FLOATS.values())}.")
    described = None if config is None else Path(config).absolute()
    hints = SourceHints(prefix, assume_complete, described, rope, master_weights)
    with using(storage or current()), parsed_once(), without_collector():
        found = find_input(Path(path).absolute(), hints)
        target = found.directory / "consolidated" if output is None else Path(output).absolute()
        refuse_existing(target)
        source = _carry_over(found, base).without([*_note(found, notes.KEPT_OUT), *_note(found, notes.APART)])
        found = replace(found, source=source)
        with closing(VerifyingReader(current(), found.source.files, found.ledger)) as reader:
            tensors, stem = tensors_to_write(found, reader.blocks), _stem(found, diffusers_compatible)
            specs, plain, recast = _described(found, tensors, dtype)
            _require_opens(found, tensors, plain, verify_export)
            layout = _layout(found, specs, stem, max_file_bytes)
            plain = {**plain, index_name(stem): layout.index}
            aliases, made = saved_aliases(found.source).items(), {spec.name: spec for spec in specs}
            cast = frozenset(recast)
            publish(
                layout,
                batches_of(
                    layout, lambda name: _blocks(tensors[name], made[name], name in cast, found.directory), made
                ),
                target,
                progress,
                plain=lambda records: _with_ties(found, plain, records),
                aliases={name: kept for name, kept in aliases if kept in tensors and name not in tensors},
                notes={} if found.manifest else {"source": "no manifest", "notes": list(found.notes)},
                settle=lambda: found.ledger.settle(current()),
            )
    names = tuple(file.name for file in layout.files)
    return ConsolidateReport(
        target, names, len(tensors), layout.total_bytes, found.manifest, tuple(found.notes), recast
    )


def _note(found: ModelInput, name: str) -> Mapping[str, JsonValue]:
    """A note that the save left beside the tensors; a list counts as its entries without values."""
    path = found.directory / notes.METADATA_DIR / name
    content = parse_json(found.read(path), path, StateFormatError) if is_file(path) else None
    if isinstance(content, list):
        return dict.fromkeys(map(str, content))
    return content if isinstance(content, dict) else {}


def _described(
    found: ModelInput, tensors: Mapping[str, TensorToWrite], dtype: str | None
) -> tuple[list[TensorSpec], Mapping[str, bytes], tuple[str, ...]]:
    """The tensors of the export, the files beside them, and which tensors get the dtype that was asked for.

    Configurations that say the dtype say that one.
    """
    plain: Mapping[str, bytes] = {name: found.read(place) for name, place in side_files(found.beside).items()}
    noted = _note(found, notes.FILE_DTYPES).items()
    dtypes = {name: code for name, code in noted if isinstance(code, str) and code in FLOATS}
    specs = [tensor.spec for tensor in tensors.values()]
    specs = [s._replace(dtype=dtypes.get(s.name, s.dtype)) if s.dtype in FLOATS else s for s in specs]
    if dtype is None:
        return specs, plain, ()
    code = next(code for code, name in FLOATS.items() if name == dtype)
    configs = _configs(plain)
    quantized = [spec.name for spec in specs if spec.dtype.startswith("F8_")]
    if quantized or any(entries.get("quantization_config") for entries in configs.values()):
        raise MisuseError(
            "the model is quantized: its values are not those of its tensors alone, so that no dtype can be chosen",
            path=found.directory,
            tensor=quantized[0] if quantized else None,
            hint="Leave --dtype (dtype=) out.",
        )
    changed = [spec for spec in specs if spec.dtype in FLOATS and spec.dtype != code]
    for old in dict.fromkeys(spec.dtype for spec in changed):
        names = [spec.name for spec in changed if spec.dtype == old]
        found.notes.append(f"cast from {FLOATS[old]} to {dtype}, as was asked for: {some(names)}")
    recast = tuple(spec.name for spec in changed)
    made = [spec._replace(dtype=code) if spec.dtype in FLOATS else spec for spec in specs]
    texts = {name: as_text(with_dtype(entries, dtype)).encode() for name, entries in configs.items()}
    return made, {**plain, **texts}, recast


def _configs(plain: Mapping[str, bytes]) -> dict[str, dict[str, JsonValue]]:
    return {name: json.loads(plain[name]) for name in (CONFIG, CONFIG_V5) if name in plain}


def _require_opens(
    found: ModelInput, tensors: Mapping[str, TensorToWrite], plain: Mapping[str, bytes], verify_export: bool | None
) -> None:
    """Check the planned export against the class that its configuration names, before a tensor is written."""
    if verify_export is None:
        verify_export = run_settings(found).get("verify_export") is not False
    if not verify_export or CONFIG not in plain:
        return
    why = check_described(json.loads(plain[CONFIG]), [each.spec for each in tensors.values()], found.beside / CONFIG)
    if why is not None:
        found.notes.append(f"not compared with a model class: {why}")


def _layout(found: ModelInput, specs: Sequence[TensorSpec], stem: str, max_file_bytes: int | None) -> Layout:
    if max_file_bytes is not None:
        return lay_out(specs, max_file_bytes=max_file_bytes, stem=stem)
    export, numbers = _note(found, notes.EXPORT), _note(found, notes.FILE_INDEX)
    named, recorded = export.get("files"), export.get("max_file_bytes")
    names = [str(name) for name in named] if isinstance(named, list) else []
    split = {name: number for name, number in numbers.items() if isinstance(number, int)}
    count = max(split.values(), default=0)

    def file(number: int) -> str:
        if len(names) >= number > 0:
            return names[number - 1]
        return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"

    files = {name: file(number) for name, number in split.items()}
    limit = recorded if type(recorded) is int else MAX_FILE_BYTES
    return lay_out(specs, base_files=files, max_file_bytes=limit, stem=stem)


def _stem(found: ModelInput, diffusers: bool | None) -> str:
    noted = _note(found, notes.EXPORT).get("stem")
    if diffusers is None and isinstance(noted, str):
        if os.sep in noted or noted.startswith("."):
            raise ConfigError(f"the recorded stem of file names is {noted!r}", path=found.directory)
        return noted
    named = run_settings(found).get("diffusers_compatible") if diffusers is None else diffusers
    return "diffusion_pytorch_model" if named else "model"


def _with_ties(found: ModelInput, plain: Mapping[str, bytes], tensors: Sequence[TensorRecord]) -> Mapping[str, bytes]:
    """The files beside the tensors; the configuration's ties are those that were written."""
    ties = {name: str(kept) for name, kept in _note(found, notes.LOOSE_TIES).items()}
    configs = _configs(plain) if differing_ties(ties, tensors) else {}
    return {**plain, **{name: as_text(untied(entries)).encode() for name, entries in configs.items()}}


def _blocks(saved: TensorToWrite, spec: TensorSpec, strict: bool, directory: Path) -> Iterator[memoryview]:
    """A tensor's bytes in the dtype of the export; ``strict``: no value may become infinite by that."""
    if saved.spec.dtype == spec.dtype:
        yield from saved.blocks()
        return
    memory = torch.empty(0, dtype=torch_dtype(spec.dtype))
    for block in saved.blocks():
        values = torch.frombuffer(block, dtype=torch_dtype(saved.spec.dtype))
        memory = memory if len(memory) >= len(values) else torch.empty_like(values, dtype=memory.dtype)
        made = memory[: len(values)].copy_(values)
        if strict and made.isinf().any() and not values.isinf().equal(made.isinf()):
            raise ConversionError(
                f"values are too large for {FLOATS[spec.dtype]}",
                path=directory,
                tensor=spec.name,
                hint="Choose bfloat16 or float32.",
            )
        yield as_bytes(made)


# --- tensors of the base model that its class does not load, which an export copies unchanged ------------------------


_HINT = "Say where the base model is: --base PATH (base=PATH)."
_ANOTHER = "It is another model than the one that was trained. " + _HINT


def _carry_over(found: ModelInput, base: str | os.PathLike[str] | None) -> Source:
    """The tensors of the export: the model's, and those that the save recorded as carried over from its base."""
    carried = _note(found, notes.EXPORT).get("carried")
    names = [*_note(found, notes.PASSED_THROUGH), *(map(str, carried) if isinstance(carried, list) else ())]
    absent = [name for name in dict.fromkeys(names) if name not in found.source.tensors]
    if not absent:
        return found.source
    path = _base_path(found, base, absent[0])
    source = open_source(path, Group(None))
    dtypes = _note(found, notes.FILE_DTYPES)
    tensors = dict(found.source.tensors)
    first = len(found.source.files)
    for name in absent:
        known, recorded = source.tensors.get(name), dtypes.get(name)
        if known is None:
            why = "the export carries this tensor over from the base model, which has none of this name"
            raise MissingTensorError(why, path=path, tensor=name, hint=_ANOTHER)
        if recorded is not None and recorded != known.spec.dtype:
            why = f"the base model has this tensor in {known.spec.dtype}; when the model was saved it was {recorded}"
            raise DtypeMismatchError(why, path=path, tensor=name, hint=_ANOTHER)
        chunks = tuple(chunk._replace(file=chunk.file + first) for chunk in known.chunks)
        tensors[name] = SourceTensor(known.spec, chunks)
    return replace(found.source, files=(*found.source.files, *source.files), tensors=tensors)


def _base_path(found: ModelInput, base: str | os.PathLike[str] | None, tensor: str) -> Path:
    if base is not None:
        return find_base(None, os.fspath(base))
    noted = _note(found, notes.EXPORT).get("base")
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
