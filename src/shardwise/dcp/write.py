"""Writing one rank's tensor items: at their final offsets in finished files, or into shard files of the rank's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from shardwise.dcp.items import Task, Written, box_of, resolve, spec_of
from shardwise.disk.crc import shift
from shardwise.disk.sequential import SequentialFile
from shardwise.disk.storage import Storage
from shardwise.dtypes import torch_dtype
from shardwise.engine.writer import FileSet, write_run
from shardwise.format.manifest import ChunkRecord, FileRecord
from shardwise.geometry import runs
from shardwise.plan.layout import Layout
from shardwise.plan.schedule import WriteRun
from shardwise.plan.shards import ShardFile, ShardPiece, shard_files
from shardwise.sources.digest import contribution
from shardwise.sources.tensor_bytes import byte_blocks


def write_final(
    storage: Storage, directory: Path, items: Sequence[WriteItem], planner: SavePlanner, layout: Layout
) -> list[WriteResult]:
    """Write items into the files of a layout, which exist, and make them durable."""
    files = FileSet(storage, [directory / file.name for file in layout.files])
    results = []
    try:
        for item in items:
            spec, box = spec_of(item), box_of(item)
            data = resolve(item, planner, box)
            place = layout.places[spec.name]
            total = 0
            for first, count, index in runs(box, spec.shape):
                start = first * spec.itemsize
                run = WriteRun(place.file, place.offset + start, 0, spec, start, data[index])
                total ^= shift(write_run(run, files, storage), spec.nbytes - start - count * spec.itemsize)
            nbytes = box.numel * spec.itemsize
            results.append(WriteResult(item.index, nbytes, Written(nbytes, total)))
        files.sync()
    finally:
        files.close()
    return results


def write_shards(
    storage: Storage, directory: Path, items: Sequence[WriteItem], planner: SavePlanner, task: Task, stem: str
) -> list[WriteResult]:
    """Make this rank's shard files, write its items into them and make them durable."""
    by_box = {(item.index.fqn, box_of(item)): item for item in items}
    pieces = [ShardPiece(0, spec_of(i), box_of(i), resolve(i, planner, box_of(i))) for i in items]
    planned = shard_files(pieces, task.rank, task.world_size, None, stem)
    storage.check_space(directory, sum(file.layout.size for file in planned))
    results = []
    for file in planned:
        for name, written in _write_pieces(file, directory, storage):
            assert written.chunk is not None
            index = by_box[(name, written.chunk.box)].index
            results.append(WriteResult(index, written.nbytes, written))
    return results


def _write_pieces(file: ShardFile, directory: Path, storage: Storage) -> list[tuple[str, Written]]:
    header = file.layout.header
    record = FileRecord.of_tensors(file.layout.name, file.layout.size, header)
    out = []
    with SequentialFile(storage, directory / file.layout.name, file.layout.size) as made:
        made.append([header])
        for spec, begin, end in file.layout.entries:
            piece, dtype = file.pieces[spec.name], torch_dtype(spec.dtype)
            crc = made.append(byte_blocks(piece.data, dtype), spec.name)
            share = contribution(piece.box, piece.spec.shape, piece.data, crc, dtype)
            chunk = ChunkRecord(record.path, len(header) + begin, end - begin, piece.box, crc)
            out.append((spec.name, Written(end - begin, share, chunk, record)))
    return out
