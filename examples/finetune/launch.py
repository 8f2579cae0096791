"""One ``torchrun`` and its workers: start them, follow them, freeze and kill them, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from examples.finetune.errors import DemoError
from examples.finetune.events import Event, Follower, Started
from examples.finetune.task import Task

_LOG_LINES = 30
_TORCHRUN = "torch/distributed/elastic/multiprocessing/api.py"
_GONE_SECONDS = 10.0


class Workers:
    """Worker processes under ``torchrun``, on this machine. A context manager: at its end nothing runs any more.

    1. make it (starts the processes); 2. `poll` until `ended`; 3. `check`. At any time: `freeze`, `thaw`, `kill`.

    Args:
        task: What they do.
        processes: How many.
        directory: Where the task, the events and the log of this run go.
    """

    def __init__(self, task: Task, processes: int, directory: Path) -> None:
        self._log = directory / "log.txt"
        self._follower = Follower(task.events)
        self._pids: list[int] = []
        task_file = directory / "task.json"
        task.write(task_file)
        with self._log.open("wb") as log:
            self._launcher = subprocess.Popen(
                _command(processes, task_file),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(processes),
                start_new_session=True,
            )

    def poll(self) -> list[Event]:
        """What the workers have told since the last call."""
        events = self._follower.read()
        self._pids += [event.pid for event in events if isinstance(event, Started)]
        return events

    @property
    def ended(self) -> bool:
        """Whether ``torchrun`` has ended."""
        return self._launcher.poll() is not None

    def check(self) -> None:
        """Wait for the end.

        Raises:
            DemoError: It was not a good one; the text ends with the last lines of the log.
        """
        code = self._launcher.wait()
        if code != 0:
            raise DemoError(f"the workers ended with code {code}; the end of their log:\n{self.log_end()}")

    def log_end(self) -> str:
        """The last lines that the workers and ``torchrun`` wrote."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        # torchrun adds a traceback of its own, which says nothing and would push the workers' out of sight.
        own = [number for number, line in enumerate(lines) if _TORCHRUN in line]
        lines = lines[: own[0]] if own and own[0] else lines
        return "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])

    def freeze(self) -> None:
        """Stop all of them where they are (SIGSTOP), ``torchrun`` first so that it misses no heartbeat."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End all of them with SIGKILL, which no process can catch or delay, and wait until they are gone."""
        self.poll()
        self._signal(signal.SIGKILL)
        self._launcher.wait()
        limit = time.monotonic() + _GONE_SECONDS
        while any(_runs(pid) for pid in self._pids):
            if time.monotonic() > limit:
                raise DemoError(f"worker processes {self._pids} do not end; look at what holds them")
            time.sleep(0.01)

    def _signal(self, number: signal.Signals) -> None:
        # torchrun gives every worker a session of its own, so that one signal to its group would miss them.
        for pid in (self._launcher.pid, *self._pids):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.ended:
            self.kill()


def _command(processes: int, task_file: Path) -> Sequence[str]:
    return (
        *(sys.executable, "-m", "torch.distributed.run"),
        # A free port on this machine, whatever its name resolves to.
        *("--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", str(processes)),
        *("--max-restarts", "0"),
        *("-m", "examples.finetune.worker", str(task_file)),
    )


def _environment(processes: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    # Everything that they open is local.
    environment["HF_HUB_OFFLINE"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _runs(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be collected by its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
