"""Writing tensors as shard files, from front to back: the files of a save by one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from shardwise.disk.sequential import SequentialFile
from shardwise.disk.storage import Storage
from shardwise.engine.records import ComponentRecord, layout_record
from shardwise.format.header import encode_header
from shardwise.format.sharding import encode_sharding_metadata
from shardwise.ops.tensors_to_write import TensorToWrite
from shardwise.plan.layout import FileLayout, Layout, lay_out, shard_name

_MAX_FILE_BYTES = 5_000_000_000


def shards_of(tensors: Mapping[str, TensorToWrite], stem: str) -> Layout:
    """The shard files of whole tensors; their names are those of the first rank."""
    plain = lay_out([each.spec for each in tensors.values()], max_file_bytes=_MAX_FILE_BYTES)
    files = []
    for number, file in enumerate(plain.files, start=1):
        starts = encode_sharding_metadata({spec.name: (0,) * len(spec.shape) for spec, _, _ in file.entries})
        name = shard_name(1, number, len(plain.files), stem)
        files.append(FileLayout(name, encode_header(file.entries, starts), file.entries))
    return Layout(tuple(files))


def write_shards(
    layout: Layout,
    tensors: Mapping[str, TensorToWrite],
    directory: Path,
    storage: Storage,
    advance: Callable[[int], None],
) -> ComponentRecord:
    """Write the files into an existing directory, durably. Memory is a block, or a tensor that has to be computed.

    Args:
        layout: From `shards_of`.
        tensors: By name.
        directory: Where to; its name is the component's.
        storage: Through what.
        advance: Called with bytes that were written.

    Returns:
        The record, with paths relative to the directory's parent.
    """
    crcs: dict[str, int] = {}
    for file in layout.files:
        with SequentialFile(storage, directory / file.name, file.size) as made:
            made.append([file.header])
            for spec, _, _ in file.entries:
                crcs[spec.name] = made.append(tensors[spec.name].blocks(), spec.name)
                advance(spec.nbytes)
    return layout_record(layout, crcs, directory.name, f"{directory.name}/")
