"""The warning about ranks that do not come: it never keeps a rank from its peers."""

from __future__ import annotations

import threading

import pytest

from shardwise.comm.lost_ranks import Waiting


def test_without_a_thread_to_spare_there_is_no_warning_and_the_call_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    waiting, entered = Waiting("group", 0, [0, 1], 60.0, 90.0), []
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for call in ("save(1)", "save(2)"):
            with waiting.during(call):
                entered.append(call)
    with waiting.during("save(3)"):  # there is one again
        entered.append("save(3)")
    assert entered == ["save(1)", "save(2)", "save(3)"]
