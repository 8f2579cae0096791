"""The fault bench: kill, starve and corrupt real saves, and print what survived.

    make faults                 the whole bench
    make faults ARGS=--short    a sample, as `make test` runs it
    make faults ARGS='--only crash --only kill'

The exit code is 0 if there was no exception to the promise. The table ends with every exception, if there are any.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.faults import corruption, crash_points, kills, refusals
from tests.faults.processes import clean, fork, result, warm


def rows(short: bool) -> list[tuple[str, str, Callable[[], tuple[str, list[str]]]]]:
    """What is run: group, name, and a function that gives counts and exceptions.

    What mostly waits runs beside the others.
    """
    scenarios = [crash_points.SCENARIOS[3], crash_points.SCENARIOS[8]] if short else list(crash_points.SCENARIOS)
    every = 72 if short else 1
    parts: list[tuple[str, str, Callable[[], tuple[str, list[str]]]]] = [
        ("crash", f"crash points: {each.name}", lambda each=each: _crash(each, not short))  # type: ignore[misc]
        for each in scenarios
    ]
    asynchronous: dict[str, object] = {"is_async": True}
    parts.append(("kill", "kill rank 0 at each operation", lambda: _tally(kills.kill_points({}, (0,), every))))
    parts.append(("kill", "kill rank 1, asynchronous", lambda: _tally(kills.kill_points(asynchronous, (1,), every))))
    if not short:
        parts += [
            ("kill", "kill rank 1 at each operation", lambda: _tally(kills.kill_points({}, (1,)))),
            ("kill", "kill both ranks", lambda: _tally(kills.kill_points({}, (0, 1)))),
            ("kill", "kill rank 0, asynchronous", lambda: _tally(kills.kill_points(asynchronous, (0,)))),
            ("kill", "kill both, asynchronous", lambda: _tally(kills.kill_points(asynchronous, (0, 1)))),
        ]
    runs = 2 if short else 300
    parts.append(
        ("random", f"{runs} random SIGKILLs of real runs", lambda: _tally(kills.random_kills(runs), acks=True))
    )
    refused = [(0, "", {}), (1, ", asynchronous", asynchronous)] if short else [
        (rank, label, changes) for label, changes in (("", {}), (", asynchronous", asynchronous)) for rank in (0, 1)
    ]  # fmt: skip
    for rank, label, changes in refused:
        parts.append(
            (
                "refuse",
                f"ENOSPC, EIO, EROFS on rank {rank}{label}",
                lambda rank=rank, changes=changes: _tally(refusals.refusals(rank, every=every, changes=changes)),  # type: ignore[misc]
            )
        )
    kinds = ("sync",) if short else ("mkdir", "create", "write", "sync", "rename")
    parts += [
        ("slow", "slow disk", lambda: _tally(kills.slow_disk())),
        ("wait", "a hung rank", lambda: _tally(kills.hung_rank(kinds))),
        ("slow", "clock jumps", lambda: _tally(refusals.clock_jumps())),
        ("corrupt", "single-bit flips", lambda: _tally(corruption.bit_flips(40 if short else 2000))),
        ("corrupt", "truncations", lambda: _tally(corruption.truncations(2 if short else 16))),
        ("corrupt", "files replaced", lambda: _tally(corruption.replacements())),
    ]
    return parts


def _crash(scenario: crash_points.Scenario, thorough: bool) -> tuple[str, list[str]]:
    found = crash_points.run(scenario, thorough=thorough)
    counts = (
        f"{found.operations} operations, {found.states} states: {found.old} old, {found.new} new, {found.saves} saves"
    )
    return counts, found.failures


def _tally(found: kills.Tally, acks: bool = False) -> tuple[str, list[str]]:
    counts = f"{found.cases} cases"
    if acks:
        counts += f", {found.new} steps saved"
    elif found.old or found.new:
        counts += f": {found.old} old, {found.new} new"
    if found.errors:
        counts += "; " + ", ".join(f"{count} {name}" for name, count in sorted(found.errors.items()))
    return counts, found.failures


def _timed(action: Callable[[], tuple[str, list[str]]]) -> tuple[str, list[str], float]:
    started = time.monotonic()
    counts, found = action()
    return counts, found, time.monotonic() - started


def _told(child: int, place: Path) -> tuple[str, list[str], float]:
    counts, found, seconds = result(child, place)  # type: ignore[misc]
    return counts, found, seconds


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a sample of a minute")
    parser.add_argument(
        "--only", action="append", help="crash, kill, random, refuse, slow, wait, corrupt; may be repeated"
    )
    options = parser.parse_args(arguments)
    warm()
    failures: list[str] = []
    begun = time.monotonic()
    wanted = [row for row in rows(options.short) if not options.only or row[0] in options.only]
    waiting = {name: fork(lambda action=action: _timed(action)) for group, name, action in wanted if group == "wait"}
    try:
        for _, name, action in sorted(wanted, key=lambda row: row[1] in waiting):
            counts, found, seconds = _told(*waiting[name]) if name in waiting else _timed(action)
            verdict = "ok" if not found else f"{len(found)} EXCEPTIONS"
            print(f"{name:<44} {verdict:<14} {seconds:7.1f} s  {counts}", flush=True)
            failures += [f"{name}: {each}" for each in found]
    finally:
        clean()
    verdict = f"{len(failures)} EXCEPTIONS" if failures else "ok"
    print(f"{'total':<44} {verdict:<14} {time.monotonic() - begun:7.1f} s")
    for each in failures:
        print(f"  {each}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
