"""Two ranks as forked processes: the parent has imported everything, so a fresh pair costs milliseconds.

The parent starts no thread and no collective, which is what makes forking it safe.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

#: What a rank does: ``(rank, mesh) -> a value that JSON can express``.
Body = Callable[[int, DeviceMesh], object]


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        returned: What its body returned; ``None`` if it did not get there.
        signal: The signal that killed it, or 0.
        hung: It had to be killed by the bench.
        crash: Traceback of an error that its body let through.
        seconds: From the start to its end.
    """

    returned: object = None
    signal: int = 0
    hung: bool = False
    crash: str = ""
    seconds: float = 0.0


def fork(body: Callable[[], object]) -> tuple[int, Path]:
    """Start ``body`` in a child; returns its process id and where its result will be."""
    handle, name = tempfile.mkstemp(prefix="rank-", dir=scratch())
    os.close(handle)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child, Path(name)
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        if "FAULTS_VERBOSE" not in os.environ:
            os.dup2(quiet, 2)
        torch.set_num_threads(1)
        Path(name).write_text(json.dumps({"returned": body()}))
        code = 0
    except BaseException:  # noqa: BLE001 - told to the parent
        Path(name).write_text(json.dumps({"crash": traceback.format_exc()}))
    finally:
        os._exit(code)


def ranks(
    body: Body, *, world: int = 2, limit: float = 60.0, killed_after: Callable[[list[int]], None] | None = None
) -> list[Ended]:
    """Run ``body`` on every rank of a fresh gloo group and tell how each ended; nobody outlives ``limit`` seconds.

    Args:
        body: What a rank does.
        world: Number of ranks.
        limit: Seconds.
        killed_after: Called with the process ids once they run; may kill some of them.
    """
    store = tempfile.mktemp(prefix="store-", dir=scratch())
    started = time.monotonic()

    def one(rank: int) -> object:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
        )
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
        return body(rank, mesh)

    children = [fork(lambda rank=rank: one(rank)) for rank in range(world)]  # type: ignore[misc]
    if killed_after is not None:
        killed_after([child for child, _ in children])
    ended: dict[int, Ended] = {}
    while len(ended) < world:
        for rank, (child, place) in enumerate(children):
            if rank in ended:
                continue
            hung = time.monotonic() - started > limit
            if hung:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, 0 if hung else os.WNOHANG)
            if done:
                ended[rank] = _ended(place, status, hung, time.monotonic() - started)
        time.sleep(0.002)
    Path(store).unlink(missing_ok=True)
    return [ended[rank] for rank in range(world)]


def alone(body: Callable[[], object], limit: float = 600.0) -> object:
    """Run ``body`` in a child and return what it returns.

    Raises:
        AssertionError: It failed, was killed or hung.
    """
    return result(*fork(body), limit)


def result(child: int, place: Path, limit: float = 600.0) -> object:
    """What a child that `fork` started returns.

    Raises:
        AssertionError: It failed, was killed or hung.
    """
    started = time.monotonic()
    while True:
        hung = time.monotonic() - started > limit
        if hung:
            os.kill(child, signal.SIGKILL)
        done, status = os.waitpid(child, 0 if hung else os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    ended = _ended(place, status, hung, 0.0)
    assert not ended.crash, ended.crash
    assert not ended.hung, "it hung"
    assert not ended.signal, f"killed by signal {ended.signal}"
    return ended.returned


def _ended(place: Path, status: int, hung: bool, seconds: float) -> Ended:
    text = place.read_text()
    place.unlink()
    record = json.loads(text) if text else {}
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Ended(record.get("returned"), number, hung, record.get("crash", ""), seconds)


_SCRATCH: list[str] = []


def scratch() -> str:
    """A directory in memory, for results and roots; removed by `clean`."""
    if not _SCRATCH:
        _SCRATCH.append(
            tempfile.mkdtemp(prefix="shardwise-faults-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        )
    return _SCRATCH[0]


def clean() -> None:
    """Remove what `scratch` holds."""
    while _SCRATCH:
        shutil.rmtree(_SCRATCH.pop(), ignore_errors=True)


def warm() -> None:
    """Import everything that a save needs, once, in the process that is forked from."""
    from tests.faults.training import Run, checkpointer, restore, save, settings

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=scratch()) as directory, checkpointer(settings(Path(directory))) as engine:
        run = Run()
        save(engine, run, 1)
        assert restore(engine, run) == 1
