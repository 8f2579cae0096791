"""A checkpointer's state from its first call to its last: the session, the background thread, the run's history."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.distributed import ProcessGroup

from shardwise.addons import CheckpointAddon
from shardwise.checkpointing.arguments import check_arguments, check_same_settings, check_stateful, refuse_alone
from shardwise.checkpointing.calls import Turn, check_same_call, own_state, take_turn
from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.checkpointing.optimizers import Optimizers
from shardwise.checkpointing.parallel_ranks import ParallelRanks
from shardwise.checkpointing.reports import Reports
from shardwise.checkpointing.run_state.data_order import DataOrder
from shardwise.checkpointing.saving.commits import RunLine
from shardwise.checkpointing.saving.torch_format import tensors_alone
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.disk.storage import Storage
from shardwise.engine.background import Background, waiting_for_copies
from shardwise.engine.device_streams import DeviceStreams
from shardwise.engine.jobs import Commit, SaveJob, Step
from shardwise.engine.staging import Stager
from shardwise.settings import Settings
from shardwise.stateful_wrappers import ModelState, OptimizerState
from shardwise.stateful_wrappers.model import Model

_LOG = logging.getLogger(__name__)


class Lifetime:
    """Opens the session at the first call, lets saves take turns, and finishes what is pending at the end.

    Attributes:
        made: The session, from the first call on.
        background: Writes asynchronous saves, from the first call on; ``None`` in synchronous mode.
        reports: Tells the user of saves and loads.
        order: The state of the run's random number generators and data loaders.
        line: Which checkpoints the run has restored and saved.
        is_tidied: Whether leftovers of interrupted saves have been removed.
        ends: Whether a component of the run's final checkpoint was saved.
        leaves: Whether the ranks have been asked to stop.
    """

    def __init__(
        self,
        config: Settings,
        ranks: ParallelRanks,
        process_group: ProcessGroup | None,
        pp_group: ProcessGroup | None,
        addons: list[CheckpointAddon],
        storage: Storage,
        device_streams: DeviceStreams | None,
        absent_seconds: float,
        reports: Reports,
    ) -> None:
        self.config, self.ranks, self.addons = config, ranks, addons
        self.storage, self.reports = storage, reports
        self._process_group, self.pp_group = process_group, pp_group
        self._device_streams, self._absent_seconds = device_streams, absent_seconds
        # Resolved once: a training script may change its working directory, and its checkpoints stay together.
        self.root = Path(config.checkpoint_dir).absolute()
        self._staging_dir = None if config.staging_dir is None else Path(config.staging_dir).absolute()
        self.made: Session | None = None
        self.background: Background | None = None
        self.order = DataOrder()
        self.line = RunLine()
        self.is_tidied = False
        self.ends = False
        self.leaves = False

    @property
    def session(self) -> Session:
        """The session, opened at the first call, which all ranks make; later accesses are local."""
        return self.begin("a call of the checkpointer")

    def begin(self, call: str) -> Session:
        """Return the session, which the first call opens. All ranks call; a warning names ``call`` if some do not."""
        if self.made is None:
            group = self._meet(call)
            try:
                refuse_alone(group)
                first_exchange = check_same_settings(self.config, self.root, group)
                parts = self.config, group, self.storage, self.ranks, self.root, first_exchange, self._staging_dir
                made = Session(*parts, self.pp_group)
                if self.config.is_async:
                    self.background = Background(self._meet(call), self._device_streams)
                    made.stager = self.background.stager
                elif self.config.cpu_offload:
                    made.stager = Stager(self._device_streams)
            except BaseException:
                group.close()
                raise
            self.made = made
        return self.made

    def _meet(self, call: str) -> Group:
        return Group.dedicated(
            self._process_group, self.config.collective_timeout_seconds, call, absent_seconds=self._absent_seconds
        )

    def of_ranks(self, call: str, state: Stateful) -> Session:
        """Begin a call that saves or loads one state per rank. All ranks call."""
        session = self.begin(call)

        def look() -> str:
            check_stateful(state)
            return "a state"

        check_same_call(call, look, {}, session.group)
        return session

    def looked(
        self,
        model: Model,
        optimizer: object = None,
        scheduler: object = None,
        name: str = "model",
        *,
        saves: bool = False,
        is_run: bool = True,
    ) -> str:
        """Check the arguments, make the model's memory safe to use from other threads, and return ``name``. Local.

        In asynchronous mode a save (``saves``) orders its own copies, so nobody waits. The meshes of the run's own
        model (``is_run``) give the parallel ranks; those of a base model or an average do not.

        Raises:
            MisuseError: An argument has a wrong type, or a parallel rank was given that contradicts the model's meshes.
        """
        check_arguments(model, optimizer, scheduler)
        if is_run:
            self.ranks.look([model] if isinstance(model, nn.Module) else model)
        if not (saves and self.config.is_async):
            self._settle(model)
        return name

    def _settle(self, model: Model) -> None:
        """Wait for this thread's queued work on the model's devices before other threads read or fill its memory.

        Those threads queue their work on other streams.
        """
        if self._device_streams is None and not torch.accelerator.is_available():
            return
        streams = self._device_streams or DeviceStreams()
        parts = [model] if isinstance(model, nn.Module) else model
        tensors = chain.from_iterable(chain(part.parameters(), part.buffers()) for part in parts)
        for device in {tensor.device for tensor in tensors}:
            if streams.has_streams(device):
                streams.settle(device)

    def turn(self, call: str, look: Callable[[], str], given: Mapping[str, bool]) -> Turn:
        """Begin a save: check that all ranks make the same one, then wait for a pending asynchronous save or skip.

        The run's final checkpoint is never skipped, nor one made because the ranks were asked to stop: no other save
        follows it.
        """
        waits = not self.config.skip_save_while_busy or self.ends or self.leaves
        states = check_same_call(call, look, given, self.session.group, own_state(self.background, waits))
        turn = Turn()
        try:
            turn = take_turn(states)
        finally:
            if self.background is not None and not turn.skipped:
                self.background.acknowledge()
        if turn.skipped and self.session.group.is_main:
            _LOG.info("skipped %s: the last save is still being written", call)
        return turn

    @contextmanager
    def saving(
        self, what: str, place: Path, turn: Turn, abandon: Callable[[Group], None]
    ) -> Iterator[Callable[[Sequence[Step], Commit], None]]:
        """Capture a save to ``place`` in the context, which passes its steps and its commit; then run them.

        All ranks call. ``abandon`` removes what was written, after a failure. The error of the previous save is raised
        at the end.
        """
        captured: list[tuple[Sequence[Step], Commit]] = []
        with turn.raising_earlier(what, self.wait):
            try:
                yield lambda steps, commit: captured.append((steps, commit))
            except BaseException:
                abandon(self.session.group)
                raise
            [(steps, commit)] = captured
            self._run(SaveJob(f"saving {place}", tuple(steps), commit, abandon))

    def _run(self, job: SaveJob) -> None:
        stager = self.session.stager
        if stager is not None:
            job = replace(job, steps=(waiting_for_copies(stager), *job.steps))
        if self.background is None:
            job.run(self.session.group)
            return
        self.background.submit(job)
        if self.config.wait_for_staging:
            self.background.wait_for_staging()

    def allocate_staging(self, model: Model, optimizer: Optimizers | None = None) -> None:
        """As `Checkpointer.allocate_staging`, within another call. All ranks call."""
        session, stager = self.session, self.session.stager
        if stager is None or self.config.is_peft:
            return
        with session.group.together("making room for asynchronous saves"):
            if self.config.model_save_format == "torch_save":
                stager.allocate("model", tensors_alone(ModelState(model).state_dict()))
                if optimizer is not None:
                    stager.allocate("optim", OptimizerState(optimizer, model).state_dict())
                return
            captured = session.names.capture(ModelState(model), load=True)
            stager.allocate("model", [*captured.held, *captured.excluded])
            if optimizer is not None:
                stager.allocate("optim", OptimizerState(optimizer, model).held())

    def wait(self) -> None:
        """Return when the last asynchronous save is durable and published; raises its error. All ranks call."""
        if self.background is not None:
            self.background.wait()

    def close(self) -> None:
        """Wait for what is pending and release groups, threads and buffers. All ranks call; safe to call twice."""
        try:
            self.wait()
        finally:
            if self.background is not None:
                self.background.close()
                self.background = None
            if self.made is not None:
                if self.made.stager is not None:
                    self.made.stager.clear()
                self.made.group.close()
                self.made = None
