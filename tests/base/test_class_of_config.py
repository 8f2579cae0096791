"""The configuration of a class, out of a config.json that may be of a model around it."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2VLConfig

from shardwise.base.class_of_config import build_on_meta, configuration, named_classes

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


def composite() -> Qwen2VLConfig:
    text = {**TEXT, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    return Qwen2VLConfig(text_config=text, vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2})


def by_library(kind: type[PretrainedConfig], config: PretrainedConfig, directory: str) -> dict[str, object]:
    config.save_pretrained(directory)
    found: dict[str, object] = kind.from_pretrained(directory).to_dict()
    return found


@pytest.mark.parametrize("kind", ["Qwen2VLTextConfig", "Qwen2VLConfig"])
def test_the_part_that_the_library_takes(kind: str, tmp_path: object) -> None:
    import transformers.models.qwen2_vl.configuration_qwen2_vl as module

    cls = getattr(module, kind)
    found = configuration(cls, composite().to_dict())
    assert isinstance(found, cls)
    expected = by_library(cls, composite(), str(tmp_path))
    assert {**found.to_dict(), "_name_or_path": ""} == {**expected, "_name_or_path": ""}


def test_a_part_that_several_models_have_is_found_by_its_type() -> None:
    whole = AutoConfig.for_model("llava", text_config={"model_type": "llama", **TEXT}).to_dict()
    found = configuration(LlamaConfig, whole)
    assert isinstance(found, LlamaConfig)
    assert found.hidden_size == 16


def test_a_class_of_a_part_is_built_in_its_sizes() -> None:
    entries = {**composite().to_dict(), "architectures": ["Qwen2VLTextModel"]}
    import transformers.models.qwen2_vl.modeling_qwen2_vl as module

    cls = module.Qwen2VLTextModel
    model = build_on_meta(cls, configuration(cls.config_class, entries))
    assert model.get_parameter("norm.weight").shape == (16,)
    assert named_classes({"architectures": ["LlamaForCausalLM"]})
