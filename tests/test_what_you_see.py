"""What a user sees of saves and loads: the line in the log, the records, callbacks, traces, bars."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import termios
from pathlib import Path

import pytest
import torch
from tests.support.ranks import fresh, run
from torch import nn

from shardwise import CallRecord, CheckpointingConfig
from shardwise.timing import Recording, Shares, Span, own_seconds, phase, recording, timed


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    made = model()
    optimizer = torch.optim.AdamW(made.parameters())
    made(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return made, optimizer


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("shardwise") and r.levelno == logging.INFO]


# --- the line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_one_line_for_each_save_and_restore(tmp_path: Path, caplog: pytest.LogCaptureFixture, is_async: bool) -> None:
    caplog.set_level(logging.INFO, logger="shardwise")
    net, optimizer = trained()
    config = CheckpointingConfig(checkpoint_dir=tmp_path, is_async=is_async, max_recent_checkpoints=1)
    with config.build() as checkpointer:
        for step in (1, 2):
            checkpointer.save(step=step, model=net, optimizer=optimizer)
        checkpointer.async_wait()
        checkpointer.restore(net, optimizer)
    first, second, third = lines(caplog)
    assert first.startswith("saved step 1: ")
    assert re.search(r"saved step 1: \S+ kB in \S+ s \([1-9]\S* [kMG]B/s\)", first), first
    assert first.endswith(f"to {tmp_path / 'epoch_0_step_1'}")
    assert second.endswith("; removed epoch_0_step_1")
    assert third.startswith("restored step 2: ")
    assert third.endswith(f"from {tmp_path / 'epoch_0_step_2'}")


def test_the_line_can_be_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="shardwise")
    with CheckpointingConfig(checkpoint_dir=tmp_path, log_summary=False).build() as checkpointer:
        checkpointer.save(step=1, model=model())
        assert checkpointer.last_save is not None
    assert lines(caplog) == []


def test_a_save_that_fails_has_no_line_and_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="shardwise")
    with CheckpointingConfig(checkpoint_dir=tmp_path).build() as checkpointer:
        checkpointer.save(step=1, model=model())
        kept = checkpointer.last_save
        with pytest.raises(FileExistsError):
            checkpointer.save(step=1, model=model())
        assert checkpointer.last_save is kept
    assert len(lines(caplog)) == 1


def save_with(root: Path, setup: str) -> None:
    """A program that sets up logging in one way or another, and saves."""
    if setup == "before":
        logging.basicConfig(level=logging.INFO, format="theirs: %(message)s")
    if setup == "level":
        logging.getLogger("shardwise").setLevel(logging.WARNING)
    with CheckpointingConfig(checkpoint_dir=root, log_summary=setup != "off").build() as checkpointer:
        if setup == "after":
            logging.basicConfig(level=logging.INFO, format="theirs: %(message)s")
        checkpointer.save(step=1, model=model())


@pytest.mark.parametrize(
    ("setup", "seen"),
    [
        ("nothing", "INFO shardwise: saved step 1"),
        ("before", "theirs: saved step 1"),
        ("after", "theirs: saved step 1"),
        ("level", ""),
        ("off", ""),
    ],
)
def test_the_log_is_seen_once_by_default(tmp_path: Path, setup: str, seen: str) -> None:
    output = tmp_path / "out"
    assert fresh(save_with, tmp_path / "root", setup, output=output, seconds=60) == 0
    text = output.with_name("out.err").read_text()
    assert text.count("saved step 1") == (1 if seen else 0)
    assert seen in text


def test_importing_and_configuring_adds_no_handler(tmp_path: Path) -> None:
    logger = logging.getLogger("shardwise")
    before = list(logger.handlers)
    CheckpointingConfig(checkpoint_dir=tmp_path)
    assert logger.handlers == before


# --- bars ------------------------------------------------------------------------------------------------------------


def save_slowly(root: Path, is_async: bool) -> None:
    """With a terminal as standard error, in a file."""
    import threading
    import time

    from shardwise import Checkpointer
    from shardwise.disk.storage import Buffer, LocalStorage
    from shardwise.engine.progress import BAR_SECONDS

    class Slow(LocalStorage):
        def write(self, handle: int, data: Buffer, offset: int) -> None:
            time.sleep(0.6 * BAR_SECONDS)
            super().write(handle, data, offset)

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    os.dup2(theirs, 2)
    seen: list[bytes] = []

    def follow() -> None:
        while True:
            seen.append(os.read(ours, 4096))

    threading.Thread(target=follow, daemon=True).start()
    config = CheckpointingConfig(checkpoint_dir=root, is_async=is_async, save_consolidated="every", io_threads=1)
    with Checkpointer(config, storage=Slow()) as checkpointer:
        checkpointer.save(step=1, model=model())
    time.sleep(0.3)
    print(b"".join(seen).decode())


@pytest.mark.parametrize("is_async", [False, True])
def test_a_long_save_shows_a_bar_on_a_terminal(tmp_path: Path, is_async: bool) -> None:
    assert fresh(save_slowly, tmp_path / "root", is_async, output=tmp_path / "out", seconds=60) == 0
    text = (tmp_path / "out").read_text()
    assert "saved step 1" in text
    assert ("saving model:" in text) is not is_async  # which would get between the training's own output


# --- records, callbacks ----------------------------------------------------------------------------------------------


def save_and_restore(root: Path, is_async: bool) -> list[CallRecord]:
    seen: list[CallRecord] = []
    net, optimizer = trained()
    config = CheckpointingConfig(checkpoint_dir=root, is_async=is_async, io_threads=2, trace=root / "trace")
    with config.build(callbacks=[seen.append]) as checkpointer:
        assert checkpointer.last_save is None
        checkpointer.save(step=4, model=net, optimizer=optimizer, is_final_checkpoint=True)
        checkpointer.async_wait()
        checkpointer.restore(net, optimizer)
        assert [checkpointer.last_save, checkpointer.last_restore] == seen
    return seen


@pytest.mark.parametrize("is_async", [False, True])
def test_every_rank_has_a_record(tmp_path: Path, is_async: bool) -> None:
    nbytes = 3 * sum(p.numel() for p in model().parameters()) * 4  # of the model and two moments
    everyone = run(2, save_and_restore, tmp_path, is_async)
    for rank, (saved, restored) in enumerate(everyone):  # type: ignore[misc]
        assert (saved.call, restored.call) == ("save", "restore")
        assert (saved.rank, saved.step, saved.epoch) == (rank, 4, 0)
        assert saved.path == restored.path == tmp_path / "epoch_0_step_4"
        assert {"capture", "agree", "write", "digest", "sync", "fold", "publish"} <= saved.phases.keys()
        assert ("stage" in saved.phases) is is_async
        assert {"resolve", "headers", "plan", "read", "install"} <= restored.phases.keys()
        assert 0 < saved.stall <= saved.seconds
        assert restored.nbytes >= nbytes
        assert restored.total_bytes == sum(each[1].nbytes for each in everyone)  # type: ignore[index]
        assert (saved.total_bytes is None) is (rank == 1)
    written = [each[0].nbytes for each in everyone]  # type: ignore[index]
    assert sum(written) in range(nbytes, nbytes + 200)
    assert everyone[0][0].total_bytes >= nbytes  # type: ignore[index]
    figures = everyone[0][0].scalars()  # type: ignore[index]
    assert figures["checkpoint/save/seconds"] == everyone[0][0].seconds  # type: ignore[index]
    assert all(isinstance(value, float) for value in figures.values())


def test_a_callback_that_fails_costs_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(record: CallRecord) -> None:
        raise RuntimeError(f"no network for {record.call}")

    seen: list[CallRecord] = []
    with CheckpointingConfig(checkpoint_dir=tmp_path).build(callbacks=[fails, seen.append]) as checkpointer:
        path = checkpointer.save(step=1, model=model())
        assert checkpointer.restore(model()) is not None
    assert path is not None
    assert path.is_dir()
    assert len(seen) == 2
    assert "no network for save" in caplog.text


# --- traces ----------------------------------------------------------------------------------------------------------


def test_a_trace_for_each_rank(tmp_path: Path) -> None:
    run(2, save_and_restore, tmp_path, True)
    run(2, save_and_restore, tmp_path / "again", False)
    files = sorted((tmp_path / "trace").iterdir())
    assert [file.name[:7] for file in files] == ["rank-0-", "rank-1-"]
    for rank, file in enumerate(files):
        events = json.loads(file.read_text())
        spans = [event for event in events if event["ph"] == "X"]
        assert {event["pid"] for event in events} == {rank}
        names = [event["name"] for event in spans]
        assert names.count("save") == 1
        assert names.count("restore") == 1
        threads = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
        [publish] = [event for event in spans if event["name"] == "publish"]
        assert publish["tid"] == threads["shardwise-save"]
        [capture] = [event for event in spans if event["name"] == "capture"]
        assert capture["tid"] == threads["MainThread"]
        assert capture["ts"] + capture["dur"] <= publish["ts"] + publish["dur"]
        if rank == 0:
            busy = [event for event in spans if "busy_seconds" in event["args"]]
            assert {event["name"] for event in busy} <= {"write"}


def save_many(root: Path, tensors: int) -> int:
    with CheckpointingConfig(checkpoint_dir=root, save_consolidated="every", io_threads=2).build() as checkpointer:
        checkpointer.save(step=1, model=nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(tensors)]))
        assert checkpointer.last_save is not None
        return len(checkpointer.last_save.spans)


def test_spans_do_not_grow_with_the_tensors(tmp_path: Path) -> None:
    few, many = save_many(tmp_path / "few", 5), save_many(tmp_path / "many", 300)
    assert abs(many - few) <= 1  # the second of two threads may have had nothing to do


def test_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_TRACE", str(tmp_path / "there"))
    with CheckpointingConfig(checkpoint_dir=tmp_path / "root").build() as checkpointer:
        checkpointer.save(step=1, model=model())
        checkpointer.save_model(model(), tmp_path / "component")
    [file] = (tmp_path / "there").iterdir()
    names = [event["name"] for event in json.loads(file.read_text())]
    assert "save" in names
    assert "save_model" in names


def test_a_place_for_traces_that_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="trace is .* is not a directory"):
        CheckpointingConfig(checkpoint_dir=tmp_path, trace=tmp_path / "file" / "below").build()


def save_apart(root: Path) -> list[int]:
    """Two checkpointers that save at the same time record apart."""
    net = model()
    first = CheckpointingConfig(checkpoint_dir=root / "a", is_async=True).build()
    second = CheckpointingConfig(checkpoint_dir=root / "b").build()
    for step in range(3):
        first.save(step=step, model=net)
        second.save(step=step, model=nn.Linear(4, 4))
    first.finalize()
    second.finalize()
    assert first.last_save is not None
    assert second.last_save is not None
    assert {span.thread for span in second.last_save.spans} == {"MainThread"}
    return [first.last_save.nbytes, second.last_save.nbytes]


def test_two_checkpointers_do_not_mix(tmp_path: Path) -> None:
    assert save_apart(tmp_path) == [sum(p.numel() for p in model().parameters()) * 4, 80]


# --- the measuring itself --------------------------------------------------------------------------------------------


def test_a_phase_inside_another_counts_once() -> None:
    spans = [
        Span("b", 10, 20, "t"),
        Span("b", 30, 35, "t"),
        Span("a", 0, 100, "t"),
        Span("c", 12, 14, "t"),
        Span("b", 0, 50, "other"),
        Span("b", 0, 900, "pool", is_share=True),
    ]
    assert own_seconds(spans) == pytest.approx({"a": 85e-9, "b": 63e-9, "c": 2e-9})


def test_what_is_measured_without_a_call_is_nothing() -> None:
    def work() -> int:
        return 7

    assert timed("work", work) is work
    assert Shares("work").of(work) is work
    with phase("work"):
        pass
    into = Recording()
    with recording(into), pytest.raises(ZeroDivisionError), phase("work"):
        timed("counted", lambda: 1 // 0)()
    assert [span.name for span in into.spans] == ["work"]
    assert set(into.phases()) == {"work", "counted"}


def test_telemetry_spans(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from shardwise.telemetry import opentelemetry_spans

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = opentelemetry_spans(provider.get_tracer("mine"))
    with CheckpointingConfig(checkpoint_dir=tmp_path).build(callbacks=[spans]) as checkpointer:
        checkpointer.save(step=3, model=model())
        record = checkpointer.last_save
    assert record is not None
    found = {span.name: span for span in exporter.get_finished_spans()}
    whole = found["shardwise.save"]
    assert whole.attributes is not None
    assert whole.attributes["shardwise.step"] == 3
    publish = found["shardwise.publish"]
    assert publish.parent is not None
    assert publish.parent.span_id == whole.context.span_id
    assert [each.begin for each in record.spans if each.name == "publish"] == [publish.start_time]
