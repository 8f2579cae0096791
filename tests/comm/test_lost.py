"""Losing a rank: every other rank learns which one it was, and nobody waits longer than was configured."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.comm import lost_ranks
from tests.support.ranks import fresh

from shardwise.comm.lost import Patience


@given(st.floats(0.01, 1e6))
def test_waiting_and_finding_out_fit_into_the_time_out(seconds: float) -> None:
    patience = Patience.within(seconds)
    assert 0 < patience.report <= 10
    assert patience.collective >= seconds * 0.7
    assert patience.collective + patience.report < seconds


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
