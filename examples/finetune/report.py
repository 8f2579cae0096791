"""The table at the end, and the checks that decide the exit code. Pure: from records to lines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from examples.finetune.console import megabytes
from examples.finetune.events import Resumed, Saved, Stepped


@dataclass(slots=True)
class RunRecord:
    """What one run told.

    Attributes:
        processes: How many.
        resumed: From where it went on.
        steps: Its training steps, in order.
        saves: Its published checkpoints, in order.
        final_loss: Loss after its last update, if it got there.
        killed_in: Step whose save it was killed in.
    """

    processes: int
    resumed: Resumed | None = None
    steps: list[Stepped] = field(default_factory=list)
    saves: list[Saved] = field(default_factory=list)
    final_loss: float | None = None
    killed_in: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to be true.

    Attributes:
        ok: Whether it is.
        text: What it is, with the figures.
    """

    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class Written:
    """What one checkpoint is made of.

    Attributes:
        part: ``model/consolidated``, ``optim``, ...
        files: How many.
        nbytes: Bytes of them.
    """

    part: str
    files: int
    nbytes: int


def same(one: float, other: float, tolerance: float) -> bool:
    """Whether two losses are equal but for rounding: a relative difference of at most ``tolerance``."""
    return abs(one - other) <= tolerance * max(abs(one), abs(other))


def run_lines(runs: Sequence[RunRecord]) -> list[str]:
    """The table of the runs: who resumed from where, and with which losses."""
    rows = [("run", "processes", "resumed from", "written by", "steps", "loss", "ended")]
    for number, run in enumerate(runs, start=1):
        resumed = run.resumed
        rows.append(
            (
                str(number),
                str(run.processes),
                resumed.name if resumed else "base model",
                f"{resumed.saved_by} processes" if resumed else "-",
                f"{run.steps[0].step}-{run.steps[-1].step}" if run.steps else "-",
                f"{run.steps[0].loss:.4f} -> {run.steps[-1].loss:.4f}" if run.steps else "-",
                f"SIGKILL while saving step {run.killed_in}" if run.killed_in is not None else "finished",
            )
        )
    return table(rows)


def written_lines(parts: Sequence[Written]) -> list[str]:
    """The table of what one checkpoint holds."""
    rows = [("in the last checkpoint", "files", "bytes")]
    rows += [(part.part, str(part.files), megabytes(part.nbytes)) for part in parts]
    rows.append(("together", str(sum(p.files for p in parts)), megabytes(sum(p.nbytes for p in parts))))
    return table(rows)


def speed_lines(runs: Sequence[RunRecord], checkpoint_bytes: int) -> list[str]:
    """The table of how fast it was, against the raw parallel write."""
    rows = [("whole checkpoint saved by", "saves", "median", "rate", "raw write", "median", "ratio")]
    for run in runs:
        if not run.saves:
            continue
        seconds = statistics.median(save.seconds for save in run.saves)
        raw = statistics.median(save.raw_seconds for save in run.saves)
        rows.append(
            (
                f"{run.processes} process" + ("es" if run.processes > 1 else ""),
                str(len(run.saves)),
                f"{seconds:.2f} s",
                f"{megabytes(checkpoint_bytes / seconds)}/s",
                megabytes(run.saves[-1].raw_bytes),
                f"{raw:.2f} s",
                f"{seconds / raw:.2f}",
            )
        )
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text, the first one being the heads."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def check_lines(checks: Sequence[Check]) -> list[str]:
    """The checks, one a line."""
    return [f"{'ok    ' if check.ok else 'FAILED'}  {check.text}" for check in checks]
