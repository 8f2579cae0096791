"""The short form of the fault bench, and that the bench can fail at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.faults import bench
from tests.support.ranks import fresh

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]


def _short() -> None:
    sys.exit(bench.main(["--short"]))


def test_the_short_bench_finds_no_exception(tmp_path: Path) -> None:
    output = tmp_path / "output"
    code = fresh(_short, output=output, seconds=880)
    text = output.read_text()
    assert code == 0, text + output.with_name("output.err").read_text()
    assert "crash points" in text
    assert "a hung rank" in text


@pytest.mark.slow
def test_the_bench_notices_a_library_that_forgets_to_sync() -> None:
    code = """
from tests.faults.crash_points import Scenario, judge, record, without_syncs
from tests.faults.processes import clean, warm
warm()
recording = record(Scenario("synchronous"))
for kind in ("sync", "sync_dir"):
    print(kind, len(judge(without_syncs(recording, kind), thorough=False).failures) > 0)
clean()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=880, cwd=ROOT)
    assert done.stdout.split() == ["sync", "True", "sync_dir", "True"], done.stdout + done.stderr
