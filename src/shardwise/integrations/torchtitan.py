"""torchtitan's checkpointer component, with checkpoints by shardwise.

    Trainer.Config(..., checkpoint=ShardwiseCheckpointManager.Config(enable=True, interval=500))

It stands where torchtitan's ``CheckpointManager`` does and takes the same settings. What is written, and how, is
`shardwise.Checkpointer`'s: one checkpoint of everything, in ``dump_folder/folder``.

Of an export torchtitan's adapter says the names, and ``config.json`` comes from ``hf_assets_path``. Checkpoints have
the q, k and v of fused attention projections apart, as torchtitan's own have. ``FusedQKVLinear`` divides its one tensor
by hooks, which gather it whole on every rank where it is sharded. Here the hooks are taken off, and each rank writes
the rows that it holds: dividing only rearranges rows, so that it is a view.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, cast

import torch
import tyro
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components import checkpointer as titan
from torchtitan.components.checkpointer import DATALOADER, LR_SCHEDULER, OPTIMIZER
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.models.common.attention import FusedQKVLinear

from shardwise.addons.base import SavesPretrained
from shardwise.addons.files import copy_file, write_json
from shardwise.addons.hf_config import CONFIG, GENERATION_CONFIG
from shardwise.addons.huggingface import write_tokenizer
from shardwise.checkpointing.saving.checks import check_described
from shardwise.comm import Group, JsonValue
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
from shardwise.dtypes import dtype_code
from shardwise.errors import ConfigError, ExportMismatchError, MisuseError
from shardwise.format.json_file import read_json_object
from shardwise.geometry import TensorSpec
from shardwise.integrations.hosts import refuse_derived
from shardwise.lifecycle import LATEST, resolve
from shardwise.sources.state_files import pack_state, unpack_state
from shardwise.stateful_wrappers.wrapping import plain_name
from shardwise.upstream.torch_modules import take_off_hooks

if TYPE_CHECKING:
    from torch import nn

    from shardwise.checkpointing import Checkpointer
    from shardwise.checkpointing.loading.restoring import Stateful

__all__ = ["ShardwiseCheckpointManager"]

_State = dict[str, object]
#: Settings that follow from torchtitan's, and from which.
_DERIVED = {
    "checkpoint_dir": "dump_folder and checkpoint.folder",
    "enabled": "checkpoint.enable",
    "is_async": "checkpoint.async_mode",
    "max_recent_checkpoints": "checkpoint.keep_latest_k",
}
_TITANS_OWN = re.compile(r"step-\d+")
_Tensors = dict[str, torch.Tensor]
#: One attention's projections in one tensor, and apart.
_FUSED, _APART = "wqkv", ("wq", "wk", "wv")
#: torchtitan's names of RoPE's scalings -> those of Hugging Face.
_ROPES = {"none": "default", "llama": "llama3", "yarn": "yarn"}
#: Numbers of Llama's scaling that have the same names in config.json, beside ``factor``.
_LLAMA_ROPE = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class ShardwiseCheckpointManager(titan.BaseCheckpointManager):  # type: ignore[misc] # torchtitan is not followed by mypy
    """A checkpointer of torchtitan's that saves and restores with shardwise. All ranks make the same calls.

    torchtitan builds it from its `Config`, with what its own is built with, and calls ``load``, ``save``,
    ``maybe_wait_for_staging``, ``maybe_wait_for_saving`` and ``close``. A checkpoint is ``epoch_0_step_S``, visible
    once it is complete: model, optimizers, schedulers, torchtitan's own state (``train_state``), the loader's position,
    random number generators. It resumes on other meshes; the position in the data needs as many data-parallel ranks.

    Raises:
        ConfigError: The settings ask for what cannot be done; the message names it.
        ExportMismatchError: With ``last_save_in_hf`` or exports with every save, ``config.json`` in
            ``hf_assets_path`` describes another model than is trained.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.CheckpointManager.Config):  # type: ignore[misc]
        """Settings: those of torchtitan's ``CheckpointManager``, and shardwise's.

        Attributes:
            checkpointing: The settings beside those that follow from torchtitan's. By default the model is exported
                with the last checkpoint where ``last_save_in_hf`` says so, and never otherwise.
        """

        checkpointing: Annotated[CheckpointingConfig | None, tyro.conf.Suppress] = None

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Stateful | None,
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[object],
        lr_schedulers: Sequence[object],
        states: dict[str, Stateful],
        sd_adapter: object | None,
        base_folder: str = "",
    ) -> None:
        self.enable = config.enable
        self.save_future: Future[None] | None = None
        if not self.enable:
            return
        self._config = config
        self._parts = list(model_parts)
        fused = _take_over(self._parts)
        self._optimizers = list(optimizers)
        self._schedulers = list(lr_schedulers)
        self._states = _by_data_rank(dataloader, states)
        settings = _settings(config, Path(base_folder) / config.folder)
        known = [OPTIMIZER, LR_SCHEDULER, *self._states]
        for name in config.exclude_from_loading:
            if name not in known:
                raise ConfigError(
                    f"exclude_from_loading has {name!r}, and the run has {', '.join(known)}",
                    hint="Correct the name, or leave it out.",
                )
        if settings.consolidated_mode is not SaveConsolidatedMode.FALSE:
            dtype = config.export_dtype if config.last_save_model_only else None
            _attach_export(self._parts, sd_adapter, fused, dtype)
        elif config.initial_load_in_hf:
            _hub_adapter(self._parts, sd_adapter, fused)
        elif fused.known:
            _divide(self._parts, fused)
        self._assets = getattr(sd_adapter, "hf_assets_path", None)
        self._checkpointer: Checkpointer = settings.build()
        self._root = Path(settings.checkpoint_dir).absolute()

    # --- what torchtitan's base class calls ---------------------------------------------------------------------------

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        config = self._config
        is_due = curr_step % config.interval == 0 or (curr_step == 1 and config.enable_first_step_checkpoint)
        if config.load_only or not (last_step or is_due):
            return False
        whole = not (last_step and config.last_save_model_only)
        group = Group.current()
        extra = {name: each.gathered(name, group) for name, each in self._states.items()} if whole else None
        saved = self._checkpointer.save(
            epoch=0,
            step=curr_step,
            model=self._parts,
            optimizer=self._optimizers if whole else None,  # type: ignore[arg-type]
            scheduler=self._schedulers if whole else None,  # type: ignore[arg-type]
            extra_state=extra,
            is_final_checkpoint=last_step,
        )
        if self._checkpointer.config.is_async:
            self.save_future = Future()
        return saved is not None

    def _load(self, step: int = -1) -> bool:
        config = self._config
        found = Group.current().broadcast_result(lambda: _find(self._root, step), "finding checkpoints")
        if found is not None:
            path, resumed_step = cast("tuple[str, int | None]", found)
            self._restore(Path(path), model_only=resumed_step == 0)
            return True
        if config.initial_load_path is None and not config.initial_load_in_hf:
            return False
        source = config.initial_load_path or self._assets
        if source is None:
            raise ConfigError(
                "initial_load_in_hf is set, and there is neither initial_load_path nor hf_assets_path",
                hint="Set one of them to the directory of the Hugging Face model.",
            )
        self._restore(Path(source), model_only=config.initial_load_model_only)
        return True

    def _maybe_wait_for_staging(self) -> None:
        self._checkpointer.maybe_wait_for_staging()

    def _wait_for_saving(self) -> None:
        self.save_future = None
        self._checkpointer.async_wait()

    def _close(self) -> None:
        self._checkpointer.close()

    # --- parts --------------------------------------------------------------------------------------------------------

    def _restore(self, path: Path, model_only: bool) -> None:
        if model_only:
            inside = path / "model"
            self._checkpointer.load_model(self._parts, inside if inside.is_dir() else path, is_init_step=True)
            return
        left = self._config.exclude_from_loading
        self._checkpointer.restore(
            self._parts,
            None if OPTIMIZER in left else self._optimizers,  # type: ignore[arg-type]
            None if LR_SCHEDULER in left else self._schedulers,  # type: ignore[arg-type]
            restore_from=path,
            extra_state={name: each for name, each in self._states.items() if name not in left},
        )


