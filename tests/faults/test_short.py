"""The short form of the fault bench, and that the bench can fail at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)
BENCH = Path(__file__).with_name("bench.py")
ROOT = BENCH.parent.parent.parent


def test_the_short_bench_finds_no_exception() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--short"], capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "crash points" in done.stdout


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
