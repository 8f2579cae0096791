"""Time, memory and bytes of one operation that several ranks carry out together."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

MIB = 2**20


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: What was measured.
        seconds: Median time.
        reference: What it is compared with.
        reference_seconds: Median time of that.
        ratio: Median over the repeats of the ratio to the reference measured next to it.
        spread: Smallest and largest of those ratios.
        cpu_ratio: Median ratio of the processor time of the busiest rank, which other processes disturb less.
        target: The ratio that the project promises, or ``None``.
        peak_mib: Largest growth of a rank's resident memory during the operation, over what it had before.
        nbytes: Bytes of the data concerned.
        disk_ratio: Bytes that were left on disk, or read from it, over ``nbytes``.
        note: Anything else.
    """

    name: str
    seconds: float
    reference: str = ""
    reference_seconds: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    cpu_ratio: float | None = None
    target: float | None = None
    peak_mib: float | None = None
    nbytes: int | None = None
    disk_ratio: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One operation: wall-clock seconds, and processor seconds and growth in MiB of the rank that had most."""

    seconds: float
    cpu: float
    peak: float


@dataclass
class Samples:
    """Repeats of an operation and of its reference, taken in turns; ``first`` is the operation's unmeasured first."""

    measured: list[Sample] = field(default_factory=list)
    reference: list[Sample] = field(default_factory=list)
    first: Sample | None = None

    def row(self, name: str, reference: str, target: float | None, nbytes: int, **more: object) -> Row:
        """Medians of the samples as a line of the table."""
        pairs = list(zip(self.measured, self.reference, strict=True))
        ratios = [a.seconds / b.seconds for a, b in pairs]
        return Row(
            name,
            statistics.median(a.seconds for a in self.measured),
            reference,
            statistics.median(b.seconds for b in self.reference),
            statistics.median(ratios),
            (min(ratios), max(ratios)),
            statistics.median(a.cpu / b.cpu for a, b in pairs),
            target,
            max(a.peak for a in [*self.measured, *([self.first] if self.first else [])]),
            nbytes,
            **more,  # type: ignore[arg-type]
        )


def measure(operation: Callable[[], object], fresh_bytes: int = 0) -> Sample:
    """Carry out an operation from a common start until every rank is done. All ranks call; the same on every rank.

    Args:
        operation: What to measure.
        fresh_bytes: Memory that it will take from the system on this rank, page cache included. So much is touched and
            let go first, as a virtual machine may have handed free memory back to its host, and whoever touches it
            next waits for it: without this, raw writes of the same bytes took between 0.4 and 1.2 s.
    """
    _touch(fresh_bytes)
    before = _status("VmRSS")
    # 5 resets the high-water mark of the resident memory: exact, where a sampling thread would miss peaks.
    Path("/proc/self/clear_refs").write_text("5")
    barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    operation()
    cpu = time.process_time() - cpu_started
    barrier()
    seconds = time.perf_counter() - started
    worst = torch.tensor([seconds, cpu, (_status("VmHWM") - before) / 1024], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Sample(*worst.tolist())


def _touch(nbytes: int) -> None:
    if nbytes:
        with mmap.mmap(-1, nbytes) as memory:
            for page in range(0, nbytes, mmap.PAGESIZE):
                memory[page] = 1


def tree_bytes(directory: Path) -> int:
    """Bytes of all regular files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    if dist.is_initialized():
        dist.barrier()


def conditions(size: float, world_size: int, repeats: int, directory: Path) -> str:
    """What the numbers depend on."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "?")
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores ({model}), load {load:.1f} at the start, torch {torch.__version__}, "
        f"{world_size} ranks, {size:g} GB of bfloat16, {repeats} repeats, {directory}"
    )