def _settings(config: ShardwiseCheckpointManager.Config, folder: Path) -> CheckpointingConfig:
    """The checkpointer's settings; `ConfigError` where they contradict torchtitan's, or are not supported."""
    given = config.checkpointing or CheckpointingConfig(save_consolidated=SaveConsolidatedMode.FALSE)
    refuse_derived(given, _DERIVED, "ShardwiseCheckpointManager")
    if config.initial_load_in_hf_quantized:
        raise ConfigError(
            "ShardwiseCheckpointManager does not support initial_load_in_hf_quantized",
            hint="Dequantize the model with transformers first, and load what it saves.",
        )
    mode = given.consolidated_mode
    if config.last_save_in_hf and mode is SaveConsolidatedMode.FALSE:
        mode = SaveConsolidatedMode.FINAL
    return replace(
        given,
        checkpoint_dir=folder,
        is_async=config.async_mode != "disabled",
        max_recent_checkpoints=config.keep_latest_k or None,
        save_consolidated=mode,
    )


def _find(root: Path, step: int) -> JsonValue:
    """The checkpoint to resume from, and its step; ``None`` where there is none. One rank calls.

    None of this step is a `CheckpointNotFoundError`, a directory with torchtitan's own a `MisuseError`.
    """
    theirs = sorted(path.name for path in root.iterdir() if _TITANS_OWN.fullmatch(path.name)) if root.is_dir() else []
    if theirs:
        raise MisuseError(
            f"the directory has checkpoints that torchtitan's own CheckpointManager has saved ({theirs[0]}, ...)",
            path=root,
            hint="Choose another checkpoint.folder, and take the model over with checkpoint.initial_load_path.",
        )
    found = resolve(root, LATEST if step == -1 else step)
    return None if found is None else [str(found.path), found.step]


