"""Whether an adapter is whole (every factor with its counterpart, every layer, of the configured rank), opens and fits.

Whether it is whole is looked at without the model. peft has to open it correctly; vLLM may not. A saved adapter fits a
model if its settings mean the same there, and what is one parameter in the model has one value in the file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch.nn as nn

from shardwise.disk.names import is_file
from shardwise.disk.storage import current
from shardwise.errors import AdapterError, CheckpointNotFoundError
from shardwise.geometry import TensorSpec
from shardwise.peft.models import is_peft_adapted
from shardwise.peft.tensors import PEFT_PREFIX, AdapterFile, named_modules
from shardwise.sources.entries import Entry, read_entries
from shardwise.sources.reader import Reader, tensor_blocks
from shardwise.stateful_wrappers.wrapping import adapted_model, bare_model
from shardwise.upstream import peft as upstream

#: The factors of a pair: side A, side B. Source: the names under which peft saves LoRA of linear layers and embeddings.
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))

_SHOWN = 8


def check_adapter(
    specs: Iterable[TensorSpec],
    config: Mapping[str, object],
    inventories: Sequence[Mapping[str, Sequence[int]]] = (),
    layers: int | None = None,
) -> None:
    """Check the tensors that all ranks together are about to write as one adapter. Pure.

    That the ranks hold every element of each tensor is the engine's check; this one is about which tensors there are.
    The settings are what ``adapter_config.json`` will say; ``inventories`` are those of each rank
    (`shardwise.peft.tensors.AdapterTensors`), where the ranks have parts of a model; ``layers`` is the number that the
    model's configuration promises. Which modules the settings name is `check_opens`' question.

    Raises:
        AdapterError: The adapter has no tensor, a factor lacks its counterpart, shapes contradict each other or the
            configured ranks, or a layer is on no rank. The message lists what is wrong.
    """
    by_name = {spec.name: spec for spec in specs}
    if not by_name:
        raise AdapterError("the adapter has no tensors", hint="Check that target_modules matches modules of the model.")
    faults = [f"{name} is empty" for name, spec in by_name.items() if spec.numel == 0]
    if str(config.get("peft_type", "LORA")).rpartition(".")[2] == "LORA":
        pairs = dict(_pairs(by_name))
        faults += _pair_faults(pairs, config)
        faults += _magnitude_faults(by_name, pairs, config)
    faults += _layer_faults(inventories, layers)
    if faults:
        more = f" (and {len(faults) - _SHOWN} more)" if len(faults) > _SHOWN else ""
        raise AdapterError(
            f"the adapter is not complete: {'; '.join(faults[:_SHOWN])}{more}",
            hint="Save with a process group that holds every pipeline stage, from the model as it was adapted; where "
            "layers were removed on purpose, let the model's config say how many there are.",
        )


Pair = tuple[TensorSpec | None, TensorSpec | None]


def _pairs(by_name: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Pair]]:
    """Module name (with peft's prefix) -> its two factors."""
    for a_suffix, b_suffix in _PAIRS:
        owners = dict.fromkeys(
            name.removesuffix(f".{suffix}")
            for name in by_name
            for suffix in (a_suffix, b_suffix)
            if name.endswith(f".{suffix}")
        )
        for owner in owners:
            yield owner, (by_name.get(f"{owner}.{a_suffix}"), by_name.get(f"{owner}.{b_suffix}"))


def _pair_faults(pairs: Mapping[str, Pair], config: Mapping[str, object]) -> Iterator[str]:
    for owner, (a, b) in pairs.items():
        if a is None or b is None:
            yield f"{owner} has no lora_{'A' if a is None else 'B'}"
            continue
        # B of a grouped convolution, or either factor of BD-LoRA, has a block of the rank alone.
        low, high = sorted((a.shape[0], b.shape[1])) if min(len(a.shape), len(b.shape)) > 1 else (0, 0)
        if not low or high % low:
            yield f"{owner} has lora_A {a.shape} and lora_B {b.shape}, which do not fit together"
            continue
        rank, configured = a.shape[0], _configured_rank(owner, config)
        several = bool(config.get("target_parameters"))
        if configured is not None and rank != configured and not (several and _divides(config, rank)):
            yield f"{owner} has rank {rank}, configured is {configured}"


#: X-LoRA keeps the model with its experts' adapters one level deeper.
_MIXTURE_PREFIX = "base_model.lora_model.model."


def adapted_modules(names: Iterable[str]) -> frozenset[str]:
    """The modules that a file's LoRA factors adapt, by its tensors' names."""
    sides = tuple(f".{suffix}" for pair in _PAIRS for suffix in pair)
    return frozenset(_adapted(name.removesuffix(side)) for name in names for side in sides if name.endswith(side))


def _adapted(owner: str) -> str:
    """The module that is adapted: parts of it, or several of its parameters, are called after peft's inner layers."""
    for prefix in (PEFT_PREFIX, _MIXTURE_PREFIX):
        owner = owner.removeprefix(prefix)
    return owner.partition(".base_layer")[0]


def _configured_rank(owner: str, config: Mapping[str, object]) -> int | None:
    module = _adapted(owner)
    patterns = config.get("rank_pattern")
    for key, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if re.match(rf"(.*\.)?({key})$", module) and isinstance(value, int):
            return value
    rank = config.get("r")
    return rank if isinstance(rank, int) else None


def _divides(config: Mapping[str, object], rank: int) -> bool:
    """Whether ``rank`` can be that of several experts side by side."""
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, Mapping) else ())]
    return any(isinstance(r, int) and r > 0 and rank % r == 0 for r in ranks)


