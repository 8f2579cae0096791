"""For every kind of module: restored is what ``load_state_dict(state_dict())`` gives, or an error names why not.

The rows say what is right; `docs/zoo.md`, written by ``python -m tools.zoo_table``, says what came of each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.zoo import torch_ao, torch_nn
from tests.zoo.compare import MODES, Verdict, judge
from tests.zoo.registry import alone, by_two, rows, together
from tests.zoo.rows import Row
from tools.zoo_table import PAGE

#: Among the many classes of torch that have no state, every so manieth is tried in each run of the tests.
_STRIDE = 6

_PLAIN = {f"nn.{name}" for names in torch_nn.WITHOUT_STATE.values() for name in names}
_FEW = [row for number, row in enumerate(alone()) if row.name not in _PLAIN or number % _STRIDE == 0]


def wrong(verdict: Verdict, row: Row) -> str:
    return "" if verdict.is_right(row) else f"{row.name}: {verdict}"


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in _FEW])
def test_an_export_restores_what_torch_does(tmp_path: Path, row: Row) -> None:
    assert not wrong(judge(row, MODES["export"], tmp_path / "root"), row)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "export"])
def test_other_modes_restore_what_torch_does(tmp_path: Path, mode: str) -> None:
    every = list(MODES).index(mode)
    some = [row for number, row in enumerate(_FEW) if number % (2 * len(MODES)) == every]
    assert not [text for row in some if (text := wrong(judge(row, MODES[mode], tmp_path / "root"), row))]


#: What two ranks judge in every run of the tests.
_TWO = [
    ("nn.Linear", "fsdp2"),
    ("nn.BatchNorm2d", "ddp"),
    ("nn.LSTM", "fsdp2"),
    ("parametrizations.weight_norm", "fsdp2"),
    ("extra state: a tensor that grows (as TransformerEngine's)", "fsdp2"),
    ("AveragedModel", "ddp"),
    ("FSDP2: unevenly, unit by unit", ""),
    ("FSDP1, original parameters", ""),
    ("tensor parallel beside replicas", ""),
    ("torchao: float8 training with float8 gathers", "fsdp2"),
]


@pytest.mark.parametrize("mode", ["export", "shards, async"])
def test_two_ranks_restore_what_torch_does(tmp_path: Path, mode: str) -> None:
    cases = [case for case in _TWO if case in together()]
    assert len(cases) >= len(_TWO) - 1
    found = by_two(cases, mode, tmp_path)
    assert not [text for (name, _), verdict in found.items() if (text := wrong(verdict, rows()[name]))]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_row_restores_what_torch_does(tmp_path: Path, mode: str) -> None:
    found = {row.name: judge(row, MODES[mode], tmp_path / "root") for row in alone()}
    assert not [text for name, verdict in found.items() if (text := wrong(verdict, rows()[name]))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", MODES)
def test_every_row_over_two_ranks_restores_what_torch_does(tmp_path: Path, mode: str) -> None:
    found = by_two(together(), mode, tmp_path)
    assert not [f"{how} {text}" for (name, how), v in found.items() if (text := wrong(v, rows()[name]))]


def test_every_class_of_torch_has_a_row() -> None:
    kinds = {f"nn.{name}" for name in torch_nn.classes()} | torch_ao.classes()
    assert not kinds - rows().keys(), "give each a row in tests/zoo"


def test_every_row_is_in_the_table() -> None:
    listed = {
        line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")
    }
    assert not rows().keys() - listed, "write it anew: python -m tools.zoo_table"
