"""Small Llamas, and the same as others write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

TOKENS = torch.arange(1, 9).view(1, 8)


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A model of a few thousand parameters, with fewer heads of k than of q."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()  # type: ignore[arg-type]


def base(directory: Path, model: PreTrainedModel, **changes: object) -> Path:
    """What a base model's directory has beside its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text("{}")
    if changes:
        found = json.loads((directory / "config.json").read_text())
        found = {name: value for name, value in {**found, **changes}.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(found))
    return directory


def outputs(model: nn.Module) -> torch.Tensor:
    """The logits of a few tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def opens_as(directory: Path, model: PreTrainedModel) -> bool:
    """Whether transformers opens a directory with nothing missing or left over, and it is this model."""
    opened, told = type(model).from_pretrained(directory, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return torch.equal(outputs(opened.eval()), outputs(model))


# --- torchtitan's ----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Rotates neighbouring elements of a head together, or those half a head apart."""

    def __init__(self, config: LlamaConfig, *, interleaved: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size, self.interleaved = config.hidden_size // self.heads, interleaved
        self.wq = nn.Linear(config.hidden_size, self.heads * self.size, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.kv_heads * self.size, bias=False)
        self.wv = nn.Linear(config.hidden_size, self.kv_heads * self.size, bias=False)
        self.wo = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """By an angle for each position and pair."""
        half = self.size // 2
        angles = torch.outer(torch.arange(x.shape[1]).float(), 10000 ** -(torch.arange(half).float() / half))
        cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
        a, b = (x[..., 0::2], x[..., 1::2]) if self.interleaved else (x[..., :half], x[..., half:])
        pair = (a * cos - b * sin, a * sin + b * cos)
        return torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.rotated(self.wq(x).view(batch, length, self.heads, self.size))
        k = self.rotated(self.wk(x).view(batch, length, self.kv_heads, self.size))
        v = self.wv(x).view(batch, length, self.kv_heads, self.size)
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, dim=2) for each in (k, v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, *, interleaved: bool) -> None:
        super().__init__()
        self.attention = Attention(config, interleaved=interleaved)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Titan(nn.Module):
    """A Llama with torchtitan's names, written for these tests from the formulas of the paper."""

    def __init__(self, config: LlamaConfig, *, interleaved: bool = True) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, interleaved=interleaved) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleDict({str(number): block for number, block in enumerate(blocks)})
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x)
        return self.output(self.norm(x))
