"""The session: settings, ranks and storage that every save and load uses, and results kept for later calls."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from shardwise.base.files import BaseModel, find_base_path, open_base
from shardwise.checkpointing.arguments import FirstExchange
from shardwise.checkpointing.hub import HubNames, HubState, Recast
from shardwise.checkpointing.parallel_ranks import ParallelRanks
from shardwise.checkpointing.saving.checks import ClassCheck
from shardwise.comm import Group
from shardwise.disk.storage import IsLocal, Storage
from shardwise.engine.agreement import Agreement
from shardwise.engine.export import ExportPlan
from shardwise.engine.load import LoadOptions
from shardwise.engine.memo import Memo
from shardwise.engine.shards import ShardPlan
from shardwise.engine.staging import Stager
from shardwise.plan.fragments import HeldTensor
from shardwise.settings import Settings
from shardwise.stateful_wrappers.replicas import MayDiffer

_LOG = logging.getLogger(__name__)


@dataclass
class Session:
    """Settings, ranks and storage of one checkpointer.

    Attributes:
        root: The absolute directory of checkpoints and pointers.
        staging_dir: The absolute directory where files are built before they are copied into place.
        stager: Where captured state is copied aside, in asynchronous mode and with ``cpu_offload``.
        recast: The model's tensors in the dtypes they are written in; reused while the model's tensors are the same.
        is_quantized: Whether the last captured model has quantized parameters; found together with its adapters.
        class_check: Checks that the model's class can load an export; each kind of export is checked once.
        logged: What is logged once per run and was logged already; see `log_once`.
        warned: Checkpoints whose per-rank tensors a warning has named.
        model_plan: The last export's plan; ``shard_plans`` has that of each component's shards.
        checked_state: The last captured state that passed the checks.
        prefix: Put before the names of staging memory where a checkpoint has more than one model.
    """

    config: Settings
    group: Group
    storage: Storage
    ranks: ParallelRanks
    root: Path
    first_exchange: FirstExchange
    staging_dir: Path | None = None
    pp_group: dist.ProcessGroup | None = None
    names: HubNames = field(init=False)
    stager: Stager | None = None
    checked_state: HubState | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        self.may_differ = MayDiffer(self.config.replicas == "first", tuple(self.config.per_rank_state or ()))
        self.names = HubNames(self.may_differ)
        self._agreements: dict[str, Agreement] = {}
        self._found_path: Memo[str | None] = Memo()
        self._opened_base: Memo[BaseModel | None] = Memo()
        self.recast: Memo[Recast] = Memo()
        self.is_quantized: Memo[bool] = Memo()
        self.class_check = ClassCheck()
        self.logged: set[str] = set()
        self.model_plan: Memo[ExportPlan] = Memo()
        self.shard_plans: dict[str, Memo[ShardPlan]] = {}
        self.warned: set[Path] = set()
        self._of_models: dict[str, Session] = {}

    @property
    def is_remote(self) -> bool:
        """Whether checkpoints are on no disk of this machine: there are no locks, and no two directories to compare."""
        return self.config.is_remote or not isinstance(self.storage, IsLocal)

    @property
    def stage(self) -> int:
        """Pipeline stage."""
        return self.ranks.stage

    def agreement(self, component: str) -> Agreement:
        """The ranks' agreement about a component."""
        # Made late: the stage is known only after a model was inspected, and ranks agree on nothing before that.
        return self._agreements.setdefault(component, Agreement(self.group, self.stage))

    def of_model(self, name: str, config: Settings | None = None) -> Session:
        """The session of another model in the same checkpoint, which may have settings of its own. Local."""
        known = self._of_models.get(name)
        if known is None:
            met = self.first_exchange if config is None else replace(self.first_exchange, names_base=False)
            prefix = f"{self.prefix}{name}/"
            known = replace(self, config=config or self.config, first_exchange=met, prefix=prefix, checked_state=None)
            self._of_models[name] = known
        return known

    def staged(self, component: str, held: Sequence[HeldTensor]) -> list[HeldTensor]:
        """The tensors to write: staged copies where the settings ask for staging, else the tensors themselves."""
        return list(held) if self.stager is None else self.stager.stage(self.prefix + component, held)

    def base_path(self) -> str | None:
        """The base model's local path, searched for once; an error if one is named and not there. All ranks call."""

        # Not a cached property: the lock of these (Python 3.11) is one for all sessions, and ranks would meet inside.
        def find() -> str | None:
            return self.group.attempt(lambda: find_base_path(self.config), "looking for the base model")

        return self._found_path.get((), None, find) if self.first_exchange.names_base else None

    def base_name(self) -> str | None:
        """The base model as an adapter's configuration names it: local path, or the settings' name. All ranks call."""
        return self.base_path() or self.config.model_repo_id

    def base(self) -> BaseModel | None:
        """The base model's headers, read once. All ranks call."""

        def open_it() -> BaseModel | None:
            path = self.base_path()
            directory = None if path is None else os.path.abspath(path)
            return open_base(directory, self.group, self.config.allow_legacy_pickle_restore)

        return self._opened_base.get((), None, open_it) if self.first_exchange.names_base else None

    def log_once(self, level: int, text: str, key: str = "") -> None:
        """Log a message once per run, or one of those with a key. Local."""
        if (key or text) not in self.logged:
            self.logged.add(key or text)
            _LOG.log(level, "%s", text)

    @property
    def may_export(self) -> bool:
        """Whether some save of this run writes an export."""
        return self.config.exports(is_final_checkpoint=True)

    @property
    def load_options(self) -> LoadOptions:
        """A load's threads, and whether replicas read the same bytes once; no difference is allowed."""
        return LoadOptions(threads=self.threads, sharing=self.config.share_replica_reads, stage=self.stage)

    @property
    def threads(self) -> int:
        """Threads for reading and writing on this rank."""
        return self._threads(0)

    @property
    def writing_threads(self) -> int:
        """Threads for writing on this rank: in asynchronous mode, as many as training leaves cores for."""
        return self._threads(torch.get_num_threads() if self.config.is_async else 0)

    def _threads(self, taken: int) -> int:
        if self.config.io_threads is not None:
            return self.config.io_threads
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or self.group.world_size
        return max(1, min(4, (os.cpu_count() or 1) // local - taken))
