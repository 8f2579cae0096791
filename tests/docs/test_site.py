"""What the site's pages get from others, and the site in a browser. `make check` builds the site, strictly."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.docs.pages import ROOT
from tests.support.browser import CHROMIUM, browser

pytest.importorskip("mkdocs", reason="the docs extra is not installed")

from tools.site_hook import with_messages


def test_a_message_stands_below_its_type() -> None:
    page = "# Title\n\n## MisuseError\n\nA call.\n\n## PeerError\n\nA rank.\n"
    table = "| a rank is slow | `PeerError` | rank 1 did not | `tests/a.py::test_a` |\n"
    before, _, after = with_messages(page, table).partition("## PeerError")
    assert "rank 1" not in before
    assert "| rank 1 did not | a rank is slow |" in after


def test_no_message_of_the_table_is_left_out() -> None:
    table = (ROOT / "docs" / "errors.md").read_text()
    shown = with_messages((ROOT / "docs" / "troubleshooting.md").read_text(), table)
    rows = [cells for line in table.splitlines() if (cells := line.split(" | "))[1:] and cells[1].startswith("`")]
    assert len(rows) > 60
    assert [cells for cells in rows if f"| {cells[2]} | {cells[0].removeprefix('| ')} |" not in shown] == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_pages_from_the_disk_are_whole_and_searched_and_fetch_nothing(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(build, cwd=ROOT, check=True)
    with browser(tmp_path / "profile") as tab:
        for page in sorted((tmp_path / "site").rglob("*.html")):
            if page.name == "404.html":  # served for any address, so what it names is absolute
                continue
            tab.look(1280, 900, dark=True)
            tab.open(page)
            assert tab.run("document.body.dataset.mdColorScheme") == "slate"
            assert tab.run("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)") == []
            assert tab.run("document.documentElement.scrollWidth") <= 1280, page
        tab.run("document.querySelector('[data-md-component=search-query]').focus()")
        tab.type("retention")
        limit = time.monotonic() + 30
        while "matching" not in (found := tab.run("document.querySelector('.md-search-result__meta').textContent")):
            assert time.monotonic() < limit, found
            time.sleep(0.1)
        asked = [event["params"]["request"]["url"] for event in tab.events if "request" in event["params"]]
        assert [url for url in asked if not url.startswith(("file:", "about:", "data:"))] == []
