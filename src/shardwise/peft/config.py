"""The content of adapter_config.json and automodel_peft_config.json, and reading them back.

Each pipeline stage knows only its own modules: the ranks agree on the settings of the whole adapter.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import cast

import torch.nn as nn

from shardwise.comm import Group, JsonValue
from shardwise.errors import AdapterError, CheckpointNotFoundError
from shardwise.format.json_file import read_json
from shardwise.peft.builtin_lora import (
    LinearSite,
    Site,
    find_sites,
    find_trained_modules,
    hub_target_modules,
    is_fused,
)
from shardwise.peft.check import LEGACY_LAYOUT_VERSION, is_legacy_version
from shardwise.peft.models import (
    ExpertTargets,
    adapter_configs,
    auto_mapping,
    config_as_saved,
    expert_targets,
    is_peft_adapted,
    v4_config,
)
from shardwise.peft.tensors import ADAPTER_CONFIG_NAME
from shardwise.stateful_wrappers.model_parts import described_part
from shardwise.stateful_wrappers.wrapping import bare_model, original_class
from shardwise.upstream.transformers import NAME_OR_PATH

_LOG = logging.getLogger(__name__)

AUTOMODEL_CONFIG_NAME = "automodel_peft_config.json"

#: Part of a model's class name -> its task, first match. Source: the names of transformers' auto classes, and
#: ``peft.TaskType``.
_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForMaskedLM", None),
)

#: Settings of a model's own LoRA that adapter_config.json holds, some under another name. ``target_modules`` is not
#: among them: the file has the modules that were adapted, not the patterns that were configured.
_IN_HF_CONFIG = frozenset(
    {"dim", "alpha", "use_dora", "use_rslora", "peft_type", "task_type", "bias", "inference_mode"}
)


def own_settings(parts: Sequence[nn.Module], peft_config: object | None, v4_compatible: bool) -> dict[str, object]:
    """The settings of a model's own LoRA modules for adapter_config.json, read from this rank's parts.

    Lists of names are sorted. Patterns hold ranks and alphas other than the configured ones.
    """
    dim = rank_setting(peft_config)
    targets: set[str] = set()
    parameters: set[str] = set()
    saved: set[str] = set()
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    has_bias = False
    for part in parts:
        sites = find_sites(part, dim, v4_compatible)
        targets.update(hub_target_modules(part, {t for s in sites if not is_fused(s) for t in s.targets}))
        parameters.update(f"{s.fqn}.{s.parameter}" for s in sites if is_fused(s))
        _add_patterns(ranks, alphas, part, sites, peft_config)
        saved.update(find_trained_modules(part, sites))
        has_bias = has_bias or any(isinstance(s, LinearSite) and s.bias is not None for s in sites)
    return {
        "target_modules": sorted(targets),
        "target_parameters": sorted(parameters),
        "rank_pattern": dict(sorted(ranks.items())),
        "alpha_pattern": dict(sorted(alphas.items())),
        "modules_to_save": sorted(saved),
        "lora_bias": has_bias,
    }


def _add_patterns(
    ranks: dict[str, int], alphas: dict[str, float], part: nn.Module, sites: Sequence[Site], config: object | None
) -> None:
    """Add ranks and alphas of a part that the configuration does not give: rank_pattern and alpha_pattern."""
    dim, alpha = rank_setting(config), alpha_setting(config)
    for site in sites:
        keys = _pattern_keys(part, site)
        if dim is not None and site.rank != dim:
            ranks.update(dict.fromkeys(keys, site.rank))
        if alpha is None or site.scale is None:
            continue
        own = site.scale * (math.sqrt(site.rank) if _setting(config, "use_rslora") is True else site.rank)
        if not math.isclose(own, alpha, rel_tol=1e-6):
            exact = round(own) if math.isclose(own, round(own), rel_tol=1e-6) else own
            alphas.update(dict.fromkeys(keys, exact))


def _pattern_keys(part: nn.Module, site: Site) -> Sequence[str]:
    """Keys of rank_pattern and alpha_pattern, which peft reads as regular expressions for the end of a name."""
    if isinstance(site, LinearSite):
        return hub_target_modules(part, site.targets)
    if is_fused(site):
        return (f"{site.fqn}.{site.parameter}",)
    return tuple(rf"{site.fqn}\.\d+\.{p}" for p in site.projections)


def _setting(config: object | None, name: str) -> object:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _number(config: object | None, names: Sequence[str], kinds: tuple[type, ...]) -> object:
    values = (_setting(config, name) for name in names)
    return next((value for value in values if isinstance(value, kinds) and not isinstance(value, bool)), None)


def rank_setting(config: object | None) -> int | None:
    """The configured rank of a model's own LoRA: ``dim``, or ``r`` where a ``LoraConfig`` was used for it."""
    return cast("int | None", _number(config, ("dim", "r"), (int,)))


