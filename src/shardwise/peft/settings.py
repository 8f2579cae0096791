"""The settings of a model's adapters, agreed between the ranks: each pipeline stage knows only its own modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch.nn as nn

from shardwise.comm import Group, JsonValue
from shardwise.errors import AdapterError
from shardwise.peft.config import jsonable, own_config, own_settings
from shardwise.peft.load import LEGACY_LAYOUT_VERSION, is_legacy_version
from shardwise.peft.models import (
    ExpertTargets,
    adapter_configs,
    config_as_saved,
    expert_targets,
    is_peft_adapted,
    v4_config,
)
from shardwise.stateful_wrappers.model_parts import described_part

if TYPE_CHECKING:
    from peft import PeftConfig

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

    Args:
        parts: This rank's parts of the model.
        peft_config: The configuration: a ``PeftConfig`` (or adapter names with such) for parts that do not carry one,
            or that of a model's own LoRA.
        group: The ranks that hold the model together, all pipeline stages among them.
        v4_compatible: The tensors are written expert by expert.
        original_model_path: The base model, for a model that does not name it.
        legacy_layout: ``peft_version`` says that fused expert parameters are laid out as by peft up to 0.19.0.
        diffusers_compatible: As diffusers records the settings of peft's adapters: those of the run, for training.

    Raises:
        AdapterError: The adapter cannot be described.
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
    names = sorted(configs)
    experts = {name: [[*target] for target in expert_targets(parts, name)] for name in names if v4_compatible}
    own = {name: _part_settings(config) for name, config in configs.items()}
    return cast(JsonValue, {"experts": experts, "adapters": names, "settings": own})


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
        return {"default": own_config(parts, peft_config, settings, original_model_path)}
    for rank, row in enumerate(rows):
        if row["adapters"] != rows[0]["adapters"]:
            # Each is a file of its own, which the ranks write and read one after the other.
            raise AdapterError(
                f"rank 0 has the adapters {rows[0]['adapters']} and rank {rank} has {row['adapters']}",
                hint="Give every pipeline stage the same adapters: to one without layers for them, their peft_config.",
            )
    out: dict[str, Settings] = {}
    for name, config in adapter_configs(parts, peft_config).items():
        saved: Settings = dict(config.to_dict())
        if not diffusers_compatible:
            saved = config_as_saved(described_part(parts), config, original_model_path)
        saved = {key: jsonable(value, key) for key, value in saved.items()}
        saved |= _united(name, [cast("dict[str, Settings]", row["settings"])[name] for row in rows])
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


def _part_settings(config: PeftConfig) -> dict[str, object]:
    """The settings that the stages of one adapter have to agree on or to unite, as JSON values."""
    values = config.to_dict()
    if str(values.get("target_modules")).lower() == "all-linear":
        values["target_modules"] = None  # of a stage in which peft has looked for nothing yet
    return {key: jsonable(values[key], key) for key in (*_FOUND, *_SAME) if key in values}


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
