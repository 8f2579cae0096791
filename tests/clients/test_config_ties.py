"""Ties by configuration that memory does not have, and the other way round: the export says what its tensors say."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.clients.opening import opened, same_weights, tensors_of
from tests.clients.training import EXPORT
from tests.clients.wrapped import RewardModel, build_checkpointer, llama, save_loose
from tests.support.ranks import run
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from shardwise.ops.consolidate import consolidate

IDS = torch.arange(8).view(1, 8)
LOCAL = [{}, {"single_rank_consolidation": True}, {"is_async": True}]


def loose(seed: int = 1) -> nn.Module:
    model = llama(seed, tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    return model


def config_of(directory: Path, name: str = "config.json") -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / name).read_text())
    return found


def is_both(directory: Path, model: nn.Module, opener: str = "AutoModelForCausalLM") -> None:
    """Whether a reader that ties by the configuration, and one that does not, get both tensors."""
    same_weights(opened(directory, opener), model.state_dict())


@pytest.mark.parametrize("settings", LOCAL)
@pytest.mark.parametrize("wrap", [lambda model: model, RewardModel])
def test_the_configuration_is_made_to_say_it(
    tmp_path: Path, settings: dict[str, object], wrap: object, caplog: pytest.LogCaptureFixture
) -> None:
    model, again = loose(1), wrap(loose(2))
    with build_checkpointer(tmp_path, **settings) as saver, caplog.at_level(logging.WARNING, logger="shardwise"):
        path = saver.save(0, 1, wrap(model))
        saver.restore(again)
    assert config_of(path / EXPORT)["tie_word_embeddings"] is False
    assert any("ties lm_head.weight to model.embed_tokens.weight" in record.message for record in caplog.records)
    is_both(path / EXPORT, model)
    restored = {name.removeprefix("backbone."): value for name, value in again.state_dict().items()}
    assert all(torch.equal(value, restored[name]) for name, value in model.state_dict().items())
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("is_equal", [False, True])
@pytest.mark.parametrize("settings", [{}, {"single_rank_consolidation": True}])
def test_two_ranks_compare_what_they_hold_parts_of(tmp_path: Path, is_equal: bool, settings: dict[str, object]) -> None:
    assert run(2, save_loose, str(tmp_path), is_equal, settings) == [True, True]
    export = tmp_path / "run" / "LATEST" / EXPORT
    assert config_of(export)["tie_word_embeddings"] is is_equal
    same_weights(opened(export, "AutoModelForCausalLM"), torch.load(tmp_path / "whole.pt"))


def test_a_later_save_of_values_that_have_become_equal_ties_again(tmp_path: Path) -> None:
    model = loose()
    with build_checkpointer(tmp_path) as saver:
        first = saver.save(0, 1, model)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        second = saver.save(0, 2, model)
    said = [config_of(path / EXPORT)["tie_word_embeddings"] for path in (first, second)]
    assert said == [False, True]
    is_both(second / EXPORT, model)


def test_shards_are_consolidated_with_what_the_tensors_say(tmp_path: Path) -> None:
    model = loose()
    with build_checkpointer(tmp_path, save_consolidated="false") as saver:
        path = saver.save(0, 1, model)
    consolidate(path)
    assert config_of(path / EXPORT)["tie_word_embeddings"] is False
    is_both(path / EXPORT, model)


def test_readers_of_transformers_4_are_told_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama(3, tie_word_embeddings=True).save_pretrained(base)
    model = loose()
    with build_checkpointer(tmp_path / "run", model_repo_id=str(base), v4_compatible=True) as saver:
        path = saver.save(0, 1, model)
    for name in ("config.json", "config.v5.json"):
        assert config_of(path / EXPORT, name)["tie_word_embeddings"] is False
    is_both(path / EXPORT, model)


def test_a_nested_configuration_is_told_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, **heads}, vision_config={**vision, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    assert config.tie_word_embeddings
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    with build_checkpointer(tmp_path) as saver:
        path = saver.save(0, 1, model)
    found = config_of(path / EXPORT)
    assert found["tie_word_embeddings"] is False
    assert found["text_config"]["tie_word_embeddings"] is False
    is_both(path / EXPORT, model, "AutoModelForImageTextToText")


def test_where_only_some_ties_are_gone_every_name_is_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    with build_checkpointer(tmp_path) as saver:
        path = saver.save(0, 1, model)
        again = opened(path / EXPORT, "AutoModelForSeq2SeqLM")
        same_weights(again, model.state_dict())
        fresh = T5ForConditionalGeneration(T5Config(**sizes))
        fresh.lm_head.weight = nn.Parameter(fresh.lm_head.weight.detach() * 0)
        saver.restore(fresh)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied_at_first", [False, True])
def test_an_untied_configuration_of_shared_memory_gets_both_names(tmp_path: Path, tied_at_first: bool) -> None:
    model = llama(1, tie_word_embeddings=tied_at_first)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = model.model.embed_tokens.weight
    with build_checkpointer(tmp_path) as saver:
        path = saver.save(0, 1, model)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(path / EXPORT / "model.safetensors").keys()
    is_both(path / EXPORT, model)


def test_what_is_tied_in_both_is_written_once(tmp_path: Path) -> None:
    model = llama(1, tie_word_embeddings=True)
    with build_checkpointer(tmp_path) as saver:
        path = saver.save(0, 1, model)
    assert config_of(path / EXPORT)["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors_of(path / EXPORT)
