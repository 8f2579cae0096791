"""Dealing reads to replicas, by property."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shardwise.plan.sharing import Limits, rounds

SMALL = Limits(round=64, largest=16, smallest=4, alone=8)
sizes_in = st.lists(st.integers(1, 4), max_size=80)


@given(st.data(), st.integers(1, 40))
def test_every_piece_is_read_once_in_order_and_in_bounded_rounds(data: st.DataObject, replicas: int) -> None:
    most = SMALL.share(replicas)
    sizes = data.draw(st.lists(st.integers(1, most), max_size=80))
    members = data.draw(st.lists(st.integers(0, 99), min_size=replicas, max_size=replicas, unique=True))
    found = list(rounds(zip(sizes, range(len(sizes)), strict=True), members, SMALL))
    assert [piece for shares in found for share in shares for piece in share.pieces] == list(range(len(sizes)))
    read = dict.fromkeys(members, 0)
    for shares in found:
        assert sum(sizes[piece] for share in shares for piece in share.pieces) <= SMALL.round
        for share in shares:
            nbytes = sum(sizes[piece] for piece in share.pieces)
            assert 0 < nbytes <= most
            read[share.reader] += nbytes
    # Nobody gets more as long as another has less.
    assert max(read.values()) - min(read.values()) <= most
    # No round could have taken the next one's first share too.
    for one, other in itertools.pairwise(found):
        total = sum(sizes[piece] for share in (*one, other[0]) for piece in share.pieces)
        assert total > SMALL.round


@given(sizes_in, st.integers(1, 9))
def test_rounds_follow_from_the_sizes_alone(sizes: list[int], replicas: int) -> None:
    def shape(offset: int) -> list[list[tuple[int, int]]]:
        dealt = rounds(((n, object()) for n in sizes), range(offset, offset + replicas), SMALL)
        return [[(share.reader - offset, len(share.pieces)) for share in shares] for shares in dealt]

    assert shape(0) == shape(50)


def test_pieces_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def endless() -> object:
        for number in range(10**9):
            taken.append(number)
            yield 4, number

    assert len(next(rounds(endless(), (0, 1), SMALL))) == 4  # type: ignore[arg-type]
    assert len(taken) <= 64 // 4 + 16 // 4 + 1


def test_shares_shrink_with_the_number_of_replicas_down_to_a_least() -> None:
    mib = 2**20
    assert [Limits().share(n) for n in (2, 4, 8, 64, 1024)] == [4 * mib, 4 * mib, 2 * mib, mib // 4, mib // 4]
