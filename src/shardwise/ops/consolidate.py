"""Writes the Hugging Face export of a checkpoint saved without one: one process, bounded memory, checkpoint unchanged.

A checkpoint that `verify` calls damaged is refused here. Digests are compared with those of the save while the bytes
are read for the export, so that damage is an error and not an export with fresh digests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shardwise.addons.files import as_text
from shardwise.addons.hf_config import CONFIG, CONFIG_V5, untied
from shardwise.checkpointing.saving.class_check import check_described
from shardwise.checkpointing.saving.config_ties import differing_ties
from shardwise.disk.names import exists, is_there
from shardwise.disk.sequential import SequentialFile, write_file
from shardwise.disk.storage import Storage, current, storage_errors, using
from shardwise.dtypes import FLOATS, torch_dtype
from shardwise.engine.missing_files import saved_aliases
from shardwise.engine.records import ComponentRecord, layout_record, write_manifest
from shardwise.errors import CheckpointExistsError, ConfigError
from shardwise.format.manifest import AliasRecord, FileRecord, TensorRecord
from shardwise.format.notes import APART, EXPORT, FILE_DTYPES, FILE_INDEX, KEPT_OUT, LOOSE_TIES, METADATA_DIR
from shardwise.format.strict_json import JsonValue
from shardwise.geometry import TensorSpec
from shardwise.lifecycle import temporary_name
from shardwise.ops.carry_over import carry_over
from shardwise.ops.consolidate_input import ModelInput, find_input
from shardwise.ops.hub_blocks import hub_tensors
from shardwise.ops.run_config import run_settings
from shardwise.ops.side_content import side_files
from shardwise.ops.verify import Progress
from shardwise.plan.layout import Layout, index_name, lay_out
from shardwise.sources.tensor_bytes import as_bytes
from shardwise.sources.verifying_reader import VerifyingReader

__all__ = ["ConsolidateReport", "consolidate"]

_CONSOLIDATED = "consolidated"
_MAX_FILE_BYTES = 5_000_000_000
_DIFFUSERS_STEM = "diffusion_pytorch_model"

#: A tensor of the export, and its bytes as they are saved.
Blocks = Callable[[], Iterator[memoryview]]


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
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    verified: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tensor:
    """A tensor to write: what it is as saved, and where its bytes come from."""

    spec: TensorSpec
    blocks: Blocks


@dataclass(frozen=True, slots=True)
class _Options:
    """What a caller set, see `consolidate`."""

    max_file_bytes: int | None
    progress: Progress | None
    base: str | os.PathLike[str] | None
    diffusers_compatible: bool | None
    verify_export: bool | None


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
) -> ConsolidateReport:
    """Write the export of a checkpoint, with the base model's file split and dtypes where they were recorded.

    The export is written beside its final directory and renamed into place, with a manifest of its own: the
    checkpoint's manifest is never rewritten. A failure leaves no files.

    Args:
        path: A checkpoint saved as shards or with ``torch_save``, its ``model`` directory, or a root with ``LATEST``.
            Other tools' too: a directory of shards, a DCP directory, a Hugging Face directory, and what verl,
            accelerate's FSDP, DeepSpeed and loops that call `torch.save` on every rank leave.
        output: The export's directory; ``consolidated`` in the ``model`` directory by default.
        max_file_bytes: Largest file where no base model's split was recorded; that of the save by default.
        progress: Called with the bytes written and the bytes to write.
        storage: Where files are read and written.
        prefix: Prefix of the model's names in a DCP directory that holds more than a model, where its structure does
            not show it; "" for all of them.
        base: The base model; its tensors that the model's class does not load are carried over. The save's by default.
        diffusers_compatible: Whether files are named as diffusers expects; as the save was configured by default.
        assume_complete: Believe that no file is absent where nothing says how large tensors in pieces were.
        master_weights: Take the fp32 master weights of DeepSpeed where 16-bit weights are saved too.
        verify_export: Whether the class that ``config.json`` names has to load the export; by default as the save was
            configured, else true.

    Raises:
        CheckpointExistsError: There is an export already.
        ExportMismatchError: The class that ``config.json`` names would not load the export.
        CheckpointNotFoundError: There is nothing to export, or no base model to carry tensors over from.
        IncompleteCheckpointError: The path is an interrupted save.
        IntegrityError: A file is absent, too short, or has other bytes than were saved.
        FormatError: A file, or the manifest, is damaged.
        TensorError: A tensor is not whole, or not that of the class that ``config.json`` names.
        MisuseError: It is not a model (an optimizer, an adapter, a pipeline), or it is unclear which part is the model.
        UnverifiableError: Nothing says whether the tensors are whole.

    Examples:
        >>> path = checkpointer.save(step=10, model=model)  # shards
        >>> consolidate(path).path.name
        'consolidated'
    """
    place = Path(path).absolute()
    target = None if output is None else Path(output).absolute()
    with using(storage or current()):
        found = find_input(
            place, current(), prefix=prefix, assume_complete=assume_complete, master_weights=master_weights
        )
        options = _Options(max_file_bytes, progress, base, diffusers_compatible, verify_export)
        return _write(found, target or found.directory / _CONSOLIDATED, options)


def _write(found: ModelInput, target: Path, options: _Options) -> ConsolidateReport:
    """Write the export. Local."""
    store = current()
    if is_there(target):
        raise CheckpointExistsError(
            "the export is already there", path=target, hint="Use it, delete it, or choose another output."
        )
    found = _exported_tensors(found, options.base)
    reader = VerifyingReader(store, found.source.files, found.ledger)
    try:
        export = _planned(found, reader, options)
        _require_opens(export, options.verify_export)
        _publish(export, target, store, options.progress)
    finally:
        reader.close()
    names, nbytes = tuple(file.name for file in export.layout.files), export.layout.total_bytes
    return ConsolidateReport(target, names, len(export.tensors), nbytes, found.manifest, tuple(found.notes))


def _exported_tensors(found: ModelInput, base: str | os.PathLike[str] | None) -> ModelInput:
    """The input with the base model's tensors that are carried over, without those that are kept out of an export."""
    found = replace(found, source=carry_over(found, base))
    notes = [found.directory / METADATA_DIR / note for note in (KEPT_OUT, APART)]
    return replace(found, source=found.source.without(name for note in notes for name in _names(found, note)))


