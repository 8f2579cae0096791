"""The documents' code does what they say, and their links lead somewhere."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest
from tests.docs.pages import PAGES, ROOT, anchors, blocks, links, run_page

from shardwise.errors import ShardwiseError


def is_run(page: str) -> bool:
    return any(block.is_program and not block.reason for block in blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if is_run(page)])
def test_code_runs_and_prints_what_the_page_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_are_there(page: str) -> None:
    dead = []
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        there = target.exists() and (not anchor or anchor in anchors(str(target.resolve().relative_to(ROOT))))
        if not there:
            dead.append(link)
    assert dead == []


def test_each_type_of_error_leads_to_its_place_in_the_documentation() -> None:
    ours = [cls for cls in ShardwiseError.registry.values() if cls.__module__ == "shardwise.errors"]
    assert len(ours) > 30
    for cls in [ShardwiseError, *ours]:
        (note,) = cls("why").__notes__
        page, _, anchor = note.removeprefix("More: ").partition("#")
        assert anchor in anchors(page), note
