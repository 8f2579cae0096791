"""A checkpointer's calls, and its state from the first to the last: the session, the background thread, the history.

Every call has around it its storage, no inference mode and no collector, and begins with an exchange: all ranks make
the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup

from shardwise.addons import CheckpointAddon
from shardwise.checkpointing.arguments import check_arguments, check_same_settings, refuse_alone
from shardwise.checkpointing.optimizers import Optimizers
from shardwise.checkpointing.parallel_ranks import ParallelRanks
from shardwise.checkpointing.reports import Call, Reports
from shardwise.checkpointing.run_state.data_order import DataOrder
from shardwise.checkpointing.saving.commits import Closing, RunLine, Unfinished
from shardwise.checkpointing.saving.torch_format import tensors_alone
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.disk.storage import Storage, using
from shardwise.engine.background import Background, waiting_for_copies
from shardwise.engine.collector import without_collector
from shardwise.engine.records import ComponentRecord, SaveJob, Step
from shardwise.engine.staging import DeviceStreams, Stager
from shardwise.errors import MisuseError, ShardwiseError
from shardwise.settings import Settings
from shardwise.stateful_wrappers import ModelState, OptimizerState
from shardwise.stateful_wrappers.model import Model
from shardwise.timing import phase

_LOG = logging.getLogger(__name__)


@phase("agree")
def check_same_call(
    call: str, look: Callable[[], str], given: Mapping[str, bool], group: Group, note: JsonValue = None
) -> list[JsonValue]:
    """Check that all ranks make the same call with the same kinds of arguments; `MisuseError` if not. All ranks call.

    Every call begins with this exchange, so that two different calls that meet are named at once: ``call`` is the
    method and its target, as messages show it. ``look`` checks this rank's arguments and returns what is saved; a
    constant text where that does not depend on the caller. ``given`` has the optional arguments that decide which
    collectives follow. Returns every rank's ``note``.
    """
    names = sorted(key for key, is_given in given.items() if is_given)
    with group.coming(call):
        everyone = group.gather(lambda: (call, look(), names, note), "looking at what is to be saved or loaded")
    first_call, first, passed, _ = everyone[0]
    for rank, (theirs, _, _, _) in enumerate(everyone):
        if theirs.partition("(")[0] != first_call.partition("(")[0]:
            raise MisuseError(
                f"rank 0 calls {first_call} and rank {rank} calls {theirs}",
                hint="Call the same methods on every rank, in the same order.",
            )
    for rank, (_, theirs, they_passed, _) in enumerate(everyone):
        if theirs != first:
            raise MisuseError(
                f"rank 0 saves {first} and rank {rank} saves {theirs}",
                hint="Count epochs and steps alike on every rank.",
            )
        if they_passed != passed:
            odd = sorted({*passed} ^ {*they_passed})[0]
            has, lacks = (0, rank) if odd in passed else (rank, 0)
            raise MisuseError(
                f"{odd} was passed on rank {has} and not on rank {lacks}",
                hint="Pass the same arguments on every rank; a rank without stages passes empty lists.",
            )
    return [note for _, _, _, note in everyone]


class Turn(NamedTuple):
    """Whether a save is made, and the error of the previous save, the same on every rank.

    A save is skipped while the previous one is still being written, if the settings say not to wait for it.
    """

    skipped: bool = False
    earlier: ShardwiseError | None = None

    @staticmethod
    def of(states: list[JsonValue]) -> Turn:
        """Decide from all ranks' states; raises the last save's error if no other can be written."""
        everyone = cast(list[tuple[bool, bool, dict[str, str | int | None] | None]], states)
        records = [record for _, _, record in everyone if record is not None]
        earlier = None
        if records:
            earlier = ShardwiseError.from_record(records[0])
            earlier.message = f"an earlier save failed in the background: {earlier.message}"
            earlier.args = (earlier.message,)
        if any(is_broken for _, is_broken, _ in everyone):
            if earlier is None:
                earlier = MisuseError("the ranks have lost touch in an earlier save", hint="Restart the job.")
            earlier.message += "; its ranks have lost touch, and the save that was asked for now was not made"
            raise earlier
        return Turn(any(is_busy for is_busy, _, _ in everyone), earlier)


P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run as outside of ``torch.inference_mode``, and without the collector.

    Every tensor that is made inside of that mode refuses for good to be changed in place outside of it: staging memory
    that the next save fills, an optimizer's state that the next step updates, a parameter that was given its memory.
    """
    is_inferring = torch.is_inference_mode_enabled()
    with without_collector(), torch.inference_mode(False) if is_inferring else nullcontext():
        yield


class HasStorage(Protocol):
    """What has public calls: the checkpointer."""

    storage: Storage


