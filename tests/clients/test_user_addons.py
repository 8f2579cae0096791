"""Addons of users: called on every rank at the promised moments, in the background too; a failure is everybody's."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from tests.clients.addons import fail, fail_and_go_on, record
from tests.clients.training import EXPORT
from tests.support.ranks import failure, fresh, run
from transformers import AutoModelForCausalLM

SURFACE = Path(__file__).parents[3] / "shared" / "conformance" / "surface.py"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("mode", ["every", "false"])
def test_hooks_run_on_every_rank_around_the_writing(is_async: bool, mode: str, tmp_path: Path) -> None:
    for seen, total in run(2, record, str(tmp_path), is_async, mode):  # type: ignore[misc]
        before, after = seen
        # Everything is there after writing, as it was when save() was called, and nothing is published yet.
        assert before == ["pre_save", 0, 0.0, False, True]
        assert after[0] == "post_save"
        assert after[1] == (1 if mode == "every" else 2)
        assert after[2] == pytest.approx(total, abs=1e-9)
        assert after[3:] == [False, True]
    assert (tmp_path / "LATEST").exists()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("hook", "rank"), [("pre_save", 1), ("post_save", 1), ("post_save", 0)])
def test_an_addon_that_fails_on_one_rank_fails_the_save_on_all(
    is_async: bool, hook: str, rank: int, tmp_path: Path
) -> None:
    error = failure(2, fail, str(tmp_path), is_async, hook, rank)
    assert "the user's own mistake" in str(error)
    assert error.rank == rank
    assert list(tmp_path.iterdir()) == []


def test_the_next_save_goes_through(tmp_path: Path) -> None:
    for text in run(2, fail_and_go_on, str(tmp_path)):
        assert "the user's own mistake" in str(text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "epoch_0_step_2"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST" / EXPORT)


@pytest.mark.skipif(not SURFACE.is_file(), reason="the list of documented names is not here")
def test_the_documented_surface_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "output"
    code = fresh(runpy.run_path, str(SURFACE), None, "__main__", output=output, seconds=100)
    text = output.read_text()
    assert code == 0, text + output.with_name("output.err").read_text()
    assert "the documented surface is whole" in text
