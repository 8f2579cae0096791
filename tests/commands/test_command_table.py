"""Each command on each kind of path: docs/commands.md is what comes of them, and nothing of it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.commands.cells import COMMANDS
from tests.commands.formats import ROWS, Row
from tools.command_table import codes_on_page, tried

#: Made and tried in a moment; the others take processes, models of transformers or both.
QUICK = (
    "a root, through a link", "a safetensors file", "a GGUF file", "a text file", "export cut short",
    "Hugging Face file with a broken header", "DCP's .metadata cut short", "an empty .safetensors file",
    "a header that claims to be huge",
    "an interrupted save", "an empty directory", "nothing", "a FIFO", "a link in a circle", "a link to nothing",
)  # fmt: skip


def check(row: Row, scratch: Path) -> None:
    found = tried(row, scratch)
    assert {name: each.wrong for name, each in found.items() if each.wrong} == {}
    assert [each.code for each in found.values()] == codes_on_page()[row.name], "run python -m tools.command_table"


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in QUICK], ids=lambda row: row.name)
def test_quick_rows(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.name not in QUICK], ids=lambda row: row.name)
def test_rows(row: Row, tmp_path: Path) -> None:
    check(row, tmp_path)


def test_the_page_has_every_row_and_command() -> None:
    assert set(QUICK) <= {row.name for row in ROWS}
    assert {name: len(codes) for name, codes in codes_on_page().items()} == {row.name: len(COMMANDS) for row in ROWS}
