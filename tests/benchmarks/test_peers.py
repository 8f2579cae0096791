"""The comparison with other libraries runs as a whole with those that are installed, and finds their bytes right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PEERS = ["shardwise", "torch", "transformers, distributed", "accelerate"]


@pytest.mark.slow
def test_a_small_run_with_the_peers_that_are_here(tmp_path: Path) -> None:
    docs, figures = tmp_path / "docs", tmp_path / "figures.json"
    command = [sys.executable, ROOT / "benchmarks/peers.py", "--size", "0.02", "--repeats", "1", "--dir", tmp_path]
    command += ["--docs", docs, "--json", figures, "--peers", *PEERS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    lines = json.loads(figures.read_text())
    assert len(lines) == 8
    for line in lines:
        assert [cell["peer"] for cell in line["cells"]] == PEERS
        for cell in line["cells"]:
            assert bool(cell["reason"]) != (len(cell["ratios"]) == 1), cell
        assert line["cells"][0]["ratios"], line["name"]
    assert "| shardwise |" in (docs / "peers.md").read_text()
    bars = ElementTree.parse(docs / "img/peers.svg").iter("{http://www.w3.org/2000/svg}rect")
    assert len(list(bars)) == sum(1 for line in lines for cell in line["cells"] if not cell["reason"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "figures.json"]
