"""This process's data-, tensor- and pipeline-parallel ranks: given by the caller, or derived from the model.

Saves and loads of models need only the pipeline stage, to distinguish two stages' tensors of one name from replicas.
`Checkpointer.save_on_dp_ranks`, which writes a file for each data-parallel rank, needs all three.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from torch import nn

from shardwise.comm import Group
from shardwise.errors import MisuseError
from shardwise.stateful_wrappers.mesh_ranks import MeshRanks, mesh_ranks
from shardwise.stateful_wrappers.names import list_parameters

_HINT = "Pass {} to CheckpointingConfig.build()."


class Coordinates(NamedTuple):
    """A process's parallel coordinates."""

    dp: int
    tp: int
    pp: int


class _Row(NamedTuple):
    """One rank's gathered row: the parallel ranks that it was given and those by its meshes; a digest of its names."""

    given: Mapping[str, int]
    meshes: MeshRanks
    digest: str


class ParallelRanks:
    """Derives this process's parallel ranks where the caller did not give them.

    The order of ``pp_group``, the ranks of this pipeline, is that of the stages. A given rank that is not a whole
    number from 0 is a `MisuseError`.
    """

    def __init__(
        self, dp_rank: int | None, tp_rank: int | None, pp_rank: int | None, pp_group: dist.ProcessGroup | None
    ) -> None:
        given = {"dp_rank": dp_rank, "tp_rank": tp_rank, "pp_rank": pp_rank}
        self._given = {name: value for name, value in given.items() if value is not None}
        for name, value in self._given.items():
            if type(value) is not int or value < 0:
                raise MisuseError(
                    f"{name} is {value!r}", hint="Ranks are whole numbers from 0; left out, they are derived."
                )
        self._group_stage = None if pp_group is None else dist.get_rank(pp_group)
        self._meshes: MeshRanks | None = None
        self._names: tuple[str, ...] = ()
        self._seen: tuple[weakref.ref[nn.Module], ...] = ()

    @property
    def stage(self) -> int:
        """The pipeline stage: as given, by ``pp_group``, or by a mesh; 0 where none of them says.

        Stages that share one number here are distinguished by the names of their tensors wherever it matters.
        """
        return self._known_stage or 0

    @property
    def _known_stage(self) -> int | None:
        known = self._given.get("pp_rank", self._group_stage)
        return known if known is not None else (self._meshes or MeshRanks()).pp

    def look(self, parts: Sequence[nn.Module]) -> None:
        """Read a model's meshes before its first save or restore, and compare them with given ranks. Local."""
        if len(parts) == len(self._seen) and all(ref() is part for ref, part in zip(self._seen, parts, strict=True)):
            return
        listed = list_parameters(parts)
        meshes = mesh_ranks(parts, [named.tensor for named in listed])
        for name, derived in (("dp_rank", meshes.dp), ("tp_rank", meshes.tp), ("pp_rank", meshes.pp)):
            given = self._given.get(name)
            if given is not None and derived is not None and given != derived:
                raise MisuseError(
                    f"{name} was given as {given}, and by the meshes of the model's tensors it is {derived}",
                    hint=f"Leave {name} out, so that it is derived, or give this process's coordinate in the mesh.",
                )
        self._meshes = meshes
        self._names = tuple(named.name for named in listed if isinstance(named.tensor, nn.Parameter))
        self._seen = tuple(map(weakref.ref, parts))

    def all_coordinates(self, group: Group) -> list[Coordinates]:
        """The coordinates of each rank in order; `MisuseError` where one cannot be derived. All ranks call."""
        if group.world_size == 1:
            return [Coordinates(*(self._given.get(name, 0) for name in ("dp_rank", "tp_rank", "pp_rank")))]
        gathered = group.gather(self._own_row, "deriving the parallel ranks")
        rows = [_Row(given, MeshRanks(**meshes), digest) for given, meshes, digest in gathered]
        stages = self._stages(rows, group)
        tensor = [self._tensor_rank(row, rank) for row, rank in zip(rows, group.global_ranks, strict=True)]
        sharing: dict[tuple[int, int, int | None], list[int]] = {}
        for number, row in enumerate(rows):
            sharing.setdefault((stages[number], tensor[number], row.meshes.cp), []).append(number)
        data: dict[int, int] = {}
        for members in sharing.values():
            data |= _data_ranks(members, rows, group.global_ranks)
        return [Coordinates(data[number], tensor[number], stages[number]) for number in range(len(rows))]

    def _own_row(self) -> tuple[dict[str, int], dict[str, Any], str]:
        lacks = [name for name in ("dp_rank", "tp_rank", "pp_rank") if name not in self._given]
        if lacks and self._meshes is None:
            raise MisuseError(
                f"{', '.join(lacks)} cannot be derived yet: no model has been saved or restored",
                hint=_HINT.format(", ".join(lacks)) + " Or save or restore the model first.",
            )
        stage = self._known_stage
        given = self._given if stage is None else self._given | {"pp_rank": stage}
        digest = hashlib.blake2b("\n".join(sorted(self._names)).encode(), digest_size=16).hexdigest()
        return given, asdict(self._meshes or MeshRanks()), digest

    def _stages(self, rows: Sequence[_Row], group: Group) -> list[int]:
        """The stage of each rank: as known, or derived from its tensors' names, which no two stages share."""
        known = [row.given.get("pp_rank") for row in rows]
        if all(stage is not None for stage in known):
            return cast(list[int], known)
        distinct = list(dict.fromkeys(row.digest for row in rows))
        if len(distinct) == 1:
            return [0] * len(rows)
        first = [row.digest for row in rows].index(rows[group.rank].digest) == group.rank
        gathered = group.gather(lambda: list(self._names) if first else None, "comparing the stages' tensors")
        seen: set[str] = set()
        for rank, names in zip(group.global_ranks, gathered, strict=True):
            if names is None:
                continue
            if not names or not seen.isdisjoint(names) or any(stage is not None for stage in known):
                raise MisuseError(
                    "pp_rank cannot be derived: the ranks have different tensors, and some of them in common, or none",
                    rank=rank,
                    hint=_HINT.format("pp_rank"),
                )
            seen.update(names)
        return [distinct.index(row.digest) for row in rows]

    @staticmethod
    def _tensor_rank(row: _Row, rank: int) -> int:
        if "tp_rank" in row.given:
            return row.given["tp_rank"]
        if row.meshes.tp is not None:
            return row.meshes.tp
        if row.meshes.unclear:
            raise MisuseError(
                f"tp_rank cannot be derived: {row.meshes.unclear}", rank=rank, hint=_HINT.format("tp_rank and dp_rank")
            )
        return 0


def _data_ranks(members: Sequence[int], rows: Sequence[_Row], global_ranks: Sequence[int]) -> dict[int, int]:
    """The data-parallel ranks of processes that differ in no other coordinate.

    Their meshes give them where all differ there; otherwise, as under DDP, their order does.
    """
    lacking = [number for number in members if "dp_rank" not in rows[number].given]
    for number in lacking:
        if rows[number].meshes.unclear:
            raise MisuseError(
                f"dp_rank cannot be derived: {rows[number].meshes.unclear}",
                rank=global_ranks[number],
                hint=_HINT.format("dp_rank"),
            )
    by_mesh = [rows[number].meshes.dp for number in members]
    are_distinct = None not in by_mesh and len(set(by_mesh)) == len(members)
    found = dict(zip(members, cast(list[int], by_mesh) if are_distinct else range(len(members)), strict=True))
    found |= {number: rows[number].given["dp_rank"] for number in members if number not in lacking}
    if lacking and len(set(found.values())) < len(members):
        raise MisuseError(
            f"dp_rank was given on some ranks, and that of another would be the same: {sorted(found.values())}",
            rank=global_ranks[lacking[0]],
            hint="Give dp_rank on every rank, or on none.",
        )
    return found
