"""PEFT: the settings and the tokenizer beside an adapter's weights, which the engine itself writes and reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import torch.nn as nn

from shardwise.addons.base import SaveHookArgs
from shardwise.addons.files import write_text, written_locally
from shardwise.comm import Group
from shardwise.errors import MisuseError
from shardwise.peft.builtin_lora import find_sites, hub_target_modules, is_fused, named_targets
from shardwise.peft.config import AUTOMODEL_CONFIG_NAME, adapter_settings, automodel_metadata
from shardwise.peft.models import (
    adapter_configs,
    expert_targets,
    is_peft_adapted,
    peft_target_modules,
    peft_target_parameters,
)
from shardwise.peft.tensors import ADAPTER_CONFIG_NAME, AdapterFile
from shardwise.stateful_wrappers import ModelState


class PeftAddon:
    """Writes ``adapter_config.json``, ``automodel_peft_config.json`` and the tokenizer beside an adapter's weights.

    With ``diffusers_compatible`` the settings are in the header of the weights, and only the tokenizer is written.
    """

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        """Write the settings and the tokenizer. All ranks call; rank 0 of the group writes; all leave together.

        ``model_state`` and ``model_path`` are needed, and ``peft_config`` for a model with LoRA modules of its own.

        Raises:
            MisuseError: A needed argument is missing.
            AdapterError: The adapter cannot be described.
        """
        group = kwargs.get("group") or Group.current()
        state, path = kwargs.get("model_state"), kwargs.get("model_path")
        parts: list[nn.Module] = []
        with group.together("describing the adapter"):
            if state is None or path is None:
                raise MisuseError("the PEFT addon needs model_state and model_path", hint="Pass both to pre_save.")
            parts = list(state.model)
        settings: Mapping[str, object] = {}
        if not kwargs.get("diffusers_compatible", False):
            settings = adapter_settings(
                parts,
                kwargs.get("peft_config"),
                group,
                v4_compatible=kwargs.get("v4_compatible", False),
                original_model_path=kwargs.get("original_model_path"),
                legacy_layout=kwargs.get("legacy_paramwrapper_layout", False),
            )
        with group.together("writing the adapter's settings"):
            if group.is_main and path is not None:
                _write(Path(path), parts, settings, kwargs)

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        """Do nothing: all is written before the weights. All ranks may call."""


def _write(path: Path, parts: list[nn.Module], settings: Mapping[str, object], kwargs: SaveHookArgs) -> None:
    for name, values in settings.items():
        _write_json(path / AdapterFile(name, ()).directory / ADAPTER_CONFIG_NAME, values)
    if settings:
        config = kwargs.get("peft_config")
        if is_peft_adapted(parts, config) and (config is None or isinstance(config, Mapping)):
            configs = adapter_configs(parts, config)
            config = configs.get("default", next(iter(configs.values())))
        _write_json(path / AUTOMODEL_CONFIG_NAME, _get_automodel_peft_metadata(config))
    tokenizer = kwargs.get("tokenizer")
    if tokenizer is not None:
        with written_locally(path) as local:
            tokenizer.save_pretrained(str(local))


def _write_json(path: Path, values: object) -> None:
    write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _extract_target_modules(model: nn.Module, v4_compatible: bool = False) -> list[str]:
    """Names of the adapted modules, as adapter_config.json lists them, sorted.

    A module is adapted where a child of it has "lora" in its name, whatever class that is and whether or not it holds
    parameters, or where it has LoRA parameters of its own. Combined projections are expanded to those of the Hugging
    Face model, grouped expert factors to one name for each expert and projection (unless `_extract_target_parameters`
    names them), and wrappers' prefixes are removed. A state-dict adapter of the model's that has
    ``map_peft_target_module_to_hf(name)`` gives each entry its final name.
    """
    if is_peft_adapted([model]):
        names = set(peft_target_modules(model))
        for adapter in adapter_configs([model], None) if v4_compatible else ():
            names.update(name for targets in expert_targets([model], adapter) for name in targets.names)
    else:
        sites = find_sites(model, None, v4_compatible, strict=False)
        names = {target for site in sites if not is_fused(site) for target in site.targets}
        names.update(named_targets(model))
    return hub_target_modules(model, names)


def _extract_target_parameters(model: nn.Module, v4_compatible: bool = False) -> list[str]:
    """Names of the fused expert parameters that are adapted as such, sorted; none in v4 mode."""
    if v4_compatible:
        return []
    if is_peft_adapted([model]):
        return peft_target_parameters(model)
    return sorted({f"{s.fqn}.{s.parameter}" for s in find_sites(model, None, v4_compatible) if is_fused(s)})


def _get_automodel_peft_metadata(peft_config: object) -> dict[str, object]:
    """The settings of an adapter configuration that adapter_config.json does not hold, ready for JSON.

    Of a Hugging Face ``PeftConfig`` adapter_config.json holds all, so nothing is left.
    """
    return {} if is_peft_adapted([], peft_config) else automodel_metadata(peft_config)


def _get_hf_peft_config(peft_config: object, model_state: ModelState, v4_compatible: bool = False) -> dict[str, object]:
    """The content of adapter_config.json, from this process's parts alone, which make up the model."""
    parts = list(model_state.model)
    settings = adapter_settings(parts, peft_config, Group(None), v4_compatible=v4_compatible)
    chosen = settings.get("default", next(iter(settings.values())))
    if is_peft_adapted(parts, peft_config):
        return chosen
    targets = {name for part in parts for name in _extract_target_modules(part, v4_compatible)}
    return {**chosen, "target_modules": sorted(targets)}
