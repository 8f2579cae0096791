"""Who holds what, known to every rank without gathering the ranks' plans. Pure.

A rank declares its tensors (`Declaration`): names, shapes, dtypes and how each is spread. Ranks of one kind declare the
same, so declarations are compared by digest and only the distinct ones travel. With each rank's mesh coordinates, a few
integers, every rank can compute every other rank's boxes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shardwise.errors import IncompleteTensorError, NameCollisionError
from shardwise.geometry import TensorSpec
from shardwise.plan.fragments import HeldPart, HeldTensor, Part
from shardwise.plan.placement import MeshKey, Placement, shard_coordinate


def _part_code(part: Part) -> str:
    mesh = "" if part.mesh is None else f"{part.mesh.names}{part.mesh.shape}{part.mesh.ordinal}"
    differs = "~" if part.may_differ else ""
    return f"{part.native_shape}|{mesh}|{part.placements}|{part.view}{differs}"


@dataclass(frozen=True)
class Declaration:
    """A rank's tensors, in the model's order; equal on ranks of one kind.

    ``stage``, the pipeline's, keeps two stages' tensors of one name from passing for replicas; ``digest`` is over all.
    """

    specs: tuple[TensorSpec, ...]
    stage: int
    digest: str

    @staticmethod
    def of(held: Sequence[HeldTensor], stage: int = 0) -> Declaration:
        """Describe a rank's tensors."""
        # The text behind a tensor's name is the same for all tensors of one kind.
        kinds: dict[tuple[object, ...], str] = {}
        text = [str(stage)]
        specs = []
        for spec, grid, parts in held:
            kind = (spec.shape, spec.dtype, grid, *[part.part for part in parts])
            code = kinds.get(kind)
            if code is None:
                spreads = [_part_code(part.part) for part in parts]
                code = kinds[kind] = f"\0{spec.shape}{spec.dtype}{grid}{spreads}\n"
            text += spec.name, code
            specs.append(spec)
        digest = hashlib.blake2b("".join(text).encode(), digest_size=16).hexdigest()
        return Declaration(tuple(specs), stage, digest)


Coordinates = Mapping[MeshKey, tuple[int, ...]]


@dataclass(frozen=True)
class Roster:
    """All ranks' declarations (the distinct ones, by digest; each rank's digest) and coordinates, equal everywhere."""

    declarations: Mapping[str, Declaration]
    digests: tuple[str, ...]
    coordinates: tuple[Coordinates, ...]
    _peers: dict[tuple[str, MeshKey | None, tuple[Placement, ...]], ShardSet] = field(
        default_factory=dict, compare=False
    )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.digests)

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The union of all ranks' tensors, in order of stage, then as declared.

        Raises `NameCollisionError`: two kinds of rank declare one name with different shapes or dtypes, or two pipeline
        stages declare the same name.
        """
        found: dict[str, TensorSpec] = {}
        stages: dict[str, int] = {}
        for declaration in sorted(self.declarations.values(), key=lambda each: each.stage):
            stage = declaration.stage
            for spec in declaration.specs:
                known = found.setdefault(spec.name, spec)
                known_stage = stages.setdefault(spec.name, stage)
                if known_stage != stage or (known is not spec and known != spec):
                    raise _collision(spec, stage, known, known_stage)
        return tuple(found.values())

    @cached_property
    def _declarers(self) -> dict[str, str]:
        """For each tensor name, a key of the set of digests that declare it."""
        names: dict[str, str] = {}
        joined: dict[tuple[str, str], str] = {}  # the same text object for all names of one set
        for digest, declaration in self.declarations.items():
            for spec in declaration.specs:
                known = names.setdefault(spec.name, digest)
                if known is not digest:
                    names[spec.name] = joined.setdefault((known, digest), f"{known},{digest}")
        return names

    def shard_set(self, name: str, part: Part) -> ShardSet:
        """The ranks that hold a part of tensor ``name``, by what they hold."""
        declarers = self._declarers[name]
        # The native shape and the view do not matter for who holds what: enumerate the ranks once for all of them.
        key = (declarers, part.mesh, part.placements)
        found = self._peers.get(key)
        if found is None:
            found = self._peers[key] = self._shard_set(set(declarers.split(",")), part)
        return found

    def holders(self, held: Iterable[HeldTensor]) -> Iterator[tuple[int, HeldPart, ShardSet]]:
        """For each part of each of a rank's tensors: the tensor's number, the part, and the ranks that hold one."""
        declarers = self._declarers
        known: dict[tuple[str, int], ShardSet] = {}  # most tensors share their part object with others
        for number, tensor in enumerate(held):
            declared_by = declarers[tensor.spec.name]
            for part in tensor.parts:
                key = (declared_by, id(part.part))
                found = known.get(key)
                if found is None:
                    found = known[key] = self.shard_set(tensor.spec.name, part.part)
                yield number, part, found

    def _shard_set(self, digests: set[str], part: Part) -> ShardSet:
        replicas: dict[tuple[int, ...], list[int]] = {}
        for rank, (digest, coordinates) in enumerate(zip(self.digests, self.coordinates, strict=True)):
            if digest in digests and (part.mesh is None or part.mesh in coordinates):
                own = () if part.mesh is None else shard_coordinate(part.placements, coordinates[part.mesh])
                replicas.setdefault(own, []).append(rank)
        return ShardSet({where: tuple(ranks) for where, ranks in sorted(replicas.items())})

    def check_complete(self, held: Sequence[HeldTensor]) -> None:
        """Check that the ranks together hold all of every tensor of ``held``.

        Raises `IncompleteTensorError`: a mesh coordinate that holds a piece is missing from the group.
        """
        checked: set[ShardSet] = set()
        for number, part, found in self.holders(held):
            if found in checked:
                continue
            checked.add(found)
            mesh_shape = () if part.part.mesh is None else part.part.mesh.shape
            wanted = math.prod(shard_coordinate(part.part.placements, mesh_shape))  # along the dimensions that split
            present = len(found.replicas)
            if present != wanted:
                what = f"{present} of {wanted} pieces are held by the ranks that save together"
                hint = "Save with a process group that contains every rank of the tensor's mesh."
                raise IncompleteTensorError(what, tensor=held[number].spec.name, hint=hint)


@dataclass(frozen=True, eq=False)
class ShardSet:
    """Ranks by what they hold: shard coordinate -> the ranks that hold exactly that (replicas), ascending."""

    replicas: Mapping[tuple[int, ...], tuple[int, ...]]

    @cached_property
    def members(self) -> tuple[int, ...]:
        """All ranks concerned, ascending."""
        return tuple(sorted(rank for ranks in self.replicas.values() for rank in ranks))

    def replicas_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same as ``rank``, itself included."""
        return self._by_rank[rank]

    @cached_property
    def _by_rank(self) -> dict[int, tuple[int, ...]]:
        return {rank: ranks for ranks in self.replicas.values() for rank in ranks}


def _collision(spec: TensorSpec, stage: int, known: TensorSpec, known_stage: int) -> NameCollisionError:
    here, there = (f"{each.dtype} {list(each.shape)}" for each in (known, spec))
    return NameCollisionError(
        f"pipeline stages {known_stage} and {stage} both have a tensor of this name"
        if stage != known_stage
        else f"ranks disagree about this tensor: {here} here, {there} there",
        tensor=spec.name,
        hint="Give each stage's modules the names that they have in the whole model; a last stage has its copy of a "
        "tied embedding as the head alone (model.model.embed_tokens = torch.nn.Identity()).",
    )
