"""Hugging Face and PEFT metadata around the weights."""

from shardwise.addons.base import CheckpointAddon, SaveHookArgs
from shardwise.addons.custom_code import _REMOVED_TRANSFORMERS_SYMBOLS as _REMOVED_TRANSFORMERS_SYMBOLS
from shardwise.addons.custom_code import _apply_transformers_compat_guards as _apply_transformers_compat_guards
from shardwise.addons.custom_code import _iter_custom_code_classes as _iter_custom_code_classes
from shardwise.addons.custom_code import _maybe_save_custom_model_code as _maybe_save_custom_model_code
from shardwise.addons.hf_config import _config_exists as _config_exists
from shardwise.addons.hf_config import _maybe_strip_quantization_config as _maybe_strip_quantization_config
from shardwise.addons.hf_config import _save_original_config_json as _save_original_config_json
from shardwise.addons.huggingface import ConsolidatedHFAddon, HFMetadataExporter
from shardwise.addons.peft import PeftAddon
from shardwise.addons.peft import _extract_target_modules as _extract_target_modules
from shardwise.addons.peft import _extract_target_parameters as _extract_target_parameters
from shardwise.addons.peft import _get_automodel_peft_metadata as _get_automodel_peft_metadata
from shardwise.addons.peft import _get_hf_peft_config as _get_hf_peft_config
from shardwise.peft.builtin_lora import is_qwen3_moe

__all__ = ["CheckpointAddon", "ConsolidatedHFAddon", "HFMetadataExporter", "PeftAddon", "SaveHookArgs"]

_is_qwen3_moe = is_qwen3_moe
