"""The preemption example under torchrun, with a worker that is asked to leave and one that is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from shardwise.ops.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
EXAMPLE = Path(__file__).parents[2] / "examples" / "preemption.py"
STEPS, SAVE_EVERY = 12, 4
LIMIT_SECONDS = 150.0


class Elastic:
    """A run of the example; its output grows in a file."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkpoints"
        self._log = directory / "log"
        settings = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--signal-at", "-1", "--pause", "0.3"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "3", str(EXAMPLE), "--out", str(self.root), *settings]
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match of ``pattern`` in the output, once it is there."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            over = self.process.poll() is not None
            found = re.search(pattern, self.log)
            if found:
                return found
            assert not over, f"the run is over without {pattern!r}\n{self.log}"
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in time\n{self.log}")

    def strike(self, number: signal.Signals) -> None:
        """Send a signal to rank 1 of the first start, some steps after the first regular checkpoint."""
        pid = int(self.wait_for(r"start 0: rank 1 is process (\d+)")[1])
        self.wait_for(rf"start 0: step {SAVE_EVERY} done")
        os.kill(pid, number)

    def end(self) -> None:
        """End what still runs: torchrun first, which would start the workers again."""
        family = [self.process.pid]
        with suppress(psutil.NoSuchProcess):
            family += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        family += map(int, re.findall(r"is process (\d+)", self.log))
        for pid in family:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                # The number of one that ended may have been given to somebody else since.
                if str(self.root) in process.cmdline():
                    process.kill()
        self.process.wait(30)


@contextmanager
def elastic(directory: Path) -> Iterator[Elastic]:
    run = Elastic(directory)
    try:
        yield run
    finally:
        run.end()


def finish(run: Elastic) -> int:
    """Wait for the end of the run, which must be a good one; return the step at which its second start began."""
    assert run.process.wait(LIMIT_SECONDS) == 0, run.log
    resumed = {int(step) for step in re.findall(r"start 1: rank \d is process \d+, from step (\d+)", run.log)}
    assert len(resumed) == 1, f"the ranks disagree\n{run.log}"
    assert "finished" in run.log
    assert verify(run.root).status == "whole"
    assert (run.root / "LATEST").resolve().name == f"epoch_0_step_{STEPS - 1}"
    return resumed.pop()


def test_sigterm_to_one_worker_saves_on_all_and_the_next_start_goes_on_from_there(tmp_path: Path) -> None:
    with elastic(tmp_path) as run:
        run.strike(signal.SIGTERM)
        run.wait_for("asked to leave: saved")
        first = finish(run)
        left = max(int(step) for step in re.findall(r"start 0: step (\d+) done", run.log))
        # Not a step of a regular checkpoint in all likelihood; whichever it was, nothing is done twice.
        assert first == left + 1
        assert SAVE_EVERY < first < STEPS


def test_a_killed_worker_is_started_again_and_resumes_from_the_last_published_checkpoint(tmp_path: Path) -> None:
    with elastic(tmp_path) as run:
        run.strike(signal.SIGKILL)
        first = finish(run)
        assert first in (SAVE_EVERY, 2 * SAVE_EVERY)
        assert "asked to leave" not in run.log
