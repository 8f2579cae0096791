"""Saving and loading one component at a time: a model, an optimizer, state for each rank, base models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from shardwise._version import __version__
from shardwise.addons import CheckpointAddon
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.arguments import check_same_settings, check_stateful, checked, warn_if_alone
from shardwise.checkpointing.calls import Turn, check_same_call, own_state, take_turn
from shardwise.checkpointing.inference import outside_inference_mode
from shardwise.checkpointing.loading import base_model
from shardwise.checkpointing.loading.foreign_optimizers import Changes
from shardwise.checkpointing.loading.models import OpenedModel, open_model
from shardwise.checkpointing.loading.restoring import overwriting
from shardwise.checkpointing.optimizers import Optimizers, OptimizerSave, Schedulers, load_optimizer
from shardwise.checkpointing.parallel_ranks import ParallelRanks, Place
from shardwise.checkpointing.run_state.extras import Stateful
from shardwise.checkpointing.run_state.ranks import load_rank_state, save_rank_state
from shardwise.checkpointing.saving.adapters import AdapterSave, OpenedAdapter, check_before_training, open_adapter
from shardwise.checkpointing.saving.hooks import leading_own, passed_addons
from shardwise.checkpointing.saving.models import ModelSave, default_addons
from shardwise.checkpointing.saving.standalone import Replacement
from shardwise.checkpointing.saving.torch_format import tensors_alone
from shardwise.checkpointing.session import Context
from shardwise.comm import ABSENT_SECONDS, Group
from shardwise.disk.storage import LocalStorage, Storage
from shardwise.engine.background import Background, waiting_for_copies
from shardwise.engine.device_streams import AcceleratorStreams, DeviceStreams
from shardwise.engine.jobs import SaveJob
from shardwise.engine.load import LoadOptions
from shardwise.engine.staging import Stager
from shardwise.errors import ConfigError
from shardwise.lifecycle import LOCAL, FileSystem
from shardwise.plan.collector import collector_paused
from shardwise.settings import SaveConsolidatedMode, Settings
from shardwise.stateful_wrappers import ModelState, OptimizerState

_LOG = logging.getLogger(__name__)

Model = nn.Module | Sequence[nn.Module]


class ComponentCheckpointer:
    """What `Checkpointer` does with the components of a checkpoint, for loops that publish on their own.

    Every method is called by all ranks of the group together, in the same order. A failure on one rank is raised on
    all of them as the same error. The arguments are documented there.
    """

    def __init__(
        self,
        config: Settings,
        dp_rank: int | None = None,
        tp_rank: int | None = None,
        pp_rank: int | None = None,
        moe_mesh: DeviceMesh | None = None,
        process_group: ProcessGroup | None = None,
        pp_group: ProcessGroup | None = None,
        *,
        addons: Sequence[CheckpointAddon] | None = None,
        storage: Storage | None = None,
        file_system: FileSystem | None = None,
        device_streams: DeviceStreams | None = None,
        absent_seconds: float = ABSENT_SECONDS,
    ) -> None:
        self.config = config
        self._ranks = ParallelRanks(dp_rank, tp_rank, pp_rank, pp_group)
        self.moe_mesh, self.pp_group = moe_mesh, pp_group
        self.addons = list(addons) if addons is not None else default_addons(config.is_peft)
        self._process_group = process_group
        if config.is_remote and (storage is None or file_system is None):
            raise ConfigError(
                "checkpoint_dir is a URL, which the mounted file systems cannot reach",
                path=config.checkpoint_dir,
                hint="Set checkpoint_dir to a local or mounted directory, or pass a storage and a file_system.",
            )
        if config.model_save_format == "torch_save" and config.consolidated_mode is SaveConsolidatedMode.EVERY:
            raise ConfigError(
                "save_consolidated is 'every', and model_save_format 'torch_save' writes no Hugging Face export",
                hint="Set model_save_format to 'safetensors' for an export with every save, or save_consolidated to "
                "'false' for DCP's files alone; `shardwise consolidate` makes an export of these later.",
            )
        self._device_streams = device_streams
        self._storage = storage or LocalStorage()
        self._fs = file_system or LOCAL
        # Resolved once: a training script may change its working directory, and its checkpoints stay together.
        self._root = Path(config.checkpoint_dir).absolute()
        self._staging_dir = None if config.staging_dir is None else Path(config.staging_dir).absolute()
        self._absent_seconds = absent_seconds
        self._made: Context | None = None
        self._background: Background | None = None
        # Whether a component of the run's last checkpoint was saved; whether the ranks have been asked to leave.
        self._ends = False
        self._leaves = False

    # --- components -------------------------------------------------------------------------------------------------

    @outside_inference_mode
    def save_model(
        self,
        model: Model,
        weights_path: str | Path,
        peft_config: object | None = None,
        tokenizer: SavesPretrained | None = None,
        is_final_checkpoint: bool = False,
    ) -> None:
        """Write ``weights_path/model``; an earlier one is replaced as a whole. All ranks call."""
        context = self._begin(call := f"save_model({weights_path})")
        if not self.config.enabled:
            return
        self._ends = self._ends or is_final_checkpoint
        given = {"is_final_checkpoint=True": is_final_checkpoint} | passed_addons(self.addons)
        turn = self._turn(call, lambda: self._looked(model, saves=True), given)
        if turn.skipped:
            return
        target = Replacement(context, Path(weights_path).absolute() / "model", {"shardwise": __version__})
        with turn.telling(f"{weights_path}/model", self.async_wait):
            try:
                save = self._model_save(model, target.temp, tokenizer, peft_config, is_final_checkpoint, target.reserve)
                steps = save.steps()
            except BaseException:
                target.abandon(context.group)
                raise
            commit = partial(target.commit, closing=save.closing)
            self._run(SaveJob(f"saving {target.place}", tuple(steps), commit, target.abandon))

    @outside_inference_mode
    def load_model(
        self,
        model: Model,
        model_path: str | Path,
        is_init_step: bool = False,
        use_checkpoint_id: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        allow_checkpoint_key_subset: bool = False,
    ) -> None:
        """Fill ``model`` in place. All ranks call.

        Args:
            model: The model, or this rank's pipeline stages, with memory (not on the meta device).
            model_path: A checkpoint's ``model`` directory, ``model/consolidated``, a DCP directory, any Hugging Face
                model directory, or a single safetensors file.
            is_init_step: Initialise from a base model: values are cast to the model's dtypes, quantized ones are
                dequantized (``dequantize_base_checkpoint``), tensors that the model lacks are left alone, adapters
                are too, and ``skip_task_head_prefixes_for_base_model`` applies. ``.bin`` files are read as well.
            use_checkpoint_id: Accepted for compatibility; the path is always opened by this library's own reader.
            key_mapping: Regular expression -> replacement, applied to the checkpoint's names; first match.
            allow_checkpoint_key_subset: Tensors that the checkpoint lacks keep their values.
        """
        self.async_wait()
        context = self._begin(call := f"load_model({model_path})")
        given = {"is_init_step=True": is_init_step, f"key_mapping={key_mapping}": bool(key_mapping)}
        check_same_call(call, lambda: self._looked(model, is_run=not is_init_step), given, context.group)
        path = Path(model_path).absolute()
        if is_init_step:
            parts = [model] if isinstance(model, nn.Module) else list(model)
            base_model.fill_from_base(
                context, parts, path, key_mapping=key_mapping, allow_missing=allow_checkpoint_key_subset
            )
            return
        opened = self._open_model(model, path, key_mapping, allow_checkpoint_key_subset)
        with overwriting("the model"):
            opened.fill()

    @outside_inference_mode
    def save_optimizer(
        self, optimizer: Optimizers, model: Model, weights_path: str | Path, scheduler: Schedulers | None = None
    ) -> None:
        """Write ``weights_path/optim``; an earlier one is replaced as a whole. All ranks call."""
        context = self._begin(call := f"save_optimizer({weights_path})")
        if not self.config.enabled:
            return
        turn = self._turn(call, lambda: self._looked(model, optimizer, scheduler, saves=True), {})
        if turn.skipped:
            return
        target = Replacement(context, Path(weights_path).absolute() / "optim", {"shardwise": __version__})
        with turn.telling(f"{weights_path}/optim", self.async_wait):
            try:
                with context.group.together(f"preparing {weights_path}/optim"):
                    if context.group.is_main:
                        target.reserve()
                steps = OptimizerSave(context, optimizer, model, scheduler, target.temp).steps()
            except BaseException:
                target.abandon(context.group)
                raise
            self._run(SaveJob(f"saving {target.place}", tuple(steps), target.commit, target.abandon))

    @outside_inference_mode
    def load_optimizer(
        self,
        optimizer: Optimizers,
        model: Model,
        weights_path: str | Path,
        scheduler: Schedulers | None = None,
        *,
        key_mapping: Mapping[str, str] | None = None,
        allow_new_parameters: bool = False,
    ) -> None:
        """Restore what `save_optimizer` wrote, in place; the optimizer may be fresh. All ranks call.

        Args:
            optimizer: The optimizer or optimizers: torch's, and containers and wrappers of such.
            model: The model, or this rank's pipeline stages.
            weights_path: The directory around ``optim``; or a DCP directory, or one around ``optim`` as DCP wrote it,
                with an optimizer's state in any of torch's layouts.
            scheduler: The scheduler or schedulers.
            key_mapping: Regular expression -> replacement, applied to the checkpoint's names of parameters; first
                match.
            allow_new_parameters: Parameters that the saved optimizer did not update, as of a layer that was unfrozen
                since, start without state; otherwise they are an error.
        """
        self.async_wait()
        context = self._begin(call := f"load_optimizer({weights_path})")
        given = {
            f"key_mapping={key_mapping}": bool(key_mapping),
            "allow_new_parameters=True": allow_new_parameters,
        }
        check_same_call(call, lambda: self._looked(model, optimizer, scheduler), given, context.group)
        changes = Changes(key_mapping, allow_new_parameters)
        load_optimizer(context, optimizer, model, scheduler, Path(weights_path).absolute() / "optim", changes)

    @outside_inference_mode
    def save_on_dp_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Write one file for each data-parallel rank, ``path/state_name/``, by its TP 0, PP 0 peer. All ranks call.

        Raises:
            MisuseError: Which data-parallel rank this is was neither given nor can be derived.
        """
        context = self._of_ranks(f"save_on_dp_ranks({state_name})", state)
        places = self._ranks.everyones(context.group)
        own = places[context.group.rank]
        # Ranks that share a sequence (context parallelism) are at the same place: one of them writes.
        writes = places.index(Place(own.dp, 0, 0)) == context.group.rank if (own.tp, own.pp) == (0, 0) else False
        save_rank_state(context, state, state_name, Path(path).absolute(), f"dp_rank_{own.dp}", writes)

    @outside_inference_mode
    def load_on_dp_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Read what `save_on_dp_ranks` wrote for this data-parallel rank. All ranks call.

        Raises:
            MisuseError: As in `save_on_dp_ranks`.
            CheckpointNotFoundError: Nothing was saved for it.
        """
        context = self._of_ranks(f"load_on_dp_ranks({state_name})", state)
        own = self._ranks.everyones(context.group)[context.group.rank]
        load_rank_state(context, state, state_name, Path(path).absolute(), f"dp_rank_{own.dp}")

    @outside_inference_mode
    def save_on_global_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Write one file for each process, ``path/state_name/``. All ranks call."""
        context = self._of_ranks(f"save_on_global_ranks({state_name})", state)
        rank = f"rank_{context.group.global_rank}"
        save_rank_state(context, state, state_name, Path(path).absolute(), rank, True)

    @outside_inference_mode
    def load_on_global_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Read what `save_on_global_ranks` wrote for this process. All ranks call."""
        context = self._of_ranks(f"load_on_global_ranks({state_name})", state)
        rank = f"rank_{context.group.global_rank}"
        load_rank_state(context, state, state_name, Path(path).absolute(), rank)

    # --- base models ------------------------------------------------------------------------------------------------

    @staticmethod
    @outside_inference_mode
    def initialize_model_weights(
        model: nn.Module, device: torch.device | str, peft_init_method: str | None = None
    ) -> None:
        """Give a meta-device model memory on ``device`` and fresh weights by its own code. All ranks call."""
        base_model.initialize_model_weights(model, torch.device(device), peft_init_method)

    @outside_inference_mode
    def load_base_model(
        self,
        model: Model,
        device: torch.device | str,
        root_dir: str | Path | None,
        model_name: str | None,
        load_base_model: bool = True,
    ) -> None:
        """Materialise ``model`` on ``device`` and load a base model into it, each rank its own slices. All ranks call.

        The model keeps its dtypes; `shardwise.base_dtype` tells the base's.

        Args:
            model: The model, or this rank's pipeline stages, usually on the meta device and already sharded.
            device: Where it is to be.
            root_dir: The hub cache, or a directory that base models lie in; ``None`` for the hub's own cache.
            model_name: A hub id (``org/name`` or ``org/name@revision``), a directory, or a file.
            load_base_model: Whether to load; otherwise the model is only initialised.

        Raises:
            CheckpointNotFoundError: The base is not there.
            TensorError: Model and base do not fit.
            QuantizationError: The base is quantized in a way that cannot be undone.
            AdapterError: With ``is_peft``, the model has an adapter that no save could write.
        """
        context = self._begin(call := f"load_base_model({model_name})")
        self.async_wait()
        given = {"load_base_model=True": load_base_model}
        check_same_call(call, lambda: self._looked(model, is_run=False), given, context.group)
        base_model.load_base_model(context, model, torch.device(device), root_dir, model_name, load_base_model)
        if self.config.is_peft and self.config.enabled:
            check_before_training(context, model, is_adapted=False)
        self._allocate_staging(model)

    # --- background -------------------------------------------------------------------------------------------------

    @outside_inference_mode
    def allocate_staging(self, model: Model, optimizer: Optimizers | None = None) -> None:
        """Make the staging memory of asynchronous saves ahead of the first one. All ranks call.

        `restore` and `load_base_model` call it. An optimizer that has not taken a step has no state to
        make room for yet: call this after the first step to keep the first save as short as the later ones.
        """
        self.async_wait()  # a save that still writes reads that very memory
        context = self._begin(call := "allocate_staging()")
        check_same_call(call, lambda: self._looked(model, optimizer), {}, context.group)
        self._allocate_staging(model, optimizer)

    def _allocate_staging(self, model: Model, optimizer: Optimizers | None = None) -> None:
        """As `allocate_staging`, within another call."""
        context = self._context
        stager = context.stager
        if stager is None or self.config.is_peft:
            return
        with context.group.together("making room for asynchronous saves"):
            if self.config.model_save_format == "torch_save":
                stager.allocate_tensors("model", tensors_alone(ModelState(model).state_dict()))
                if optimizer is not None:
                    stager.allocate_tensors("optim", OptimizerState(optimizer, model).state_dict())
                return
            captured = context.names.capture(ModelState(model), load=True)
            stager.allocate("model", [*captured.held, *captured.hidden])
            if optimizer is not None:
                stager.allocate("optim", OptimizerState(optimizer, model).held())

    def maybe_wait_for_staging(self) -> None:
        """Return when the model's and the optimizer's memory may be overwritten by anybody, on any stream.

        A loop need not call it. On the CPU the state is copied before a save returns. On an accelerator, what this
        thread queues on a device's current stream after a save runs behind the copies, and so does any optimizer's
        ``step()`` on any stream. Call it before the state is changed in another way: by kernels or a captured graph on
        a stream that was not the current one, by another process that shares the memory, or by freeing memory that
        torch does not manage.
        """
        if self._background is not None:
            self._background.wait_for_staging()

    @outside_inference_mode
    def async_wait(self) -> None:
        """Return when the last asynchronous save is durable and published; raises what failed in it. All ranks call."""
        if self._background is not None:
            self._background.wait()

    @outside_inference_mode
    def finalize(self) -> None:
        """Wait for what is pending and release groups, threads and buffers. All ranks call; safe to call twice."""
        try:
            self.async_wait()
        finally:
            if self._background is not None:
                self._background.close()
                self._background = None
            if self._made is not None:
                if self._made.stager is not None:
                    self._made.stager.clear()
                self._made.group.close()
                self._made = None

    close = finalize

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what is pending and release everything, also after an error.

        A save in the background needs no other rank's training loop, so that it is finished even where this rank alone
        has failed. Should it fail, that is raised, or after an error logged and noted with it.
        """
        if error is None or isinstance(error, SystemExit):
            self.finalize()
            return
        try:
            self.finalize()
        except Exception as lost:  # noqa: BLE001 - the error that is on its way goes first, with a note of this one
            _LOG.error("a save that was pending when %s was raised has failed: %s", type(error).__name__, lost)
            error.add_note(f"A save that was still being written has failed too: {lost}")

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def _context(self) -> Context:
        return self._begin("a call of the checkpointer")

    def _begin(self, call: str) -> Context:
        """What every part needs, made at the first call. All ranks call.

        Args:
            call: The call, for a warning should some rank not come.
        """
        if self._made is None:
            group = self._meet(call)
            try:
                met = check_same_settings(self.config, self._root, group)
                warn_if_alone(group)
                made = Context(
                    self.config,
                    group,
                    self._storage,
                    self._fs,
                    self._ranks,
                    self._root,
                    met,
                    self._staging_dir,
                    self.pp_group,
                )
                if self.config.is_async:
                    self._background = Background(self._meet(call), self._device_streams)
                    made.stager = self._background.stager
                elif self.config.cpu_offload:
                    made.stager = Stager(self._device_streams)
            except BaseException:
                group.close()
                raise
            self._made = made
        return self._made

    def _meet(self, call: str) -> Group:
        return Group.dedicated(
            self._process_group, self.config.collective_timeout_seconds, call, absent_seconds=self._absent_seconds
        )

    def _of_ranks(self, call: str, state: Stateful) -> Context:
        """Begin a call that saves or loads a state of every rank's own."""
        context = self._begin(call)

        def look() -> str:
            check_stateful(state)
            return "a state"

        check_same_call(call, look, {}, context.group)
        return context

    def _looked(
        self,
        model: Model,
        optimizer: object = None,
        scheduler: object = None,
        name: str = "model",
        *,
        saves: bool = False,
        is_run: bool = True,
    ) -> str:
        """As `checked`; then the model's memory is ready for other threads. Local.

        Args:
            model: As in `checked`.
            optimizer: Likewise.
            scheduler: Likewise.
            name: Likewise.
            saves: Whether the model is to be saved: copying aside is ordered by itself, and nobody waits for it.
            is_run: Whether it is the model of this run, whose meshes say which ranks these are; a base model's do not.

        Raises:
            MisuseError: A parallel rank was given that contradicts the model's meshes.
        """
        checked(model, optimizer, scheduler)
        if is_run:
            self._ranks.look([model] if isinstance(model, nn.Module) else model)
        if not (saves and self.config.is_async):
            self._settle(model)
        return name

    def _settle(self, model: Model) -> None:
        """Wait for what this thread has queued on the model's devices, where other threads read or fill its memory.

        What those threads queue goes to streams of their own.
        """
        if self._device_streams is None and not torch.accelerator.is_available():
            return
        streams = self._device_streams or AcceleratorStreams()
        parts = [model] if isinstance(model, nn.Module) else model
        tensors = chain.from_iterable(chain(part.parameters(), part.buffers()) for part in parts)
        for device in {tensor.device for tensor in tensors}:
            if streams.has_streams(device):
                streams.settle(device)

    def _model_save(
        self,
        model: Model,
        directory: Path,
        tokenizer: SavesPretrained | None,
        peft_config: object | None,
        is_final: bool,
        reserve: Callable[[], None],
        optimizer: Optimizers | None = None,
        context: Context | None = None,
    ) -> ModelSave | AdapterSave:
        kind = partial(AdapterSave, optimizer=optimizer) if self.config.is_peft else ModelSave
        # A hook of others' is for the model: it may write to one place.
        addons = self.addons if context is None or self.config.is_peft else self.addons[: leading_own(self.addons)]
        return kind(
            context or self._context,
            model,
            directory,
            addons,
            tokenizer=tokenizer,
            peft_config=peft_config,
            is_final=is_final,
            reserve=reserve,
        )

    def _open_model(
        self,
        model: Model,
        path: Path,
        key_mapping: Mapping[str, str] | None = None,
        allow_missing: bool = False,
        context: Context | None = None,
    ) -> OpenedModel | OpenedAdapter:
        """Compare a model, or its adapters, with a checkpoint's. All ranks call; nothing is changed."""
        context = context or self._context
        if self.config.is_peft:
            return open_adapter(context, model, path, key_mapping=key_mapping, allow_missing=allow_missing)
        options = LoadOptions(allow_missing, threads=context.threads, sharing=context.sharing)
        return open_model(context, model, path, key_mapping=key_mapping, options=options)

    def _turn(self, call: str, look: Callable[[], str], given: Mapping[str, bool]) -> Turn:
        """Begin a save: the ranks ask for the same, and an earlier asynchronous save is over, or this one is skipped.

        Neither the run's last checkpoint is ever skipped, nor one for which the ranks were asked to leave: no other
        save comes after it.
        """
        waits = not self.config.skip_save_while_busy or self._ends or self._leaves
        told = check_same_call(call, look, given, self._context.group, own_state(self._background, waits))
        turn = Turn()
        try:
            turn = take_turn(told)
        finally:
            if self._background is not None and not turn.skipped:
                self._background.told()
        if turn.skipped:
            _LOG.info("skipped a save: the last one is still being written")
        return turn

    def _run(self, job: SaveJob) -> None:
        stager = self._context.stager
        if stager is not None:
            job = replace(job, steps=(waiting_for_copies(stager), *job.steps))
        if self._background is None:
            # Training waits, so nobody else leaves garbage meanwhile. One pass of the collector over a process that has
            # torch and transformers loaded takes as long as saving half a gigabyte does.
            with collector_paused():
                job.run(self._context.group)
            return
        self._background.submit(job)
        if self.config.wait_for_staging:
            self._background.wait_for_staging()
