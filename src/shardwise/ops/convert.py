"""Converts a checkpoint that another tool wrote: to a Hugging Face model, to DCP, or to a checkpoint to go on from.

One process that uses all cores, and memory that does not grow with the model; the source is never changed. What is not
understood is refused before anything is written, and a failure leaves nothing.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Literal, TypeAlias, cast
from zlib import crc32

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp

from shardwise._version import __version__
from shardwise.addons.hf_config import CONFIG
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import Storage, current, using
from shardwise.dtypes import torch_dtype
from shardwise.engine.collector import without_collector
from shardwise.engine.load import saved_aliases
from shardwise.engine.records import ComponentRecord, layout_record, write_manifest
from shardwise.errors import MisuseError
from shardwise.format.dcp_metadata import parsed_once
from shardwise.format.header import TensorEntry, encode_header, encode_sharding_metadata
from shardwise.format.manifest import AliasRecord
from shardwise.format.notes import ASIDE_DIR, DCP_METADATA_NAME, METADATA_DIR, NOTES, PER_RANK_DIR
from shardwise.format.strict_json import JsonValue
from shardwise.geometry import TensorSpec
from shardwise.lifecycle import LATEST, LINEAGE_NAME, METRICS_NAME, checkpoint_name, next_lineage, set_pointer
from shardwise.lifecycle.names import foreign_numbers
from shardwise.ops.beside import side_files
from shardwise.ops.consolidate import consolidate
from shardwise.ops.consolidate_input import ModelInput, SourceHints, class_of, find_input
from shardwise.ops.exporting import TensorWriter, batches_of, refuse_existing, write_plain, written_aside
from shardwise.ops.optimizer_input import OptimizerInput, find_optimizer, states_beside
from shardwise.ops.tensors_to_write import TensorToWrite, as_saved, computing, native_tensors_to_write, tensors_to_write
from shardwise.ops.torchtitan_names import ROPES, Rope
from shardwise.ops.verify import Counted, Progress
from shardwise.plan.layout import FileLayout, Layout, lay_out, shard_name
from shardwise.sources.dcp_values import DcpValues, is_dcp
from shardwise.sources.others.rank_files import optimizer_beside
from shardwise.sources.reader import VerifyingReader
from shardwise.upstream.torch_distributed import storage_info

__all__ = ["FORMATS", "ConvertReport", "Format", "convert"]

Format: TypeAlias = Literal["hf", "dcp", "shards"]
FORMATS: tuple[Format, ...] = ("hf", "dcp", "shards")
_MODEL, _OPTIM = "model", "optim"


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was written.

    Attributes:
        path: The directory; of ``shards`` the checkpoint in the root that was asked for.
        format: ``hf``, ``dcp`` or ``shards``.
        tensors: Number of the model's tensors.
        nbytes: Their bytes, and those of the optimizer's.
        optimizer: Whether an optimizer's state was carried over.
        verified: Every byte was compared with the digests in the source's manifest.
        notes: What was left out, changed, or could not be checked, one sentence each.
    """

    path: Path
    format: Format
    tensors: int
    nbytes: int
    optimizer: bool = False
    verified: bool = False
    notes: tuple[str, ...] = ()


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Format,
    *,
    config: str | os.PathLike[str] | None = None,
    prefix: str | None = None,
    rope: Rope | None = None,
    master_weights: bool = False,
    optimizer: bool | None = None,
    epoch: int | None = None,
    step: int | None = None,
    assume_complete: bool = False,
    verify_export: bool | None = None,
    progress: Progress | None = None,
    storage: Storage | None = None,
) -> ConvertReport:
    """Convert a checkpoint.

    Args:
        source: A directory of DCP, of shards, of a Hugging Face model, of a run; or a file of ``torch.save``.
        target: The directory to write, which must not exist. Of ``shards`` it is a root, with one checkpoint in it.
        to: ``hf`` for a Hugging Face model; ``dcp`` for what ``torch.distributed.checkpoint.load`` reads, with the
            model's state dict below ``model``; ``shards`` for a checkpoint that `Checkpointer.restore` goes on from.
        config: Directory with ``config.json``, the tokenizer and the like, where they are not beside the source.
        prefix: What the names of the model's tensors begin with in the source, where that is not clear; "" for nothing.
        rope: As for `consolidate`.
        master_weights: As for `consolidate`.
        optimizer: Whether the optimizer's state goes into ``shards``. By default it does where there is one, and one
            that cannot be carried over is refused.
        epoch: Epoch of the checkpoint in ``shards``; by default what the source's name says, else 0.
        step: The same of its step.
        assume_complete: As for `consolidate`.
        verify_export: As for `consolidate`.
        progress: Called with the bytes written and the bytes to write.
        storage: Where files are read and written.

    Raises:
        CheckpointExistsError: There is something at ``target``.
        CheckpointNotFoundError: There is nothing at ``source``.
        MisuseError: The source is no model, or something of it is not clear; or it has an optimizer that cannot be
            carried over.
        IntegrityError, FormatError: The source is damaged.
        TensorError: A tensor is not whole, or not that of the class in ``config.json``.
        UnsafePickleError: A file would have to run code to be read.
        UnverifiableError: Nothing says whether the tensors are whole.
        ExportMismatchError: The class that ``config.json`` names would not load the model.
        StorageError: The file system refused.

    Examples:
        >>> path = checkpointer.save(step=10, model=model, optimizer=optimizer)
        >>> convert(path, "exported/dcp", "dcp").tensors > 0
        True
    """
    if to not in FORMATS or (rope is not None and rope not in ROPES):
        raise MisuseError(f"to is {to!r}, rope {rope!r}", hint=f"to is one of {FORMATS}, rope None or one of {ROPES}.")
    if to != "shards" and (optimizer or epoch is not None or step is not None):
        raise MisuseError("optimizer, epoch and step are for shards", hint="Leave them out, or convert to shards.")
    place = Path(target).absolute()
    with using(storage or current()), parsed_once(), without_collector():
        refuse_existing(place)
        if to == "hf":
            made = consolidate(
                source, place, progress=progress, prefix=prefix, assume_complete=assume_complete,
                verify_export=verify_export, config=config, rope=rope, master_weights=master_weights,
            )  # fmt: skip
            return ConvertReport(made.path, to, made.tensors, made.nbytes, verified=made.verified, notes=made.notes)
        described = None if config is None else Path(config).absolute()
        hints = SourceHints(prefix, assume_complete, described, rope, master_weights)
        found = find_input(Path(source).absolute(), hints)
        with closing(VerifyingReader(current(), found.source.files, found.ledger)) as reader:
            if to == "dcp":
                return _to_dcp(found, reader, place, progress)
            return _to_shards(found, reader, place, progress, optimizer, (epoch, step))


