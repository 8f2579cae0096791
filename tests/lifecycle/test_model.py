"""The lifecycle against a simple model of it: which checkpoints there are, what each restores to, what LATEST means.

Runs save, fail to save, are killed at any operation, go back, keep fewer or more checkpoints, share a root, and have it
copied, in any order that hypothesis thinks of. The model knows the rules from the documentation, and no files.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.lifecycle.support import Crash, FaultyStorage
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import LocalStorage
from shardwise.errors import CheckpointExistsError, ShardwiseError
from shardwise.lifecycle import list_checkpoints, resolve


class Swapping(FaultyStorage):
    """One that can swap two names in a step, as Linux' own file systems can."""

    def exchange(self, one: Path, other: Path) -> bool:
        self._step("exchange", other)
        return LocalStorage().exchange(one, other)


@dataclass(frozen=True)
class Node:
    """A checkpoint as it should be."""

    step: int
    value: float
    sequence: int
    tree: int
    ancestors: tuple[Node, ...] = field(default=(), repr=False)


@dataclass
class World:
    """What should be in a root: the step of each checkpoint, and which it is."""

    there: dict[int, Node] = field(default_factory=dict)

    def line(self, node: Node) -> list[Node]:
        """A checkpoint and those that it came from, nearest first, of those that are there."""
        return [each for each in (node, *node.ancestors) if self.there.get(each.step) == each]

    def newest(self) -> Node | None:
        """The one that was published last, which LATEST is."""
        return max(self.there.values(), key=lambda node: node.sequence, default=None)

    def left_at(self, node: Node, line: list[Node]) -> int | None:
        """Where a checkpoint left a line; ``None`` where they have nothing in common."""
        shared = [line.index(each) for each in self.line(node) if each in line]
        return shared[0] if shared else (len(line) if line and line[0].tree == node.tree else None)

    def doomed(self, max_recent: int | None) -> set[int]:
        """The steps that retention gives up."""
        last = self.newest()
        if last is None or max_recent is None:
            return set()
        line = self.line(last)
        gone = {each.step for each in line[max_recent:]}
        for node in self.there.values():
            left_at = self.left_at(node, line) if node not in line else None
            if left_at is not None and left_at >= max_recent:
                gone.add(node.step)
        return gone


class Run:
    """A process that trains: what it is, and what the model knows of it."""

    def __init__(self, root: Path, swaps: bool, max_recent: int | None) -> None:
        config = CheckpointingConfig(
            checkpoint_dir=root, save_consolidated="false", save_rng=False, max_recent_checkpoints=max_recent
        )
        self.storage = Swapping() if swaps else FaultyStorage()
        self.engine = Checkpointer(config, 0, 0, 0, storage=self.storage)
        self.model = nn.Linear(1, 1, bias=False)
        self.max_recent = max_recent
        self.origin: Node | None = None
        self.restored = False

    def save(self, step: int, value: float) -> None:
        with torch.no_grad():
            self.model.weight.fill_(value)
        self.engine.save(0, step, self.model)

    def restore(self, name: str = "LATEST") -> tuple[int | None, float] | None:
        record = self.engine.restore(self.model, restore_from=name)
        return None if record is None else (record.step, float(self.model.weight.detach()))


