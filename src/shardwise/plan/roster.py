"""Who holds what, known to every rank without gathering the ranks' plans. Pure.

A rank declares its tensors (`Declaration`): names, shapes, dtypes and how each is spread. Ranks of one kind declare the
same, so declarations are compared by digest and only the distinct ones travel. With each rank's mesh coordinates, a few
integers, every rank can compute every other rank's boxes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shardwise.errors import IncompleteTensorError, NameCollisionError
from shardwise.geometry import TensorSpec
from shardwise.plan.fragments import HeldPart, HeldTensor, Part
from shardwise.plan.placement import MeshKey, Placement, Replicated, Sharded, Strided, shard_coordinate


def _placement_code(placement: Placement) -> str:
    match placement:
        case Replicated():
            return "r"
        case Sharded(dim):
            return f"s{dim}"
        case Strided(dim, factor):
            return f"x{dim}.{factor}"


def _part_code(part: Part) -> str:
    mesh = "" if part.mesh is None else f"{part.mesh.names}{part.mesh.shape}{part.mesh.ordinal}"
    differs = "~" if part.may_differ else ""
    return f"{part.native_shape}|{mesh}|{','.join(map(_placement_code, part.placements))}|{part.view}{differs}"


@dataclass(frozen=True)
class Declaration:
    """A rank's tensors; equal on ranks of one kind.

    Attributes:
        specs: The tensors in the file that this kind of rank holds a part of, in the model's order.
        stage: Pipeline stage, which keeps two stages' tensors of one name from passing for replicas.
        digest: Hexadecimal digest over specs, spreads and stage.
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
            kind: tuple[object, ...]
            if len(parts) == 1:
                kind = (spec.shape, spec.dtype, grid, parts[0].part)
            else:
                kind = (spec.shape, spec.dtype, grid, *[part.part for part in parts])
            code = kinds.get(kind)
            if code is None:
                spreads = [_part_code(part.part) for part in parts]
                code = kinds[kind] = f"\0{spec.shape}{spec.dtype}{grid}{spreads}\n"
            text.append(spec.name)
            text.append(code)
            specs.append(spec)
        digest = hashlib.blake2b("".join(text).encode(), digest_size=16).hexdigest()
        return Declaration(tuple(specs), stage, digest)


Coordinates = Mapping[MeshKey, tuple[int, ...]]


@dataclass(frozen=True)
class Roster:
    """All ranks' declarations and coordinates. The same on every rank.

    Attributes:
        declarations: The distinct ones, by digest, in the order of the first rank that made each.
        digests: The digest of each rank's declaration.
        coordinates: Each rank's mesh coordinates.
    """

    declarations: Mapping[str, Declaration]
    digests: tuple[str, ...]
    coordinates: tuple[Coordinates, ...]
    _peers: dict[tuple[str, MeshKey | None, tuple[Placement, ...]], ShardSet] = field(
        default_factory=dict, compare=False
    )
    _peers_of_part: dict[tuple[str, Part], ShardSet] = field(default_factory=dict, compare=False)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.digests)

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The union of all ranks' tensors, in order of stage, then as declared.

        Raises:
            NameCollisionError: Two kinds of rank declare one name with different shapes or dtypes, or two pipeline
                stages declare the same name.
        """
        declarations = sorted(self.declarations.values(), key=lambda d: d.stage)
        found: dict[str, TensorSpec] = {}
        stages: dict[str, int] = {}
        if len(declarations) == 1:
            # A single declaration needs no comparison, unless it names a tensor twice.
            found = {spec.name: spec for spec in declarations[0].specs}
            if len(found) == len(declarations[0].specs):
                return declarations[0].specs
            found.clear()
        for declaration in declarations:
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
        if len(self.declarations) == 1:
            [(digest, declaration)] = self.declarations.items()
            return dict.fromkeys([spec.name for spec in declaration.specs], digest)
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
        found = self._peers_of_part.get((declarers, part))
        if found is None:
            # The native shape and the view do not matter for who holds what: enumerate the ranks once for all of them.
            key = (declarers, part.mesh, part.placements)
            found = self._peers.get(key)
            if found is None:
                found = self._peers[key] = self._shard_set(set(declarers.split(",")), part)
            self._peers_of_part[(declarers, part)] = found
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
        for rank, digest in enumerate(self.digests):
            if digest not in digests:
                continue
            if part.mesh is None:
                replicas.setdefault((), []).append(rank)
            elif part.mesh in self.coordinates[rank]:
                own = shard_coordinate(part.placements, self.coordinates[rank][part.mesh])
                replicas.setdefault(own, []).append(rank)
        return ShardSet({where: tuple(ranks) for where, ranks in sorted(replicas.items())})

    def check_complete(self, held: Sequence[HeldTensor]) -> None:
        """Check that the ranks together hold all of every tensor of ``held``.

        Raises:
            IncompleteTensorError: A mesh coordinate that holds a piece is missing from the group.
        """
        checked: set[ShardSet] = set()
        for number, part, found in self.holders(held):
            if found in checked:
                continue
            checked.add(found)
            wanted = 1
            if part.part.mesh is not None:
                for size, placement in zip(part.part.mesh.shape, part.part.placements, strict=True):
                    wanted *= 1 if isinstance(placement, Replicated) else size
            present = len(found.replicas)
            if present != wanted:
                raise IncompleteTensorError(
                    f"{present} of {wanted} pieces are held by the ranks that save together",
                    tensor=held[number].spec.name,
                    hint="Save with a process group that contains every rank of the tensor's mesh.",
                )


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
    if stage != known_stage:
        what = f"pipeline stages {known_stage} and {stage} both have a tensor of this name"
    else:
        what = (
            f"ranks disagree about this tensor: {known.dtype} {list(known.shape)} here, "
            f"{spec.dtype} {list(spec.shape)} there"
        )
    return NameCollisionError(
        what,
        tensor=spec.name,
        hint="Give each stage's modules the names that they have in the whole model; a last stage has its copy of a "
        "tied embedding as the head alone (model.model.embed_tokens = torch.nn.Identity()).",
    )