def _planned(found: ModelInput, reader: VerifyingReader, options: _Options) -> _Export:
    plain = {name: found.read(place) for name, place in side_files(found.beside).items()}
    tensors = _tensors(found, reader)
    note = _object(found, found.directory / METADATA_DIR / EXPORT)
    stem = _stem(found, note.get("stem"), options.diffusers_compatible)
    layout = _layout(found, tensors, note, stem, options.max_file_bytes)
    return _Export(found, tensors, layout, {**plain, index_name(stem): layout.index})


def _publish(export: _Export, target: Path, storage: Storage, progress: Progress | None) -> None:
    """Write the export beside ``target`` and rename it into place; a failure leaves no files."""
    aside = target.with_name(temporary_name(target.name))
    made = _absent(target.parent)
    with storage_errors(aside):
        storage.remove_tree(aside)
    try:
        storage.make_directory(aside)
        export.write(aside, storage, progress)
        with storage_errors(target):
            storage.rename_new(aside, target)
            storage.sync_directory(target.parent)
    except BaseException:
        with storage_errors(aside):
            storage.remove_tree(aside)
            for directory in made:
                storage.remove_empty(directory)
        raise


def _require_opens(export: _Export, verify_export: bool | None) -> None:
    """Check the planned export against the class that its configuration names, before a tensor is written."""
    found, plain, specs = export.found, export.plain, [tensor.spec for tensor in export.tensors.values()]
    if verify_export is None:
        verify_export = run_settings(found).get("verify_export") is not False
    if not verify_export or CONFIG not in plain:
        return
    why = check_described(json.loads(plain[CONFIG]), specs, found.beside / CONFIG)
    if why is not None:
        found.notes.append(f"not compared with a model class: {why}")


def _absent(directory: Path) -> list[Path]:
    """The directories that have to be made for this one to exist, the innermost first."""
    absent = []
    while not exists(directory):
        absent.append(directory)
        directory = directory.parent
    return absent


def _tensors(found: ModelInput, reader: VerifyingReader) -> dict[str, _Tensor]:
    if found.native and found.kind is not None:
        hub = hub_tensors(found.kind, found.source.tensors, reader)
        return {spec.name: _Tensor(spec, blocks) for spec, blocks in hub}

    def one(name: str) -> Blocks:
        return lambda: reader.blocks(found.source.tensors[name])

    return {name: _Tensor(tensor.spec, one(name)) for name, tensor in found.source.tensors.items()}