class Lifecycle(RuleBasedStateMachine):
    """Rules are what people and machines do to a root; after each, what is there is compared with the model."""

    @initialize(swaps=st.booleans(), max_recent=st.sampled_from([None, 1, 2, 3]))
    def begin(self, swaps: bool, max_recent: int | None) -> None:
        self.top = Path(tempfile.mkdtemp())
        self.root = self.top / "root"
        self.swaps = swaps
        self.world = World()
        self.count = 0
        self.runs = [Run(self.root, swaps, max_recent)]

    def teardown(self) -> None:
        if hasattr(self, "top"):
            try:
                for step, node in self.world.there.items():
                    assert Run(self.root, self.swaps, None).restore(f"epoch_0_step_{step}") == (step, node.value)
            finally:
                shutil.rmtree(self.top)

    def _next(self, run: Run, step: int) -> Node | None:
        """The checkpoint that a save makes; ``None`` where it is to be refused."""
        world = self.world
        origin = run.origin
        if step in world.there:
            line = [] if origin is None or not run.restored else world.line(origin)
            found = world.there[step]
            if not line or found in line or world.left_at(found, line) is None:
                return None
        others = World({key: node for key, node in world.there.items() if key != step})
        parent = origin
        if run.origin is None:
            earlier = [key for key in others.there if key < step]
            parent = others.there[max(earlier)] if earlier else None
        self.count += 1
        last = world.newest()
        ancestors = () if parent is None else tuple(others.line(parent))
        tree = self.count if parent is None else parent.tree
        return Node(step, float(self.count), 1 + (last.sequence if last else 0), tree, ancestors)

    def _publish(self, run: Run, node: Node) -> set[int]:
        """Put it in the model; returns what retention gives up, which is still there."""
        self.world.there[node.step] = node
        run.origin = node
        return self.world.doomed(run.max_recent)

    def _on_disk(self) -> set[int]:
        return {info.step for info in list_checkpoints(self.root) if info.complete}

    @rule(which=st.integers(0, 1), ahead=st.integers(0, 4))
    def save(self, which: int, ahead: int) -> None:
        run = self.runs[which % len(self.runs)]
        step = (run.origin.step if run.origin else 0) + ahead
        node = self._next(run, step)
        if node is None:
            with pytest.raises(CheckpointExistsError):
                run.save(step, -1.0)
            return
        run.save(step, node.value)
        for gone in self._publish(run, node):
            del self.world.there[gone]

    @rule(which=st.integers(0, 1), ahead=st.integers(1, 4), at=st.integers(0, 90), kills=st.booleans())
    def save_and_fail(self, which: int, ahead: int, at: int, kills: bool) -> None:
        """The file system refuses from an operation on, or the process ends at it."""
        number = which % len(self.runs)
        run = self.runs[number]
        step = (run.origin.step if run.origin else 0) + ahead
        node = self._next(run, step)
        if node is None:
            return
        run.storage.calls.clear()
        run.storage.at = at
        run.storage.error = Crash() if kills else OSError(errno.ENOSPC, "No space left on device")
        with contextlib.suppress(Crash, ShardwiseError):
            run.save(step, node.value)
        run.storage.at = None
        if kills:
            self.runs[number] = Run(self.root, self.swaps, run.max_recent)
        latest = resolve(self.root) if self.root.is_dir() else None
        found = self._on_disk() if self.root.is_dir() else set()
        was_there = step in self.world.there
        if latest is not None and latest.step == step and self._value(step) == node.value:
            given_up = self._publish(self.runs[number] if not kills else run, node)
            assert found >= set(self.world.there) - given_up
            self.world.there = {key: each for key, each in self.world.there.items() if key in found}
        elif was_there and step not in found:  # between the two renames where there is no swap
            assert not self.swaps
            del self.world.there[step]

    def _value(self, step: int) -> float:
        found = Run(self.root, self.swaps, None).restore(f"epoch_0_step_{step}")
        assert found is not None
        return found[1]

    @precondition(lambda self: self.world.there)
    @rule(which=st.integers(0, 1), data=st.data())
    def go_back(self, which: int, data: st.DataObject) -> None:
        run = self.runs[which % len(self.runs)]
        step = data.draw(st.sampled_from(sorted(self.world.there)))
        assert run.restore(f"epoch_0_step_{step}") == (step, self.world.there[step].value)
        run.origin, run.restored = self.world.there[step], True

    @rule(which=st.integers(0, 1), max_recent=st.sampled_from([None, 1, 2, 3]), resumes=st.booleans())
    def start_again(self, which: int, max_recent: int | None, resumes: bool) -> None:
        """A new process in the place of one of them, which keeps another number of checkpoints."""
        run = Run(self.root, self.swaps, max_recent)
        self.runs[which % len(self.runs)] = run
        if resumes:
            last = self.world.newest()
            assert run.restore() == (None if last is None else (last.step, last.value))
            if last is not None:
                run.origin, run.restored = last, True

    @precondition(lambda self: len(self.runs) == 1)
    @rule()
    def a_second_run(self) -> None:
        self.runs.append(Run(self.root, self.swaps, self.runs[0].max_recent))

    @precondition(lambda self: self.root.is_dir())
    @rule(links=st.booleans())
    def copy(self, links: bool) -> None:
        """Go on in a copy, whose maker may have followed the links."""
        self.count += 1
        root = self.top / f"copy-{self.count}"
        shutil.copytree(self.root, root, symlinks=links)
        self.root = root
        self.runs = [Run(root, self.swaps, self.runs[0].max_recent)]

    @invariant()
    def what_is_there(self) -> None:
        if not hasattr(self, "world") or not self.root.is_dir():
            return
        assert self._on_disk() == set(self.world.there)
        last, found = self.world.newest(), resolve(self.root)
        assert (None if found is None else found.step) == (None if last is None else last.step)


def check(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Lifecycle,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_lifecycle_is_that_of_the_model() -> None:
    check(12, 25)


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("rolled_back", [True, False])
def test_a_run_goes_on_from_what_a_failing_save_has_published(swaps: bool, rolled_back: bool) -> None:
    """Retention went by the checkpoint before it, and kept one too many."""
    published = 0
    for at in range(18, 42, 2):
        machine = Lifecycle()
        machine.begin(swaps, 2)
        machine.save(0, 1)
        machine.save(0, 1)
        if rolled_back:
            assert machine.runs[0].restore("epoch_0_step_1") == (1, 1.0)
            machine.runs[0].origin, machine.runs[0].restored = machine.world.there[1], True
        machine.save_and_fail(0, 1, at, False)
        published += machine.runs[0].origin is not None and machine.runs[0].origin.value == 3.0
        machine.what_is_there()
        for _ in range(2):
            machine.save(0, 1)
            machine.what_is_there()
        machine.teardown()
    assert 0 < published < 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_lifecycle_is_that_of_the_model_for_long() -> None:
    check(150, 40)
