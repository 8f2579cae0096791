"""What commands print with: sizes, ages, columns, colour, JSON, a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from shardwise.ops.verify import Progress

_COLOURS = {"red": 31, "green": 32, "yellow": 33, "grey": 90}


def record(value: DataclassInstance) -> dict[str, object]:
    """As ``dataclasses.asdict``, which would leave named tuples to become lists."""
    return {field.name: plain(getattr(value, field.name)) for field in fields(value)}


def plain(value: object) -> object:
    """A value as JSON has it: records are objects, paths are text."""
    if is_dataclass(value) and not isinstance(value, type):
        return record(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, PurePath) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)  # JSON has no infinity
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def text_of(error: Exception) -> str:
    """What is printed of an error: its message, and where the documentation has more."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def print_json(value: object) -> None:
    """Print a value on standard output."""
    print(json.dumps(value, indent=1))


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.2f} {unit}"


def age(seconds: float) -> str:
    """A time span for people, in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def columns(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Lines with the cells of each column below each other.

    Args:
        rows: Cells; all rows have the same number.
        right: Numbers of the columns that are aligned at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def coloured(text: str, colour: str) -> str:
    """The text in a colour, where standard output is a terminal and ``NO_COLOR`` is not set."""
    shows = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{_COLOURS[colour]}m{text}\033[0m" if shows else text


class Bar:
    """A progress bar on standard error, where that is a terminal.

    Args:
        quiet: Never show one.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.progress: Progress | None = None
        self._close: Callable[[], None] | None = None
        if quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        bar = tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr)

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        self.progress, self._close = advance, bar.close

    def close(self) -> None:
        """Remove the bar."""
        if self._close is not None:
            self._close()
