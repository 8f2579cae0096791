"""The ranks' agreement before a save: which rank holds which tensors, and one other note of each rank.

One gather. Each rank sends a digest of its statement and its mesh coordinates, a few integers. Ranks of one kind make
the same statement; a statement that is not known yet is broadcast once, by the lowest rank that makes it. A later save
without a new statement costs the gather alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

from shardwise.comm import Group, JsonValue
from shardwise.errors import MisuseError
from shardwise.geometry import TensorSpec
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.placement import MeshKey
from shardwise.plan.roster import Coordinates, Declaration, Roster
from shardwise.timing import phase


@dataclass(frozen=True, slots=True)
class Statement:
    """A rank's declaration before a save: lists of tensors that it holds, as many as on every rank, and any note."""

    held: tuple[Sequence[HeldTensor], ...]
    note: JsonValue = None


@dataclass(frozen=True, slots=True)
class Agreed:
    """The statements of all ranks: who holds what, for each list of `Statement.held`, and each rank's note.

    The same on every rank, and the same object until a rank makes a new statement.
    """

    rosters: tuple[Roster, ...]
    notes: tuple[JsonValue, ...]


class Agreement:
    """The ranks' agreement on one component; keeps their statements, so that a later save does not send them again."""

    def __init__(self, group: Group, stage: int = 0) -> None:
        self._group = group
        self._stage = stage
        self._kinds: dict[str, _Kind] = {}
        self._rows: list[JsonValue] = []
        self._agreed = Agreed((), ())

    @phase("agree")
    def reach(self, describe: Callable[[], Statement], what: str) -> Agreed:
        """Exchange what the ranks have to say. All ranks call.

        ``describe`` gives this rank's statement; a failure in it on one rank is raised on all.

        Raises:
            NameCollisionError: Two kinds of rank declare one name differently.
            IncompleteTensorError: The ranks together lack a piece of a tensor.
            MisuseError: Two meshes of a rank cannot be distinguished.
        """
        own: list[tuple[Statement, _Kind]] = []

        def describe_kind() -> JsonValue:
            statement = describe()
            kind, row = _describe(statement, self._stage)
            own.append((statement, kind))
            return row

        rows = self._group.gather(describe_kind, what)
        # Every rank compares what all have received, so that they decide alike, whatever became of an earlier save.
        if rows != self._rows:
            [(statement, kind)] = own
            self._kinds = self._receive(kind, [str(digest) for digest, _ in cast(list[_Row], rows)])
            agreed = self._agreed_on(cast(list[_Row], rows))
            with self._group.together("checking that the ranks hold every tensor whole"):
                for roster, held in zip(agreed.rosters, statement.held, strict=True):
                    _ = roster.specs
                    roster.check_complete(held)
            self._rows, self._agreed = rows, agreed
        return self._agreed

    def roster(self, describe: Callable[[], Sequence[HeldTensor]], what: str) -> Roster:
        """The roster of the tensors that ``describe`` gives. All ranks call; errors as of `reach`."""
        return self.reach(lambda: Statement((describe(),)), what).rosters[0]

    def _receive(self, own: _Kind, digests: Sequence[str]) -> dict[str, _Kind]:
        """The statement of each kind of rank, by digest; unknown ones are broadcast."""
        kinds: dict[str, _Kind] = {}
        for digest in dict.fromkeys(digests):
            known = self._kinds.get(digest)
            if known is None:
                source = digests.index(digest)
                text = json.dumps(own.encoded()).encode() if self._group.rank == source else b""
                received = self._group.broadcast_bytes(text, source, "exchanging descriptions of the tensors to save")
                known = own if own.digest == digest else _Kind.decoded(json.loads(received))
            kinds[digest] = known
        return kinds

    def _agreed_on(self, rows: Sequence[_Row]) -> Agreed:
        everyone = [self._kinds[digest] for digest, _ in rows]
        coordinates = tuple(kind.coordinates(theirs) for kind, (_, theirs) in zip(everyone, rows, strict=True))
        rosters = []
        for declared in zip(*(kind.declarations for kind in everyone), strict=True):
            distinct = {declaration.digest: declaration for declaration in declared}
            rosters.append(Roster(distinct, tuple(each.digest for each in declared), coordinates))
        return Agreed(tuple(rosters), tuple(kind.note for kind in everyone))


