"""The story of the demo, one part after the other."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.finetune import inspection, report
from examples.finetune.base_model import PROMPT, BaseChoice, prepare_base
from examples.finetune.console import Console, megabytes
from examples.finetune.errors import DemoError
from examples.finetune.events import Event, Finished, Ready, Resumed, Saved, Saving, Stepped
from examples.finetune.last_look import Ran, look, page_place
from examples.finetune.launch import Workers
from examples.finetune.report import Check, RunRecord, Written
from examples.finetune.task import Task

from shardwise.lifecycle import checkpoint_name, temporary_name
from shardwise.ops.verify import verify

_FIRST, _SECOND, _LAST = 2, 3, 1
_LEARNING_RATE = 1e-4
_TICK_SECONDS = 0.002
_SILENCE_SECONDS = 900.0
#: Where in a save the kill falls, as a part of the duration of the saves before it.
_KILL_AT = 0.1
#: Copies of the weights that the disk has to hold: the base, and a model with two moments in each of two checkpoints,
#: an unfinished one and two raw writes.
_COPIES = 1 + 3 * 5
#: Losses that should be equal but for the order of additions.
_ROUNDING = 0.01


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for.

    Attributes:
        model: A directory or hub name; ``None`` for the model that ships with the demo.
        steps: Training steps over all runs, at least 4.
        out: Where everything goes and stays; ``None`` for a temporary directory.
        keep: Keep the temporary directory.
    """

    model: str | None = None
    steps: int = 8
    out: Path | None = None
    keep: bool = False

    @property
    def kill_step(self) -> int:
        """The first step whose save is to be interrupted."""
        return max(2, self.steps // 2)


def tell_the_story(options: Options, console: Console) -> bool:
    """Run the whole demo; returns whether every check passed.

    Raises:
        DemoError: It could not go on.
    """
    with _work_directory(options, console) as work:
        return Demo(options, console, work).run()


@contextlib.contextmanager
def _work_directory(options: Options, console: Console) -> Iterator[Path]:
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            taken = any(options.out.iterdir())
        except OSError as error:
            raise DemoError(f"--out {options.out}: {error.strerror}") from error
        if taken:
            raise DemoError(f"--out {options.out} is not empty; name a new directory.")
        yield options.out.resolve()
        return
    work = Path(tempfile.mkdtemp(prefix="shardwise-demo-"))
    try:
        yield work
    finally:
        if options.keep:
            console.plain(f"\nEverything is kept in {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)


class KillSwitch:
    """Kills a run in the middle of a save, and only there.

    The processes are frozen first and killed if the frozen state is that of a half-written checkpoint; otherwise they
    go on and the next save is tried. So the kill cannot fall between two saves by bad luck.

    Args:
        workers: Who is to be killed.
        root: Root of the checkpoints.
        first_step: Earlier saves are left in peace.
    """

    def __init__(self, workers: Workers, root: Path, first_step: int) -> None:
        self._workers = workers
        self._root = root
        self._first_step = first_step
        self._durations: list[float] = []
        self._step: int | None = None
        self._seen: float | None = None

    def notice(self, event: Event) -> None:
        """Learn from an event."""
        if isinstance(event, Saving) and event.step >= self._first_step:
            self._step, self._seen = event.step, None
        elif isinstance(event, Saved):
            self._durations.append(event.seconds)
            self._step = None

    def try_it(self) -> int | None:
        """Kill if the moment has come; returns the step whose save was cut short."""
        if self._step is None:
            return None
        name = checkpoint_name(0, self._step)
        temporary = self._root / temporary_name(name)
        if self._seen is None:
            if not inspection.writing_weights(temporary):
                return None
            self._seen = time.monotonic()
        if time.monotonic() - self._seen < _KILL_AT * statistics.median(self._durations or [0.0]):
            return None
        self._workers.freeze()
        if not temporary.is_dir() or (self._root / name).exists():
            self._workers.thaw()
            self._step = None
            return None
        self._workers.kill()
        return self._step


class Demo:
    """The parts of the story, sharing what they learnt.

    Args:
        options: What the user asked for.
        console: Output.
        work: Directory for everything.
    """

    def __init__(self, options: Options, console: Console, work: Path) -> None:
        self._options = options
        self._console = console
        self._work = work
        self._root = work / "checkpoints"
        self._runs: list[RunRecord] = []
        self._checks: list[Check] = []

    def run(self) -> bool:
        """Everything, in order; returns whether every check passed."""
        say, steps = self._console.say, self._options.steps
        self._console.heading("The model")
        base = prepare_base(self._options.model, self._work / "base", self._console)
        self._need_space(base)
        say(f"{base.label}: {megabytes(base.weight_bytes)} of weights in {base.directory}")

        self._console.heading(f"Run 1: {_FIRST} processes, to be killed while saving step {self._options.kill_step}")
        killed = self._train(base, _FIRST, steps - 2, kill=True)
        if killed.killed_in is None:
            raise DemoError("no save could be caught in the middle; try again with more --steps")
        self._look_at_the_wreck(killed.killed_in)

        self._console.heading(f"Run 2: {_SECOND} processes go on from the last published checkpoint")
        second = self._train(base, _SECOND, steps - 1)
        self._compare(killed, second)

        self._console.heading(f"Run 3: {_LAST} process finishes")
        last = self._train(base, _LAST, steps)

        self._console.heading("The result, opened with plain transformers")
        self._open(base, last)

        self._console.heading("The checkpoints, looked at from the command line")
        page = page_place(self._work, stays=self._options.out is not None or self._options.keep)
        commands = list(look(self._root, page))
        self._check(all(each.ok for each in commands), "shardwise ls, diff and inspect --html did what they should")
        self._report(commands, page)
        return all(check.ok for check in self._checks)

    def _need_space(self, base: BaseChoice) -> None:
        needed, free = _COPIES * base.weight_bytes, shutil.disk_usage(self._work).free
        if free < needed:
            raise DemoError(
                f"{self._work} has {megabytes(free)} free and the demo needs {megabytes(needed)}; "
                "name a directory with more room with --out."
            )

    def _train(self, base: BaseChoice, processes: int, last_step: int, *, kill: bool = False) -> RunRecord:
        record = RunRecord(processes)
        self._runs.append(record)
        directory = self._work / f"run-{len(self._runs)}"
        directory.mkdir()
        task = Task(
            base=base.directory.resolve(),
            checkpoints=self._root,
            scratch=directory,
            events=directory / "events.jsonl",
            steps=self._options.steps,
            last_step=last_step,
            learning_rate=_LEARNING_RATE,
            orchestrator=os.getpid(),
        )
        self._console.say(f"starting torchrun with {processes} process{'es' if processes > 1 else ''}")
        with Workers(task, processes, directory) as workers:
            switch = KillSwitch(workers, self._root, self._options.kill_step) if kill else None
            self._follow(workers, record, switch)
        for raw in directory.glob("raw-*"):
            raw.unlink()
        return record

    def _follow(self, workers: Workers, record: RunRecord, switch: KillSwitch | None) -> None:
        heard = time.monotonic()
        while not workers.ended:
            for event in workers.poll():
                heard = time.monotonic()
                self._take(event, record)
                if switch is not None:
                    switch.notice(event)
            if switch is not None and (step := switch.try_it()) is not None:
                record.killed_in = step
                self._console.say(f"SIGKILL to all processes while they save step {step}")
                return
            if time.monotonic() - heard > _SILENCE_SECONDS:
                raise DemoError(f"no word from the workers for {_SILENCE_SECONDS:.0f} s:\n{workers.log_end()}")
            time.sleep(_TICK_SECONDS)
        for event in workers.poll():
            self._take(event, record)
        workers.check()

    def _take(self, event: Event, record: RunRecord) -> None:
        line: str | None = None
        match event:
            case Ready():
                line = (
                    f"{event.parameters:,} parameters loaded, sharded over {event.world_size} ({event.seconds:.1f} s)"
                )
            case Resumed():
                record.resumed = event
                line = f"resumed from {event.name}, written by {event.saved_by} processes ({event.seconds:.1f} s)"
            case Stepped():
                record.steps.append(event)
                line = f"step {event.step} of {self._options.steps}: loss {event.loss:.4f} ({event.seconds:.1f} s)"
            case Saved():
                record.saves.append(event)
                line = f"saved {event.name} in {event.seconds:.2f} s (raw write {event.raw_seconds:.2f} s)"
            case Finished():
                record.final_loss = event.loss
                line = f"loss after the last update: {event.loss:.4f}"
        if line is not None:
            self._console.say(line)

    def _check(self, ok: bool, text: str) -> None:
        self._checks.append(Check(ok, text))
        self._console.say(("" if ok else "FAILED: ") + text)

    def _look_at_the_wreck(self, step: int) -> None:
        left = inspection.look_at_remains(self._root)
        wanted = checkpoint_name(0, step - 1)
        if left is None:
            self._check(False, "the killed save left nothing, so it was not interrupted in the middle")
            return
        self._check(
            left.refused and not (self._root / checkpoint_name(0, step)).exists(),
            f"the killed save left {left.name} ({left.files} files, {megabytes(left.nbytes)} reserved), which nothing "
            "resolves",
        )
        self._check(left.latest == wanted, f"LATEST still leads to {left.latest}, one of {', '.join(left.published)}")

    def _compare(self, killed: RunRecord, second: RunRecord) -> None:
        assert killed.killed_in is not None
        resumed = second.resumed.step if second.resumed else 0
        self._check(resumed == killed.killed_in - 1, f"run 2 resumed from step {resumed}")
        before, after = killed.steps[-1], second.steps[0]
        self._check(
            before.step == after.step and report.same(before.loss, after.loss, _ROUNDING),
            f"step {after.step} again: loss {after.loss:.4f} on {_SECOND} processes, {before.loss:.4f} on {_FIRST}",
        )
        left = [path.name for path in inspection.unfinished(self._root)]
        self._check(not left, f"unfinished directories left: {', '.join(left) or 'none'}")

    def _open(self, base: BaseChoice, last: RunRecord) -> None:
        checkpoint = (self._root / "LATEST").resolve()
        verified = verify(checkpoint)
        self._check(
            verified.status == "whole",
            f"{checkpoint.name} is {verified.status}: {verified.tensors} tensors compared with their digests",
        )
        model = checkpoint / "model"
        exported = inspection.weight_bytes(model)
        self._check(
            exported <= 1.01 * base.weight_bytes,
            f"model/ holds {megabytes(exported)} of weights, {exported / base.weight_bytes:.4f} times the base model's",
        )
        opened = inspection.open_with_transformers(model / "consolidated", PROMPT)
        self._check(
            not opened.problems,
            f"transformers opened {opened.tensors} tensors; missing, unexpected or mismatched: "
            f"{', '.join(opened.problems[:5]) or 'none'}",
        )
        assert last.final_loss is not None
        self._check(
            report.same(opened.loss, last.final_loss, _ROUNDING),
            f"loss in transformers {opened.loss:.4f}, in the trainer {last.final_loss:.4f}",
        )
        first = self._runs[0].steps[0].loss
        self._check(opened.loss < first, f"loss before training {first:.4f}, after it {opened.loss:.4f}")
        if base.answer is None:
            self._console.say(f"generated: {opened.text}")
        else:
            self._check(base.answer in opened.text, f"generated: {opened.text}")

    def _report(self, commands: list[Ran], page: Path) -> None:
        checkpoint = (self._root / "LATEST").resolve()
        parts = list(_parts(checkpoint))
        sections: list[tuple[str, Callable[[], list[str]]]] = [
            ("What resumed from where", lambda: report.run_lines(self._runs)),
            ("What was written", lambda: report.written_lines(parts)),
            (
                "How fast, as a ratio to a raw parallel write of the same tensors into the same folder",
                lambda: report.speed_lines(self._runs, sum(part.nbytes for part in parts)),
            ),
            ("Checks", lambda: report.check_lines(self._checks)),
            *((f"$ {ran.command}", lambda ran=ran: ran.lines) for ran in commands),
        ]
        for title, lines in sections:
            self._console.heading(title)
            for line in lines():
                self._console.plain(line)
        failed = sum(not check.ok for check in self._checks)
        verdict = "every check passed" if not failed else f"{failed} of {len(self._checks)} checks FAILED"
        self._console.plain(f"\nA map of the last checkpoint, and what its last step changed: {page}")
        self._console.plain(f"{verdict}, in {self._console.seconds:.0f} s")


def _parts(checkpoint: Path) -> Iterator[Written]:
    for name in ("model/consolidated", "model/.hf_metadata", "optim", "rng", "extra"):
        directory = checkpoint / name
        if directory.is_dir():
            yield Written(name, *inspection.measure(directory))
    own = [path.stat().st_size for path in checkpoint.iterdir() if path.is_file()]
    yield Written("manifest.json, config.yaml, losses.json", len(own), sum(own))
