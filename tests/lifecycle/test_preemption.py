from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from shardwise.errors import MisuseError
from shardwise.lifecycle import PreemptionGuard

CHILD = """
import os, signal, sys, time
from shardwise.lifecycle import PreemptionGuard

def say(text):
    print(text, flush=True)
"""


@contextmanager
def child(body: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD + body], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        # With what it forked, which may still be there where a test fails.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


LOOP = """
with PreemptionGuard({arguments}) as guard:
    say("ready")
    while not guard.should_save():
        time.sleep(0.01)
    say("saving")
    {saving}
say("left")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_first_signal_asks_for_a_save_and_a_clean_exit(number: signal.Signals) -> None:
    with child(LOOP.format(arguments=f"(signal.{number.name},)", saving="pass")) as process:
        assert heard(process) == "ready"
        process.send_signal(number)
        assert heard(process) == "saving"
        assert heard(process) == "left"
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    "saving",
    [
        "time.sleep(600)",
        # Waiting where Python runs no handler, as in a collective: a lock that is never released.
        "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "while True: pass",
    ],
)
def test_the_second_signal_leaves_at_once(saving: str) -> None:
    with child(LOOP.format(arguments="", saving=saving)) as process:
        assert heard(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert heard(process) == "saving"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
        assert heard(process) == ""


def test_another_guarded_signal_is_a_second_one_too() -> None:
    body = LOOP.format(arguments="(signal.SIGTERM, signal.SIGUSR1)", saving="time.sleep(600)")
    with child(body) as process:
        assert heard(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert heard(process) == "saving"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == -signal.SIGUSR1


def test_a_forwarded_copy_belongs_to_the_first_signal() -> None:
    body = """
now = [0.0]
with PreemptionGuard(repeat_window_seconds=2, clock=lambda: now[0]) as guard:
    for at in (10.0, 11.0, 12.0):
        now[0] = at
        os.kill(os.getpid(), signal.SIGTERM)
        say(guard.should_save())
    now[0] = 12.5
    os.kill(os.getpid(), signal.SIGTERM)
    say("still here")
"""
    with child(body) as process:
        assert [heard(process) for _ in range(4)] == ["True", "True", "True", ""]
        assert process.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize(
    "busy",
    [
        "time.sleep(600)",
        # In C code that never comes back to where Python would run a handler.
        "import itertools; sum(itertools.repeat(1))",
    ],
)
def test_a_forked_worker_ends_when_it_is_told_to(busy: str) -> None:
    body = f"""
with PreemptionGuard() as guard:
    told, tell = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(tell, b"x")
        {busy}
        os._exit(0)
    os.read(told, 1)
    time.sleep(0.05)
    os.kill(worker, signal.SIGTERM)
    _, status = os.waitpid(worker, 0)
    say(os.waitstatus_to_exitcode(status))
    say(guard.requested_locally)
"""
    with child(body) as process:
        assert heard(process) == str(-signal.SIGTERM)
        assert heard(process) == "False"
        assert process.wait(30) == 0


def test_a_fork_leaves_the_process_guarded_and_the_workers_own_handlers_alone() -> None:
    body = """
with PreemptionGuard((signal.SIGTERM, signal.SIGUSR1)) as guard:
    signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(7))
    worker = os.fork()
    if worker == 0:
        default = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        say(default)
        signal.raise_signal(signal.SIGUSR1)
        os._exit(0)
    _, status = os.waitpid(worker, 0)
    say(os.waitstatus_to_exitcode(status))
    os.kill(os.getpid(), signal.SIGTERM)
    say(guard.should_save())
"""
    with child(body) as process:
        assert [heard(process) for _ in range(3)] == ["True", "7", "True"]
        assert process.wait(30) == 0


def test_a_forked_worker_that_leaves_an_inner_guard_is_not_guarded_by_the_outer_one() -> None:
    body = """
with PreemptionGuard() as outer:
    with PreemptionGuard() as inner:
        worker = os.fork()
    if worker == 0:
        say(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
        os._exit(0)
    os.waitpid(worker, 0)
    os.kill(os.getpid(), signal.SIGTERM)
    say((inner.requested_locally, outer.requested_locally))
"""
    with child(body) as process:
        assert heard(process) == "True"
        assert heard(process) == "(False, True)"
        assert process.wait(30) == 0


def test_the_previous_handlers_come_back() -> None:
    calls: list[int] = []

    def mine(number: int, frame: object) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        guard = PreemptionGuard((signal.SIGUSR1,))
        with guard:
            assert not guard.requested_locally
            signal.raise_signal(signal.SIGUSR1)
            assert guard.requested_locally
            assert calls == []
        assert signal.getsignal(signal.SIGUSR1) is mine
        signal.raise_signal(signal.SIGUSR1)
        assert calls == [signal.SIGUSR1]
        with guard:
            assert not guard.requested_locally
        with pytest.raises(ZeroDivisionError), guard:
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_ranks_agree_through_the_callers_collective() -> None:
    passed: list[bool] = []

    def any_rank(mine: bool) -> bool:
        passed.append(mine)
        return len(passed) > 1

    with PreemptionGuard((signal.SIGUSR2,)) as guard:
        assert not guard.should_save(any_rank)
        assert guard.should_save(any_rank)
        assert not guard.requested_locally
        signal.raise_signal(signal.SIGUSR2)
        assert guard.should_save(any_rank)
        assert guard.should_save()
    assert passed == [False, False, True]


def test_only_the_main_thread_can_use_it() -> None:
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            PreemptionGuard().__enter__()
        except MisuseError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert "main thread" in str(caught[0])


def test_it_is_not_entered_twice() -> None:
    guard = PreemptionGuard((signal.SIGUSR2,))
    before = signal.getsignal(signal.SIGUSR2)
    with guard, pytest.raises(MisuseError):
        guard.__enter__()
    assert signal.getsignal(signal.SIGUSR2) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGCONT])
def test_signals_that_cannot_ask(number: signal.Signals) -> None:
    with pytest.raises(MisuseError, match=number.name):
        PreemptionGuard((number,))


def test_a_second_signal_publishes_nothing_by_halves(tmp_path: object) -> None:
    body = f"""
from pathlib import Path
from shardwise.lifecycle import LATEST, put_in_place, reserve, set_pointer, settle
root = Path({str(tmp_path)!r})

def write(step):
    temp = reserve(root, f"epoch_0_step_{{step}}")
    (temp / "model").mkdir()
    (temp / "model" / "data").write_bytes(b"x")
    return temp

def commit(temp):
    (temp / "manifest.json").write_text("{{}}")
    name = temp.name.removeprefix(".saving-")
    put_in_place(temp, root / name)
    settle(temp, root / name)
    set_pointer(root, LATEST, name)

with PreemptionGuard() as guard:
    commit(write(1))
    say("ready")
    while not guard.should_save():
        time.sleep(0.01)
    temp = write(2)
    say("saving")
    time.sleep(600)
    commit(temp)
"""
    from pathlib import Path

    from shardwise.lifecycle import resolve

    with child(body) as process:
        assert heard(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert heard(process) == "saving"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    resolved = resolve(Path(str(tmp_path)))
    assert resolved is not None
    assert resolved.step == 1
