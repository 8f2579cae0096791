"""Crash points.

After every operation of a save, whatever the disk kept, the old or the new checkpoint is there whole.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.faults.crash_states import Disk, Tree, digest, outline, read_tree, write_tree
from tests.faults.layer import Tape
from tests.faults.processes import alone, ranks, scratch
from tests.faults.training import Run, checkpointer, restore, save, settings, short
from torch.distributed.device_mesh import DeviceMesh

from shardwise.ops.verify import verify


@dataclass(frozen=True)
class Scenario:
    """A kind of save.

    Attributes:
        name: For the table.
        before: Steps saved before the one that is looked at.
        changes: Settings.
        links: Symbolic links are to be had; else pointers are text files.
        back_to: The step to which the run is rolled back before the save that is looked at, which replaces the
            abandoned one after it.
    """

    name: str
    before: tuple[int, ...] = (1,)
    changes: dict[str, object] = field(default_factory=dict)
    links: bool = True
    back_to: int | None = None

    @property
    def new(self) -> int:
        """The step of the save that is looked at."""
        last = self.before[-1] if self.back_to is None and self.before else self.back_to
        return 1 if last is None else last + 1


_KEEP: dict[str, object] = {"max_recent_checkpoints": 1, "keep_best": 1}
SCENARIOS = (
    Scenario("synchronous"),
    Scenario("synchronous, retention", (1, 2), _KEEP),
    Scenario("asynchronous", (1,), {"is_async": True}),
    Scenario("asynchronous, retention", (1, 2), {"is_async": True, **_KEEP}),
    Scenario("shards only, retention", (1, 2), {"save_consolidated": "false", **_KEEP}),
    Scenario("pointers as text, retention", (1, 2), _KEEP, links=False),
    Scenario("first save", ()),
    Scenario("rolled back", (1, 2, 3), back_to=1),
    Scenario("rolled back, retention", (1, 2, 3, 4), {"max_recent_checkpoints": 3}, back_to=2),
    Scenario("rolled back, asynchronous", (1, 2, 3), {"is_async": True}, back_to=1),
)


@dataclass(frozen=True)
class Recording:
    """One save of two ranks: the tree before it, and every change in the order in which it happened."""

    scenario: Scenario
    tree: Tree
    operations: tuple[dict[str, object], ...]
    old: int | None
    new: int


@dataclass
class Outcome:
    """What the states of one scenario came to."""

    operations: int = 0
    states: int = 0
    old: int = 0
    new: int = 0
    saves: int = 0
    failures: list[str] = field(default_factory=list)


def record(scenario: Scenario) -> Recording:
    """Save the earlier steps, then one more with a log on both ranks."""
    root = Path(tempfile.mkdtemp(dir=scratch())) / "root"
    logs = Path(tempfile.mkdtemp(dir=scratch()))
    new = scenario.new
    config = settings(root, **scenario.changes)

    def earlier(rank: int, mesh: DeviceMesh) -> object:
        run = Run(mesh)
        with checkpointer(config, Tape(root), rank, scenario.links) as engine:
            for step in scenario.before:
                save(engine, run, step)
        return True

    def logged(rank: int, mesh: DeviceMesh) -> object:
        run = Run(mesh)
        with checkpointer(config, Tape(root, log=logs / f"{rank}.jsonl"), rank, scenario.links) as engine:
            if scenario.back_to is not None:
                restore(engine, run, f"epoch_0_step_{scenario.back_to}")
            save(engine, run, new)
        return True

    if scenario.before:
        _whole(ranks(earlier))
    tree = read_tree(root) if root.exists() else {}
    root.mkdir(exist_ok=True)
    _whole(ranks(logged))
    lines = [json.loads(line) for path in sorted(logs.iterdir()) for line in path.read_text().splitlines()]
    # What one rank writes through its layer, the other may have come upon as somebody's file.
    created = {each["path"] for each in lines if each["op"] == "create"}
    known = [each for each in lines if each["op"] != "external" or each["path"] not in created]
    operations = sorted(known, key=lambda each: each["at"])
    after = read_tree(root)
    shutil.rmtree(root.parent)
    shutil.rmtree(logs)
    found = Recording(scenario, tree, tuple(operations), scenario.before[-1] if scenario.before else None, new)
    _check_faithful(found, after)
    return found


def _whole(ended: list[object]) -> None:
    assert all(each.returned for each in ended), ended  # type: ignore[attr-defined]


def without_syncs(recording: Recording, kind: str) -> Recording:
    """The same save by a library that forgets to sync; checking it must fail, or the check is worth nothing."""
    return replace(recording, operations=tuple(each for each in recording.operations if each["op"] != kind))


def _check_faithful(recording: Recording, after: Tree) -> None:
    """The log replayed, with everything on disk, gives what the real save left; else it lacks an operation."""
    disk = Disk(recording.tree)
    for operation in recording.operations:
        disk.apply(operation)
    replayed = next(disk.crashes())
    assert replayed == after, sorted(k for k in {*replayed, *after} if replayed.get(k) != after.get(k))


def check(recording: Recording, *, thorough: bool) -> Outcome:
    """Build and check every state.

    Args:
        recording: The save.
        thorough: Restore and save again from every state; else only from those that differ in what can be seen
            without opening a hidden directory.
    """
    outcome = Outcome(operations=len(recording.operations))
    disk = Disk(recording.tree)
    seen: set[str] = set()
    saved: set[str] = set()
    for number in range(len(recording.operations) + 1):
        if number:
            disk.apply(recording.operations[number - 1])
        finished = number == len(recording.operations)
        for tree in disk.crashes():
            key = digest(tree) + str(finished)
            if key in seen:
                continue
            seen.add(key)
            outcome.states += 1
            seen_from_outside = outline(tree) + str(finished)
            if seen_from_outside in saved and not thorough:
                continue
            again = seen_from_outside not in saved
            saved.add(seen_from_outside)
            _check_state(recording, tree, number, finished, again, outcome)
    return outcome


def _check_state(recording: Recording, tree: Tree, number: int, finished: bool, again: bool, outcome: Outcome) -> None:
    root = Path(tempfile.mkdtemp(dir=scratch()))
    where = f"{recording.scenario.name}, after operation {number}"
    if number:
        last = recording.operations[number - 1]
        where += f" ({last['op']} {last['path']})"
    try:
        write_tree(tree, root)
        config = settings(root, **recording.scenario.changes)
        with checkpointer(config) as engine:
            run = Run()
            found = restore(engine, run)
            assert found in (recording.old, recording.new), f"restored step {found}"
            assert not finished or found == recording.new, "the save had returned and is gone"
            outcome.old += found == recording.old
            outcome.new += found == recording.new
            if found is not None:
                report = verify(root)
                assert report.status == "whole", report.damages
            if again:
                following = recording.new if found is None else found + 1
                save(engine, run, following)
                assert restore(engine, Run()) == following, "the next save is not what is restored"
                assert verify(root).status == "whole"
                left = [each.name for each in root.iterdir() if each.name.startswith((".saving", ".doomed"))]
                assert not left, f"left behind: {left}"
                outcome.saves += 1
    except Exception as error:  # noqa: BLE001 - every exception to the promise is counted and shown
        outcome.failures.append(f"{where}: {short(error)}")
    finally:
        shutil.rmtree(root)


def run(scenario: Scenario, *, thorough: bool) -> Outcome:
    """Record one scenario and check its states, in a process of its own."""
    return judge(record(scenario), thorough=thorough)


def judge(recording: Recording, *, thorough: bool) -> Outcome:
    """Check the states of a recording, in a process of its own."""

    def body() -> object:
        found = check(recording, thorough=thorough)
        return [found.operations, found.states, found.old, found.new, found.saves, found.failures]

    return Outcome(*alone(body, 1800))  # type: ignore[misc]