# --- states of the data-parallel ranks --------------------------------------------------------------------------------


class _ByDataRank:
    """A state that each data-parallel rank has one of; in a checkpoint it is that of all of them.

    Ranks that share their data (tensor, pipeline and context parallelism) have the same state, so that a checkpoint
    resumes on any mesh with as many data-parallel ranks. One that ``is_bound`` means nothing on another number of them;
    of others the first rank's is taken then.
    """

    def __init__(self, target: Stateful, rank: int, size: int, is_bound: bool) -> None:
        self._target, self._rank, self._size, self._is_bound = target, rank, size, is_bound

    def gathered(self, name: str, group: Group) -> _State:
        """The states of all data-parallel ranks, the same on every rank. All ranks call."""

        def own() -> JsonValue:
            packed = pack_state(self._own())
            return [self._rank, {suffix: base64.b64encode(content).decode() for suffix, content in packed.items()}]

        rows = cast("list[tuple[int, dict[str, str]]]", group.gather(own, f"gathering {name}"))
        states = {str(rank): {s: base64.b64decode(text) for s, text in packed.items()} for rank, packed in rows[::-1]}
        return {"size": self._size, "states": {rank: unpack_state(packed) for rank, packed in sorted(states.items())}}

    def state_dict(self) -> _State:
        """This rank's state, as a part of `gathered`."""
        return {"size": self._size, "states": {str(self._rank): self._own()}}

    def load_state_dict(self, state_dict: _State) -> None:
        """Take this rank's state out of all; `MisuseError` for torchtitan's own, or another number of ranks."""
        states, size = state_dict.get("states"), state_dict.get("size")
        if not isinstance(states, Mapping):
            raise MisuseError(
                f"the state of the {type(self._target).__name__} was saved by torchtitan itself",
                hint="Name it in checkpoint.exclude_from_loading: it then starts afresh.",
            )
        if size != self._size and self._is_bound:
            raise MisuseError(
                f"the position in the data is that of {size} data-parallel ranks, and the run has {self._size}",
                hint="Resume on as many, or begin the data afresh: set checkpoint.exclude_from_loading to "
                f"['{DATALOADER}'].",
            )
        state = cast(_State, states[str(self._rank if size == self._size else 0)])
        if isinstance(self._target, ParallelAwareDataloader):
            StatefulDataLoader.load_state_dict(self._target, state)
        else:
            self._target.load_state_dict(state)

    def _own(self) -> _State:
        if isinstance(self._target, ParallelAwareDataloader):  # its own method pickles this, and unpickles it
            return cast(_State, StatefulDataLoader.state_dict(self._target))
        return self._target.state_dict()


