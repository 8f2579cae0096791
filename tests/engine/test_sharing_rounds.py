"""Dealing reads to replicas, by property."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.engine import sharing
from shardwise.engine.sharing import largest_share, nbytes_of, rounds
from shardwise.geometry import TensorSpec
from shardwise.plan.reads import Read

ROUND = 64


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharing, "ROUND_BYTES", ROUND)
        patched.setattr(sharing, "LARGEST_SHARE", 16)
        patched.setattr(sharing, "SMALLEST_SHARE", 4)
        yield


def piece(number: int, nbytes: int) -> Read:
    """A piece that is known by its offset."""
    return Read(0, number, 1, nbytes, nbytes, torch.empty(0), TensorSpec("t", (nbytes,), "U8"))


def pieces_of(sizes: Sequence[int]) -> Iterator[Read]:
    return itertools.starmap(piece, enumerate(sizes))


sizes_in = st.lists(st.integers(1, 4), max_size=80)


@given(st.data(), st.integers(1, 40))
def test_every_piece_is_read_once_in_order_and_in_bounded_rounds(data: st.DataObject, replicas: int) -> None:
    most = largest_share(replicas)
    sizes = data.draw(st.lists(st.integers(1, most), max_size=80))
    members = tuple(data.draw(st.lists(st.integers(0, 99), min_size=replicas, max_size=replicas, unique=True)))
    found = [each.shares for each in rounds(pieces_of(sizes), members)]
    in_order = [piece.offset for shares in found for share in shares for piece in share.pieces]  # type: ignore[union-attr]
    assert in_order == list(range(len(sizes)))
    read = dict.fromkeys(members, 0)
    for shares in found:
        assert sum(nbytes_of(piece) for share in shares for piece in share.pieces) <= ROUND
        for share in shares:
            nbytes = sum(map(nbytes_of, share.pieces))
            assert 0 < nbytes <= most
            read[share.reader] += nbytes
    # Nobody gets more as long as another has less.
    assert max(read.values()) - min(read.values()) <= most
    # No round could have taken the next one's first share too.
    for one, other in itertools.pairwise(found):
        total = sum(nbytes_of(piece) for share in (*one, other[0]) for piece in share.pieces)
        assert total > ROUND


@given(sizes_in, st.integers(1, 9))
def test_rounds_follow_from_the_sizes_alone(sizes: list[int], replicas: int) -> None:
    def shape(offset: int) -> list[list[tuple[int, int]]]:
        dealt = rounds(pieces_of(sizes), tuple(range(offset, offset + replicas)))
        return [[(share.reader - offset, len(share.pieces)) for share in each.shares] for each in dealt]

    assert shape(0) == shape(50)


def test_pieces_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def endless() -> Iterator[Read]:
        for number in range(10**9):
            taken.append(number)
            yield piece(number, 4)

    assert len(next(rounds(endless(), (0, 1))).shares) == 4
    assert len(taken) <= 64 // 4 + 16 // 4 + 1


def test_shares_shrink_with_the_number_of_replicas_down_to_a_least(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 2**20
    monkeypatch.setattr(sharing, "ROUND_BYTES", 16 * mib)
    monkeypatch.setattr(sharing, "LARGEST_SHARE", 4 * mib)
    monkeypatch.setattr(sharing, "SMALLEST_SHARE", mib // 4)
    assert [largest_share(n) for n in (2, 4, 8, 64, 1024)] == [4 * mib, 4 * mib, 2 * mib, mib // 4, mib // 4]
