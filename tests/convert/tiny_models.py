"""Tiny random models of every type for which transformers has conversion rules, built by one recipe."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LIMIT = 50_000_000  # parameters

_LAYERS = {
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_hidden_layers_text": 2,
    "depth": 2,
    "vision_depth": 2,
    "text_layers": 2,
    "perceiver_depth": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
_COUNTS = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 64,
}
_SIZES = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "hidden_dim": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "projection_dim": 32,
    "out_hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")

#: From the strongest to the gentlest: which fields are made small.
_RECIPES = ({**_LAYERS, **_COUNTS, **_SIZES}, {**_LAYERS, **_COUNTS}, _LAYERS, {})

#: What no common rule can know about a type.
_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
_MIXED = {"mlp_layer_types": ["dense", "sparse"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DOTS3 = {
    "text_config": {"num_key_value_heads": 4},
    "vision_config": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
}
_EMU3 = {"vocabulary_map": {"<|extra_200|>": 1, "<image>": 2}, "vq_config": {"base_channels": 32, "codebook_size": 64}}
_VIBEVOICE = {f"{kind}_tokenizer_encoder_config": {"num_filters": 4} for kind in ("acoustic", "semantic")}
_SAPIENS = {
    "upsample_out_channels": [8, 8],
    "upsample_kernel_sizes": [4, 4],
    "conv_out_channels": [8],
    "conv_kernel_sizes": [1],
}
_OVERRIDES: dict[str, dict[str, object]] = {
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    "ConditionalDetrForSegmentation": _RESNET,
    "ConditionalDetrModel": _RESNET,
    "DetrForSegmentation": _RESNET,
    "DetrModel": _RESNET,
    "deformable_detr": _RESNET,
    "cosmos3_edge": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "d_fine": {"backbone_config": {"model_type": "hgnet_v2", "out_features": ["stage2", "stage3", "stage4"]}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32, **_MIXED},
    "Dots3NoteForConditionalGeneration": _DOTS3,
    "Dots3NoteModel": _DOTS3,
    "Dots3NoteTextModel": {"num_key_value_heads": 4},
    "emu3": _EMU3,
    "Emu3Model": _EMU3,
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "beam": _MIXED,
    "flint": {"mlp_only_layers": [0]},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, **_MIXED}},
    "glm5_next_text": {"num_key_value_heads": 4, **_MIXED},
    "inkling_mm_model": {"text_config": _MIXED},
    "step3p7": {"text_config": {**_MIXED, "share_expert_dim": 24}},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MimiModel": {"upsample_groups": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
        "word_timestamp_config": {"blank_token_id": 5},
    },
    "NemotronH_Omni_Reasoning_V3": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 24}},
    },
    "vibevoice_asr": _VIBEVOICE,
    "VibeVoiceAsrModel": _VIBEVOICE,
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "hy_v4_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_loop_text": {"unpadded_vocab_size": 90},
    "esm": {"vocab_size": 40, "pad_token_id": 1, "mask_token_id": 2},
}

_OVERRIDES |= {
    key: {"use_swiglu_ffn": True} for key in ("Dinov2Model", "Dinov2WithRegistersModel", "Tipsv2VisionModel")
}
_OVERRIDES |= {"tipsv2": {"vision_config": {"use_swiglu_ffn": True}}}
_OVERRIDES |= {
    f"Sapiens2For{task}": {"head_config": _SAPIENS}
    for task in ("ImageMatting", "NormalEstimation", "PointmapEstimation", "PoseEstimation", "SemanticSegmentation")
}

#: Reasons that the error does not give.
_REASONS: dict[str, str] = {
    "mlcd_vision": "no model has this type; MLCD's is mlcd_vision_model, for which there are no rules",
    "PPChart2TableModel": "transformers has a configuration and no model of it",
    "timm_wrapper": "needs the package timm",
    "xCLIPTextModel": "no class has this name; X-CLIP's is XCLIPTextModel, for which there are no rules",
    "xCLIPVisionModel": "no class has this name; X-CLIP's is XCLIPVisionModel, for which there are no rules",
}


class CannotBuildError(Exception):
    """No tiny random model of the type can be made here."""


def registered() -> list[str]:
    """Every model type and class name for which transformers has rules."""
    from transformers import conversion_mapping

    return sorted({*conversion_mapping._build_checkpoint_conversion_mapping()} - {"legacy"}, key=str.lower)


def build(key: str) -> torch.nn.Module:
    """Build a tiny random model for a model type or class name.

    Raises:
        CannotBuildError: With the reason.
    """
    if key == "MtpModel":
        return _mtp_model()
    try:
        cls = model_class(key)
    except CannotBuildError as error:
        raise CannotBuildError(_REASONS.get(key) or str(error)) from None
    reasons: list[str] = []
    with quiet():
        for recipe in _RECIPES:
            try:
                config = _config(cls.config_class, recipe, _OVERRIDES.get(key, {}))
                with torch.device("meta"):
                    size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
                if size > LIMIT:
                    raise CannotBuildError(f"{size / 1e6:.0f} million parameters")
                torch.manual_seed(0)
                model = cls(config)
            except Exception as error:  # noqa: BLE001  whatever a model's code raises is the reason that is recorded
                reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
                continue
            _fill(model)
            return model.eval()
    raise CannotBuildError(_REASONS.get(key) or reasons[0])


def _mtp_model() -> torch.nn.Module:
    """The layers that predict further tokens: transformers makes their class out of another model."""
    from transformers.modeling_layers import MtpModel

    main = build("deepseek_v3")
    with quiet():
        model = MtpModel(main, num_mtp_layers=2)
    _fill(model)
    return model.eval()


def model_class(key: str) -> type:
    """The class to build: the named one, or the type's fullest task class."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if key not in CONFIG_MAPPING_NAMES:
        cls = getattr(transformers, key, None)
        if cls is None:
            cls = _search(key)
        if cls is None:
            raise CannotBuildError("transformers has rules for this name, but no model class of it")
        if getattr(cls, "config_class", None) is None:
            raise CannotBuildError("the class has no configuration of its own")
        return cls
    for table in _TASKS:
        name = getattr(modeling_auto, f"{table}_NAMES", {}).get(key)
        if name is not None:
            return getattr(transformers, name if isinstance(name, str) else name[0])
    config = getattr(transformers, CONFIG_MAPPING_NAMES[key])
    for name in dir(inspect.getmodule(config)):
        found = getattr(transformers, name, None)
        if inspect.isclass(found) and getattr(found, "config_class", None) is config:
            return found
    found = _search_config(config)
    if found is None:
        raise CannotBuildError("no model class for this configuration")
    return found


