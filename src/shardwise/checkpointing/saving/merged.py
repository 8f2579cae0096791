"""Saving an adapter's model merged: an export of base plus adapter beside the adapter, without a gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from torch import nn

from shardwise.addons import ConsolidatedHFAddon
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.hub import HubState, memory_of, natives_of, require_memory
from shardwise.checkpointing.merged_state import merged_state
from shardwise.checkpointing.saving.facts import Facts
from shardwise.checkpointing.saving.models import Described, ModelSave
from shardwise.checkpointing.session import Session
from shardwise.engine.export import ExportOptions
from shardwise.engine.jobs import Step
from shardwise.geometry import TensorSpec
from shardwise.peft.merge import MergedPart

#: Component of the merged tensors: the manifest lists a tensor once in a component.
MERGED = "merged"


class MergedSave(ModelSave):
    """The merged export of one save of a model's adapters; it writes nothing that resumes. All ranks make one.

    ``parts`` have their adapters, ``merged`` are the same without; ``directory``, the ``model`` directory, exists.
    """

    def __init__(
        self,
        session: Session,
        parts: Sequence[nn.Module],
        merged: Sequence[MergedPart],
        directory: Path,
        *,
        tokenizer: SavesPretrained | None,
        is_final: bool,
    ) -> None:
        super().__init__(
            session,
            [part.model for part in merged],
            directory,
            [ConsolidatedHFAddon()],
            tokenizer=tokenizer,
            peft_config=None,
            is_final=is_final,
            reserve=lambda: None,
        )
        self._parts, self._merged = parts, merged

    def _captured(self) -> tuple[HubState, bool]:
        session = self._session
        hub = session.names.capture(self.state)
        hub = merged_state(hub, self._parts, self._merged, session.may_differ)
        require_memory(memory_of(hub.held), "values to save")
        natives = iter(session.staged("model.native", natives_of(hub.groups)))
        groups = tuple(replace(held, natives=tuple(islice(natives, len(held.natives)))) for held in hub.groups)
        return replace(hub, held=tuple(session.staged("model", hub.held)), groups=groups), self._look_at_parameters()

    def _options(self, specs: Sequence[TensorSpec]) -> ExportOptions:
        return replace(super()._options(specs), component=MERGED)

    def _prepare_directory(self, facts: Facts, passed: Sequence[str] = ()) -> None:
        # The notes beside an export are for resuming from it.
        super()._prepare_directory(replace(facts, native={}, outside=frozenset(), excluded=()))

    def _beside(self, described: Described) -> list[Step]:
        return []