def public_call(function: Callable[P, T]) -> Callable[P, T]:
    """Let a method of the checkpointer use its storage, and run it `undisturbed`."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with using(cast(HasStorage, args[0]).storage), undisturbed():
            return function(*args, **kwargs)

    return call


@dataclass
class Lifetime:
    """Opens the session at the first call, lets saves take turns, and finishes what is pending at the end.

    Attributes:
        made: The session, from the first call on.
        background: Writes asynchronous saves, from the first call on; ``None`` in synchronous mode.
        line: Which checkpoints the run has restored and saved.
        is_tidied: Whether leftovers of interrupted saves have been removed.
        ends: Whether a component of the run's final checkpoint was saved.
        leaves: Whether the ranks have been asked to stop.
    """

    config: Settings
    ranks: ParallelRanks
    process_group: ProcessGroup | None
    pp_group: ProcessGroup | None
    addons: list[CheckpointAddon]
    storage: Storage
    device_streams: DeviceStreams | None
    absent_seconds: float
    reports: Reports
    made: Session | None = None
    background: Background | None = None
    order: DataOrder = field(default_factory=DataOrder)
    line: RunLine = field(default_factory=RunLine)
    is_tidied: bool = False
    ends: bool = False
    leaves: bool = False

    def __post_init__(self) -> None:
        # Resolved once: a training script may change its working directory, and its checkpoints stay together.
        self.root = Path(self.config.checkpoint_dir).absolute()
        self._staging_dir = None if self.config.staging_dir is None else Path(self.config.staging_dir).absolute()

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
                    self.background = Background(self._meet(call), self.device_streams)
                    made.stager = self.background.stager
                elif self.config.cpu_offload:
                    made.stager = Stager(self.device_streams)
            except BaseException:
                group.close()
                raise
            self.made = made
        return self.made

    def _meet(self, call: str) -> Group:
        return Group.dedicated(
            self.process_group, self.config.collective_timeout_seconds, call, absent_seconds=self.absent_seconds
        )

    def looked(
        self,
        model: Model,
        optimizer: object = None,
        scheduler: object = None,
        *,
        saves: bool = False,
        is_run: bool = True,
    ) -> str:
        """Check the arguments, make the model's memory safe to use from other threads, and return "model". Local.

        In asynchronous mode a save (``saves``) orders its own copies, so nobody waits. The meshes of the run's own
        model (``is_run``) give the parallel ranks, and may contradict given ones (`MisuseError`); those of a base model
        or an average do not.
        """
        check_arguments(model, optimizer, scheduler)
        if is_run:
            self.ranks.look([model] if isinstance(model, nn.Module) else model)
        if not (saves and self.config.is_async):
            self._settle(model)
        return "model"

    def _settle(self, model: Model) -> None:
        """Wait for this thread's work on the model's devices: threads that use its memory have other streams."""
        if self.device_streams is None and not torch.accelerator.is_available():
            return
        streams = self.device_streams or DeviceStreams()
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
        own: JsonValue = [False, False, None]  # is the background thread busy, is it broken, its error
        if self.background is not None:
            waits = not self.config.skip_save_while_busy or self.ends or self.leaves
            if self.background.busy and not waits:
                own = [True, False, None]
            else:
                failure = self.background.outcome()
                own = [
                    False,
                    self.background.is_broken,
                    None if failure is None else cast(JsonValue, failure.to_record()),
                ]
        states = check_same_call(call, look, given, self.session.group, own)
        turn = Turn()
        try:
            turn = Turn.of(states)
        finally:
            if self.background is not None and not turn.skipped:
                self.background.acknowledge()
        if turn.skipped and self.session.group.is_main:
            _LOG.info("skipped %s: the last save is still being written", call)
        return turn

    def save(
        self,
        target: Unfinished,
        capture: Callable[[], tuple[Sequence[Step], Closing]],
        earlier: ShardwiseError | None,
        told: Call,
        epoch: int | None = None,
        step: int | None = None,
    ) -> None:
        """Run the steps that ``capture`` gives, and commit them to ``target``. All ranks call.

        The error of the ``earlier`` save is raised at the end: a user who has lost a checkpoint needs the next one all
        the more, so this one is made durable first.
        """
        try:
            try:
                steps, closing = capture()
            except BaseException:
                target.abandon(self.session.group)
                raise

            def commit(group: Group, record: ComponentRecord) -> None:
                target.commit(group, record, closing)
                told.over(group, target.place, epoch, step, target.total_bytes, target.pruned)

            if self.session.stager is not None:
                steps = [waiting_for_copies(self.session.stager), *steps]
            job = SaveJob(f"saving {target.place}", tuple(steps), commit, target.abandon)
            if self.background is None:
                job.run(self.session.group)
            else:
                self.background.submit(job)
                if self.config.wait_for_staging:
                    self.background.stager.wait()
            if earlier is not None:
                self.wait()
        except ShardwiseError as error:
            if earlier is not None:
                error.add_note(f"Before that, {earlier}")
            raise
        if earlier is not None:
            made = f"This one, of {target.name}, was made all the same and is published."
            earlier.hint = f"{made} {earlier.hint}" if earlier.hint else made
            raise earlier

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
