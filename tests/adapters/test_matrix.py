"""Peft's methods on all topologies: a few cells here, all of them in the slow run, as docs/adapters.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tests.adapters.cells import Case, outcomes
from tests.adapters.methods import ROWS
from tests.adapters.spreads import FSDP, ONE, SPREADS, STAGES, TP
from tools.adapter_table import PAGE, summary

import peft

#: What was lost or refused once, each topology among them.
FAST = [
    Case("FRoD", ONE, False),  # what layers share was left out of the file
    Case("PiSSA, fast", FSDP, True),  # base weights that were changed by chance were others after a restore
    Case("LoRA, embeddings and head", STAGES, False),  # the last stage's head was left out
    Case("rsLoRA", TP, True),
    Case("X-LoRA", ONE, False),  # the names of its experts were taken for those of other modules
]


def documented(name: str) -> dict[str, str]:
    """Topology -> what the page says of a method."""
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} | "))
    cells = line.replace("\\|", "\0").strip("| ").split(" | ")
    return dict(zip(SPREADS, (cell.replace("\0", "\\|") for cell in cells[1:]), strict=True))


def is_of_the_page() -> bool:
    """Whether these are the releases of which the page tells what peft and transformers cannot do themselves."""
    said = f"with peft {peft.__version__}, torch {torch.__version__.partition('+')[0]} and transformers "
    text = " ".join(PAGE.read_text().split())
    return f"{said}{transformers.__version__}." in text


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, str]:
    directory = tmp_path_factory.mktemp("matrix")
    return outcomes(FAST, directory / "scratch", directory / "known")


def test_every_method_of_peft_has_a_row() -> None:
    assert {row.kind for row in ROWS.values()} == {kind.value for kind in peft.PeftType}


def test_nothing_is_documented_as_wrong() -> None:
    cells = [cell for name in ROWS for cell in documented(name).values()]
    assert not [cell for cell in cells if not cell.startswith(("same", "refused: ", "cannot: "))]


@pytest.mark.parametrize("case", FAST, ids=lambda case: f"{case.name}, {case.spread}")
def test_as_documented(case: Case, fast: dict[Case, str]) -> None:
    if is_of_the_page():
        assert fast[case] == documented(case.name)[case.spread]
    else:
        assert fast[case].startswith(("same", "refused: ", "cannot: "))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ROWS)
def test_the_whole_row_is_as_documented(name: str, tmp_path: Path) -> None:
    if not is_of_the_page():
        pytest.skip("the page is of other releases")
    cases = [Case(name, spread, mode) for spread in SPREADS for mode in (False, True)]
    found = outcomes(cases, tmp_path / "scratch", tmp_path / "known")
    row = {spread: summary({mode: found[Case(name, spread, mode)] for mode in (False, True)}) for spread in SPREADS}
    assert row == documented(name)
