from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lifecycle.support import Crash, FaultyStorage, fill_existing, is_whole, made, publish, save

from shardwise.config import CheckpointingConfig
from shardwise.disk.storage import LocalStorage, using
from shardwise.errors import ConfigError, StorageError
from shardwise.lifecycle import (
    BEST,
    LATEST,
    CheckpointInfo,
    Retention,
    best_checkpoint,
    checkpoint_name,
    list_checkpoints,
    prune,
    reserve,
    resolve,
    set_pointer,
)
from shardwise.lifecycle.retention import select_doomed


def info(
    step: int, value: float | None = None, complete: bool = True, verifiable: bool = True, epoch: int = 0
) -> CheckpointInfo:
    metrics = {} if value is None else {"default": value}
    name = checkpoint_name(epoch, step)
    return CheckpointInfo(name, epoch, step, complete, Path(name), complete and verifiable, metrics)


@st.composite
def populations(draw: st.DrawFn) -> tuple[CheckpointInfo, ...]:
    numbers = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), unique=True, max_size=12))
    return tuple(
        info(
            step,
            draw(st.none() | st.integers(-3, 3).map(float)),
            draw(st.booleans()),
            draw(st.booleans()),
            epoch,
        )
        for epoch, step in numbers
    )


POLICIES = st.builds(
    Retention,
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 10),
    st.none() | st.integers(1, 4),
    st.sampled_from(["min", "max"]),
)


@given(populations(), st.sets(st.integers(0, 11)), POLICIES)
def test_what_is_never_removed(population: tuple[CheckpointInfo, ...], chosen: set[int], policy: Retention) -> None:
    pointed = {population[i].name for i in chosen if i < len(population)} | {"epoch_99_step_99"}
    doomed = select_doomed(population, pointed, policy)
    complete = sorted((each for each in population if each.complete), key=lambda each: (each.epoch, each.step))
    assert set(doomed) <= {each.name for each in complete}
    assert not set(doomed) & pointed
    assert len(set(doomed)) == len(doomed)
    if complete:
        assert complete[-1].name not in doomed
    verifiable = [each for each in complete if each.verifiable]
    if verifiable:
        assert verifiable[-1].name not in doomed
    assert [each.name for each in complete if each.name in doomed] == list(doomed)


@given(populations(), POLICIES)
def test_exactly_what_no_rule_wants_is_removed(population: tuple[CheckpointInfo, ...], policy: Retention) -> None:
    doomed = set(select_doomed(population, set(), policy))
    complete = sorted((each for each in population if each.complete), key=lambda each: (each.epoch, each.step))
    newest_verifiable = [each for each in complete if each.verifiable][-1:]
    for age, each in enumerate(reversed(complete)):
        wanted = policy.max_recent is None or age < policy.max_recent or each in newest_verifiable
        wanted |= policy.every_k_steps is not None and each.step % policy.every_k_steps == 0
        if policy.best is not None and "default" in each.metrics:
            sign = 1 if policy.metric_mode == "min" else -1
            better = [
                other
                for other in complete
                if "default" in other.metrics
                and (sign * other.metrics["default"], -other.epoch, -other.step)
                < (sign * each.metrics["default"], -each.epoch, -each.step)
            ]
            wanted |= len(better) < policy.best
        assert (each.name in doomed) == (not wanted)


@given(populations(), POLICIES)
def test_deciding_twice_decides_nothing_new(population: tuple[CheckpointInfo, ...], policy: Retention) -> None:
    doomed = select_doomed(population, set(), policy)
    assert select_doomed([each for each in population if each.name not in doomed], set(), policy) == ()
    assert select_doomed(tuple(reversed(population)), set(), policy) == doomed


def test_the_rules_by_example() -> None:
    population = [info(step, value) for step, value in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 9.0))]

    def kept(pointed: set[str] | None = None, **rules: object) -> list[int]:
        doomed = select_doomed(population, pointed or set(), Retention(**rules))  # type: ignore[arg-type]
        return [each.step for each in population if each.name not in doomed]

    assert kept() == [10, 20, 30, 40, 50]
    assert kept(best=1) == [10, 20, 30, 40, 50]
    assert kept(max_recent=1) == [50]
    assert kept(max_recent=2) == [40, 50]
    assert kept(max_recent=1, best=2) == [20, 30, 50]
    assert kept(max_recent=1, best=1, metric_mode="max") == [50]
    assert kept(max_recent=1, every_k_steps=20) == [20, 40, 50]
    assert kept({"epoch_0_step_10"}, max_recent=1) == [10, 50]
    assert best_checkpoint(population, Retention()) == "epoch_0_step_20"
    assert best_checkpoint(population, Retention(metric_mode="max")) == "epoch_0_step_50"
    assert best_checkpoint(population, Retention(metric_key="accuracy")) is None