def _by_data_rank(dataloader: Stateful | None, states: Mapping[str, Stateful]) -> dict[str, _ByDataRank]:
    """The loader and the run's further states, by name."""
    group = Group.current()
    rank = getattr(dataloader, "dp_rank", group.rank)
    size = getattr(dataloader, "dp_world_size", group.world_size)
    found = {name: _ByDataRank(state, rank, size, is_bound=False) for name, state in states.items()}
    if dataloader is not None:
        found[DATALOADER] = _ByDataRank(dataloader, rank, size, is_bound=True)
    return found


# --- exports ----------------------------------------------------------------------------------------------------------


class _TitansAdapter(Protocol):
    """The part of torchtitan's ``BaseStateDictAdapter`` that is used here."""

    def to_hf(self, state_dict: _Tensors) -> _Tensors: ...

    def from_hf(self, hf_state_dict: _Tensors) -> _Tensors: ...


class _HubAdapter:
    """torchtitan's adapter, asked as `shardwise.convert.adapter.StateDictAdapter` is: one tensor at a time.

    torchtitan's knows q, k and v apart; ``fused`` are the model's projections that are one tensor. Without an adapter
    files have torchtitan's own names.
    """

    def __init__(self, adapter: _TitansAdapter | None, fused: FusedProjections) -> None:
        self._adapter = adapter
        self._fused = fused

    def to_hf(self, state_dict: Mapping[str, torch.Tensor], **options: object) -> _Tensors:
        """Convert torchtitan's tensors."""
        apart = self._fused.divided(state_dict)
        return apart if self._adapter is None else self._adapter.to_hf(apart)

    def from_hf(
        self, state_dict: Mapping[str, torch.Tensor], device_mesh: object = None, **options: object
    ) -> _Tensors:
        """Convert tensors of Hugging Face files."""
        found = dict(state_dict)
        return self._fused.fused(found if self._adapter is None else self._adapter.from_hf(found))

    def convert_single_tensor_to_hf(
        self, fqn: str, tensor: torch.Tensor, **options: object
    ) -> list[tuple[str, torch.Tensor]]:
        """Convert one of torchtitan's tensors."""
        return list(self.to_hf({fqn: tensor}).items())


@dataclass(frozen=True, slots=True)
class _Metadata:
    """Writes what is beside the weights (a `shardwise.addons.huggingface.HFMetadataExporter`).

    ``assets`` is ``hf_assets_path``, ``dtype`` torch's name of the weights'.
    """

    assets: Path
    dtype: str

    def validate(self, *, tokenizer: SavesPretrained | None, original_model_path: str | None) -> bool:
        """Nothing: `_attach_export` has looked at it."""
        return True

    def save(self, *, hf_metadata_dir: str, tokenizer: SavesPretrained | None, original_model_path: str | None) -> None:
        """Write the configuration, true to the weights' dtype, and the tokenizer. Rank 0 calls."""
        directory = Path(hf_metadata_dir)
        entries = read_json_object(self.assets / CONFIG)
        entries.pop("torch_dtype", None)
        write_json(directory / CONFIG, entries | {"dtype": self.dtype})
        if (self.assets / GENERATION_CONFIG).is_file():
            copy_file(self.assets / GENERATION_CONFIG, directory / GENERATION_CONFIG)
        write_tokenizer(tokenizer, self.assets, directory)


