"""Saving and loading one component at a time: a model, an optimizer, state for each rank, base models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
from shardwise.checkpointing import basemodel
from shardwise.checkpointing.adapters import AdapterSave, OpenedAdapter, check_before_training, open_adapter
from shardwise.checkpointing.arguments import (
    check_same_call,
    check_same_settings,
    checked,
    warn_if_alone,
)
from shardwise.checkpointing.context import Context
from shardwise.checkpointing.extras import Stateful
from shardwise.checkpointing.hooks import passed_addons
from shardwise.checkpointing.inference import outside_inference_mode
from shardwise.checkpointing.model_loading import OpenedModel, open_model
from shardwise.checkpointing.models import ModelSave, default_addons
from shardwise.checkpointing.optimizers import Optimizers, OptimizerSave, Schedulers, load_optimizer
from shardwise.checkpointing.ranks import load_rank_state, save_rank_state
from shardwise.checkpointing.restoring import overwriting
from shardwise.checkpointing.standalone import Replacement
from shardwise.checkpointing.torch_format import tensors_alone
from shardwise.comm import Group
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
from shardwise.engine.background import Background
from shardwise.engine.device_streams import AcceleratorStreams, DeviceStreams
from shardwise.engine.jobs import SaveJob
from shardwise.engine.load import LoadOptions
from shardwise.errors import ConfigError
from shardwise.io.storage import LocalStorage, Storage
from shardwise.lifecycle import LOCAL, FileSystem
from shardwise.plan.collector import collector_paused
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
        config: CheckpointingConfig,
        dp_rank: int,
        tp_rank: int,
        pp_rank: int,
        moe_mesh: DeviceMesh | None = None,
        process_group: ProcessGroup | None = None,
        pp_group: ProcessGroup | None = None,
        *,
        addons: Sequence[CheckpointAddon] | None = None,
        storage: Storage | None = None,
        file_system: FileSystem | None = None,
        device_streams: DeviceStreams | None = None,
    ) -> None:
        self.config = config
        self.dp_rank, self.tp_rank, self.pp_rank = dp_rank, tp_rank, pp_rank
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
        self._made: Context | None = None
        self._background: Background | None = None

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
        context = self._context
        if not self.config.enabled or self._skip():
            return
        given = {"is_final_checkpoint=True": is_final_checkpoint} | passed_addons(self.addons)
        check_same_call(lambda: self._looked(model, saves=True), given, context.group)
        target = Replacement(context, Path(weights_path).absolute() / "model", {"shardwise": __version__})
        try:
            save = self._model_save(model, target.temp, tokenizer, peft_config, is_final_checkpoint, target.reserve)
            steps = save.steps()
        except BaseException:
            target.abandon(context.group)
            raise
        commit = partial(target.commit, closing=save.closing)
        self._run(SaveJob(f"saving {weights_path}/model", tuple(steps), commit, target.abandon))

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
        context = self._context
        given = {"is_init_step=True": is_init_step, f"key_mapping={key_mapping}": bool(key_mapping)}
        check_same_call(lambda: self._looked(model), given, context.group)
        path = Path(model_path).absolute()
        if is_init_step:
            parts = [model] if isinstance(model, nn.Module) else list(model)
            basemodel.fill_from_base(
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
        context = self._context
        if not self.config.enabled or self._skip():
            return
        with context.group.together("looking at what is to be saved"):
            self._looked(model, optimizer, scheduler, saves=True)
        target = Replacement(context, Path(weights_path).absolute() / "optim", {"shardwise": __version__})
        with context.group.together(f"preparing {weights_path}/optim"):
            if context.group.is_main:
                target.reserve()
        try:
            steps = OptimizerSave(context, optimizer, model, scheduler, target.temp).steps()
        except BaseException:
            target.abandon(context.group)
            raise
        self._run(SaveJob(f"saving {weights_path}/optim", tuple(steps), target.commit, target.abandon))

    @outside_inference_mode
    def load_optimizer(
        self, optimizer: Optimizers, model: Model, weights_path: str | Path, scheduler: Schedulers | None = None
    ) -> None:
        """Restore what `save_optimizer` wrote, in place; the optimizer may be fresh. All ranks call."""
        self.async_wait()
        with self._context.group.together("looking at what is to be loaded"):
            self._looked(model, optimizer, scheduler)
        load_optimizer(self._context, optimizer, model, scheduler, Path(weights_path).absolute() / "optim")

    @outside_inference_mode
    def save_on_dp_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Write one file for each data-parallel rank, ``path/state_name/``, by its TP 0, PP 0 peer. All ranks call."""
        writes = self.tp_rank == 0 and self.pp_rank == 0
        save_rank_state(self._context, state, state_name, Path(path).absolute(), f"dp_rank_{self.dp_rank}", writes)

    @outside_inference_mode
    def load_on_dp_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Read what `save_on_dp_ranks` wrote for this data-parallel rank. All ranks call."""
        load_rank_state(self._context, state, state_name, Path(path).absolute(), f"dp_rank_{self.dp_rank}")

    @outside_inference_mode
    def save_on_global_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Write one file for each process, ``path/state_name/``. All ranks call."""
        rank = f"rank_{self._context.group.global_rank}"
        save_rank_state(self._context, state, state_name, Path(path).absolute(), rank, True)

    @outside_inference_mode
    def load_on_global_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Read what `save_on_global_ranks` wrote for this process. All ranks call."""
        rank = f"rank_{self._context.group.global_rank}"
        load_rank_state(self._context, state, state_name, Path(path).absolute(), rank)

    # --- base models ------------------------------------------------------------------------------------------------

    @staticmethod
    @outside_inference_mode
    def initialize_model_weights(
        model: nn.Module, device: torch.device | str, peft_init_method: str | None = None
    ) -> None:
        """Give a meta-device model memory on ``device`` and fresh weights by its own code. All ranks call."""
        basemodel.initialize_model_weights(model, torch.device(device), peft_init_method)

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

        The model keeps its dtypes; `shardwise.checkpointing.base_files.base_dtype` tells the base's.

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
        context = self._context
        self.async_wait()
        check_same_call(lambda: self._looked(model), {"load_base_model=True": load_base_model}, context.group)
        basemodel.load_base_model(context, model, torch.device(device), root_dir, model_name, load_base_model)
        if self.config.is_peft and self.config.enabled:
            check_before_training(context, model, is_adapted=False)
        self.allocate_staging(model)

    # --- background -------------------------------------------------------------------------------------------------

    @outside_inference_mode
    def allocate_staging(self, model: Model, optimizer: Optimizers | None = None) -> None:
        """Make the staging memory of asynchronous saves ahead of the first one. All ranks call.

        `restore` and `load_base_model` call it. An optimizer that has not taken a step has no state to
        make room for yet: call this after the first step to keep the first save as short as the later ones.
        """
        context = self._context
        stager = context.stager
        if stager is None or self.config.is_peft:
            return
        self.async_wait()  # a save that still writes reads that very memory
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
                self._made.group.close()
                self._made = None

    close = finalize

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finalize()

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def _context(self) -> Context:
        if self._made is None:
            seconds = self.config.collective_timeout_seconds
            group = Group.dedicated(self._process_group, seconds)
            try:
                names_base = check_same_settings(self.config, group)
                warn_if_alone(group)
                made = Context(self.config, group, self._storage, self._fs, self.pp_rank, names_base=names_base)
                if self.config.is_async:
                    self._background = Background(Group.dedicated(self._process_group, seconds), self._device_streams)
                    made.stager = self._background.stager
            except BaseException:
                group.close()
                raise
            self._made = made
        return self._made

    def _looked(
        self,
        model: Model,
        optimizer: object = None,
        scheduler: object = None,
        name: str = "model",
        *,
        saves: bool = False,
    ) -> str:
        """As `checked`; then the model's memory is ready for other threads. Local.

        Args:
            model: As in `checked`.
            optimizer: Likewise.
            scheduler: Likewise.
            name: Likewise.
            saves: Whether the model is to be saved: copying aside is ordered by itself, and nobody waits for it.
        """
        checked(model, optimizer, scheduler)
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
    ) -> ModelSave | AdapterSave:
        kind = partial(AdapterSave, optimizer=optimizer) if self.config.is_peft else ModelSave
        return kind(
            self._context,
            model,
            directory,
            self.addons,
            tokenizer=tokenizer,
            peft_config=peft_config,
            is_final=is_final,
            reserve=reserve,
        )

    def _open_model(
        self, model: Model, path: Path, key_mapping: Mapping[str, str] | None = None, allow_missing: bool = False
    ) -> OpenedModel | OpenedAdapter:
        """Compare a model, or its adapters, with a checkpoint's. All ranks call; nothing is changed."""
        context = self._context
        if self.config.is_peft:
            return open_adapter(context, model, path, key_mapping=key_mapping, allow_missing=allow_missing)
        options = LoadOptions(allow_missing, threads=context.threads, sharing=context.sharing)
        return open_model(context, model, path, key_mapping=key_mapping, options=options)

    def _skip(self) -> bool:
        """Settle an earlier asynchronous save, or find that it is still running and the policy says to skip."""
        if self._background is None:
            return False
        if self.config.skip_save_while_busy and self._context.group.any(self._background.busy, "asking for a save"):
            _LOG.info("skipped a save: the last one is still being written")
            return True
        self._background.wait()
        return False

    def _run(self, job: SaveJob) -> None:
        if self._background is None:
            # Training waits, so nobody else leaves garbage meanwhile. One pass of the collector over a process that has
            # torch and transformers loaded takes as long as saving half a gigabyte does.
            with collector_paused():
                job.run(self._context.group)
            return
        self._background.submit(job)
        if self.config.wait_for_staging:
            self._background.wait_for_staging()
