"""What the site's pages get from others. `make check` builds the site itself, strictly."""

from __future__ import annotations

import pytest
from tests.docs.pages import ROOT

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