def test_a_foreign_directory_does_not_cost_the_last_checkpoint_that_can_be_verified() -> None:
    population = [info(1), info(2), info(3, verifiable=False)]
    assert select_doomed(population, set(), Retention(1)) == ("epoch_0_step_1",)


@pytest.mark.parametrize("rules", [(0,), (True,), (1, 0), (1, 1, -1), (1, None, None, "lowest"), (1.0,)])
def test_policies_that_make_no_sense(rules: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError):
        Retention(*rules)  # type: ignore[arg-type]


def test_the_policy_of_a_configuration() -> None:
    config = CheckpointingConfig(
        max_recent_checkpoints=3, keep_every_k_steps=100, keep_best=2, best_metric_mode="max", best_metric_key="acc"
    )
    assert Retention.from_config(config) == Retention(3, 100, 2, "max", "acc")
    assert Retention.from_config(CheckpointingConfig()) == Retention()


def test_pruning_keeps_what_pointers_name(tmp_path: Path) -> None:
    for step in range(1, 7):
        made(tmp_path, 0, step)
    set_pointer(tmp_path, BEST, "epoch_0_step_2")
    (tmp_path / "MINE").symlink_to(tmp_path / "epoch_0_step_3" / "model")
    (tmp_path / "REVIEW.txt").write_text("epoch_0_step_4")
    (tmp_path / "epoch_0_step_0" / "optim").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert prune(tmp_path, Retention(1)) == ("epoch_0_step_1", "epoch_0_step_5")
    left = {path.name for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()}
    assert left == {"notes", *(f"epoch_0_step_{step}" for step in (0, 2, 3, 4, 6))}
    assert prune(tmp_path, Retention(1)) == ()
    assert prune(tmp_path / "absent", Retention(1)) == ()


def test_a_checkpoint_whose_pointer_is_not_set_yet_is_kept(tmp_path: Path) -> None:
    save(tmp_path, 5, 100, LocalStorage())
    save(tmp_path, 5, 200, LocalStorage())
    temp = reserve(tmp_path, "epoch_1_step_300")
    fill_existing(temp, None, b"x")
    publish(temp, tmp_path / "epoch_1_step_300")
    assert prune(tmp_path, Retention(1)) == ("epoch_5_step_100",)
    assert is_whole(tmp_path / "epoch_1_step_300")


@pytest.mark.parametrize("kind", ["crash", "refusal"])
def test_an_interrupted_prune_leaves_whole_checkpoints_or_nothing(tmp_path: Path, kind: str) -> None:
    at, stopped = 0, True
    while stopped:
        root = tmp_path / str(at)
        for step in range(1, 5):
            made(root, 0, step)
        set_pointer(root, LATEST, "epoch_0_step_4")
        error = Crash() if kind == "crash" else OSError(errno.EIO, "Input/output error")
        try:
            with using(FaultyStorage(at, error)):
                prune(root, Retention(2))
            stopped = False
        except (Crash, StorageError):
            pass
        listed = list_checkpoints(root)
        assert all(is_whole(root / each.name) for each in listed)
        assert {3, 4} <= {each.step for each in listed}
        resolved = resolve(root)
        assert resolved is not None
        assert resolved.step == 4
        prune(root, Retention(2))
        assert sorted(path.name for path in root.iterdir()) == [LATEST, "epoch_0_step_3", "epoch_0_step_4"]
        at += 1
    assert at > 8


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=6, unique=True), POLICIES)
def test_the_latest_always_survives_on_disk(numbers: list[tuple[int, int]], policy: Retention) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for epoch, step in numbers:
            save(root, epoch, step, LocalStorage())
            prune(root, policy)
            resolved = resolve(root)
            assert resolved is not None
            assert (resolved.epoch, resolved.step) == (epoch, step)
            assert is_whole(resolved.path)
