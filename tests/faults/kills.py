"""Real processes that die, hang, or are slow in the middle of a save."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.crash_states import Tree, read_tree, write_tree
from tests.faults.layer import Fault, Tape
from tests.faults.processes import Ended, alone, ranks, scratch
from tests.faults.training import Run, checkpointer, restore, save, settings, short
from torch.distributed.device_mesh import DeviceMesh

from shardwise.errors import ShardwiseError
from shardwise.lifecycle import list_checkpoints
from shardwise.ops.verify import verify

#: A survivor has to report its peer's death within the time-out, plus what a loaded machine adds.
TIMEOUT_SECONDS = 10.0
_GRACE_SECONDS = 20.0


@dataclass
class Tally:
    """Counts of one part of the bench, and every exception to the promise."""

    cases: int = 0
    old: int = 0
    new: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def saw(self, error: str) -> None:
        self.errors[error] = self.errors.get(error, 0) + 1


def prepared(changes: dict[str, object]) -> Tree:
    """A root with two checkpoints saved by two ranks."""
    root = Path(tempfile.mkdtemp(dir=scratch()))

    def body(rank: int, mesh: DeviceMesh) -> object:
        run = Run(mesh)
        with checkpointer(settings(root, **changes), None, rank) as engine:
            for step in (1, 2):
                save(engine, run, step)
        return True

    ended = ranks(body)
    assert all(each.returned for each in ended), ended
    tree = read_tree(root)
    shutil.rmtree(root)
    return tree


def attempt(root: Path, step: int, faults: dict[int, Fault], changes: dict[str, object]) -> list[Ended]:
    """One save of two ranks with faults on some; each returns ``[outcome, seconds, operations]``."""

    def body(rank: int, mesh: DeviceMesh) -> object:
        run = Run(mesh)
        tape = Tape(root, faults.get(rank))
        engine = checkpointer(settings(root, **changes), tape, rank)
        started = time.monotonic()
        try:
            save(engine, run, step)
            outcome = "saved"
        except ShardwiseError as error:
            outcome = type(error).__name__
        return [outcome, time.monotonic() - started, len(tape.done)]

    return ranks(body, limit=2 * (TIMEOUT_SECONDS + _GRACE_SECONDS))


def aftermath(root: Path, old: int, new: int, changes: dict[str, object], tally: Tally, where: str) -> None:
    """Whatever happened: old or new is there whole, and the next save succeeds."""

    def body() -> object:
        try:
            with checkpointer(settings(root, **changes)) as engine:
                found = restore(engine, Run())
                assert found in (old, new), f"restored step {found}"
                assert verify(root).status == "whole"
                following = new + 1 if found == new else new
                save(engine, Run(), following)
                assert restore(engine, Run()) == following
            assert verify(root).status == "whole"
        except Exception as error:  # noqa: BLE001 - counted and shown
            return f"{where}: {short(error)}"
        return found

    found = alone(body)
    if isinstance(found, str):
        tally.failures.append(found)
    else:
        tally.old += found == old
        tally.new += found == new


def kill_points(changes: dict[str, object], victims: Sequence[int], every: int = 1) -> Tally:
    """Kill ``victims`` right before each of their operations, and after the last.

    Args:
        changes: Settings.
        victims: Ranks that are killed, both at the same number.
        every: Only every so-many-th operation.
    """
    changes = {"collective_timeout_seconds": TIMEOUT_SECONDS, **changes}
    tally, tree = Tally(), prepared(changes)
    counted = _in_copy(tree, lambda root: attempt(root, 3, {}, changes))
    most = max(int(counted[rank].returned[2]) for rank in victims)  # type: ignore[index]
    for at in range(0, most + 1, every):
        root = Path(tempfile.mkdtemp(dir=scratch()))
        write_tree(tree, root)
        where = f"killing {victims} at operation {at}"
        ended = attempt(root, 3, {rank: Fault("kill", at) for rank in victims}, changes)
        tally.cases += 1
        for rank, each in enumerate(ended):
            _judge(each, rank in victims, where, tally)
        aftermath(root, 2, 3, changes, tally, where)
        shutil.rmtree(root)
    return tally


def _in_copy(tree: Tree, action: object) -> list[Ended]:
    root = Path(tempfile.mkdtemp(dir=scratch()))
    write_tree(tree, root)
    ended: list[Ended] = action(root)  # type: ignore[operator]
    shutil.rmtree(root)
    return ended


def _judge(ended: Ended, victim: bool, where: str, tally: Tally) -> None:
    if ended.hung:
        tally.failures.append(f"{where}: a rank hung")
    elif ended.crash:
        tally.failures.append(f"{where}: an error that is not ours: {ended.crash.strip().splitlines()[-1]}")
    elif ended.signal and not victim:
        tally.failures.append(f"{where}: a survivor died of signal {ended.signal}")
    elif isinstance(ended.returned, list):
        outcome, seconds, *_ = ended.returned
        tally.saw(str(outcome))
        if seconds > TIMEOUT_SECONDS + _GRACE_SECONDS:
            tally.failures.append(f"{where}: the survivor's error took {seconds:.0f} s")


def hung_rank(kinds: Iterable[str]) -> Tally:
    """A rank that sleeps longer than the time-out, at the first operation of each kind.

    Its peer must not wait for it.
    """
    timeout = 2.0
    changes: dict[str, object] = {"collective_timeout_seconds": timeout}
    tally, tree = Tally(), prepared({})
    for kind in kinds:
        for rank in (0, 1):
            root = Path(tempfile.mkdtemp(dir=scratch()))
            write_tree(tree, root)
            where = f"rank {rank} hung at {kind}"
            fault = Fault("sleep", 0, kind, seconds=timeout + 6)
            ended = attempt(root, 3, {rank: fault}, changes)
            tally.cases += 1
            for number, each in enumerate(ended):
                _judge(each, False, where, tally)
                reported = isinstance(each.returned, list) and number != rank and each.returned[0] != "saved"
                if reported and each.returned[1] > timeout + 4:  # type: ignore[index]
                    tally.failures.append(f"{where}: its peer waited {each.returned[1]:.1f} s")  # type: ignore[index]
            aftermath(root, 2, 3, {}, tally, where)
            shutil.rmtree(root)
    return tally


def slow_disk() -> Tally:
    """Every operation takes 10 ms longer on one rank: late is not lost."""
    tally, tree = Tally(), prepared({})
    root = Path(tempfile.mkdtemp(dir=scratch()))
    write_tree(tree, root)
    ended = attempt(root, 3, {1: Fault("sleep", seconds=0.01, every=True)}, {})
    tally.cases = 1
    if [each.returned and each.returned[0] for each in ended] != ["saved", "saved"]:  # type: ignore[index]
        tally.failures.append(f"slow disk: {ended}")
    aftermath(root, 3, 3, {}, tally, "slow disk")
    shutil.rmtree(root)
    return tally


def random_kills(count: int, seed: int = 0, *, directory: str | None = None) -> Tally:
    """Runs that save as fast as they can and are killed at random: all ranks, or one of them.

    Every run resumes from what the last one left, in the same directory, with nobody tidying up in between, and every
    third goes back from there to the oldest checkpoint that it finds. A save that has returned must never be lost: what
    is resumed is the last one that had returned, or the one that was under way.

    Args:
        count: Number of kills.
        seed: Of the moments and the victims.
        directory: Where; a real file system by default.
    """
    tally, dice = Tally(), random.Random(seed)
    root = Path(tempfile.mkdtemp(dir=directory))
    notes = Path(tempfile.mkdtemp(dir=scratch()))
    acknowledged, trying, saves = -1, -1, 0
    for number in range(count):
        for old in notes.iterdir():
            old.unlink()
        is_async = bool(number % 2)
        victims = dice.choice([(0,), (1,), (0, 1)])
        delay = dice.uniform(0.0, 1.5)
        ended = ranks(
            _killed_run(root, notes, (acknowledged, trying), is_async, goes_back=number % 3 == 1),
            limit=2 * (TIMEOUT_SECONDS + _GRACE_SECONDS),
            killed_after=lambda pids, v=victims, d=delay: _strike(notes, pids, v, d),  # type: ignore[misc]
        )
        tally.cases += 1
        for rank, each in enumerate(ended):
            where = f"run {number}, killing {victims} after {delay:.3f} s"
            _judge(each, rank in victims, where, tally)
            if isinstance(each.returned, list) and each.returned[0] == "lost":
                tally.failures.append(f"{where}: {each.returned[3]}")
        for name in sorted(path.name for path in notes.glob("note*")):
            _, kind, step = name.split("-", 2)
            saves += kind == "saved"
            acknowledged, trying = (acknowledged, int(step)) if kind == "trying" else (int(step), -1)
    tally.new = saves
    shutil.rmtree(root)
    return tally


def _killed_run(root: Path, notes: Path, allowed: tuple[int, int], is_async: bool, goes_back: bool) -> object:
    count = itertools.count()

    def note(rank: int, kind: str, step: int) -> None:
        if rank == 0:
            (notes / f"note{next(count):06d}-{kind}-{step}").touch()

    def body(rank: int, mesh: DeviceMesh) -> object:
        run = Run(mesh)
        started = time.monotonic()
        changes = {"collective_timeout_seconds": TIMEOUT_SECONDS, "is_async": is_async, "max_recent_checkpoints": 2}
        engine = checkpointer(settings(root, **changes), None, rank)
        try:
            step = restore(engine, run)
            if (-1 if step is None else step) not in allowed:
                return ["lost", 0.0, 0, f"step {allowed[0]} was saved and step {step} came back"]
            step = -1 if step is None else step
            note(rank, "resumed", step)
            known = [info.name for info in list_checkpoints(root) if info.complete] if goes_back and step >= 0 else []
            if known:
                step = int(restore(engine, run, known[0]) or 0)
            (notes / f"running{rank}").touch()
            while time.monotonic() - started < TIMEOUT_SECONDS:
                step += 1
                note(rank, "trying", step)
                save(engine, run, step)
                note(rank, "saved", step)
        except AssertionError as error:
            return ["lost", 0.0, 0, str(error)]
        except ShardwiseError as error:
            return [type(error).__name__, 0.0, 0, str(error)]
        return ["never killed", 0.0, 0, ""]

    return body


def _strike(notes: Path, pids: list[int], victims: Sequence[int], delay: float) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and len(list(notes.glob("running*"))) < len(pids):
        time.sleep(0.005)
    time.sleep(delay)
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)


def as_text(tally: Tally) -> str:
    """Errors by type."""
    return json.dumps(tally.errors)
