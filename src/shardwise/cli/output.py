"""What commands end and print with: exit codes, lines in which no name can steer a terminal, columns, JSON, a bar.

Nothing else in `shardwise.cli` prints. Names of tensors and files, values of configurations and messages of other
libraries come from whoever wrote the files.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, TextIO

from shardwise.errors import FormatError, IntegrityError, ShardwiseError, TensorError, UnverifiableError

if TYPE_CHECKING:
    import argparse

    from _typeshed import DataclassInstance

    from shardwise.ops.verify import Progress

#: Unverifiable is not whole: a script that goes on after 0 must not go on with what nobody checked.
FINE, FOUND, MISUSE, UNVERIFIABLE = 0, 1, 2, 3
#: An error of the program itself (EX_SOFTWARE of sysexits.h); 1, which Python gives, would read as "damaged".
CRASHED = 70
INTERRUPTED = 130

_GRAVEST = (INTERRUPTED, CRASHED, FOUND, MISUSE, UNVERIFIABLE, FINE)

_COLOURS = {"red": 31, "green": 32, "yellow": 33, "grey": 90}


def code_of(error: ShardwiseError) -> int:
    """The exit code of a command that ended with this error."""
    if isinstance(error, UnverifiableError):
        return UNVERIFIABLE
    return FOUND if isinstance(error, (FormatError, IntegrityError, TensorError)) else MISUSE


def gravest(codes: Iterable[int]) -> int:
    """The code of a command for several paths: found before misuse before unverifiable before fine."""
    return min(codes, key=_GRAVEST.index, default=FINE)


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


def printable(text: str) -> str:
    r"""A text on one line, which says what it says: ``\x1b``, ``\n``, ``\u202e`` in the place of these characters.

    What is spelled out is what Python holds unprintable: control characters (among them those that begin a terminal's
    commands), line and paragraph separators, marks of direction, spaces that look like others, bytes that are no text.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def say(text: str = "", colour: str | None = None) -> None:
    """Print a line on standard output, in a colour where that is a terminal and ``NO_COLOR`` is not set."""
    shows = _is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    line = printable(text)
    print(f"\033[{_COLOURS[colour]}m{line}\033[0m" if colour and shows else line)


def tell(text: str) -> None:
    """Print a line on standard error."""
    if sys.stderr is not None:
        with suppress(OSError):  # nobody can be told that nobody can be told; the exit code stays
            print(printable(text), file=sys.stderr)


def tell_error(error: ShardwiseError, about: str = "") -> None:
    """Print an error on standard error, behind what it is ``about``, and where the documentation has more."""
    error.rank = None  # commands are one process: "rank 0" would say nothing
    tell(f"shardwise: {about}{error}")
    for note in getattr(error, "__notes__", ()):
        tell(note)


@contextmanager
def warnings_told() -> Iterator[None]:
    """What this and other libraries warn of inside is told as errors are, and not as Python would print it."""
    handler = _Telling(logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        logging.captureWarnings(False)


class _Telling(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(f"shardwise: {record.levelname.lower()}: {record.getMessage().rstrip()}")


def flush() -> None:
    """Have everything written that was printed.

    Raises:
        OSError: It cannot be: the disk is full, or whoever read it has left.
    """
    if sys.stdout is not None:  # it is where a process was started without one
        sys.stdout.flush()


def drop_output() -> None:
    """What could not be printed goes nowhere, so that Python does not complain about it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def clear_screen() -> None:
    """Begin at the top again, where standard output is a terminal."""
    if _is_terminal(sys.stdout):
        print("\033[2J\033[H", end="")


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def print_json(value: object) -> None:
    """Print a value on standard output."""
    print(json.dumps(value, indent=1))


def show(options: argparse.Namespace, report: DataclassInstance, lines: Iterable[str]) -> None:
    """Print a report as JSON where that was asked for; else, unless only what is wrong is wanted, these lines."""
    if options.json:
        print_json(record(report))
    elif not options.quiet:
        for line in lines:
            say(line)


def count(number: int, what: str) -> str:
    """So many of something: ``1 file``, ``2 files``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


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
    """Lines with the cells, made `printable`, of each column below each other, aligned left or ``right``."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress | None]:
    """A progress bar on standard error while the ``with`` block lasts, where that is a terminal and it is not quiet."""
    if quiet or not _is_terminal(sys.stderr):
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
