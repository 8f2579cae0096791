"""Measure shardwise beside other libraries, in turns on the same bytes: ``make bench-peers``, or with ``--help``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench.peers import page
from bench.peers.operations import OPERATIONS
from bench.peers.turns import compare
from bench.peers.worker import PEERS


def main(arguments: list[str] | None = None) -> int:
    """Run the operations named on the command line, or all, and write the page where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="operation", help=f"of {', '.join(OPERATIONS)}; by default all")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="peer")
    parser.add_argument("--size", type=float, default=0.5, help="gigabytes of the model (default 0.5)")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns after one that is not (default 3)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where files go (default /dev/shm)")
    parser.add_argument("--docs", type=Path, help="write peers.md and img/peers.svg into this directory")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in OPERATIONS]:
        parser.error(f"unknown: {', '.join(unknown)}")
    given.dir.mkdir(parents=True, exist_ok=True)
    run = page.conditions(given.size, given.repeats, given.dir)
    place = Path(tempfile.mkdtemp(prefix="shardwise-peers-", dir=given.dir))
    try:
        lines = compare(given.peers, given.names or list(OPERATIONS), place, given.size, given.repeats)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(page.table(lines))
    if given.json:
        given.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    if given.docs:
        page.write(given.docs, run, lines)
    return int(any(cell.failed for line in lines for cell in line.cells))


if __name__ == "__main__":
    sys.exit(main())
