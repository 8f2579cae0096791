"""Real process groups of 1 to 4 ranks, cheap enough to use in every test.

Four processes live as long as the test run. A test sends a top-level function to the first ``world`` of them; they form
a gloo group, run it and leave the group, so that no test sees another's. Nothing can hang: whatever takes too long is
killed, and the next test gets new processes.

    def save(path: str) -> int: ...

    def test_it(tmp_path):
        assert run(2, save, str(tmp_path)) == [7, 7]

`fresh` is for what needs a process of its own, and would else start an interpreter and import torch once more.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from tests.support.worker import Outcome, Task, serve

from shardwise.errors import ShardwiseError

WORLDS = (1, 2, 3, 4)
_LARGEST = max(WORLDS)
#: After one rank has failed in a way that its peers cannot know of, they are not waited for any longer than this.
_GRACE_SECONDS = 30.0


class Pool:
    """The processes."""

    def __init__(self) -> None:
        self._processes: list[tuple[ForkServerProcess, Connection]] = []
        self._directory = tempfile.mkdtemp(prefix="shardwise-ranks-")
        self._numbers = itertools.count()

    def outcomes(
        self, world: int, function: Callable[..., object], args: tuple[object, ...], seconds: float
    ) -> list[Outcome]:
        """Run ``function`` on ``world`` ranks and return what became of it on each."""
        if not self._processes:
            self._start()
        store = Path(self._directory) / f"store-{next(self._numbers)}"
        connections = [connection for _, connection in self._processes[:world]]
        for rank, connection in enumerate(connections):
            connection.send(Task(world, rank, store, function, args, Path(self._directory)))
        found: dict[int, Outcome] = {}
        deadline = time.monotonic() + seconds
        while len(found) < world:
            pending = {id(c): (rank, c) for rank, c in enumerate(connections) if rank not in found}
            ready = wait([c for _, c in pending.values()], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise TimeoutError(_report(f"{len(pending)} of {world} ranks did not return", found))
            for connection in ready:
                rank = pending[id(connection)][0]
                try:
                    found[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.close()
                    raise RuntimeError(_report(f"rank {rank} died", found)) from None
                if found[rank].failed:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return [found[rank] for rank in range(world)]

    def _start(self) -> None:
        for _ in range(_LARGEST):
            ours, theirs = multiprocessing.Pipe()
            self._processes.append((_forked(serve, theirs), ours))
            theirs.close()

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._processes:
            connection.close()
            process.kill()
        for process, _ in self._processes:
            process.join(10)
        self._processes = []


def _forked(target: Callable[..., object], *args: object) -> ForkServerProcess:
    """Start a process that has everything imported."""
    root = str(Path(__file__).parents[2])
    paths = [os.path.join(root, "src"), root]
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *(path for path in known if path and path not in paths)])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.worker"])
    main, sys.modules["__main__"] = sys.modules["__main__"], sys.modules[__name__]
    try:
        process = context.Process(target=target, args=args, daemon=True)
        process.start()
    finally:
        sys.modules["__main__"] = main
    return process


_POOL = Pool()
atexit.register(_POOL.close)


def outcomes(world: int, function: Callable[..., object], *args: object, seconds: float = 100) -> list[Outcome]:
    """Run ``function(*args)`` on ``world`` ranks; return values and errors, in rank order."""
    return _POOL.outcomes(world, function, args, seconds)


def run(world: int, function: Callable[..., object], *args: object, seconds: float = 100) -> list[object]:
    """Run ``function(*args)`` on ``world`` ranks; return its values in rank order.

    Raises:
        AssertionError: It raised on a rank; all tracebacks are in the text.
    """
    found = outcomes(world, function, *args, seconds=seconds)
    if any(outcome.failed for outcome in found):
        raise AssertionError(_report("the ranks failed", dict(enumerate(found))))
    return [outcome.value for outcome in found]


def failure(world: int, function: Callable[..., object], *args: object, seconds: float = 100) -> ShardwiseError:
    """Run ``function(*args)``, which must fail on every rank with one and the same error of shardwise's; return it."""
    found = outcomes(world, function, *args, seconds=seconds)
    errors = [outcome.error for outcome in found]
    assert len({str(error) for error in errors}) == 1, f"the ranks disagree: {[str(e) for e in errors]}"
    assert len({type(error) for error in errors}) == 1, f"the ranks disagree: {[type(e) for e in errors]}"
    return errors[0]


def fresh(function: Callable[..., object], *args: object, output: Path, seconds: float) -> int:
    """Run ``function(*args)`` in a new process, which is all its own, and return the exit code.

    Args:
        function: A top-level function.
        args: Its arguments.
        output: Where what it prints goes; errors go to a file of this name and ``.err``.
        seconds: It is killed after this time, which gives another exit code than 0.
    """
    process = _forked(_printing, output, function, args)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _printing(output: Path, function: Callable[..., object], args: tuple[object, ...]) -> None:
    for number, path in ((1, output), (2, output.with_name(output.name + ".err"))):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    function(*args)
    sys.stdout.flush()


def _report(what: str, found: dict[int, Outcome]) -> str:
    lines = [what]
    for rank, outcome in sorted(found.items()):
        lines.append(f"--- rank {rank}: " + (outcome.trace if outcome.failed else "ok"))
    return "\n".join(lines)
