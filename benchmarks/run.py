"""Measure saves and loads as ratios to raw parallel input and output: ``make bench``, or ``benchmarks/run.py --help``.

Nothing here asserts a time. Ratios are medians over repeats that alternate with their reference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench import background, limits, loading, offline, others, planning, saving, sharing, tracing
from bench.measure import Row, conditions
from bench.ranks import Settings

CASES: dict[str, Callable[[Settings], list[Row]]] = {
    "consolidated": saving.consolidated,
    "sharded": saving.sharded_save,
    "with-base": saving.with_base,
    "digests": saving.digests,
    "replicated": saving.replicated,
    "load": loading.resharding,
    "base-model": loading.base_model,
    "limits": limits.limits,
    "stall": background.async_stall,
    "steps": background.async_steps,
    "plan": planning.planning,
    "trace": tracing.tracing,
    "offline": offline.offline,
}
#: Only when asked for by name: other libraries' ways, which are slow or need the whole model in one rank's memory, and
#: what is not done by default here.
OPTIONAL: dict[str, Callable[[Settings], list[Row]]] = {
    "torch-writer": others.torch_writer,
    "gather": others.gather,
    "share-reads": sharing.share_reads,
}


_HEAD = ("benchmark", "seconds", "ratio", "(min-max)", "cpu", "target", "to", "peak MiB", "disk", "note")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks named on the command line, or all that are not optional."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"{', '.join(CASES)}; only by name: {', '.join(OPTIONAL)}"
    )
    parser.add_argument("--size", type=float, default=1.8, help="gigabytes of the model (default 1.8)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement (default 5)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where files go (default /dev/shm)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args(arguments)
    known = CASES | OPTIONAL
    unknown = [name for name in given.names if name not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    given.dir.mkdir(parents=True, exist_ok=True)
    print(conditions(given.size, 2, given.repeats, given.dir), flush=True)
    print(
        _line("benchmark", "seconds", "ratio", "(min-max)", "cpu", "target", "to", "peak MiB", "disk", "note"),
        flush=True,
    )
    rows: list[Row] = []
    failed = False
    for name in given.names or CASES:
        place = Path(tempfile.mkdtemp(prefix="shardwise-bench-", dir=given.dir))
        try:
            found = known[name](Settings(place, given.size, given.repeats))
        except Exception:  # noqa: BLE001 - the other benchmarks are still worth having
            traceback.print_exc()
            failed = True
            continue
        finally:
            shutil.rmtree(place, ignore_errors=True)
        rows += found
        for row in found:
            print(_format(row), flush=True)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(failed)


def _format(row: Row) -> str:
    return _line(
        row.name,
        f"{row.seconds:.3f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.spread is None else f"{row.spread[0]:.2f}-{row.spread[1]:.2f}",
        "" if row.cpu_ratio is None else f"{row.cpu_ratio:.2f}",
        "" if row.target is None else f"{row.target:g}",
        row.reference + (f" {row.reference_seconds:.3f} s" if row.reference_seconds is not None else ""),
        "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
        "" if row.disk_ratio is None else f"{row.disk_ratio:.4f}",
        row.note,
    )


def _line(*cells: str) -> str:
    widths = (34, 8, 6, 11, 6, 6, 20, 8, 7, 0)
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


if __name__ == "__main__":
    sys.exit(main())
