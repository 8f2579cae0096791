"""Tensors that have to be computed, on the merging path: each rank appends what it makes to a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from shardwise.comm import Group, JsonValue
from shardwise.disk.sequential import SequentialFile
from shardwise.disk.storage import Storage
from shardwise.dtypes import torch_dtype
from shardwise.engine.computed import write_computed
from shardwise.engine.export import ExportPlan
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.reads import SourceChunk, SourceTensor
from shardwise.plan.roster import Roster
from shardwise.plan.schedule import WriteRun
from shardwise.sources.tensor_bytes import byte_blocks


@dataclass(frozen=True)
class ComputedFiles:
    """Where the computed tensors of all ranks lie. The same on every rank.

    ``sources`` and ``digests`` are by tensor name; chunks refer to ``paths``.
    """

    paths: tuple[Path, ...]
    sources: Mapping[str, SourceTensor]
    digests: Mapping[str, int]

    def others(self, roster: Roster) -> Roster:
        """Who holds what, without the computed tensors, which no rank holds a part of."""
        if not self.sources:
            return roster
        declarations = {
            digest: replace(
                declaration, specs=tuple(spec for spec in declaration.specs if spec.name not in self.sources)
            )
            for digest, declaration in roster.declarations.items()
        }
        return Roster(declarations, roster.digests, roster.coordinates)


def write_aside(plan: ExportPlan, directory: Path, group: Group, storage: Storage) -> ComputedFiles:
    """Compute what has to be computed and put it into ``directory``, front to back. All ranks of the group call.

    One group of tensors is in memory at a time, on the rank that computes it.

    Raises:
        ConversionError: The conversion did not give what it announced.
        StorageError: The file system refused, on any rank; the same error on every rank.
    """
    if not group.any(bool(plan.computed.groups), "looking for tensors that have to be computed"):
        return ComputedFiles((), {}, {})
    paths = tuple(directory / f"computed-{rank:05d}" for rank in range(1, group.world_size + 1))
    own: list[JsonValue] = []
    with group.together(f"computing tensors of {plan.directory}"):
        storage.make_directory(directory)
        with SequentialFile(storage, paths[group.rank]) as file:

            def append(run: WriteRun) -> None:
                start = file.size
                crc = file.append(byte_blocks(run.data, torch_dtype(run.spec.dtype)), run.spec.name)
                own.append([run.spec.name, list(run.spec.shape), run.spec.dtype, start, crc])

            failure = write_computed(plan.computed, plan.layout, group, append)
            if failure is not None:
                raise failure
    rows = cast(list[list[list[JsonValue]]], group.gather_json(own, "gathering records"))
    sources: dict[str, SourceTensor] = {}
    digests: dict[str, int] = {}
    for number, theirs in enumerate(rows):
        for row in theirs:
            name, shape, dtype, offset, crc = cast(tuple[str, list[int], str, int, int], tuple(row))
            spec = TensorSpec(name, tuple(shape), dtype)
            sources[name] = SourceTensor(spec, (SourceChunk(Box.whole(spec.shape), number, offset),))
            digests[name] = crc
    return ComputedFiles(paths, sources, digests)