#: What a rank sends: the digest of its statement, and its coordinate in each mesh.
_Row = tuple[str, list[list[int]]]


@dataclass(frozen=True, slots=True)
class _Kind:
    """The statement of ranks of one kind."""

    declarations: tuple[Declaration, ...]
    meshes: tuple[MeshKey, ...]
    note: JsonValue
    digest: str

    def coordinates(self, row: Sequence[Sequence[int]]) -> Coordinates:
        """The coordinates that a rank of this kind has sent."""
        return {mesh: tuple(at) for mesh, at in zip(self.meshes, row, strict=True)}

    def encoded(self) -> JsonValue:
        """The statement as it is broadcast."""
        declared = [(each.stage, each.digest, each.specs) for each in self.declarations]
        return cast(JsonValue, [declared, self.meshes, self.note, self.digest])  # tuples are arrays in JSON

    @staticmethod
    def decoded(value: JsonValue) -> _Kind:
        """The inverse of `encoded`."""
        declared, meshes, note, digest = cast(_Encoded, value)
        declarations = [
            Declaration(tuple([TensorSpec(n, tuple(shape), dtype) for n, shape, dtype in specs]), stage, own)
            for stage, own, specs in declared
        ]
        keys = tuple([MeshKey(tuple(names), tuple(shape), ordinal) for names, shape, ordinal in meshes])
        return _Kind(tuple(declarations), keys, note, digest)


def _describe(statement: Statement, stage: int) -> tuple[_Kind, JsonValue]:
    """The statement of this rank's kind, and the rank's own row. Local."""
    declarations = tuple([Declaration.of(held, stage) for held in statement.held])
    found = coordinates_of(chain(*statement.held))
    text = json.dumps([[each.digest for each in declarations], list(found), statement.note])
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return _Kind(declarations, tuple(found), statement.note, digest), [digest, list(map(list, found.values()))]


_Encoded = tuple[
    list[tuple[int, str, list[tuple[str, list[int], str]]]], list[tuple[list[str], list[int], int]], JsonValue, str
]


def roster_of_kind(held: Sequence[HeldTensor], group: Group, stage: int) -> Roster | None:
    """Which ranks hold the same kinds of tensor as this rank, and at which coordinates: these alone. All ranks call.

    Only digests of descriptions are gathered: with a rank of another kind there is nothing in common to rely on.
    Returns ``None`` where this rank's meshes cannot be distinguished.
    """
    own: list[_Kind] = []

    def describe_kind() -> JsonValue:
        try:
            kind, row = _describe(Statement((held,)), stage)
        except MisuseError:
            # Each rank can still read by itself where meshes cannot be distinguished.
            return ["", []]
        own.append(kind)
        return row

    rows = cast(list[_Row], group.gather(describe_kind, "exchanging digests of the tensors to load"))
    if not own:
        return None
    [kind] = own
    [declaration] = kind.declarations
    digests = tuple(declaration.digest if digest == kind.digest else "" for digest, _ in rows)
    coordinates = tuple(kind.coordinates(at) if digest == kind.digest else {} for digest, at in rows)
    return Roster({declaration.digest: declaration}, digests, coordinates)


def coordinates_of(held: Iterable[HeldTensor]) -> dict[MeshKey, tuple[int, ...]]:
    """This rank's coordinate in each mesh of its tensors; `MisuseError` if two tensors disagree on one."""
    found: dict[MeshKey, tuple[int, ...]] = {}
    seen: dict[int, tuple[int, ...]] = {}  # most tensors share their part and coordinate with others, object and all
    for tensor in held:
        for part in tensor.parts:
            if seen.get(id(part.part)) is part.coordinate:
                continue
            seen[id(part.part)] = part.coordinate
            mesh = part.part.mesh
            if mesh is not None and found.setdefault(mesh, part.coordinate) != part.coordinate:
                what = f"two meshes {mesh} with different coordinates cannot be distinguished"
                hint = "Give the mesh dimensions names (init_device_mesh(..., mesh_dim_names=...))."
                raise MisuseError(what, tensor=tensor.spec.name, hint=hint)
    return found
