"""docs/errors.md names errors that there are, and tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardwise import errors

ROOT = Path(__file__).parent.parent
_ERROR = r"`\w+`|\((?:warning|logged)\)"
_ROW = re.compile(rf"\| (?P<situation>.+?) \| (?P<error>{_ERROR}) \| (?P<message>.+?) \| `(?P<test>[^`]+)` \|")
_LINES = (ROOT / "docs" / "errors.md").read_text().splitlines()
_TABLE = [line for line in _LINES if line.startswith("| ")][1:]


@pytest.mark.parametrize("line", _TABLE)
def test_a_row_names_an_error_and_the_test_that_provokes_it(line: str) -> None:
    row = _ROW.fullmatch(line)
    assert row is not None, line
    if not row["error"].startswith("("):
        cls = getattr(errors, row["error"].strip("`"))
        assert issubclass(cls, errors.ShardwiseError)
    file, _, name = row["test"].partition("::")
    assert re.search(rf"^def {re.escape(name)}\(", (ROOT / file).read_text(), re.M), f"no test {name} in {file}"


def test_the_table_is_not_empty() -> None:
    assert len(_TABLE) > 60