_TASKS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "MODEL_FOR_IMAGE_SEGMENTATION_MAPPING",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_MAPPING",
)


def _modeling_module(config: type) -> object | None:
    import importlib

    name = config.__module__.replace(".configuration_", ".modeling_")
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _search(name: str) -> type | None:
    """A class that is not exported, wherever its model is."""
    import pkgutil
    from pathlib import Path

    import transformers.models as models

    for found in pkgutil.iter_modules(models.__path__):
        path = Path(models.__path__[0]) / found.name / f"modeling_{found.name}.py"
        if path.exists() and f"class {name}(" in path.read_text(encoding="utf-8"):
            import importlib

            return getattr(importlib.import_module(f"transformers.models.{found.name}.modeling_{found.name}"), name)
    return None


def _search_config(config: type) -> type | None:
    module = _modeling_module(config)
    classes = [value for value in vars(module or object()).values() if inspect.isclass(value)] if module else []
    fitting = [
        c for c in classes if getattr(c, "config_class", None) is config and not c.__name__.endswith("PreTrainedModel")
    ]
    return fitting[-1] if fitting else None


def _config(cls: type, small: dict[str, object], overrides: dict[str, object]) -> object:
    return cls(**_merged(_shrunk(cls(), small), overrides))


def _merged(values: dict[str, object], overrides: dict[str, object]) -> dict[str, object]:
    """Overrides win; one that names a model type replaces, any other dict goes into the one that is there."""
    out = dict(values)
    for name, value in overrides.items():
        inner = out.get(name)
        merge = isinstance(value, dict) and isinstance(inner, dict) and "model_type" not in value
        out[name] = _merged(inner, value) if merge else value
    return out


def _shrunk(config: object, small: dict[str, object]) -> dict[str, object]:
    values: dict[str, object] = {}
    known = config.to_dict()
    for name, value in small.items():
        now = known.get(name)
        if isinstance(now, int) and isinstance(value, int) and not isinstance(now, bool):
            values[name] = min(now, value)
    if "vocab_size" in values:
        values |= {name: 1 for name in _IDS if isinstance(known.get(name), int)}
    if isinstance(known.get("depths"), (list, tuple)) and "num_layers" in small:
        values["depths"] = [1] * len(known["depths"])
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if sub is not None and hasattr(sub, "to_dict"):
            inner = _shrunk(sub, small)
            values[name] = {**inner, "model_type": sub.model_type} if sub.model_type else inner
    return values


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    """Give every element of every tensor a value of its own, so that no mistake is hidden by equal ones."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


@contextmanager
def quiet() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


#: Types that the recipe does not reach; docs/conversions.md says why. A type that drops out otherwise fails its test.
UNBUILT = frozenset(
    {
        "PPChart2TableModel",
        "mlcd_vision",
        "timm_wrapper",
        "xCLIPTextModel",
        "xCLIPVisionModel",
    }
)

#: Types that take seconds.
SLOW = frozenset(
    {
        "ViTMAEForPreTraining",
        "maskformer",
        "pp_doclayout_v2",
        "pp_doclayout_v3",
        "pp_doclayout_v4",
        "rt_detr",
        "rt_detr_v2",
        "sam3_tracker_video",
        "tipsv2_dpt",
        "Tipsv2DptForDepthEstimation",
        "Tipsv2DptForNormalEstimation",
        "MimiDecoderModel",
        "unlimited_ocr",
        "videomae",
        "d_fine",
        "sam3_tracker",
        "MimiModel",
        "Tipsv2DptForSemanticSegmentation",
        "ConditionalDetrForSegmentation",
        "qwen3_omni_moe",
    }
)
