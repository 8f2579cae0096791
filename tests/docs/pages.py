"""The documents as data: their code blocks, links and headings. And what runs a page."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent.parent
#: Every document that a user reads. CHANGELOG.md is prose.
PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    if path.name != "CHANGELOG.md"
)

_MARKDOWN = MarkdownIt("commonmark").enable("table")
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->", re.S)
_TITLE = re.compile(r'title="([^"]+)"')
#: What is no program: output, layouts, diagrams, settings and formats that the text explains.
_NO_PROGRAM = {"text", "mermaid", "diff", "yaml", "json"}
_OUTPUT = doctest.OutputChecker()
_LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True)
class Block:
    """A code block.

    Attributes:
        language: What stands behind the fence; empty for an indented block.
        title: The file that the block is the content of.
        text: The code.
        line: Where it begins, counted from 1.
        reason: Why it is not run, from the comment before it.
    """

    language: str
    title: str
    text: str
    line: int
    reason: str

    @property
    def is_program(self) -> bool:
        return self.language not in _NO_PROGRAM


def tokens(page: str) -> list[Token]:
    return _MARKDOWN.parse((ROOT / page).read_text())


def blocks(page: str) -> list[Block]:
    """The code blocks of a page in order, those in lists and quotations too."""
    found, reason = [], ""
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            title = _TITLE.search(token.info)
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Block(language, title[1] if title else "", token.content, token.map[0] + 1, reason))
        if token.type == "html_block":
            comment = _NOT_RUN.search(token.content)
            reason = comment[1] if comment else ""
        elif token.level == 0:
            reason = ""
    return found


def links(page: str) -> Iterator[str]:
    """Targets of the links and pictures of a page."""
    for token in tokens(page):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if isinstance(target, str):
                yield target


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them (mkdocs makes the same of ours)."""
    listed = tokens(page)
    found: set[str] = set()
    for token, inline in pairwise(listed):
        if token.type == "heading_open":
            text = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
            number = sum(each == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", each) is not None for each in found)
            found.add(f"{slug}-{number}" if number else slug)
    return found


def run_page(page: str, folder: Path) -> list[tuple[Block, str]]:
    """Run the blocks of a page in order, in ``folder``, which is empty and the working directory.

    Python blocks share one namespace. A block with a title is written to that file, and run by whatever names it. A
    block of text behind a block that was run is what this has to print, with ``...`` for what differs from run to run.

    Returns:
        Each block that was run, and what it printed.
    """
    ran: list[tuple[Block, str]] = []
    namespace: dict[str, object] = {"__name__": page}
    printed: str | None = None
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.language == "text":
            if printed is not None and not _OUTPUT.check_output(block.text, printed, _LENIENT):
                raise AssertionError(f"{where}: the page says\n{block.text}\nand printed was\n{printed}")
            printed = None
        elif block.reason or not block.is_program:
            printed = None
        elif block.title:
            (folder / block.title).write_text(block.text)
            printed = None
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                # Line numbers of the page, so that a traceback leads to it.
                exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), namespace)
            printed = out.getvalue()
        elif block.language in ("sh", "bash"):
            printed = in_shell(block.text, folder, where)
        else:
            raise AssertionError(f"{where}: nobody knows how to run {block.language or 'an indented block'!r}")
        if printed is not None:
            ran.append((block, printed))
    return ran


def in_shell(commands: str, folder: Path, where: str) -> str:
    """What a shell prints that runs ``commands`` with this environment's programs, and this tree's package."""
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
