"""A loop ends with a save pending: the save is finished, or its loss is an error, in whatever way the loop ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.lifecycle import resolve

SCRIPT = Path(__file__).with_name("ending_script.py")


def ended(root: Path, how: str, fails: bool = False) -> tuple[list[int], str]:
    """Exit codes of two ranks, and what they wrote to their standard error."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(root), how, "fails" if fails else ""],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return [process.returncode for process in processes], "\n".join(errors)


@pytest.mark.parametrize(
    ("how", "codes"),
    [
        ("destroy", [0, 0]),
        pytest.param("fall", [0, 0], marks=pytest.mark.slow),
        pytest.param("raise on one", [0, 1], marks=pytest.mark.slow),
        pytest.param("exit", [0, 0], marks=pytest.mark.slow),
        pytest.param("raise", [1, 1], marks=pytest.mark.slow),
        pytest.param("lost reference", [0, 0], marks=pytest.mark.slow),
        pytest.param("destroy before finalize", [0, 0], marks=pytest.mark.slow),
    ],
)
def test_a_pending_save_is_finished(tmp_path: Path, how: str, codes: list[int]) -> None:
    found, errors = ended(tmp_path / "root", how)
    assert found == codes, errors
    resumed = resolve(tmp_path / "root")
    assert resumed is not None, errors
    assert resumed.step == 7


@pytest.mark.parametrize(
    "how", ["fall", *(pytest.param(how, marks=pytest.mark.slow) for how in ("destroy", "exit", "raise"))]
)
def test_a_save_that_is_lost_is_an_error_that_says_which(tmp_path: Path, how: str) -> None:
    found, errors = ended(tmp_path / "root", how, fails=True)
    assert all(found)
    assert "epoch_0_step_7" in errors
    assert "Input/output error" in errors or "input/output error" in errors
    assert resolve(tmp_path / "root") is None
