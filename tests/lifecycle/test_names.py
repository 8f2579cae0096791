from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import MisuseError
from shardwise.lifecycle import checkpoint_name, doomed_name, parse_checkpoint_name, temporary_name
from shardwise.lifecycle.names import foreign_numbers

COUNTS = st.integers(0, 10**12)


@given(COUNTS, COUNTS)
def test_a_name_says_its_epoch_and_step(epoch: int, step: int) -> None:
    name = checkpoint_name(epoch, step)
    assert name == f"epoch_{epoch}_step_{step}"
    assert parse_checkpoint_name(name) == (epoch, step)
    assert parse_checkpoint_name(temporary_name(name)) is None
    assert parse_checkpoint_name(doomed_name(name)) is None
    assert temporary_name(name) != doomed_name(name)


@given(st.from_regex(r"epoch_[0-9]{1,3}_step_[0-9]{1,3}", fullmatch=True))
def test_a_checkpoint_has_one_spelling(name: str) -> None:
    numbers = parse_checkpoint_name(name)
    if numbers is None:
        assert "_0" in name
    else:
        assert checkpoint_name(*numbers) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "LATEST",
        "epoch_0_step_",
        "epoch_0_step_1\n",
        "epoch_0_step_1 ",
        "epoch_-1_step_1",
        "epoch_00_step_1",
        "epoch_0_step_01",
        "epoch_1_step_٣",
        "xepoch_0_step_1",
        "epoch_0_step_1.tmp",
        "epoch_0_step_1/model",
    ],
)
def test_other_names(name: str) -> None:
    assert parse_checkpoint_name(name) is None


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, -1), (True, 0), (0, 1.0), ("0", 0)])
def test_only_counts_make_names(epoch: int, step: int) -> None:
    with pytest.raises(MisuseError):
        checkpoint_name(epoch, step)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("step-1000", (None, 1000)),
        ("epoch_0_step_20", (0, 20)),
        ("checkpoint-500", (None, 500)),
        ("global_step10", (None, 10)),
        ("epoch=2-step=40", (2, 40)),
        ("iter_0000100", (None, 100)),
        ("epoch_3", (3, None)),
        ("stepwise", (None, None)),
        ("run-7", (None, None)),
        ("step-5-copy", (None, None)),
    ],
)
def test_numbers_in_other_tools_names(name: str, numbers: tuple[int | None, int | None]) -> None:
    assert foreign_numbers(name) == numbers
