"""Hugging Face and PEFT metadata around the weights.

Importing this package is cheap: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.addons.base import CheckpointAddon as CheckpointAddon
    from shardwise.addons.base import SaveHookArgs as SaveHookArgs
    from shardwise.addons.custom_code import _REMOVED_TRANSFORMERS_SYMBOLS as _REMOVED_TRANSFORMERS_SYMBOLS
    from shardwise.addons.custom_code import _apply_transformers_compat_guards as _apply_transformers_compat_guards
    from shardwise.addons.custom_code import _iter_custom_code_classes as _iter_custom_code_classes
    from shardwise.addons.custom_code import _maybe_save_custom_model_code as _maybe_save_custom_model_code
    from shardwise.addons.hf_config import _config_exists as _config_exists
    from shardwise.addons.hf_config import _maybe_strip_quantization_config as _maybe_strip_quantization_config
    from shardwise.addons.hf_config import _save_original_config_json as _save_original_config_json
    from shardwise.addons.huggingface import ConsolidatedHFAddon as ConsolidatedHFAddon
    from shardwise.addons.huggingface import HFMetadataExporter as HFMetadataExporter
    from shardwise.addons.peft import PeftAddon as PeftAddon
    from shardwise.addons.peft import _extract_target_modules as _extract_target_modules
    from shardwise.addons.peft import _extract_target_parameters as _extract_target_parameters
    from shardwise.addons.peft import _get_automodel_peft_metadata as _get_automodel_peft_metadata
    from shardwise.addons.peft import _get_hf_peft_config as _get_hf_peft_config
    from shardwise.addons.peft import _is_qwen3_moe as _is_qwen3_moe

__all__ = ["CheckpointAddon", "ConsolidatedHFAddon", "HFMetadataExporter", "PeftAddon", "SaveHookArgs"]

#: Name -> the module that defines it.
_HOMES = {
    name: home
    for home, names in {
        "base": ("CheckpointAddon", "SaveHookArgs"),
        "custom_code": (
            "_REMOVED_TRANSFORMERS_SYMBOLS", "_apply_transformers_compat_guards", "_iter_custom_code_classes",
            "_maybe_save_custom_model_code",
        ),
        "hf_config": ("_config_exists", "_maybe_strip_quantization_config", "_save_original_config_json"),
        "huggingface": ("ConsolidatedHFAddon", "HFMetadataExporter"),
        "peft": (
            "PeftAddon", "_extract_target_modules", "_extract_target_parameters", "_get_automodel_peft_metadata",
            "_get_hf_peft_config", "_is_qwen3_moe",
        ),
    }.items()
    for name in names
}  # fmt: skip


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