def _divide(parts: Sequence[nn.Module], fused: FusedProjections) -> None:
    """Have the parts' tensors named as torchtitan's own checkpoints name them: q, k and v apart. Local."""
    for part in parts:
        setattr(part, "state_dict_adapter", _HubAdapter(None, fused))  # noqa: B010 - modules are typed to hold others


def _hub_adapter(parts: Sequence[nn.Module], adapter: object | None, fused: FusedProjections) -> _HubAdapter:
    """Have the parts' tensors named and arranged as torchtitan's adapter says; `ConfigError` without one. Local."""
    if adapter is None:
        raise ConfigError(
            "Hugging Face files are asked for, and torchtitan has no state_dict_adapter for this model",
            hint="Leave last_save_in_hf, save_consolidated and initial_load_in_hf out, or give the ModelSpec one.",
        )
    made = _HubAdapter(cast("_TitansAdapter", adapter), fused)
    for part in parts:
        setattr(part, "state_dict_adapter", made)  # noqa: B010
    return made


def _attach_export(
    parts: Sequence[nn.Module], adapter: object | None, fused: FusedProjections, dtype: str | None
) -> None:
    """Have the parts exported under Hugging Face's names, beside the configuration in ``hf_assets_path``.

    All ranks call. The model is built again without memory and compared with that configuration: names, shapes, and
    the numbers that no shape shows. ``dtype`` is ``export_dtype``, where it counts.

    Raises:
        ConfigError: There is no adapter, no configuration, or the export would be in another dtype than was asked for.
        ExportMismatchError: The configuration describes another model.
    """
    with Group.current().together("checking whether the export would open"):
        hub = _hub_adapter(parts, adapter, fused)
        assets = getattr(adapter, "hf_assets_path", None)
        if assets is None or not (Path(assets) / CONFIG).is_file():
            raise ConfigError(
                f"an export is asked for, and hf_assets_path has no {CONFIG} to go with it",
                path=assets,
                hint="Put the config.json of the Hugging Face model there, or leave last_save_in_hf and "
                "save_consolidated out.",
            )
        have = {str(each.dtype).removeprefix("torch.") for part in parts for each in part.parameters()}
        if len(have) != 1 or (dtype is not None and have != {dtype}):
            raise ConfigError(
                f"export_dtype is {dtype}, and the parameters are {' and '.join(sorted(have))}",
                hint="Set export_dtype to the dtype that is trained; transformers casts when it loads (dtype=...).",
            )
        path = Path(assets) / CONFIG
        entries = read_json_object(path)
        config = getattr(adapter, "model_config", None)
        _check(hub, config, entries, path)
        exporter = _Metadata(Path(assets), have.pop())
        for part in parts:
            setattr(part, "_get_consolidated_hf_metadata_exporter", lambda **_: exporter)  # noqa: B010


def _check(hub: _HubAdapter, config: object, entries: Mapping[str, JsonValue], path: Path) -> None:
    """Compare torchtitan's configuration with ``config.json``. Local."""
    build = getattr(config, "build", None)
    if not callable(build):
        raise ExportMismatchError(
            "torchtitan's state_dict_adapter does not say which model it is for: it has no model_config",
            path=path,
            hint="Derive the adapter from torchtitan's StateDictAdapter, or export with torchtitan's tools.",
        )
    with torch.device("meta"):
        native = build().state_dict()
    tensors = hub.to_hf(native)
    specs = [TensorSpec(name, tuple(each.shape), dtype_code(each.dtype)) for name, each in tensors.items()]
    reason = check_described(entries, specs, path)
    if reason is not None:
        raise ExportMismatchError(
            f"whether transformers would open the export cannot be checked: {reason}",
            path=path,
            hint="Use the config.json of a model class of transformers'.",
        )
    wrong = [
        f"{name} is {theirs} in {CONFIG} and {ours} in torchtitan" for name, ours, theirs in _differing(config, entries)
    ]
    if wrong:
        raise ExportMismatchError(
            f"{CONFIG} describes a model that computes something else: {'; '.join(wrong)}",
            path=path,
            hint="Correct config.json in hf_assets_path, or the ModelSpec.",
        )