def _aliases(found: ModelInput, names: Mapping[str, TensorToWrite]) -> dict[str, str]:
    """Further names of tensors, where parameters are tied."""
    known = saved_aliases(found.source) | (dict(found.kind.others) if found.kind is not None else {})
    return {name: kept for name, kept in known.items() if kept in names and name not in names}


# --- DCP -------------------------------------------------------------------------------------------------------------

# The files are those that torch's ``FileSystemWriter`` writes: items of ``torch.save`` one after the other in
# ``.distcp`` files, and ``.metadata``, which says where each is. Source: torch 2.13's
# ``torch.distributed.checkpoint.filesystem``. An item is the tensor's elements between bytes that its shape and dtype
# determine, but for a checksum behind them. So the place of every item is known beforehand, and none is ever whole in
# memory.


#: What torch calls the current layout of such directories.
_VERSION = "1.0.0"
#: In a zip archive: the name of the elements' entry, how an entry of its directory begins, and where its checksum is.
_ELEMENTS, _DIRECTORY_ENTRY, _CHECKSUM_AT = b"/data/0", b"PK\x01\x02", 16
#: Behind the elements: where their checksum is in what follows them at once (APPNOTE.TXT, 4.3.9).
_DESCRIPTOR_AT = 4


def _to_dcp(found: ModelInput, reader: VerifyingReader, place: Path, progress: Progress | None) -> ConvertReport:
    """Write ``{"model": state_dict}``; both names of tied tensors lead to the same bytes."""
    if found.kind is None:
        found = replace(found, kind=class_of(found))  # a checkpoint with a manifest was not compared with its class
    tensors = native_tensors_to_write(found, reader.blocks)
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    nbytes = sum(spec.nbytes for spec in specs.values())
    frames = {kind: _frame(spec) for kind, spec in {(spec.shape, spec.dtype): spec for spec in specs.values()}.items()}
    layout = _dcp_layout(specs, frames)

    def item(name: str) -> Iterator[memoryview]:
        return frames[specs[name].shape, specs[name].dtype].around(tensors[name].blocks())

    _tell_left(found, None)
    with written_aside(place) as aside:
        current().check_space(aside, nbytes)
        TensorWriter(layout, aside, Counted(nbytes, progress).add).write(batches_of(layout, item, specs))
        names = {name: name for name in specs} | _aliases(found, tensors)
        write_file(current(), aside / DCP_METADATA_NAME, pickle.dumps(_dcp_metadata(layout, specs, names)))
        found.ledger.settle(current())
    return ConvertReport(place, "dcp", len(tensors), nbytes, False, found.manifest, tuple(found.notes))


