"""What every part of the checkpointer needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shardwise.checkpointing.answers import Answers
from shardwise.checkpointing.arguments import Met
from shardwise.checkpointing.base import BaseModel, find_base_path, open_base
from shardwise.checkpointing.hub import HubNames, HubState
from shardwise.checkpointing.recasts import RecastKeeper
from shardwise.comm import Group
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
from shardwise.engine.export import ExportPlan
from shardwise.engine.memo import Memo
from shardwise.engine.rosters import RosterKeeper
from shardwise.engine.shards import ShardPlan
from shardwise.engine.sharing import Sharing
from shardwise.engine.staging import Stager
from shardwise.format.manifest import KnownManifest
from shardwise.io.storage import Storage
from shardwise.lifecycle import FileSystem
from shardwise.plan.fragments import HeldTensor


@dataclass
class Context:
    """Settings, ranks and storage of one checkpointer.

    Attributes:
        config: Settings.
        group: The ranks that save and load together.
        storage: Where data goes.
        fs: Where names are made and renamed.
        stage: Pipeline rank.
        root: The directory of checkpoints and pointers, absolute: a change of the working directory moves nothing.
        met: What the ranks have told each other when they met.
        staging_dir: Where files are built before they are copied into place; likewise.
        names: The model's conversion to hub names.
        stager: Where captured state is copied aside, in asynchronous mode.
        model_roster: Who holds what of the model.
        optimizer_roster: Who holds what of the optimizer.
        sound: What was captured last, after it was looked through.
    """

    config: CheckpointingConfig
    group: Group
    storage: Storage
    fs: FileSystem
    stage: int
    root: Path
    met: Met
    staging_dir: Path | None = None
    names: HubNames = field(default_factory=HubNames)
    stager: Stager | None = None
    sound: HubState | None = None
    _base_path: str | None = None
    _base_found: bool = False
    _base: BaseModel | None = None
    _base_read: bool = False

    def __post_init__(self) -> None:
        self.model_roster = RosterKeeper(self.group, self.stage)
        self.recasts = RecastKeeper(self.group)
        self.peculiar = Answers(self.group, "asking what models have beside plain tensors")
        self.is_quantized: Memo[bool] = Memo()
        self.model_plan: Memo[ExportPlan] = Memo()
        self.shard_plans: dict[str, Memo[ShardPlan]] = {}
        self.manifests: dict[str, KnownManifest] = {}
        self.exact_roster = RosterKeeper(self.group, self.stage)
        self.computed_roster = RosterKeeper(self.group, self.stage)
        self.optimizer_roster = RosterKeeper(self.group, self.stage)

    def staged(self, component: str, held: Sequence[HeldTensor]) -> list[HeldTensor]:
        """The tensors as they are to be written: copied aside in asynchronous mode, else as they are."""
        return list(held) if self.stager is None else self.stager.stage(component, held)

    def base_path(self) -> str | None:
        """The base model's local path, ``None`` where none is named; looked for once. All ranks call.

        Raises:
            CheckpointNotFoundError: One is named on some rank and is not there.
        """
        if self.met.names_base and not self._base_found:
            with self.group.together("looking for the base model"):
                self._base_path = find_base_path(self.config)
            self._base_found = True
        return self._base_path

    def base_name(self) -> str | None:
        """The base model as an adapter names it: its local path, or else the name in the settings. All ranks call."""
        return self.base_path() or self.config.model_repo_id

    def base(self) -> BaseModel | None:
        """The base model's headers, read once. All ranks call."""
        if self.met.names_base and not self._base_read:
            legacy = self.config.allow_legacy_pickle_restore
            path = self.base_path()
            self._base = open_base(None if path is None else os.path.abspath(path), self.group, legacy)
            self._base_read = True
        return self._base

    def exports(self, is_final: bool) -> bool:
        """Whether a save writes the consolidated export."""
        mode = self.config.save_consolidated
        return mode is SaveConsolidatedMode.EVERY or (mode is SaveConsolidatedMode.FINAL and is_final)

    @property
    def sharing(self) -> Sharing:
        """Whether replicas read the same bytes once."""
        return Sharing(self.config.share_replica_reads, self.stage)

    @property
    def threads(self) -> int:
        """Threads for reading and writing on this rank."""
        return self._threads(0)

    @property
    def writing_threads(self) -> int:
        """Threads for writing on this rank: in asynchronous mode, as many as training leaves cores for."""
        return self._threads(torch.get_num_threads() if self.stager is not None else 0)

    def _threads(self, taken: int) -> int:
        if self.config.io_threads is not None:
            return self.config.io_threads
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or self.group.world_size
        return max(1, min(4, (os.cpu_count() or 1) // local - taken))
