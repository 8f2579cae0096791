"""Losing a rank: every other rank learns which one it was, and nobody waits longer than was configured."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.comm import lost_ranks
from tests.support.ranks import fresh, run

from shardwise.comm import Group
from shardwise.comm.lost_ranks import time_budget
from shardwise.errors import PeerError


@given(st.floats(0.01, 1e6))
def test_waiting_and_finding_out_fit_into_the_time_out(seconds: float) -> None:
    collective, report = time_budget(seconds)
    assert 0 < report <= 10
    assert collective >= seconds * 0.7
    assert collective + report < seconds


LOSSES = [
    ("kill", 1, "died"),
    # With rank 0 goes the store through which the others would tell one another.
    ("kill", 0, "died"),
    ("kill-late", 2, "died"),
    ("hang", 2, "did not answer"),
    ("stop", 0, "did not answer"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[dict[str, object] | None]]:
    words = [f"{how}:{victim}" for how, victim, _ in LOSSES]
    output = tmp_path_factory.mktemp("lost") / "output"
    assert fresh(lost_ranks.main, words, output=output, seconds=200) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return {(how, victim): line for (how, victim, _), line in zip(LOSSES, lines, strict=True)}


@pytest.mark.parametrize(("how", "victim", "cause"), LOSSES)
def test_every_survivor_names_the_rank_that_is_missing(
    seen: dict[tuple[str, int], list[dict[str, object] | None]], how: str, victim: int, cause: str
) -> None:
    for survivor in seen[how, victim]:
        assert survivor is not None, "a survivor hung"
        assert (survivor["message"], survivor["rank"]) == (f"rank {victim} {cause} while saving", victim)


def fail_alone() -> list[tuple[str, str]]:
    """Rank 1 leaves; rank 0 fails by itself and then finds nobody to tell."""
    seen: list[tuple[str, str]] = []
    group = Group.dedicated(None, 3)
    group.any(False)
    if group.rank == 1:
        group.close()
        return seen
    calls: list[Callable[[], object]] = [
        lambda: group.agree(ValueError("the disk is full"), "saving"),
        lambda: group.gather(lambda: int("not a number"), "saving"),
        lambda: group.fold([], [1], "saving", ValueError("the disk is full")),
    ]
    for call in calls:
        try:
            call()
        except PeerError as error:
            seen.append((str(error), repr(error.__cause__)))
    return seen


def test_what_a_rank_failed_with_is_not_hidden_by_a_broken_exchange() -> None:
    (first, cause), (second, other), (third, _) = run(2, fail_alone)[0]  # type: ignore[misc]
    assert "while saving; before that, this rank had failed by itself: ValueError: the disk is full" in first
    assert cause == "ValueError('the disk is full')"
    assert "invalid literal for int()" in second
    assert other.startswith("ValueError(")
    assert third == first