def _magnitude_faults(
    by_name: Mapping[str, TensorSpec], pairs: Mapping[str, Pair], config: Mapping[str, object]
) -> Iterator[str]:
    have = {n.removesuffix(".lora_magnitude_vector") for n in by_name if n.endswith(".lora_magnitude_vector")}
    if config.get("use_dora"):
        yield from (f"{owner} has no lora_magnitude_vector" for owner in pairs if owner not in have)
    elif have:
        yield f"{min(have)} has a lora_magnitude_vector, and use_dora is off"


def _layer_faults(inventories: Sequence[Mapping[str, Sequence[int]]], layers: int | None) -> Iterator[str]:
    """The layers that the model's configuration promises and no rank has."""
    union: dict[str, set[int]] = {}
    for inventory in inventories:
        for container, indices in inventory.items():
            union.setdefault(container, set()).update(indices)
    most = max(map(len, union.values()), default=0)
    if layers is None or not most or most >= layers:
        return
    yield f"the ranks have {most} of {layers} layers"
    for container, found in union.items():
        missing = sorted(set(range(layers)) - found)
        if len(found) == most and missing:
            yield f"no rank has {container}.{missing[0]}"


def check_stages(stages: Collection[int]) -> None:
    """Check that the ranks that save together, of these ``stages``, have each pipeline stage below their last."""
    missing = sorted(set(range(max(stages, default=0))) - set(stages))
    if missing:
        raise AdapterError(
            f"the adapter is not complete: the ranks have the pipeline stages {sorted(set(stages))}, and not "
            f"{missing[0]}",
            hint="Save with a process group that holds every pipeline stage, from the model as it was adapted.",
        )


# --- whether other tools would open it -------------------------------------------------------------------------------


#: The highest ``max_lora_rank`` that may be set, and the one that is set. Source: vLLM, ``vllm/config/lora.py``.
_VLLM_RANKS = (16, 512)

#: Ends of tensors' names that vLLM knows, the last two to pass over. Source: its ``parse_fine_tuned_lora_name`` and
#: ``is_base_embedding_weights``.
_VLLM_TENSORS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".embed_tokens.base_layer.weight",
    ".lm_head.base_layer.weight",
)


