"""The documents name files, modules and names that there are. Their code and links: tests/docs."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "shardwise"
DOCUMENTS = ("ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "docs/ten-questions.md")

_TICKED = re.compile(r"`([^`\n]+)`")
_PYTHON_FILE = re.compile(r"[\w/.-]+\.py\b")
_FOLDER = re.compile(r"[\w.]+(?:/[\w.]+)*/")
_DOTTED = re.compile(r"[a-z_]\w*(?:\.\w+)+")
#: First parts of dotted names that are ours.
_OURS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
#: Torch's own, as its users abbreviate ``torch.distributed.checkpoint``.
_TORCHS = {"dcp.save", "dcp.async_save", "dcp.load"}
_FILE = re.compile(r".*\.(py|json|yaml|safetensors|txt)")
#: Folders that a checkpoint has, not this repository.
_ON_DISK = {"per_rank/", "model_ema/", "model/", "consolidated/", "optim/"}


def text(document: str) -> str:
    return (ROOT / document).read_text()


def is_there(path: str) -> bool:
    return (PACKAGE / path).exists() or (ROOT / path).exists()


@cache
def has_name(dotted: str) -> bool:
    """Whether a module below shardwise, or an attribute of one, has this name."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(["shardwise", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_are_there(document: str) -> None:
    named = set(_PYTHON_FILE.findall(re.sub(r"\]\([^)]*\)", "]", text(document))))
    named |= {each for each in _TICKED.findall(text(document)) if _FOLDER.fullmatch(each)} - _ON_DISK
    assert sorted(path for path in named if not is_there(path)) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_and_their_names_are_there(document: str) -> None:
    dotted = {each.removeprefix("shardwise.") for each in _TICKED.findall(text(document)) if _DOTTED.fullmatch(each)}
    ours = {each for each in dotted - _TORCHS if each.split(".")[0] in _OURS and not _FILE.fullmatch(each)}
    assert sorted(each for each in ours if not has_name(each)) == []


def test_every_package_and_module_has_its_row_among_the_layers() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", text("ARCHITECTURE.md").partition("## Layers")[2].partition("\n## ")[0], re.M)
    named = {name for row in rows for name in _TICKED.findall(row)}
    assert named == _OURS - {"__init__", "__main__", "_version"}


def test_the_ten_questions_are_answered_by_architecture() -> None:
    answers = re.findall(r"^\| \d+ \|.*\| `([^`]+)` \|$", text("docs/ten-questions.md"), re.M)
    decided = text("ARCHITECTURE.md").partition("## Where what is decided")[2].partition("\n## ")[0]
    rows = [row.rpartition(" | ")[2] for row in decided.splitlines() if row.startswith("| ")]
    assert len(answers) == len(set(answers)) == 10
    assert [answer for answer in answers if sum(f"`{answer}`" in row for row in rows) != 1] == []


def test_the_glossary_is_short() -> None:
    glossary = text("ARCHITECTURE.md").partition("## Glossary")[2].partition("\n## ")[0]
    assert 1 <= len(re.findall(r"^\| [a-z]", glossary, re.M)) <= 20
