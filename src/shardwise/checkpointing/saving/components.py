"""Saving one component alone, for loops that publish by themselves: ``weights_path/model``, ``weights_path/optim``.

The component is written beside its place and moved there in one step: a re-save leaves no files of an earlier split,
and an interrupted save leaves the earlier component whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from shardwise._version import __version__
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.calls import Turn
from shardwise.checkpointing.lifetime import Lifetime
from shardwise.checkpointing.optimizers import Optimizers, Schedulers, capture_optimizer
from shardwise.checkpointing.reports import Outcome
from shardwise.checkpointing.saving.adapters import AdapterSave
from shardwise.checkpointing.saving.commits import Closing, Unfinished, claimed, gather_records
from shardwise.checkpointing.saving.hooks import ModelRequest, passed_addons
from shardwise.checkpointing.saving.models import ModelSave
from shardwise.comm import Group
from shardwise.disk.names import is_there, walk
from shardwise.engine.jobs import Step
from shardwise.engine.records import ComponentRecord
from shardwise.lifecycle import doomed_name, settle
from shardwise.stateful_wrappers.model import Model
from shardwise.timing import phase


def save_model(
    life: Lifetime,
    model: Model,
    weights_path: str | Path,
    peft_config: object | None,
    tokenizer: SavesPretrained | None,
    is_final: bool,
) -> None:
    """See `Checkpointer.save_model`. All ranks call."""
    life.ends = life.ends or is_final

    def capture(target: Replacement) -> tuple[Sequence[Step], Closing]:
        parts = life.session, model, target.temp, life.addons, tokenizer, peft_config, is_final, target.reserve
        save = model_save(ModelRequest(*parts))
        return save.steps(), save.closing

    given = {"is_final_checkpoint=True": is_final} | passed_addons(life.addons)
    _save(life, "model", weights_path, lambda: life.looked(model, saves=True), given, capture)


def save_optimizer(
    life: Lifetime, optimizer: Optimizers, model: Model, weights_path: str | Path, scheduler: Schedulers | None
) -> None:
    """See `Checkpointer.save_optimizer`. All ranks call."""

    def capture(target: Replacement) -> tuple[Sequence[Step], Closing]:
        group = life.session.group
        with group.together(f"preparing {target.place}"):
            if group.is_main:
                target.reserve()
        return capture_optimizer(life.session, optimizer, model, scheduler, target.temp), ()

    _save(life, "optimizer", weights_path, lambda: life.looked(model, optimizer, scheduler, saves=True), {}, capture)


def _save(
    life: Lifetime,
    what: Literal["model", "optimizer"],
    weights_path: str | Path,
    look: Callable[[], str],
    given: Mapping[str, bool],
    capture: Callable[[Replacement], tuple[Sequence[Step], Closing]],
) -> None:
    """Save one component; ``capture`` returns the steps that write it. All ranks call."""
    place = Path(weights_path).absolute() / ("model" if what == "model" else "optim")
    with life.reports.call(f"save_{what}") as told:
        session = life.begin(call := f"save_{what}({place.parent})")
        turn = life.turn(call, look, given) if life.config.enabled else Turn(skipped=True)
        if turn.skipped:
            return
        target = Replacement(session, place, {"shardwise": __version__})
        with life.saving(str(place), place, turn, target.abandon) as run:
            steps, closing = capture(target)

            def commit(group: Group, record: ComponentRecord) -> None:
                target.commit(group, record, closing)
                told.over(Outcome(group, place, total_bytes=target.total_bytes))

            run(steps, commit)


def model_save(request: ModelRequest) -> ModelSave | AdapterSave:
    """One save of a model, or of its adapters. All ranks call."""
    return AdapterSave(request) if request.session.config.is_peft else ModelSave(request)


class Replacement(Unfinished):
    """Reserve, fill and put in place one component's directory."""

    def reserve(self) -> None:
        """Make the directory to write into, removing what an interrupted save left. Rank 0 calls."""
        session = self._session
        session.storage.make_directory(self.place.parent)
        self._claim, self._is_reserved = claimed(session, self.place), True
        session.storage.remove_tree(self.temp)
        if is_there(self._doomed) and not is_there(self.place):
            # A crash between the two renames of commit(): what stood here is the only copy there is.
            session.storage.rename_new(self._doomed, self.place)
            session.storage.sync_directory(self.place.parent)
        session.storage.remove_tree(self._doomed)
        session.storage.make_directory(self.temp)

    @property
    def _doomed(self) -> Path:
        return self.place.with_name(doomed_name(self.place.name))

    @phase("publish")
    def commit(self, group: Group, record: ComponentRecord, closing: Closing = ()) -> None:
        """Write the component's manifest and rename it into place. All ranks call."""
        union = gather_records(self._session, group, self.temp, record, closing)
        with group.together(f"putting {self.place} in place"):
            if group.is_main:
                storage = self._session.storage
                self._write_manifest(union())
                for where, _ in walk(self.temp):
                    storage.sync_directory(where)
                self._put_in_place()
                # It is there: nothing is abandoned any more. What it replaced may be all that a power failure leaves.
                self._is_reserved = False
                settle(self.temp, self.place)
                self._release()

    def _put_in_place(self) -> None:
        storage = self._session.storage
        if not is_there(self.place):
            storage.rename(self.temp, self.place)
        elif not storage.exchange(self.temp, self.place):
            # In two steps where there is no better way; reserve() sees to a crash between them.
            storage.rename(self.place, self._doomed)
            try:
                storage.rename(self.temp, self.place)
            except BaseException:
                storage.rename_new(self._doomed, self.place)
                raise
