"""Exports of torchtitan's models: its adapter says the names, and ``config.json`` comes from ``hf_assets_path``.

Checkpoints have the q, k and v of fused attention projections apart, as torchtitan's own have. ``FusedQKVLinear``
divides its one tensor by hooks, which gather it whole on every rank where it is sharded. Here the hooks are taken off,
and each rank writes the rows that it holds: dividing only rearranges rows, so that it is a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torchtitan.models.common.attention import FusedQKVLinear

from shardwise.addons.base import SavesPretrained
from shardwise.addons.files import copy_file, write_json
from shardwise.addons.hf_config import CONFIG, GENERATION_CONFIG
from shardwise.addons.huggingface import write_tokenizer
from shardwise.checkpointing.saving.class_check import check_described
from shardwise.comm import Group, JsonValue
from shardwise.dtypes import dtype_code
from shardwise.errors import ConfigError, ExportMismatchError
from shardwise.format.json_file import read_json_object
from shardwise.geometry import TensorSpec
from shardwise.stateful_wrappers.wrapping import plain_name
from shardwise.upstream.torch_modules import take_off_hooks

if TYPE_CHECKING:
    from torch import nn

_Tensors = dict[str, torch.Tensor]
#: One attention's projections in one tensor, and apart.
_FUSED, _APART = "wqkv", ("wq", "wk", "wv")
#: torchtitan's names of RoPE's scalings -> those of Hugging Face.
_ROPES = {"none": "default", "llama": "llama3", "yarn": "yarn"}
#: Numbers of Llama's scaling that have the same names in config.json, beside ``factor``.
_LLAMA_ROPE = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class _TitansAdapter(Protocol):
    """The part of torchtitan's ``BaseStateDictAdapter`` that is used here."""

    def to_hf(self, state_dict: _Tensors) -> _Tensors: ...

    def from_hf(self, hf_state_dict: _Tensors) -> _Tensors: ...


class HubAdapter:
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
        """Nothing: `attach_export` has looked at it."""
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


def divide(parts: Sequence[nn.Module], fused: FusedProjections) -> None:
    """Have the parts' tensors named as torchtitan's own checkpoints name them: q, k and v apart. Local."""
    for part in parts:
        setattr(part, "state_dict_adapter", HubAdapter(None, fused))  # noqa: B010 - modules are typed to hold others


def hub_adapter(parts: Sequence[nn.Module], adapter: object | None, fused: FusedProjections) -> HubAdapter:
    """Have the parts' tensors named and arranged as torchtitan's adapter says; `ConfigError` without one. Local."""
    if adapter is None:
        raise ConfigError(
            "Hugging Face files are asked for, and torchtitan has no state_dict_adapter for this model",
            hint="Leave last_save_in_hf, save_consolidated and initial_load_in_hf out, or give the ModelSpec one.",
        )
    made = HubAdapter(cast("_TitansAdapter", adapter), fused)
    for part in parts:
        setattr(part, "state_dict_adapter", made)  # noqa: B010
    return made


def attach_export(
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
        hub = hub_adapter(parts, adapter, fused)
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


def _check(hub: HubAdapter, config: object, entries: Mapping[str, JsonValue], path: Path) -> None:
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


def take_over(parts: Sequence[nn.Module]) -> FusedProjections:
    """The fused projections of a model, which give their one tensor from now on when they are asked for their state."""
    known: dict[str, Projections] = {}
    for part in parts:
        for name, module in part.named_modules():
            if isinstance(module, FusedQKVLinear):
                take_off_hooks(module, FusedQKVLinear.__module__)
                known[plain_name(f"{name}.")[:-1]] = Projections(module.head_dim, module.heads_per_kv)
    return FusedProjections(known)
