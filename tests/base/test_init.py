"""Materialising: memory, values, buffers that are in no file, ties."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.base.support import assert_same, checkpointer, llama_config, on_meta
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from shardwise.checkpointing import Checkpointer
from shardwise.errors import MisuseError

_ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 500000.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
}
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _same_buffers(model: nn.Module, expected: nn.Module) -> None:
    have = dict(model.named_buffers())
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(have[name], buffer, rtol=0, atol=0)
    assert all(p.device.type == "cpu" and torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("kind", _ROPES)
def test_every_kind_of_rotary_table(kind: str) -> None:
    config = llama_config(rope_parameters=_ROPES[kind])
    fresh = on_meta(LlamaForCausalLM, config)
    Checkpointer.initialize_model_weights(fresh, "cpu")
    _same_buffers(fresh, LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (GPT2LMHeadModel, GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20)),
        (ViTModel, ViTConfig(**_SMALL, image_size=32, patch_size=16)),
        (
            CLIPModel,
            CLIPConfig(
                text_config=_SMALL | {"vocab_size": 50, "eos_token_id": 2},
                vision_config=_SMALL | {"image_size": 32, "patch_size": 16},
            ),
        ),
        (
            WhisperForConditionalGeneration,
            WhisperConfig(
                vocab_size=60,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                max_source_positions=30,
                max_target_positions=20,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            ),
        ),
        (
            Gemma3ForConditionalGeneration,
            Gemma3Config(
                text_config=_SMALL | {"vocab_size": 60, "head_dim": 8, "num_key_value_heads": 2},
                vision_config=_SMALL | {"image_size": 28, "patch_size": 14},
                mm_tokens_per_image=4,
            ),
        ),
    ],
    ids=["gpt2", "vit", "clip", "whisper", "gemma3"],
)
def test_buffers_of_other_models(cls: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    fresh = on_meta(cls, config)
    Checkpointer.initialize_model_weights(fresh, "cpu")
    _same_buffers(fresh, cls(config))


class OldRotary(nn.Module):
    """As custom code of transformers 4 has it: a table in a buffer, another in a plain attribute."""

    def __init__(self, dim: int, base: float = 10000.0, device: object = None) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        table = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
        self.register_buffer("inv_freq", table, persistent=False)
        self.original = self.inv_freq * 2
        self.register_buffer("mask", torch.ones(dim, dim, dtype=torch.bool).tril(), persistent=False)


class Attention(nn.Module):
    def __init__(self, width: int, seats: int) -> None:
        super().__init__()
        self.width, self._seats = width, seats
        self.proj = nn.Linear(width, width)
        self.register_buffer("bias", torch.full((seats, seats), -1.5).triu(), persistent=False)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=3)
        self.rotary = OldRotary(8, 500.0)
        self.attention = Attention(8, 5)
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.full((3,), 7.0))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight


def test_plain_modules_are_built_again_from_what_they_keep() -> None:
    with torch.device("meta"):
        fresh = Plain()
    Checkpointer.initialize_model_weights(fresh, "cpu")
    expected = Plain()
    _same_buffers(fresh, expected)
    assert torch.equal(fresh.rotary.original, expected.rotary.original)
    assert torch.equal(fresh.gain, expected.gain)
    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(fresh.embed.weight[3], torch.zeros(8))
    assert torch.equal(fresh.norm.weight, torch.ones(8))


class Forgetful(nn.Module):
    def __init__(self, size: int, scale: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(size).float() * scale, persistent=False)


def test_a_table_that_nothing_recomputes_is_an_error() -> None:
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(2, 2), Forgetful(4))
    with pytest.raises(MisuseError, match=r"1 tensors have no initial values.*1\.table.*reset_parameters"):
        Checkpointer.initialize_model_weights(fresh, "cpu")


class Titan(nn.Module):
    """As torchtitan's models: one method for weights and tables."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4).float() * scale, persistent=False)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        assert buffer_device is not None
        nn.init.trunc_normal_(self.layer.weight, std=0.5)
        nn.init.zeros_(self.layer.bias)
        with torch.device(buffer_device):
            self.table = torch.arange(4).float() * 3


def test_own_initialisation_comes_first() -> None:
    with torch.device("meta"):
        fresh = Titan(3.0)
    Checkpointer.initialize_model_weights(fresh, "cpu")
    assert torch.equal(fresh.table, torch.arange(4).float() * 3)
    assert "table" not in fresh.state_dict()
    assert 0.2 < fresh.layer.weight.std() < 0.8


def test_random_values_follow_from_the_seed_and_leave_the_generator_alone() -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = on_meta(LlamaForCausalLM, llama_config())
        before = torch.get_rng_state()
        Checkpointer.initialize_model_weights(model, "cpu")
        assert torch.equal(torch.get_rng_state(), before)
        return dict(model.state_dict())

    first, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    weights = [v for n, v in first.items() if "proj" in n]
    values = torch.cat([w.flatten() for w in weights])
    assert math.isclose(values.std().item(), 0.02, rel_tol=0.05)
    assert len({w.flatten()[0].item() for w in weights}) == len(weights)  # no two draw the same


def test_what_has_memory_is_moved_and_kept() -> None:
    model = Plain()
    kept = model.rotary.inv_freq.clone()
    with torch.device("meta"):
        model.head = nn.Linear(8, 20, bias=False)
    Checkpointer.initialize_model_weights(model, "cpu")
    assert torch.equal(model.rotary.inv_freq, kept)
    assert torch.isfinite(model.head.weight).all()


def emptied(model: nn.Module) -> nn.Module:
    """On the CPU with whatever was in the memory: here, what no table has."""
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(1)
    return model


@pytest.mark.parametrize("kind", _ROPES)
def test_tables_are_recomputed_after_to_empty(kind: str, tmp_path: Path) -> None:
    config = llama_config(rope_parameters=_ROPES[kind])
    expected = LlamaForCausalLM(config)
    expected.save_pretrained(tmp_path / "base")
    fresh, loaded = emptied(on_meta(LlamaForCausalLM, config)), emptied(on_meta(LlamaForCausalLM, config))
    Checkpointer.initialize_model_weights(fresh, "cpu")
    _same_buffers(fresh, expected)
    with checkpointer(tmp_path) as engine:
        engine.load_base_model(loaded, "cpu", None, str(tmp_path / "base"))
    assert_same(loaded, expected)


def test_what_nothing_recomputes_keeps_its_values(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Forgetful(4), OldRotary(8, 500.0))
    model[1].table.add_(1)
    model[2].inv_freq.zero_()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for load in (True, False):
        with checkpointer(tmp_path) as engine:
            engine.load_base_model(model, "cpu", None, str(tmp_path / "model.safetensors"), load_base_model=load)
        assert torch.equal(model[1].table, torch.arange(4).float() * 2 + 1)
        assert torch.equal(model[2].inv_freq, OldRotary(8, 500.0).inv_freq)
    Checkpointer.initialize_model_weights(model, "cpu")
    assert torch.equal(model[1].table, torch.arange(4).float() * 2 + 1)