def check_opens(
    parts: Sequence[nn.Module], adapter_name: str, names: Iterable[str], settings: Mapping[str, object]
) -> None:
    """Check that peft, given a base model and the adapter's settings, would adapt the modules that have tensors. Local.

    peft reads the settings alone, the content of ``adapter_config.json``. It skips tensors without a module in them,
    with a warning, and a module without saved tensors would start from its initial values. ``names`` are those of all
    ranks.
    """
    if importlib.util.find_spec("peft") is None:
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    from peft import PeftConfig

    try:
        with warnings.catch_warnings(action="ignore"):
            config: Any = PeftConfig.from_peft_type(**settings)
    except Exception as error:  # peft's own checks of what a configuration may say
        raise AdapterError(
            f"peft does not take the settings of the adapter {adapter_name!r}: {type(error).__name__}: {error}",
            hint="Correct the adapter's configuration (model.peft_config), which adapter_config.json is made of.",
        ) from error
    targets = getattr(config, "target_modules", None)
    if settings.get("peft_type") != "LORA" or not targets:
        return
    parents = tuple(str(p).rpartition(".")[0] for p in getattr(config, "target_parameters", None) or ())
    owners = adapted_modules(names)
    for owner in sorted(owners):
        beside = any(f".{owner}".endswith(f".{parent}") for parent in parents)
        if not beside and not config.ensure_weight_tying and not check_target_module_exists(config, owner):
            raise _unlike(adapter_name, owner, "has tensors, and the settings give peft no adapter for it")
    if not is_peft_adapted(parts):
        return
    leaves = None if isinstance(targets, str) else {str(target).rpartition(".")[2] for target in targets}
    for part in parts:
        for name in _base_modules(bare_model(adapted_model(part))):
            if name in owners or (leaves is not None and name.rpartition(".")[2] not in leaves):
                continue
            if check_target_module_exists(config, name):
                raise _unlike(adapter_name, name, "has no tensors, and by the settings peft would adapt it")


def _unlike(adapter_name: str, module: str, what: str) -> AdapterError:
    return AdapterError(
        f"peft would open the adapter {adapter_name!r} as another one: {module!r} {what}",
        tensor=module,
        hint="Let target_modules (and exclude_modules, layers_to_transform) name the modules that are adapted, in full "
        "where they differ between layers or stages.",
    )


def _base_modules(model: nn.Module) -> Iterator[str]:
    """Names of the modules that the base model has, but for those that peft's wrappers hold."""
    layer, copy = upstream.layer_class(), upstream.copy_class()
    below: list[str] = []
    for name, module in named_modules(model):
        if any(name.startswith(f"{wrapper}.") for wrapper in below[-1:]):
            if isinstance(module, layer) or not name.endswith(".base_layer"):
                continue
            name = name.removesuffix(".base_layer")
        elif isinstance(module, (layer, copy)):
            below.append(name)
            if isinstance(module, copy):
                continue
        yield name


def vllm_limits(names: Iterable[str], settings: Mapping[str, object], *, has_extra: bool) -> list[str]:
    """The parts of an adapter that vLLM does not serve, and why; empty where it serves all. Pure.

    Source: vLLM's ``PEFTHelper``, ``LoRAConfig`` and ``parse_fine_tuned_lora_name``. ``has_extra`` says whether tensors
    are trained beside the adapter.
    """
    kind = str(settings.get("peft_type"))
    if kind != "LORA":
        return [f"peft_type is {kind}, and it serves LORA alone"]
    out: list[str] = []
    if settings.get("use_dora"):
        out.append("use_dora: it does not apply magnitudes")
    if saved := settings.get("modules_to_save"):
        out.append(f"modules_to_save ({saved}): it loads no whole modules")
    if settings.get("bias") not in (None, "none"):
        out.append(f"bias is {settings['bias']!r}, and has to be 'none'")
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if settings.get(key)]
    if patterns:
        out.append(f"{' and '.join(patterns)}: it scales every module by the one r and lora_alpha")
    rank = settings.get("r")
    default, highest = _VLLM_RANKS
    if isinstance(rank, int) and rank > default:
        out.append(
            f"r is {rank}: {f'set max_lora_rank, {default} by default' if rank <= highest else f'over {highest}'}"
        )
    strange = sorted(name for name in names if not name.endswith(_VLLM_TENSORS))
    if strange and not settings.get("modules_to_save") and not settings.get("use_dora"):
        out.append(f"{len(strange)} tensors are no factors, {strange[0]} among them")
    if has_extra:
        out.append("tensors are trained beside the adapter, in a file that it does not read")
    return out


# --- whether a saved adapter fits a model, beyond names and shapes ----------------------------------------------------


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
    if not upstream.is_imported() or _kind(current) == "LORA":
        return _LORA_DEFAULTS if _kind(current) == "LORA" else {}
    cls = upstream.config_class_of(_kind(current))
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
