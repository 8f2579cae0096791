"""The content of adapter_config.json and automodel_peft_config.json, and reading them back."""

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
from shardwise.peft.models import auto_mapping
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
    patterns: tuple[dict[str, int], dict[str, float]] = ({}, {})
    has_bias = False
    for part in parts:
        sites = find_sites(part, dim, v4_compatible)
        targets.update(hub_target_modules(part, {t for s in sites if not is_fused(s) for t in s.targets}))
        parameters.update(f"{s.fqn}.{s.parameter}" for s in sites if is_fused(s))
        _add_patterns(patterns, part, sites, peft_config)
        saved.update(module.fqn for module in find_trained_modules(part, sites))
        has_bias = has_bias or any(isinstance(s, LinearSite) and s.bias is not None for s in sites)
    return {
        "target_modules": sorted(targets),
        "target_parameters": sorted(parameters),
        "rank_pattern": dict(sorted(patterns[0].items())),
        "alpha_pattern": dict(sorted(patterns[1].items())),
        "modules_to_save": sorted(saved),
        "lora_bias": has_bias,
    }


def _add_patterns(
    patterns: tuple[dict[str, int], dict[str, float]], part: nn.Module, sites: Sequence[Site], config: object | None
) -> None:
    """Add ranks and alphas of a part that the configuration does not give: rank_pattern and alpha_pattern."""
    dim, alpha = rank_setting(config), alpha_setting(config)
    ranks, alphas = patterns
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
    """The minimal adapter_config.json of a model's own LoRA.

    Its configuration has ``dim``, ``alpha`` and ``use_dora``. The settings are those of `own_settings`, of all ranks
    together; the path is for a model that does not name its base.
    """
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
    if isinstance(peft_config, Mapping):
        values: object = dict(peft_config)
    elif callable(to_dict):
        values = to_dict()
    elif dataclasses.is_dataclass(peft_config) and not isinstance(peft_config, type):
        values = {field.name: getattr(peft_config, field.name) for field in dataclasses.fields(peft_config)}
    else:
        values = None
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
    """Read the ``adapter_config.json`` in ``directory``.

    Raises:
        CheckpointNotFoundError: There is none.
        AdapterError: It is not a JSON object that names a peft method.
    """
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
