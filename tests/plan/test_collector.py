"""The collector rests while plans are made, and afterwards is as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from shardwise.plan.collector import collector_paused


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """What other tests' processes keep frozen is not these tests' business."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.unfreeze()
    yield
    (gc.enable if enabled else gc.disable)()
    if frozen:
        gc.freeze()


class Cycle:
    """Garbage that only the collector can free."""

    def __init__(self) -> None:
        self.me = self


def test_it_rests_and_resumes() -> None:
    gc.enable()
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="as it does"), collector_paused():
        raise ValueError("as it does")
    assert gc.isenabled()


def test_one_that_was_off_stays_off() -> None:
    gc.disable()
    with collector_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_what_was_made_is_not_visited_and_what_was_garbage_is_freed() -> None:
    passes: list[str] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        passes.append(phase)

    gc.enable()
    garbage = weakref.ref(Cycle())
    with collector_paused():
        assert garbage() is None
        gc.callbacks.append(watch)
        made = [[] for _ in range(100_000)]  # type: ignore[var-annotated]
    more = [[] for _ in range(100)]  # type: ignore[var-annotated]
    gc.callbacks.remove(watch)
    assert passes == []
    assert len(made) + len(more) == 100_100
    # It is collected as ever once it is garbage.
    cycle = weakref.ref(Cycle())
    gc.collect()
    assert cycle() is None


def test_what_others_have_frozen_stays_frozen() -> None:
    gc.enable()
    gc.freeze()
    frozen = gc.get_freeze_count()
    assert frozen
    with collector_paused():
        made = [[] for _ in range(100_000)]  # type: ignore[var-annotated]
    assert gc.get_freeze_count() >= frozen - 1_000
    assert len(made) == 100_000
    gc.unfreeze()
