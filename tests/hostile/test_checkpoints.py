"""Whole checkpoints that somebody made to do harm: one typed error each, soon, and nothing outside is touched."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
from tests.hostile import runner
from tests.hostile.cases import all_cases
from tests.support.ranks import fresh

#: One process tries every case; on a loaded machine that takes its time.
pytestmark = pytest.mark.timeout(900)


@cache
def lines() -> tuple[list[dict[str, object]], str]:
    """What the one process that tries every case printed, and what became of it."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        code = fresh(runner.main, output=output, seconds=880)
        found = [json.loads(line) for line in output.read_text().splitlines()]
        errors = output.with_name("output.err").read_text()
    return found, "" if code == 0 else f"exit {code}: {errors[-2000:]}"


def results() -> tuple[dict[str, dict[str, object]], dict[str, object]]:
    """Results by case, and what is true at the end."""
    found, problem = lines()
    assert not problem, f"after {len(found)} cases: {problem}"
    return {str(line["case"]): line for line in found[:-1]}, found[-1]


def test_there_are_enough_cases() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names)) >= 200


@pytest.mark.parametrize("name", [case.name for case in all_cases()])
def test_hostile(name: str) -> None:
    found = results()[0][name]
    for way, result in found["ways"].items():  # type: ignore[attr-defined]
        assert not result["ended"].startswith(("UNTYPED", "HUNG")), f"{way}: {result['ended']}"
        assert not result["forbidden"], f"{way}: {result['forbidden']}"
    if found["detected"]:
        ended = found["ways"]["verify"]["ended"]  # type: ignore[index]
        assert ended == "damaged" or ended.startswith("typed"), ended


def test_nothing_was_run_and_nothing_outside_was_changed() -> None:
    assert results()[1] == {"owned": False, "secret": True}
