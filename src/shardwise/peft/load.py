"""Checks before an adapter is loaded: whether the file fits the model beyond names and shapes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path

from shardwise.disk.names import is_file
from shardwise.disk.storage import current
from shardwise.errors import AdapterError, CheckpointNotFoundError
from shardwise.peft.tensors import AdapterFile
from shardwise.sources.entries import Entry, read_entries
from shardwise.sources.reader import Reader, tensor_blocks
from shardwise.upstream import peft

#: Settings that do not change what the tensors of an adapter mean; every other one is compared.
_WITHOUT_MEANING = frozenset(
    {
        # Where the adapter comes from and what it is used for.
        "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
        "tokenizer_name_or_path", "tokenizer_kwargs", "runtime_config", "runtime_offload_base_weight", "progressbar",
        "megatron_config", "megatron_core",
        # Which modules are adapted, and which tensors the file has: names tell. Ranks are shapes.
        "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform",
        "layers_pattern", "feedforward_modules", "bias", "lora_bias", "rank_pattern", "init_r", "save_projection",
        "save_only_topk_weights", "save_indices", "save_precomputed_indices",
        # How a fresh adapter begins. Some of LoRA's beginnings change the base weights: `changed_base`.
        "init_lora_weights", "init_weights", "init_ia3_weights", "d_initial", "init_vector_bank_bound",
        "init_logits_std", "init_theta_d_bound", "init_v_bound", "init_scale", "loftq_config", "eva_config",
        "corda_config", "lora_ga_config", "prompt_tuning_init", "prompt_tuning_init_text",
        "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task",
        # How it is trained from here on.
        "velora_config", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
        "rank_dropout_scale", "auxiliary_loss_weight", "opt_weighted_loss_type", "opt_loss_decay_factor",
        "opt_projection_epsilon", "opt_projection_format_epsilon", "use_asa", "asa_target_subspaces", "init_warmup",
        "final_warmup", "mask_interval", "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent",
        # How the base layer keeps its weight, which peft corrects by itself.
        "fan_in_fan_out",
    }
)  # fmt: skip

#: LoRA initialisations that move a part of the base weights into the adapter, or round them.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: LoRA's defaults for absent settings, other than nothing. Source: ``peft.LoraConfig``.
_LORA_DEFAULTS: dict[str, object] = {"peft_type": "LORA", "lora_alpha": 8, "qalora_group_size": 16}

#: The first release of peft that reads an expert parameter's ``(experts, out, in)`` as such is the one after this.
LEGACY_LAYOUT_VERSION = "0.19.0"


def differing_settings(saved: Mapping[str, object], current: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Settings that would give the saved tensors another meaning in the current model, with both values.

    Every setting of the checkpoint's ``adapter_config.json`` and the model's is compared but those that are known to
    change no meaning: where the adapter comes from, how it begins and is trained, and what names and shapes of the
    tensors show.
    """
    out: dict[str, tuple[object, object]] = {}
    defaults = _defaults(current)
    ignored = _WITHOUT_MEANING | ({"r"} if _kind(current) in ("LORA", "ADALORA") else frozenset())
    for key in dict.fromkeys((*_LORA_DEFAULTS, *saved, *current)):
        if key in ignored or key.endswith(("dropout", "dropout_p")):
            continue
        theirs, ours = saved.get(key), current.get(key)
        if _plain(defaults.get(key) if theirs is None else theirs) != _plain(
            defaults.get(key) if ours is None else ours
        ):
            out[key] = (theirs, ours)
    if changed_base(saved) != changed_base(current):
        out["init_lora_weights"] = (saved.get("init_lora_weights"), current.get("init_lora_weights"))
    layouts = is_legacy_layout(saved), is_legacy_layout(current)
    if None not in layouts and layouts[0] != layouts[1]:
        out["legacy_paramwrapper_layout"] = layouts
    return out


def _kind(config: Mapping[str, object]) -> str:
    return str(config.get("peft_type") or "LORA").rpartition(".")[2]


def _defaults(current: Mapping[str, object]) -> Mapping[str, object]:
    """Peft's defaults for settings that are absent, as in files of other releases."""
    if not peft.is_imported() or _kind(current) == "LORA":
        return _LORA_DEFAULTS if _kind(current) == "LORA" else {}
    cls = peft.config_class_of(_kind(current))
    return {} if cls is None else {f.name: f.default for f in fields(cls) if f.default is not MISSING}


def _plain(value: object) -> object:
    """A setting in one of the spellings that mean the same: nothing at all, and tokens of the only embedding."""
    if isinstance(value, Mapping):
        plain = {str(key): _plain(item) for key, item in value.items()}
        only = next(iter(plain.values())) if len(plain) == 1 else None
        return (only if isinstance(only, list) else plain) or None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value] or None
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str) or None
    return value if value is not False else None


def changed_base(config: Mapping[str, object]) -> object:
    """How the adapter's initialisation changed the base weights, which it then needs; ``None`` where it did not."""
    begin = config.get("init_lora_weights")
    if not isinstance(begin, str) or not begin.lower().startswith(_CHANGES_BASE):
        return None
    return (begin, _plain(config.get("loftq_config"))) if begin == "loftq" else begin


def is_legacy_layout(config: Mapping[str, object]) -> bool | None:
    """Whether adapters of expert parameters are laid out as peft up to 0.19.0 does; ``None`` where there are none."""
    if not config.get("target_parameters"):
        return None
    version = config.get("peft_version")
    if not isinstance(version, str):  # which peft writes since 0.18; a model's own LoRA has few settings and no version
        return "init_lora_weights" in config
    return is_legacy_version(version)


def is_legacy_version(version: str) -> bool:
    """Whether a release of peft reads and writes adapters of expert parameters in the legacy layout."""
    numbers = [int(n) for n in re.findall(r"\d+", version.partition("@")[0])[:3]]
    return numbers <= [int(n) for n in LEGACY_LAYOUT_VERSION.split(".")]


def check_shared_factors(
    file: AdapterFile, model_directory: str | os.PathLike[str], renamed: Callable[[str], str] = str
) -> None:
    """Check that tensors which share memory in the model are equal in the file. One rank calls.

    A model with a combined projection has one A factor for all of its parts; an adapter trained with one factor each
    cannot be loaded into it. Reads those tensors of the file (the adapter's, or that in the checkpoint's ``model``
    directory), two at a time, block by block. ``renamed`` maps its names to the model's.
    """
    shared = [(item.spec.name, item.alias_of) for item in file.entries if item.alias_of is not None]
    if not shared:
        return
    path = Path(model_directory)
    path = path if is_file(path) else path / file.path
    if not is_file(path):
        raise CheckpointNotFoundError(
            f"no {path.name}", path=path, hint="Pass the model directory of an adapter checkpoint."
        )
    names = {renamed(entry.name): entry for entry in read_entries(path)}
    with contextlib.closing(Reader(current(), [path])) as reader:
        for name, first in shared:
            if name in names and first in names and not _equal(names[name], names[first], reader):
                raise AdapterError(
                    f"{name!r} differs from {first!r}, and both are one parameter of this model",
                    path=path,
                    tensor=name,
                    hint="Load this adapter into a model with separate projections, for example with peft.",
                )


def _equal(one: Entry, other: Entry, reader: Reader) -> bool:
    """Whether two tensors of the reader's only file have the same dtype, shape and bytes."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = zip(*(tensor_blocks(entry.located_in(0), reader) for entry in (one, other)), strict=True)
    return all(ours == theirs for ours, theirs in pairs)
