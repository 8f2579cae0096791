"""Exporting in the base model's dtypes what is in memory in others."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from shardwise.comm import Group, JsonValue
from shardwise.dtypes import FLOATS
from shardwise.engine.memo import Memo
from shardwise.geometry import DTYPE_BYTES, TensorSpec
from shardwise.plan.fragments import HeldTensor

#: Dtypes between which an export may convert: those of ordinary weights.


@dataclass(frozen=True, slots=True, eq=False)
class Recast:
    """This rank's tensors in the base model's dtypes.

    Attributes:
        export: The tensors to export, each in the dtype that the base has it in.
        exact: Those among the originals whose values the base's dtype cannot hold exactly: a run that trains in
            float32 from a bfloat16 base exports bfloat16 and resumes from float32.
        native: Dtype in memory of each tensor that the export has in another.
        apart: Names of tensors that are no part of the exported model; they are ``exact``.
        digest: Of ``native`` and ``apart``; empty where these are.
    """

    export: Sequence[HeldTensor]
    exact: Sequence[HeldTensor]
    native: Mapping[str, str]
    apart: Collection[str]
    digest: str

    @staticmethod
    def none(held: Sequence[HeldTensor], apart: Collection[str]) -> Recast:
        """All tensors as they are, those apart too, for shards."""
        return Recast(list(held), [], {}, apart, _digest({}, apart))

    @staticmethod
    def of(held: Sequence[HeldTensor], base: Mapping[str, TensorSpec], apart: Collection[str] = ()) -> Recast:
        """Give each tensor the dtype that the base model has it in, where both are of ordinary weights."""
        if not base and not apart:
            return Recast(list(held), [], {}, (), "")
        export, exact, native = [], [], {}
        for tensor in held:
            if tensor.spec.name in apart:
                exact.append(tensor)
                continue
            known = base.get(tensor.spec.name)
            have = tensor.spec.dtype
            if known is None or known.dtype == have:
                export.append(tensor)
                continue
            native[tensor.spec.name] = have
            if not {known.dtype, have} <= FLOATS.keys():
                export.append(tensor)
                continue
            export.append(tensor._replace(spec=tensor.spec._replace(dtype=known.dtype)))
            if DTYPE_BYTES[known.dtype] <= DTYPE_BYTES[have]:
                exact.append(tensor)
        return Recast(export, exact, native, apart, _digest(native, apart))


def _digest(native: Mapping[str, str], apart: Collection[str]) -> str:
    if not native and not apart:
        return ""
    text = repr((sorted(native.items()), sorted(apart)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Recasts:
    """What the ranks recast together: pipeline stages have different tensors.

    Attributes:
        native: Dtype in memory of each tensor of any rank that the export has in another.
        rounds: Whether any rank has tensors that are saved beside the export: it rounds them, or they are apart.
        apart: Names of any rank's tensors that are no part of the exported model.
    """

    native: Mapping[str, str]
    rounds: bool
    apart: frozenset[str] = frozenset()


class RecastKeeper:
    """Recasts a model's tensors once, and keeps what the other ranks have told of theirs.

    Args:
        group: The ranks that save together.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._own: Memo[Recast] = Memo()
        self._told: dict[str, tuple[Mapping[str, str], Sequence[str]]] = {"": ({}, ())}
        self._last: Recast | None = None
        self._agreed: Recasts | None = None
        self._before: Recasts | None = None

    def recast(
        self, held: Sequence[HeldTensor], base: Mapping[str, TensorSpec], apart: Collection[str], *, exports: bool
    ) -> Recast:
        """This rank's tensors as an export has them, in the base's dtypes, or as shards do. Local.

        Args:
            held: All of them.
            base: The base's tensors, always the same.
            apart: Names of those that are no part of the exported model.
            exports: Whether there is an export.
        """
        make = partial(Recast.of, held, base, apart) if exports else partial(Recast.none, held, apart)
        return self._own.get(held, exports, make)

    def begin(self) -> None:
        """Take nothing for agreed on until it is again. All ranks call, before anything that can fail on one."""
        self._before, self._agreed = self._agreed, None

    def look(self, own: Recast) -> bool:
        """Take in what this rank recasts; returns whether the ranks have to tell each other. Local."""
        changed, self._last = own is not self._last, own
        return changed or self._before is None

    def settle(self, own: Recast, news: bool) -> Recasts:
        """What all ranks recast. All ranks call, with whether `look` was true on any of them.

        Ranks that say the same say it once, and not again at a later save.
        """
        if not news and self._before is not None:
            self._agreed = self._before
            return self._before
        row: JsonValue = [own.digest, bool(own.exact)]
        rows = cast(list[tuple[str, bool]], self._group.gather_json(row, "comparing dtypes with the base model's"))
        digests = [digest for digest, _ in rows]
        native: dict[str, str] = {}
        apart: set[str] = set()
        for digest in dict.fromkeys(digests):
            if digest not in self._told:
                teller = digests.index(digest)
                mine: JsonValue = [cast(JsonValue, dict(own.native)), sorted(own.apart)]
                told = self._group.broadcast_json(mine, teller, "exchanging dtypes that are not the base model's")
                self._told[digest] = cast(tuple[dict[str, str], list[str]], told)
            native |= self._told[digest][0]
            apart.update(self._told[digest][1])
        self._agreed = Recasts(native, any(rounds for _, rounds in rows), frozenset(apart))
        return self._agreed
