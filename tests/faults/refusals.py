"""A file system that refuses: full, broken or read-only, at every operation of one rank; and a clock that jumps."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.kills import Tally
from tests.faults.layer import Fault, Tape
from tests.faults.processes import ranks, scratch
from tests.faults.training import Run, checkpointer, restore, save, settings, short
from torch.distributed.device_mesh import DeviceMesh

from shardwise.errors import ShardwiseError, StorageError
from shardwise.ops.verify import verify

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)
_KINDS = ("mkdir", "space", "create", "write", "sync", "sync_dir", "rename", "symlink", "remove")


class _Warned(logging.Handler):
    """Keeps what the library warns of in this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("shardwise").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.texts.append(record.getMessage())


def refusals(rank: int, *, every: int = 1, changes: dict[str, object] | None = None) -> Tally:
    """Refuse every operation of ``rank`` in turn, and each kind with each error number, in one pair of processes.

    Args:
        rank: Where.
        every: Only every so-many-th operation; if not all of them, each kind with one error number.
        changes: Settings.
    """
    root = Path(tempfile.mkdtemp(dir=scratch()))

    def body(me: int, mesh: DeviceMesh) -> object:
        run, tape = Run(mesh), Tape(root)
        failures: list[str] = []
        texts: list[str] = []
        warned = _Warned()
        kept: dict[str, object] = {"max_recent_checkpoints": 1, **(changes or {})}
        with checkpointer(settings(root, **kept), tape, me) as engine:
            save(engine, run, 1)
            save(engine, run, 2)
            tape.done.clear()
            save(engine, run, 3)
            step = 3
            count = len(tape.done) if me == rank else 0
            # Both ranks walk through the same list; its length is the faulty rank's.
            count = _told(mesh, count, rank)
            for fault in _faults(count, rank, every):
                tape.fault, tape.count, tape.struck = (fault if me == rank else None), 0, ""
                warned.texts.clear()
                text = _attempt(engine, run, step + 1)
                struck = tape.struck
                tape.fault = None
                texts.append(text)
                # What fails behind the publication costs no save; a warning says so, and the next save tries again.
                if (
                    me == rank
                    and struck
                    and text == "saved"
                    and not any("is published, but" in t for t in warned.texts)
                ):
                    failures.append(f"refused {struck} and nobody noticed")
                try:
                    found = restore(engine, run)
                    if found not in (step, step + 1):
                        failures.append(f"after {struck}: restored step {found}")
                    step = int(found or 0) + 1
                    save(engine, run, step)
                except (ShardwiseError, AssertionError) as error:
                    failures.append(f"after {struck}: {short(error)}")
                    break
            if me == 0 and verify(root).status != "whole":
                failures.append(f"damaged: {verify(root).damages}")
        return [texts, failures]

    tally = Tally()
    ended = ranks(body, limit=1500)
    for each in ended:
        if not isinstance(each.returned, list):
            tally.failures.append(f"a rank ended with {each}")
            return tally
        tally.failures += each.returned[1]
    for one, other in zip(*(each.returned[0] for each in ended), strict=True):  # type: ignore[index]
        tally.cases += 1
        tally.saw(one.partition(":")[0])
        if one != other:
            tally.failures.append(f"ranks disagree: {one} / {other}")
        elif one != "saved" and (f"rank {rank}" not in one or not one.startswith("StorageError")):
            tally.failures.append(f"does not name rank {rank}: {one}")
    return tally


def _faults(count: int, rank: int, every: int) -> list[Fault]:
    """Faults at ``count`` operations, and at the first of each kind."""
    found = [Fault("refuse", at, code=CODES[at % 3]) for at in range(0, count, every)]
    for number, kind in enumerate(_KINDS):
        codes = CODES if every == 1 else (CODES[(number + rank) % 3],)
        found += [Fault("refuse", 0, kind, code) for code in codes]
    return found


def _attempt(engine: object, run: Run, step: int) -> str:
    try:
        save(engine, run, step)  # type: ignore[arg-type]
    except ShardwiseError as error:
        known = isinstance(error, StorageError) and error.errno in CODES and error.path
        return f"{type(error).__name__}: {error}" if known else f"incomplete {type(error).__name__}: {error}"
    return "saved"


def _told(mesh: DeviceMesh, count: int, source: int) -> int:
    import torch
    import torch.distributed as dist

    value = torch.tensor([count])
    dist.broadcast(value, source)
    return int(value.item())


def clock_jumps(jumps: Sequence[float] = (-3.2e8, 3.2e8, -86400.0, 0.0)) -> Tally:
    """The wall clock jumps by years between saves, and time stamps in the root are scrambled: order is by name."""
    root = Path(tempfile.mkdtemp(dir=scratch()))

    def body(rank: int, mesh: DeviceMesh) -> object:
        real = time.time
        run = Run(mesh)
        failures = []
        with checkpointer(settings(root, max_recent_checkpoints=2), None, rank) as engine:
            for step, jump in enumerate(jumps, start=1):
                time.time = lambda jump=jump: real() + jump
                save(engine, run, step)
                if rank == 0:
                    for number, path in enumerate(sorted(root.iterdir())):
                        if not path.is_symlink():
                            os.utime(path, (real() - 1e6 * number, real() - 1e6 * number))
                found = restore(engine, run)
                if found != step:
                    failures.append(f"after a jump by {jump:.0f} s step {found} came back instead of {step}")
            time.time = real
        names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.is_symlink())
        wanted = [f"epoch_0_step_{len(jumps) - 1}", f"epoch_0_step_{len(jumps)}"]
        if names != wanted:
            failures.append(f"kept {names} instead of {wanted}")
        return failures

    tally = Tally(cases=len(jumps))
    for each in ranks(body):
        if isinstance(each.returned, list):
            tally.failures += each.returned
        else:
            tally.failures.append(str(each))
    return tally
