"""What comes of a command on a thing: exit code, message, and that nothing was written that was not asked for."""

from __future__ import annotations

import atexit
import contextlib
import io
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

from tests.commands.formats import Row, a_model, an_adapter

from shardwise.cli import main

#: Arguments of a command, by what it is pointed at and where it may write.
COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "ls": lambda path, out: ["ls", path],
    "inspect": lambda path, out: ["inspect", path],
    "inspect --html": lambda path, out: ["inspect", path, "--html", out],
    "verify": lambda path, out: ["verify", path],
    "diff": lambda path, out: ["diff", path, path],
    "consolidate": lambda path, out: ["consolidate", path, "--output", out],
    "convert --to hf": lambda path, out: ["convert", path, out, "--to", "hf"],
    "convert --to dcp": lambda path, out: ["convert", path, out, "--to", "dcp"],
    "convert --to shards": lambda path, out: ["convert", path, out, "--to", "shards"],
    "merge-adapter PATH": lambda path, out: ["merge-adapter", path, str(adapter_and_base()[0]), out],
    "merge-adapter BASE PATH": lambda path, out: ["merge-adapter", str(adapter_and_base()[1]), path, out],
    "prune": lambda path, out: ["prune", path, "--keep-last", "1"],
    "repair": lambda path, out: ["repair", path],
    "push": lambda path, out: ["push", path, "org/name"],
}
#: Commands that make something out of all that is there.
_WRITING = (
    *("consolidate", "convert --to hf", "convert --to dcp", "convert --to shards"),
    *("merge-adapter PATH", "merge-adapter BASE PATH", "inspect --html"),
)
#: Commands that must not end with 0 on damage.
_TELLING = ("verify", "push", *_WRITING[:-1])
_CODES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        code: The exit code.
        line: The line that says most, without what changes from run to run.
        wrong: What is not as documented; empty if all is.
    """

    code: int
    line: str
    wrong: str = ""


@cache
def adapter_and_base() -> tuple[Path, Path]:
    """An adapter and the base model that it is of, which `merge-adapter` gets beside what is tried."""
    place = Path(tempfile.mkdtemp(prefix="commands-"))
    atexit.register(shutil.rmtree, place)
    return an_adapter(place), a_model(place)


class Hub:
    """Takes everything and keeps nothing."""

    def create_repo(self, *_: object, **__: object) -> None: ...

    def upload_folder(self, *_: object, **__: object) -> None: ...


def outcome(row: Row, name: str, path: Path, scratch: Path) -> Outcome:
    """Run a command in this process.

    Args:
        row: What was made.
        name: The command, one of `COMMANDS`.
        path: Where it was made.
        scratch: A directory to write into, in which nothing stays.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    target = (row.out or scratch) / ("out.html" if name == "inspect --html" else "out")
    top = path.parent.parent
    before = _tree(top)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patch("huggingface_hub.HfApi", Hub):
        code = main(COMMANDS[name](str(path), str(target)))
    left = sorted(each.name for each in scratch.iterdir())
    shutil.rmtree(scratch)
    line = _line(name, out.getvalue(), err.getvalue())
    others = ((scratch, "SCRATCH"), (adapter_and_base()[0], "ADAPTER"), (adapter_and_base()[1], "BASE"))
    for place, word in ((target, "OUT"), (path, "PATH"), (path.parent, "PARENT"), (path.parent.parent, "TOP"), *others):
        line = line.replace(str(place), word)
    wrong = [] if _tree(top) == before else ["what it was pointed at was changed"]
    if code not in _CODES or "Traceback" in err.getvalue():
        wrong.append(f"ends with {code} and {err.getvalue()[-300:]!r}")
    wanted = [target.name] if name in _WRITING and (code == 0 or (name == "inspect --html" and left)) else []
    if left != wanted:
        wrong.append(f"left {left} behind, exit code {code}")
    if row.damaged and name in _TELLING and code == 0:
        wrong.append("is content with damage")
    if code and not line.strip():
        wrong.append("says nothing")
    return Outcome(code, line, "; ".join(wrong))


def _line(name: str, out: str, err: str) -> str:
    """The error, or the line of a report that says most."""
    told = [line for line in err.splitlines() if not line.startswith(("note  ", "More: "))]
    shown = out.splitlines()
    if told and not shown:
        line = next((each for each in told if not each.startswith("shardwise: warning")), told[0])
        return line.removeprefix("shardwise: ")
    damaged = next((line for line in shown if "DAMAGED" in line), "")
    if damaged or name in ("consolidate", "push", "diff", "prune", "repair") or name.startswith(("convert", "merge")):
        line = damaged or shown[0 if name in ("prune", "repair") else -1]
    elif name == "inspect":
        line = next((each for each in shown if re.search(r"\d tensors, ", each)), shown[-1])
    else:
        line = shown[1] if name == "ls" and len(shown) > 1 else shown[-1]
    line = re.sub(r"(\d+)\.\d\d (kB|MB)", r"\1 \2", line)  # names of places stand in files
    line = re.sub(r" in \d+\.\d+ s \([^)]*\)", "", line)  # how fast it was
    return re.sub(r"  +", " ", re.sub(r"\b\d+ s  ", "", line)).strip()


def _tree(top: Path) -> list[tuple[str, int, int, int]]:
    found = []
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_mode, status.st_size, status.st_mtime_ns))
    return found