def _differing(config: object, entries: Mapping[str, JsonValue]) -> Iterator[tuple[str, object, object]]:
    """Numbers that no shape shows and that differ: name, torchtitan's, ``config.json``'s."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(**entries)
    for name, ours in _numbers(config):
        value = getattr(theirs, name, None)
        if name.startswith("rope."):
            value = (getattr(theirs, "rope_parameters", None) or {}).get(name.removeprefix("rope."))
        if value != ours:
            yield name, ours, value


def _numbers(config: object) -> Iterator[tuple[str, object]]:
    """Such numbers, as torchtitan has them, under Hugging Face's names."""
    yield "tie_word_embeddings", getattr(config, "enable_weight_tying", False)
    eps = getattr(getattr(config, "norm", None), "eps", None)
    if eps is not None:
        yield "rms_norm_eps", eps
    attention = getattr(next(iter(getattr(config, "layers", ())), None), "attention", None)
    heads = getattr(attention, "n_heads", None)
    if heads is not None:
        yield "num_attention_heads", heads
        yield "num_key_value_heads", getattr(attention, "n_kv_heads", None) or heads
    rope = getattr(attention, "rope", None)
    if rope is not None:
        yield "rope.rope_theta", rope.theta
        yield "rope.rope_type", _ROPES.get(rope.scaling, rope.scaling)
        if rope.scaling == "llama":
            yield "rope.factor", rope.scaling_factor
            for name in _LLAMA_ROPE:
                yield f"rope.{name}", getattr(rope, name)


# --- q, k and v in one tensor -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Projections:
    """The fused projections of one attention: the size of a head, and the heads of q for each one of k and of v."""

    head: int
    queries: int

    def divided(self, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v of a weight or bias, whose rows are, for each head of k: its heads of q, k, v."""
        tail = fused.shape[1:]
        heads = fused.reshape(-1, self.queries + 2, self.head, *tail)
        ends = (0, self.queries, self.queries + 1, self.queries + 2)
        return tuple(heads[:, start:end].reshape(-1, *tail) for start, end in pairwise(ends))

    def fused(self, apart: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor that `divided` has divided."""
        tail = apart[0].shape[1:]
        counts = (self.queries, 1, 1)
        heads = [each.reshape(-1, count, self.head, *tail) for each, count in zip(apart, counts, strict=True)]
        return torch.cat(heads, dim=1).reshape(-1, *tail)


@dataclass(frozen=True, slots=True)
class FusedProjections:
    """Those of a model, by the plain name of the module that has them."""

    known: Mapping[str, Projections]

    def divided(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors by name, with q, k and v apart."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            module, of, kind = name.rpartition(f".{_FUSED}.")
            if of and module in self.known:
                apart = self.known[module].divided(tensor)
                found |= {f"{module}.{part}.{kind}": each for part, each in zip(_APART, apart, strict=True)}
            else:
                found[name] = tensor
        return found

    def fused(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors by name of which `divided` has made these; whatever lacks its neighbours stays as it is."""
        found = dict(tensors)
        for name in tensors:
            module, of, kind = name.rpartition(f".{_APART[0]}.")
            apart = [f"{module}.{part}.{kind}" for part in _APART]
            if of and module in self.known and all(each in found for each in apart):
                found[f"{module}.{_FUSED}.{kind}"] = self.known[module].fused([found.pop(each) for each in apart])
        return found


def _take_over(parts: Sequence[nn.Module]) -> FusedProjections:
    """The fused projections of a model, which give their one tensor from now on when they are asked for their state."""
    known: dict[str, Projections] = {}
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, FusedQKVLinear):
                take_off_hooks(module, FusedQKVLinear.__module__)
                known[plain_name(f"{name}.")[:-1]] = Projections(module.head_dim, module.heads_per_kv)
    return FusedProjections(known)
