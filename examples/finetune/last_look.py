"""What the command line says of the run: its checkpoints, what the last step changed, and a page about it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SHOWN = 5
#: Exit codes of ``shardwise``: fine, and something was found (here: that a training step has changed something).
_FINE, _FOUND = 0, 1


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that was run.

    Attributes:
        command: As it would be typed.
        lines: What it printed; the middle of much is left out.
        ok: Whether it ended as it should.
    """

    command: str
    lines: list[str]
    ok: bool


def look(root: Path, page: Path) -> Iterator[Ran]:
    """List the checkpoints, compare the last two, and write a page about the last.

    Args:
        root: The directory of the checkpoints.
        page: The page to be written.
    """
    from shardwise.ops.listing import list_checkpoints

    yield _run(["ls", str(root)], _FINE)
    published = [each.path for each in list_checkpoints(root) if each.state == "published"]
    if len(published) < 2:
        yield Ran("shardwise diff", ["there are no two checkpoints to compare"], False)
        return
    before, last = published[-2:]
    yield _run(["diff", str(before / "model"), str(last / "model")], _FOUND)
    yield _run(["inspect", str(last), "--html", str(page), "--against", str(before)], _FINE)


def page_place(work: Path, stays: bool) -> Path:
    """Where the page goes: beside the checkpoints if these stay, else into a directory that does."""
    return (work if stays else Path(tempfile.mkdtemp(prefix="shardwise-report-"))) / "report.html"


def _run(arguments: list[str], expected: int) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "shardwise", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    left_out = len(lines) - _SHOWN - 1
    if left_out > 1:
        lines = [*lines[:_SHOWN], f"... and {left_out} more lines", lines[-1]]
    return Ran(f"shardwise {' '.join(arguments)}", lines, done.returncode == expected)
