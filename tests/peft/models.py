"""Tiny models for the adapter tests, and a stand-in for the engine that writes what was captured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file

from shardwise.geometry import Box
from shardwise.peft.capture import capture_adapter, hold_adapter
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.tensors import MeshRegister

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}


class Parts:
    """The model state that the hooks are given."""

    def __init__(self, model: Sequence[nn.Module]) -> None:
        self.model = list(model)


def causal(family: str) -> nn.Module:
    """A tiny random model, the same every time."""
    import transformers as tf

    torch.manual_seed(7)
    name = family.removesuffix("-bf16")
    if name == "gpt2":
        model: nn.Module = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    elif name == "qwen3_moe":
        sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes))
    else:
        kinds = {
            "llama": (tf.LlamaForCausalLM, tf.LlamaConfig),
            "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config),
            "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config),
        }
        kind, config = kinds[name.removesuffix("-tied")]
        model = kind(config(**SIZES, tie_word_embeddings=name.endswith("-tied")))
    return model.to(torch.bfloat16).eval() if family.endswith("-bf16") else model.eval()


def randomise(model: nn.Module, seed: int) -> None:
    """Give every trainable parameter values, as training would: a fresh lora_B is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(parameter + noise.to(parameter.dtype))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.tensor([[1, 5, 9, 3, 2]])).logits
    return out


def assemble(held: HeldTensor) -> torch.Tensor:
    """The tensor of the file, from the fragments of a whole parameter."""
    fragments = list(held.fragments)
    out = torch.zeros(held.grid, dtype=fragments[0].data.dtype)
    for fragment in fragments:
        out[where(fragment.box)] = fragment.data
    assert sum(fragment.box.numel for fragment in fragments) == held.spec.numel
    return out.reshape(held.spec.shape)


def where(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))


def save_captured(
    parts: Sequence[nn.Module],
    peft_config: object | None,
    directory: Path,
    *,
    v4_compatible: bool = False,
    legacy_paramwrapper_layout: bool = False,
) -> None:
    """Write every adapter of a single process's model."""
    captured = capture_adapter(
        parts,
        peft_config,
        v4_compatible=v4_compatible,
        legacy_paramwrapper_layout=legacy_paramwrapper_layout,
    )
    for file in captured.files:
        path = directory / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        held = hold_adapter(file.entries, MeshRegister())
        save_file({t.spec.name: assemble(t).contiguous() for t in held}, path, metadata={"format": "pt"})