def _dcp_metadata(layout: Layout, specs: Mapping[str, TensorSpec], names: Mapping[str, str]) -> dcp.Metadata:
    """What ``.metadata`` says; ``names`` are all names -> those of the tensors."""
    places = {
        entry.spec.name: storage_info(file.name, entry.begin, entry.end - entry.begin, None)
        for file in layout.files
        for entry in file.entries
    }
    paths = {f"{_MODEL}.{name}": (_MODEL, name) for name in names}
    metadata = dcp.Metadata({}, paths, {}, dcp.StorageMeta(), version=_VERSION)
    for name, own in names.items():
        shape, zeros = torch.Size(specs[own].shape), [0] * len(specs[own].shape)
        properties = dcp.TensorProperties(dtype=torch_dtype(specs[own].dtype))
        chunks = [dcp.ChunkStorageMetadata(torch.Size(zeros), shape)]
        metadata.state_dict_metadata[f"{_MODEL}.{name}"] = dcp.TensorStorageMetadata(properties, shape, chunks)
        metadata.storage_data[dcp.MetadataIndex(f"{_MODEL}.{name}", torch.Size(zeros))] = places[own]
    return metadata


def _dcp_layout(specs: Mapping[str, TensorSpec], frames: Mapping[tuple[tuple[int, ...], str], _Frame]) -> Layout:
    """The files, named as DCP names those of its first rank; as many as an export has: writers of one take turns."""
    files = []
    for number, file in enumerate(lay_out(specs.values()).files):
        entries, at = [], 0
        for spec, _, _ in file.entries:
            frame = frames[spec.shape, spec.dtype]
            end = at + len(frame.head) + spec.nbytes + len(frame.tail)
            entries.append(TensorEntry(spec, at, end))
            at = end
        files.append(FileLayout(f"__0_{number}.distcp", b"", tuple(entries)))
    return Layout(tuple(files))


@dataclass(frozen=True, slots=True)
class _Frame:
    """What ``torch.save`` writes before and behind the elements of a tensor of one shape and dtype.

    ``checksums`` is where in ``tail`` the elements' CRC-32 stands.
    """

    head: bytes
    tail: bytes
    checksums: tuple[int, ...]

    def around(self, blocks: Iterator[memoryview]) -> Iterator[memoryview]:
        """A tensor's bytes as ``torch.save`` writes it."""
        yield memoryview(self.head)
        crc = 0
        for block in blocks:
            yield block
            crc = crc32(block, crc)
        tail = bytearray(self.tail)
        for at in self.checksums:
            tail[at : at + 4] = crc.to_bytes(4, "little")
        yield memoryview(tail)


def _frame(spec: TensorSpec) -> _Frame:
    """What surrounds such a tensor, as torch writes it around whatever is in memory that is never written to."""
    whole = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    start = whole.data_ptr()
    head, tail = bytearray(), bytearray()
    passed = 0

    def write(part: bytes | memoryview) -> int:
        nonlocal passed
        data = np.frombuffer(part, dtype=np.uint8)
        if start <= data.ctypes.data < start + spec.nbytes:
            passed += len(data)
        else:
            (tail if passed else head).extend(part)
        return len(data)

    torch.save(whole, cast("IO[bytes]", SimpleNamespace(write=write, flush=lambda: None)))
    if not spec.nbytes:  # the checksum of nothing stands there already
        return _Frame(bytes(head), b"", ())
    entry = tail.rindex(_DIRECTORY_ENTRY, 0, tail.index(_ELEMENTS))
    return _Frame(bytes(head), bytes(tail), (_DESCRIPTOR_AT, entry + _CHECKSUM_AT))


# --- shards ----------------------------------------------------------------------------------------------------------


