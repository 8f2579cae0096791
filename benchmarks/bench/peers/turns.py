"""The parent: one pair of processes for each peer, told to take turns, and replaced when it fails or hangs."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import multiprocessing.connection
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from bench.measure import Sample
from bench.peers.operations import OPERATIONS
from bench.peers.worker import RAW, Answer, Job, main

_RANKS = 2
#: After this a pair is stopped: nothing here takes a tenth of it.
_PATIENCE = 300.0
_GRACE = 10.0


@dataclass
class Cell:
    """One peer in one line of the table: ratios to the raw reference of the same turn, or why there are none."""

    peer: str
    ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    reason: str = ""
    failed: bool = False

    @property
    def ratio(self) -> float:
        """The median."""
        return statistics.median(self.ratios)


@dataclass
class Line:
    """One line of the table."""

    name: str
    raw_seconds: list[float]
    cells: list[Cell]


class _Pair:
    """The processes of one peer."""

    def __init__(self, peer: str, directory: Path, size: float) -> None:
        self._peer, self._directory, self._size = peer, directory, size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def ask(self, operation: str, turn: int | None) -> Answer:
        """Send a command to all ranks and wait for rank 0's answer, or the first failure."""
        self._start()
        try:
            for pipe in self._pipes:
                pipe.send((operation, turn))
        except OSError:  # as where the system was out of memory and has killed it
            self.stop()
            return Answer(failed="the process ended between two commands")
        answers = self._answers()
        for answer in answers:
            if answer.failed or answer.reason:
                if len(answers) < _RANKS or answer.failed:
                    self.stop()
                return answer
        return answers[0]

    def _answers(self) -> list[Answer]:
        answers: list[Answer] = []
        waiting, until = list(self._pipes), time.monotonic() + _PATIENCE
        while waiting:
            ready = mp.connection.wait(waiting, max(0.0, until - time.monotonic()))
            if not ready:
                return answers or [Answer(failed=f"no answer within {_PATIENCE:.0f} s")]
            for pipe in ready:
                assert isinstance(pipe, Connection)
                waiting.remove(pipe)
                try:
                    answer = pipe.recv()
                except EOFError:
                    answer = Answer(failed="the process ended")
                answers.append(answer)
                if answer.failed:  # the other may wait for it in a collective
                    until = min(until, time.monotonic() + _GRACE)
        return answers

    def _start(self) -> None:
        if self._processes:
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        for rank in range(_RANKS):
            here, there = context.Pipe()
            job = Job(self._peer, rank, _RANKS, port, self._directory, self._size)
            process = context.Process(target=main, args=(job, there))
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def stop(self) -> None:
        """End the processes; the next command starts new ones."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    pipe.send(None)
        for process in self._processes:
            process.join(_GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []


def compare(peers: Sequence[str], operations: Sequence[str], directory: Path, size: float, repeats: int) -> list[Line]:
    """Measure each operation of each peer in turns with the raw reference. Says on stderr where it is."""
    pairs = {name: _Pair(name, directory, size) for name in (RAW, *peers)}
    lines: list[Line] = []
    try:
        for operation in operations:
            lines += _operation(pairs, operation, repeats)
    finally:
        for pair in pairs.values():
            pair.stop()
    return lines


def _operation(pairs: dict[str, _Pair], operation: str, repeats: int) -> list[Line]:
    parts = OPERATIONS[operation].parts
    lines = [Line(part, [], [Cell(name) for name in pairs if name != RAW]) for part in parts]
    if (answer := pairs[RAW].ask(operation, None)).failed:
        raise RuntimeError(answer.failed)
    taking = [name for name in pairs if name != RAW]
    for name in list(taking):
        _note(f"{operation}: {name} prepares")
        if not _goes_on(pairs[name].ask(operation, None), name, lines):
            taking.remove(name)
    for turn in range(repeats + 1):
        reference = pairs[RAW].ask(operation, turn)
        if reference.failed:
            raise RuntimeError(reference.failed)
        # Each peer follows the reference in another place each time.
        order = taking[turn % len(taking) :] + taking[: turn % len(taking)] if taking else []
        for name in order:
            _note(f"{operation}: {name}, turn {turn}")
            answer = pairs[name].ask(operation, turn)
            if not _goes_on(answer, name, lines):
                taking.remove(name)
                continue
            for line, sample, raw in zip(lines, answer.samples, reference.samples, strict=True):
                _add(_cell(line, name), sample, raw, measured=turn > 0)
        for line, raw in zip(lines, reference.samples, strict=True):
            if turn:
                line.raw_seconds.append(raw.seconds)
    for pair in pairs.values():
        pair.ask("", None)
    return lines


def _add(cell: Cell, sample: Sample, raw: Sample, *, measured: bool) -> None:
    cell.peak_mib = max(cell.peak_mib, sample.peak)
    if measured:
        cell.ratios.append(sample.seconds / raw.seconds)
        cell.seconds.append(sample.seconds)


def _goes_on(answer: Answer, name: str, lines: list[Line]) -> bool:
    if not (answer.failed or answer.reason):
        return True
    for line in lines:
        cell = _cell(line, name)
        cell.failed = bool(answer.failed)
        cell.reason = answer.reason or answer.failed.strip().splitlines()[-1][:160]
    if answer.failed:
        _note(f"{name} failed:\n{answer.failed}")
    return False


def _cell(line: Line, name: str) -> Cell:
    return next(cell for cell in line.cells if cell.peer == name)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