def alpha_setting(config: object | None) -> float | None:
    """The configured alpha of a model's own LoRA: ``alpha``, or ``lora_alpha`` where a ``LoraConfig`` was used."""
    return cast("float | None", _number(config, ("alpha", "lora_alpha"), (int, float)))


def own_config(
    parts: Sequence[nn.Module],
    peft_config: object,
    settings: Mapping[str, object],
    original_model_path: str | None = None,
) -> dict[str, object]:
    """The minimal adapter_config.json of a model's own LoRA, from the `own_settings` of all ranks together."""
    task, mapping = task_type(parts)
    out: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": task,
        "r": rank_setting(peft_config),
        "lora_alpha": alpha_setting(peft_config),
        "use_dora": bool(_setting(peft_config, "use_dora")),
        "target_modules": settings["target_modules"],
        "bias": "none",
        "base_model_name_or_path": base_model_name(parts) or original_model_path,
        "inference_mode": True,
    }
    optional = {"auto_mapping": mapping, **settings, "use_rslora": _setting(peft_config, "use_rslora") is True}
    return out | {key: value for key, value in optional.items() if value}


def task_type(parts: Sequence[nn.Module]) -> tuple[str | None, dict[str, str] | None]:
    """Task type of a model in peft's terms, and the ``auto_mapping`` that replaces it where peft has none."""
    model = described_part(parts)
    if model is None:
        return "CAUSAL_LM", None
    config = getattr(model, "config", None)
    architectures = getattr(config, "architectures", None)
    names = [cls.__name__ for cls in type(model).__mro__]
    names += [str(name) for name in architectures] if isinstance(architectures, (list, tuple)) else []
    for name in names:
        for marker, task in _TASKS:
            if marker in name:
                return (task, None) if task is not None else (None, auto_mapping(model))
        if "ForConditionalGeneration" in name:
            # Vision-language models have the same ending; only an encoder-decoder is sequence to sequence.
            return ("SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) is True else "CAUSAL_LM"), None
    cls = original_class(model)
    headless = cls.__name__.endswith("Model") and cls.__module__.partition(".")[0].startswith("transformers")
    return ("FEATURE_EXTRACTION" if headless or "FeatureExtraction" in cls.__name__ else "CAUSAL_LM"), None


def base_model_name(parts: Sequence[nn.Module]) -> str | None:
    """Name or path of the base model, from the model's configuration or the model itself."""
    for part in parts:
        model = bare_model(part)
        config = getattr(model, "config", None)
        for holder, name in ((config, "name_or_path"), (config, NAME_OR_PATH), (model, "name_or_path")):
            value = getattr(holder, name, None)
            if isinstance(value, (str, os.PathLike)) and os.fspath(value):
                return os.fspath(value)
    return None


def automodel_metadata(peft_config: object) -> dict[str, object]:
    """The settings of a LoRA configuration that adapter_config.json does not hold.

    Of one with ``to_dict()``, a dataclass or a mapping.
    """
    to_dict = getattr(peft_config, "to_dict", None)
    values: object = peft_config if isinstance(peft_config, Mapping) or not callable(to_dict) else to_dict()
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    if not isinstance(values, Mapping):
        raise AdapterError(
            f"the adapter configuration {type(peft_config).__name__} has no to_dict()",
            hint="Give it a to_dict() that returns its settings.",
        )
    return {str(key): jsonable(value, str(key)) for key, value in values.items() if key not in _IN_HF_CONFIG}


def jsonable(value: object, key: str) -> object:
    """``value`` as JSON can hold it: sets sorted, enumerations by value, dtypes and other objects as text."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return jsonable(value.value, key)
    if isinstance(value, Mapping):
        return {str(k): jsonable(v, key) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(item, key) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [jsonable(item, key) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ != "torch":
        _LOG.warning("the adapter setting %r (%s) is stored as text", key, type(value).__name__)
    return str(value)


def read_adapter_config(directory: str | os.PathLike[str]) -> dict[str, object]:
    """Read the ``adapter_config.json`` in ``directory``; `AdapterError` if it is no JSON object with a peft method."""
    path = Path(directory) / ADAPTER_CONFIG_NAME
    try:
        value = read_json(path, AdapterError)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"no {ADAPTER_CONFIG_NAME}", path=path, hint="Pass the directory of an adapter checkpoint."
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get("peft_type"), str):
        raise AdapterError(
            "the adapter configuration does not name a peft_type",
            path=path,
            hint="Restore the file, or save the adapter again.",
        )
    return dict(value)


# --- agreed between the ranks ----------------------------------------------------------------------------------------


Settings = dict[str, object]

#: Settings that peft completes from the modules that it sees: ``all-linear``, ranks found for each layer, heads.
_FOUND = ("target_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern")

#: Settings that have to be the same, since the whole adapter has one value of each.
_SAME = ("peft_type", "r", "lora_alpha", "bias", "use_dora", "use_rslora")


def adapter_settings(
    parts: Sequence[nn.Module],
    peft_config: object | None,
    group: Group,
    *,
    v4_compatible: bool = False,
    original_model_path: str | None = None,
    legacy_layout: bool = False,
    diffusers_compatible: bool = False,
) -> dict[str, Settings]:
    """The content of ``adapter_config.json``, for each adapter. All ranks call.

    ``peft_config`` is a ``PeftConfig`` (or adapter names with such) for parts that do not carry one, or that of a
    model's own LoRA; ``original_model_path`` is for a model that does not name its base. With ``v4_compatible`` the
    tensors are written expert by expert, with ``legacy_layout`` as by peft up to 0.19.0, which ``peft_version`` then
    says, and with ``diffusers_compatible`` the settings are those of the run, for training, as diffusers records them.
    An adapter that cannot be described raises `AdapterError`.
    """
    gathered = group.gather(lambda: _local_settings(parts, peft_config, v4_compatible), "describing the adapter")
    rows = [cast("dict[str, JsonValue]", row) for row in gathered]

    def whole() -> dict[str, Settings]:
        found = _merged(parts, peft_config, rows, v4_compatible, original_model_path, diffusers_compatible)
        for settings in found.values():
            _record_layout(settings, legacy_layout)
        return found

    return group.attempt(whole, "describing the adapter")


def _record_layout(settings: Settings, legacy: bool) -> None:
    """Let ``peft_version`` be one that lays out adapters of expert parameters as the tensors are."""
    if not settings.get("target_parameters"):
        return
    if legacy:
        settings["peft_version"] = LEGACY_LAYOUT_VERSION
    elif is_legacy_version(str(settings.get("peft_version") or "1")):
        # The settings came with an adapter of an older release, and the layers are those of the installed one.
        from importlib.metadata import version

        settings["peft_version"] = version("peft")


def _local_settings(parts: Sequence[nn.Module], peft_config: object | None, v4_compatible: bool) -> JsonValue:
    if not is_peft_adapted(parts, peft_config):
        return {"own": cast(JsonValue, own_settings(parts, peft_config, v4_compatible))}
    configs = adapter_configs(parts, peft_config)
    experts = {name: [[*target] for target in expert_targets(parts, name)] for name in configs if v4_compatible}
    own: dict[str, Settings] = {}
    for name, config in configs.items():
        values = config.to_dict()
        if str(values.get("target_modules")).lower() == "all-linear":
            values["target_modules"] = None  # of a stage in which peft has looked for nothing yet
        own[name] = {key: jsonable(values[key], key) for key in (*_FOUND, *_SAME) if key in values}
    return cast(JsonValue, {"experts": experts, "settings": own})


def _merged(
    parts: Sequence[nn.Module],
    peft_config: object | None,
    rows: Sequence[dict[str, JsonValue]],
    v4_compatible: bool,
    original_model_path: str | None,
    diffusers_compatible: bool,
) -> dict[str, Settings]:
    if any(set(row) != set(rows[0]) for row in rows):
        raise AdapterError(
            "some ranks hold layers of peft and others LoRA modules of the model's own",
            hint="Adapt every pipeline stage in the same way, and pass its peft_config on every rank.",
        )
    if "own" in rows[0]:
        if peft_config is None:
            raise AdapterError(
                "LoRA modules of the model's own need a peft_config",
                hint="Pass a configuration with dim, alpha, use_dora and to_dict().",
            )
        own = [cast(Settings, row["own"]) for row in rows]
        settings = own[0] | _united("default", own) | {"lora_bias": any(each["lora_bias"] for each in own)}
        for key in ("rank_pattern", "alpha_pattern"):  # in one order, whichever ranks the modules are on
            settings[key] = dict(sorted(cast("dict[str, object]", settings[key]).items()))
        return {"default": own_config(parts, peft_config, settings, original_model_path)}
    stages = [cast("dict[str, Settings]", row["settings"]) for row in rows]
    for rank, stage in enumerate(stages):
        if stage.keys() != stages[0].keys():
            # Each is a file of its own, which the ranks write and read one after the other.
            raise AdapterError(
                f"rank 0 has the adapters {sorted(stages[0])} and rank {rank} has {sorted(stage)}",
                hint="Give every pipeline stage the same adapters: to one without layers for them, their peft_config.",
            )
    out: dict[str, Settings] = {}
    for name, config in adapter_configs(parts, peft_config).items():
        saved: Settings = dict(config.to_dict())
        if not diffusers_compatible:
            saved = config_as_saved(described_part(parts), config, original_model_path)
        saved = {key: jsonable(value, key) for key, value in saved.items()}
        saved |= _united(name, [stage[name] for stage in stages])
        out[name] = v4_config(saved, _experts_of(rows, name)) if v4_compatible else saved
    return out


def _experts_of(rows: Sequence[dict[str, JsonValue]], adapter_name: str) -> list[ExpertTargets]:
    found: dict[tuple[str, tuple[str, ...]], ExpertTargets] = {}
    for row in rows:
        by_adapter = cast("dict[str, list[tuple[str, list[str], int, int, float]]]", row["experts"])
        for module, listed, experts, rank, alpha in by_adapter.get(adapter_name, []):
            projections = tuple(listed)
            found[module, projections] = ExpertTargets(module, projections, experts, rank, alpha)
    return list(found.values())


def _united(adapter_name: str, stages: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The settings of the whole adapter that differ between its stages: peft configures each stage by itself."""
    out: dict[str, object] = {}
    for key in (*_FOUND, *_SAME):
        values = [settings.get(key) for settings in stages]
        if all(value == values[0] for value in values):
            continue
        whole = _union(values) if key in _FOUND else None
        if whole is None:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise AdapterError(
                f"the adapter {adapter_name!r} has {key} {values[0]!r} on rank 0 and {values[other]!r} on rank {other}",
                hint="Adapt every pipeline stage with the same settings; each stage may list its own names.",
            )
        out[key] = whole
    return out


def _union(values: Sequence[object]) -> object | None:
    """All names of several lists, or entries of several mappings; ``None`` where they contradict each other."""
    given = [value for value in values if value is not None]
    if all(isinstance(value, (list, tuple)) for value in given):
        return sorted({str(name) for value in given for name in value})  # type: ignore[attr-defined]
    if not all(isinstance(value, Mapping) for value in given):
        return None
    whole: dict[str, object] = {}
    for value in given:
        for key, entry in value.items():  # type: ignore[attr-defined]
            if whole.setdefault(key, entry) != entry:
                return None
    return whole
