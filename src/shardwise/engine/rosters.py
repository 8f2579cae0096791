"""Agreeing on who holds what: one small exchange, and the distinct declarations once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from shardwise.comm import Group, JsonValue
from shardwise.engine.memo import Memo
from shardwise.errors import MisuseError
from shardwise.geometry import TensorSpec
from shardwise.plan.collector import collector_paused
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.placement import MeshKey
from shardwise.plan.roster import Declaration, Roster


class RosterKeeper:
    """Keeps what the ranks of a group have declared, so that a later save with the same layout asks for nothing.

    Args:
        group: The ranks that save together.
        stage: This rank's pipeline stage.
    """

    def __init__(self, group: Group, stage: int = 0) -> None:
        self._group = group
        self._stage = stage
        self._declarations: dict[str, Declaration] = {}
        self._known: tuple[str, Roster] | None = None
        self._before: tuple[str, Roster] | None = None
        self._described: Memo[tuple[Declaration, JsonValue]] = Memo()

    def _describe(self, held: Sequence[HeldTensor]) -> tuple[Declaration, JsonValue]:
        own = Declaration.of(held, self._stage)
        return own, [own.digest, [_encode_key(k, c) for k, c in coordinates_of(held).items()]]

    def begin(self) -> None:
        """Take nothing for known until the tensors have been checked again.

        All ranks call, before anything that can fail on one: after a failure, what this rank described last may be
        others than those that the ranks agreed on.
        """
        self._before, self._known = self._known, None

    def look(self, held: Sequence[HeldTensor]) -> bool:
        """Describe this rank's tensors; returns whether the ranks have to exchange descriptions. Local."""
        changed = not self._described.holds(held, None)
        self._described.get(held, None, lambda: self._describe(held))
        return changed or self._before is None

    def roster(self, held: Sequence[HeldTensor]) -> Roster:
        """Everybody's declarations and coordinates. All ranks call.

        Where no rank's tensors are others than last time, one exchange is all it takes.

        Raises:
            NameCollisionError: Two kinds of rank declare one name differently.
            IncompleteTensorError: The ranks together lack a piece of a tensor.
        """
        self.begin()
        with self._group.together("describing the tensors to save") as news:
            news.flag = self.look(held)
        return self.settle(held, news.any)

    @collector_paused()
    def settle(self, held: Sequence[HeldTensor], news: bool) -> Roster:
        """As `roster`, after `begin` and `look`. All ranks call, with whether `look` was true on any of them."""
        before = self._before
        if not news and before is not None:
            self._known = before
            return before[1]
        own, row = self._described.get(held, None, lambda: self._describe(held))
        rows = cast(list[list[JsonValue]], self._group.gather_json(row, "exchanging digests of the tensors to save"))
        key = repr(rows)
        if before is not None and before[0] == key:
            known = before[1]
        else:
            digests = tuple(str(theirs[0]) for theirs in rows)
            self._learn(own, digests)
            coordinates = tuple(dict(map(_decode_key, cast(list[JsonValue], theirs[1]))) for theirs in rows)
            known = Roster({d: self._declarations[d] for d in dict.fromkeys(digests)}, digests, coordinates)
            with self._group.together("checking that the ranks hold every tensor whole"):
                _ = known.specs
                known.check_complete(held)
        self._known = key, known
        return known

    def _learn(self, own: Declaration, digests: tuple[str, ...]) -> None:
        for digest in dict.fromkeys(digests):
            if digest in self._declarations:
                continue
            teller = digests.index(digest)
            mine = own if own.digest == digest else None
            told = self._group.broadcast_json(
                _encode(mine) if mine is not None and self._group.rank == teller else None,
                teller,
                "exchanging descriptions of the tensors to save",
            )
            self._declarations[digest] = mine if mine is not None else _decode(told, digest)


def roster_of_kind(held: Sequence[HeldTensor], group: Group, stage: int) -> Roster | None:
    """Who holds the same kinds of tensor as this rank, and at which coordinates. All ranks call.

    Nobody's description travels, only its digest: a rank of another kind has nothing in common that could be relied on.

    Returns:
        A roster that knows of these ranks alone; ``None`` where this rank's meshes cannot be told apart.
    """
    own: Declaration | None = None
    row: JsonValue = None
    with group.together("describing the tensors to load"):
        own = Declaration.of(held, stage)
        try:
            row = [own.digest, [_encode_key(k, c) for k, c in coordinates_of(held).items()]]
        except MisuseError:
            # What cannot be told apart can still be read by each rank for itself.
            own = None
    rows = cast(list[list[JsonValue] | None], group.gather_json(row, "exchanging digests of the tensors to load"))
    if own is None:
        return None
    digests = tuple("" if theirs is None else str(theirs[0]) for theirs in rows)
    coordinates = tuple(
        {} if theirs is None else dict(map(_decode_key, cast(list[JsonValue], theirs[1]))) for theirs in rows
    )
    return Roster({own.digest: own}, digests, coordinates)


def coordinates_of(held: Sequence[HeldTensor]) -> dict[MeshKey, tuple[int, ...]]:
    """This rank's coordinate in each mesh that its tensors are spread over.

    Raises:
        MisuseError: Two tensors give different coordinates for one mesh.
    """
    found: dict[MeshKey, tuple[int, ...]] = {}
    seen: dict[int, tuple[int, ...]] = {}  # most tensors share their part and coordinate with others, object and all
    for tensor in held:
        for part in tensor.parts:
            if seen.get(id(part.part)) is part.coordinate:
                continue
            seen[id(part.part)] = part.coordinate
            mesh = part.part.mesh
            if mesh is not None and found.setdefault(mesh, part.coordinate) != part.coordinate:
                raise MisuseError(
                    f"two meshes {mesh} with different coordinates pass for one",
                    tensor=tensor.spec.name,
                    hint="Give the mesh dimensions names (init_device_mesh(..., mesh_dim_names=...)).",
                )
    return found


def _encode_key(mesh: MeshKey, coordinate: tuple[int, ...]) -> JsonValue:
    return [list(mesh.names), list(mesh.shape), mesh.ordinal, list(coordinate)]


def _decode_key(value: JsonValue) -> tuple[MeshKey, tuple[int, ...]]:
    names, shape, ordinal, coordinate = cast(tuple[list[str], list[int], int, list[int]], value)
    return MeshKey(tuple(names), tuple(shape), ordinal), tuple(coordinate)


def _encode(declaration: Declaration) -> JsonValue:
    return [declaration.stage, [[s.name, list(s.shape), s.dtype] for s in declaration.specs]]


def _decode(value: JsonValue, digest: str) -> Declaration:
    stage, rows = cast(tuple[int, list[tuple[str, list[int], str]]], value)
    return Declaration(tuple(TensorSpec(n, tuple(shape), dtype) for n, shape, dtype in rows), stage, digest)
