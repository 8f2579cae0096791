"""Saved from two processes, every model type gives the names and bytes of `save_pretrained`, and comes back."""

from __future__ import annotations

import pytest
from tests.convert.tiny_models import SLOW, UNBUILT, registered
from tests.support.ranks import run
from tests.topology.every_type import SAME, check_all

KEYS = [key for key in registered() if key not in UNBUILT]
#: A spread over everything that conversions do: renamed, fused, stacked, transposed; text, images, sound.
ROUTINE = [key for number, key in enumerate(key for key in KEYS if key not in SLOW) if number % 17 == 0]
REST = [key for key in KEYS if key not in ROUTINE]
BATCH = 30


def wrong(keys: list[str]) -> dict[str, str]:
    outcomes = run(2, check_all, keys, seconds=280)
    return {key: verdict for rank in outcomes for key, (_, verdict) in rank.items() if verdict != SAME}  # type: ignore[attr-defined]


def test_types_saved_by_two_processes() -> None:
    assert len(ROUTINE) >= 12
    assert wrong(ROUTINE) == {}


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, len(REST), BATCH))
def test_the_other_types(start: int) -> None:
    assert wrong(REST[start : start + BATCH]) == {}