def _layout(
    found: ModelInput,
    tensors: Mapping[str, _Tensor],
    export: Mapping[str, JsonValue],
    stem: str,
    max_file_bytes: int | None,
) -> Layout:
    notes = found.directory / METADATA_DIR
    numbers = {n: i for n, i in _object(found, notes / FILE_INDEX).items() if isinstance(i, int)}
    dtypes = _object(found, notes / FILE_DTYPES)
    named = export.get("files")
    names = [str(name) for name in named] if isinstance(named, list) else []
    count = max(numbers.values(), default=0)
    files = {name: _file_name(number, count, names) for name, number in numbers.items()}
    recorded = export.get("max_file_bytes")
    limit = max_file_bytes if max_file_bytes is not None else recorded if type(recorded) is int else _MAX_FILE_BYTES
    specs = [_exported(tensor.spec, dtypes.get(name)) for name, tensor in tensors.items()]
    return lay_out(specs, base_files=files, max_file_bytes=limit, stem=stem)


def _file_name(number: int, count: int, names: Sequence[str]) -> str:
    if len(names) >= number > 0:
        return names[number - 1]
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _stem(found: ModelInput, noted: JsonValue, diffusers: bool | None) -> str:
    if diffusers is None and isinstance(noted, str):
        if os.sep in noted or noted.startswith("."):
            raise ConfigError(f"the recorded stem of file names is {noted!r}", path=found.directory)
        return noted
    if diffusers is None:
        diffusers = bool(run_settings(found).get("diffusers_compatible"))
    return _DIFFUSERS_STEM if diffusers else "model"


def _exported(spec: TensorSpec, dtype: JsonValue) -> TensorSpec:
    if isinstance(dtype, str) and {dtype, spec.dtype} <= FLOATS.keys():
        return spec._replace(dtype=dtype)
    return spec


def _object(found: ModelInput, path: Path) -> Mapping[str, JsonValue]:
    content = found.read_json(path)
    return content if isinstance(content, dict) else {}


def _names(found: ModelInput, path: Path) -> list[str]:
    content = found.read_json(path)
    return [str(name) for name in content] if isinstance(content, list) else []


@dataclass(frozen=True)
class _Export:
    """A planned export whose bytes are not written yet."""

    found: ModelInput
    tensors: Mapping[str, _Tensor]
    layout: Layout
    plain: Mapping[str, bytes]

    def write(self, aside: Path, storage: Storage, progress: Progress | None) -> None:
        """Write all files into the existing directory, the manifest last."""
        layout = self.layout
        storage.check_space(aside, layout.total_bytes)
        crcs: dict[str, int] = {}
        done = 0
        for file in layout.files:
            with SequentialFile(storage, aside / file.name, file.size) as made:
                made.append([file.header])
                for spec, _, _ in file.entries:
                    crcs[spec.name] = made.append(self._blocks(spec), spec.name)
                    done += spec.nbytes
                    if progress is not None:
                        progress(done, layout.tensor_bytes)
        self.found.ledger.settle(storage)
        record = layout_record(layout, crcs)
        files = []
        for name, content in self._plain(record.tensors).items():
            storage.make_directory((aside / name).parent)
            write_file(storage, aside / name, content)
            storage.sync_directory((aside / name).parent)
            files.append(FileRecord.plain(name, content))
        record += ComponentRecord(tuple(files), aliases=self._aliases())
        notes: dict[str, JsonValue] = {"source": "no manifest", "notes": list(self.found.notes)}
        write_manifest(storage, aside, record, {} if self.found.manifest else notes)

    def _plain(self, tensors: Sequence[TensorRecord]) -> Mapping[str, bytes]:
        """The files beside the tensors; the configuration's ties are those that were written."""
        note = _object(self.found, self.found.directory / METADATA_DIR / LOOSE_TIES)
        if not differing_ties({name: str(kept) for name, kept in note.items()}, tensors):
            return self.plain
        configs = {name: json.loads(self.plain[name]) for name in (CONFIG, CONFIG_V5) if name in self.plain}
        return {**self.plain, **{name: as_text(untied(entries)).encode() for name, entries in configs.items()}}

    def _aliases(self) -> tuple[AliasRecord, ...]:
        """Aliases of the tensors, from the checkpoint's manifest."""
        return tuple(
            AliasRecord("model", name, kept)
            for name, kept in saved_aliases(self.found.source).items()
            if kept in self.tensors and name not in self.tensors
        )

    def _blocks(self, spec: TensorSpec) -> Iterator[memoryview]:
        saved = self.tensors[spec.name]
        for block in saved.blocks():
            if saved.spec.dtype == spec.dtype:
                yield block
            else:
                values = torch.frombuffer(block, dtype=torch_dtype(saved.spec.dtype))
                yield as_bytes(values.to(torch_dtype(spec.dtype)))