def _to_shards(
    found: ModelInput,
    reader: VerifyingReader,
    root: Path,
    progress: Progress | None,
    with_optimizer: bool | None,
    numbers: tuple[int | None, int | None],
) -> ConvertReport:
    store = current()
    for part in (ASIDE_DIR, PER_RANK_DIR):
        if is_directory(found.directory / part):
            raise MisuseError(
                f"the model has state that is no tensor of it ({part}), which cannot be carried over",
                path=found.directory / part,
                hint="Restore the checkpoint where the model is built, and save it there.",
            )
    optimizer = None if with_optimizer is False else find_optimizer(found)
    if optimizer is None and with_optimizer:
        raise MisuseError("there is no optimizer beside the model", path=found.directory, hint="Leave out --optimizer.")
    epoch, step = _numbers(found, *numbers, needed=optimizer is not None)
    name = checkpoint_name(epoch, step)
    tensors = tensors_to_write(found, reader.blocks)
    written = [*tensors.values(), *(() if optimizer is None else optimizer.source.tensors.values())]
    total = sum(each.spec.nbytes for each in written)
    advance = Counted(total, progress).add
    _tell_left(found, optimizer)
    with written_aside(root) as aside:
        store.check_space(aside, total)
        directory = aside / name
        record = _model(found, tensors, directory, advance)
        if optimizer is not None:
            beside = write_plain({f"{_OPTIM}/{file}": content for file, content in optimizer.plain.items()}, directory)
            with closing(VerifyingReader(store, optimizer.source.files, found.ledger)) as more:
                states = as_saved(optimizer.source.tensors, computing(more.blocks, optimizer.computed))
                record += _shards(states, directory / _OPTIM, advance) + ComponentRecord(beside)
        found.ledger.settle(store)
        plain = {LINEAGE_NAME: next_lineage(aside, [], name, epoch, step, None).encode()}
        if is_file(found.checkpoint / METRICS_NAME):
            plain[METRICS_NAME] = found.read(found.checkpoint / METRICS_NAME)
        record += ComponentRecord(write_plain(plain, directory))
        notes = cast(JsonValue, list(found.notes))
        info: dict[str, JsonValue] = {"epoch": epoch, "step": step, "world_size": 1, "metrics": {}, "converted": notes}
        write_manifest(store, directory, record, {"shardwise": __version__, **info})
        set_pointer(aside, LATEST, name)
    return ConvertReport(
        root / name, "shards", len(tensors), total, optimizer is not None, found.manifest, tuple(found.notes)
    )


def _numbers(found: ModelInput, epoch: int | None, step: int | None, *, needed: bool) -> tuple[int, int]:
    """Epoch and step of the checkpoint: what was asked for, or the nearest that names of the source say."""
    source = found.source.path
    for name in (source.stem if not is_directory(source) else source.name, found.checkpoint.name, source.parent.name):
        said_epoch, said_step = foreign_numbers(name)
        if step is None and said_step is not None:
            step, epoch = said_step, epoch if epoch is not None else said_epoch
    if step is None and needed:
        raise MisuseError(
            "the source's name does not say at which step it was saved",
            path=source,
            hint="Say it: --step N (step=N), and --epoch N if the run counts epochs.",
        )
    return epoch or 0, step or 0


def _model(
    found: ModelInput, tensors: Mapping[str, TensorToWrite], checkpoint: Path, advance: Callable[[int], None]
) -> ComponentRecord:
    record = _shards(tensors, checkpoint / _MODEL, advance)
    notes = found.directory / METADATA_DIR
    own = side_files(found.beside)
    if CONFIG not in own and not is_directory(notes):
        own = {}  # whatever lies beside a run's tensors is not the model's
    own |= {name: notes / name for name in NOTES if is_file(notes / name)}
    plain = {f"{_MODEL}/{METADATA_DIR}/{name}": found.read(path) for name, path in own.items()}
    aliases = tuple(AliasRecord(_MODEL, name, kept) for name, kept in sorted(_aliases(found, tensors).items()))
    return record + ComponentRecord(write_plain(plain, checkpoint), aliases=aliases)


def _shards(tensors: Mapping[str, TensorToWrite], directory: Path, advance: Callable[[int], None]) -> ComponentRecord:
    """Write the shard files that a save by one rank would have into a component's directory, durably."""
    current().make_directory(directory)
    plain = lay_out([each.spec for each in tensors.values()])
    files = []
    for number, file in enumerate(plain.files, start=1):
        starts = encode_sharding_metadata({spec.name: (0,) * len(spec.shape) for spec, _, _ in file.entries})
        name = shard_name(1, number, len(plain.files), directory.name)
        files.append(FileLayout(name, encode_header(file.entries, starts), file.entries))
    layout = Layout(tuple(files))
    batches = batches_of(layout, lambda name: tensors[name].blocks(), tensors)
    crcs = TensorWriter(layout, directory, advance).write(batches)
    return layout_record(layout, crcs, directory.name, f"{directory.name}/")


def _tell_left(found: ModelInput, optimizer: OptimizerInput | None) -> None:
    """Note what else is in a checkpoint."""
    left: dict[str, None] = {}
    if found.checkpoint != found.directory and is_directory(found.checkpoint):
        here = [name for name in names_in(found.checkpoint) if is_directory(found.checkpoint / name)]
        taken = (_MODEL,) if optimizer is None else (_MODEL, _OPTIM)
        left = {name: None for name in here if name not in taken and not name.startswith(".")}
    values = None if optimizer is None else optimizer.values
    if values is not None:
        left |= dict.fromkeys(states_beside(values, found, carried=True))
    if is_dcp(found.directory) and (values is None or values.directory != found.directory):
        carried = optimizer is not None
        left |= dict.fromkeys(states_beside(DcpValues(found.directory), found, carried=carried))
    trainers = optimizer_beside(found.source.path)
    if trainers is not None and is_dcp(trainers) and values is None:
        left[trainers.name] = None
    if left:
        found.notes.append(f"not carried over: {', '.join(left)}")
