"""What the parts of a checkpointer share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from shardwise import CheckpointingConfig
from shardwise.checkpointing.arguments import FirstExchange
from shardwise.checkpointing.parallel_ranks import ParallelRanks
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.disk.storage import LocalStorage

T = TypeVar("T")


class Meeting(Group):
    """Ranks that meet only when a group in another thread does, too."""

    both = threading.Barrier(2, timeout=20)

    def attempt(self, work: Callable[[], T], what: str) -> T:
        self.both.wait()
        return super().attempt(work, what)


def session(root: Path) -> Session:
    config = CheckpointingConfig(checkpoint_dir=root, original_model_root_dir=root, allow_missing_base=True)
    first = FirstExchange(True, False, (), "token")
    ranks = ParallelRanks(None, None, None, None)
    return Session(config, Meeting(), LocalStorage(), ranks, root, first)


def test_checkpointers_of_two_threads_look_for_their_base_models_at_the_same_time(tmp_path: Path) -> None:
    # Ranks meet inside: with a lock around it, two threads that take turns differently on two ranks never end.
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: session(tmp_path).base_path(), range(2)))
    assert found[0] == found[1]
