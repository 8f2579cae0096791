"""Scripts of the how-to pages: as they were and as the page changes them, run in processes of their own."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

from tests.integrations.runs import announce, die_when_opening, errors_of, launch

PAGES = Path(__file__).parents[2] / "docs" / "howto"


def write_scripts(page: str, folder: Path) -> int:
    """Write a page's script as ``old.py`` and, changed, as ``new.py``; returns how many lines are added."""
    block = (PAGES / page).read_text().partition("```diff\n")[2].partition("```")[0].splitlines(keepends=True)
    for name, sign in (("old.py", "-"), ("new.py", "+")):
        (folder / name).write_text("".join(line[1:] for line in block if line[0] in f" {sign}"))
    return sum(line[0] == "+" for line in block)


def run_script(
    script: Path, directory: Path, world: int = 1, killed_in: str = ""
) -> tuple[list[int], dict[int, float], str]:
    """Run a script that keeps its ``losses`` by step; returns exit codes, rank 0's losses, and what went wrong.

    Args:
        script: The script.
        directory: Where it runs; made if absent.
        world: Number of ranks.
        killed_in: Rank 0 dies when it opens a file of tensors whose path has this in it.
    """
    directory.mkdir(exist_ok=True)
    codes = launch(_rank, (script, directory, world, killed_in), world, directory)
    said = [line for line in (directory / "rank-0").read_text().splitlines() if line.startswith("{")]
    return (
        codes,
        {int(step): loss for step, loss in json.loads(said[-1] if said else "{}").items()},
        errors_of(world, directory),
    )


def _rank(run: tuple[Path, Path, int, str], rank: int, port: int) -> None:
    script, directory, world, killed_in = run
    announce(rank, world, port)
    os.chdir(directory)
    if killed_in and rank == 0:
        die_when_opening(killed_in)
    print(json.dumps(runpy.run_path(str(script))["losses"]), flush=True)
