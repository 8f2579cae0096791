"""All rows of the zoo, and how many of them are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tests.support.ranks import run
from tests.zoo import distributed, torch_ao, torch_nn, torchao_rows, wrapped
from tests.zoo.compare import MODES, Verdict, judge
from tests.zoo.rows import Row

#: Rows that two ranks judge in one go; a hang costs no more than these.
_AT_ONCE = 40


@cache
def rows() -> dict[str, Row]:
    """Every row by its name, in the order of the table."""
    found: dict[str, Row] = {}
    for table in (torch_nn, wrapped, torch_ao, torchao_rows, distributed):
        for row in table.rows():
            assert row.name not in found, f"two rows are called {row.name}"
            found[row.name] = row
    return found


def alone() -> list[Row]:
    """The rows that one rank can judge."""
    return [row for row in rows().values() if not row.group and not is_lacking(row)]


def together() -> list[tuple[str, str]]:
    """The rows that two ranks judge, and the ways in which they are spread."""
    return [(row.name, how) for row in rows().values() if not is_lacking(row) for how in row.spreads]


def is_lacking(row: Row) -> bool:
    """Whether what the row needs is not installed."""
    return row.needs == "torchao" and not torchao_rows.IS_HERE


def by_two(cases: Sequence[tuple[str, str]], mode: str, directory: Path) -> dict[tuple[str, str], Verdict]:
    """What two ranks find of some rows, each spread in some way."""
    found: dict[tuple[str, str], Verdict] = {}
    for number, some in enumerate(_portions(cases)):
        both = run(2, _judged, some, mode, directory / str(number), seconds=600)
        for case, *verdicts in zip(some, *both, strict=True):
            first, second = (Verdict(*verdict) for verdict in verdicts)
            agree = first.kind == second.kind
            found[case] = first if agree else Verdict("wrong", f"the ranks disagree: {first} | {second}")
    return found


def _portions(cases: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    for start in range(0, len(cases), _AT_ONCE):
        yield list(cases[start : start + _AT_ONCE])


def _judged(cases: Sequence[tuple[str, str]], mode: str, directory: Path) -> list[tuple[str, str]]:
    verdicts = [
        judge(rows()[name], MODES[mode], directory / str(number), how) for number, (name, how) in enumerate(cases)
    ]
    return [(verdict.kind, verdict.text) for verdict in verdicts]
