"""The commands that write: consolidate."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from shardwise.cli.exits import FINE
from shardwise.cli.output import Bar, print_json, record, size

if TYPE_CHECKING:
    import argparse


def consolidate(options: argparse.Namespace) -> int:
    """``shardwise consolidate``."""
    from shardwise.ops import consolidate as work

    bar = Bar(options.quiet)
    try:
        report = work.consolidate(
            options.path,
            options.output,
            progress=bar.progress,
            prefix=options.prefix,
            base=options.base,
            diffusers_compatible=options.diffusers,
            assume_complete=options.assume_complete,
            verify_export=options.verify_export,
        )
    finally:
        bar.close()
    for note in report.notes:
        print(f"note  {note}", file=sys.stderr)
    if options.json:
        print_json(record(report))
    elif not options.quiet:
        print(f"wrote {report.path}: {report.tensors} tensors in {len(report.files)} files, {size(report.nbytes)}")
    return FINE
