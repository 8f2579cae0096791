"""Tiny models that bring LoRA modules of their own, shaped as other training libraries shape them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import torch
import torch.nn as nn

HEADS, GROUPS, WIDTH, HIDDEN, INNER, EXPERTS = 4, 2, 4, 16, 24, 4


@dataclass
class OwnConfig:
    """The configuration of a model's own LoRA."""

    dim: int = 4
    alpha: int = 8
    use_dora: bool = False
    target_modules: list[str] = field(default_factory=lambda: ["*_proj"])
    match_all_linear: bool = False
    dropout: float = 0.0
    lora_dtype: torch.dtype | None = None

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "lora_dtype": self.lora_dtype}


class LoRALinear(nn.Linear):
    """Submodules, as in most libraries."""

    def __init__(self, n_in: int, n_out: int, rank: int, scale: float, dora: bool = False) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.weight.requires_grad_(False)
        self.scale = scale
        self.lora_A = nn.Linear(n_in, rank, bias=False)
        self.lora_B = nn.Linear(rank, n_out, bias=False)
        if dora:
            self.lora_magnitude = nn.Parameter(torch.rand(n_out, 1) + 1)

    def delta(self) -> torch.Tensor:
        out: torch.Tensor = self.lora_B.weight @ self.lora_A.weight * self.scale
        return out


class TransposedLoRALinear(nn.Linear):
    """Parameters, (in, rank) and (rank, out)."""

    def __init__(self, n_in: int, n_out: int, rank: int, scale: float) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.weight.requires_grad_(False)
        self.scale = scale
        self.lora_A = nn.Parameter(torch.randn(n_in, rank))
        self.lora_B = nn.Parameter(torch.randn(rank, n_out))

    def delta(self) -> torch.Tensor:
        return (self.lora_A @ self.lora_B).T * self.scale


class GroupedLoRA(nn.Module):
    """Experts in one parameter, with grouped factors."""

    def __init__(self, rank: int, scale: float, swapped: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.swapped = swapped
        self.gate_and_up_projs = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INNER), requires_grad=False)
        self.down_projs = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN), requires_grad=False)
        for name, n_in, n_out in (("gate_and_up", HIDDEN, 2 * INNER), ("down", INNER, HIDDEN)):
            a, b = torch.randn(EXPERTS, n_in, rank), torch.randn(EXPERTS, rank, n_out)
            if swapped:
                a, b = a.transpose(1, 2).contiguous(), b.transpose(1, 2).contiguous()
            self.register_parameter(f"lora_{name}_A", nn.Parameter(a))
            self.register_parameter(f"lora_{name}_B", nn.Parameter(b))

    def delta(self, name: str) -> torch.Tensor:
        """(experts, out, in), as the Hugging Face model keeps its parameters."""
        a, b = self.get_parameter(f"lora_{name}_A"), self.get_parameter(f"lora_{name}_B")
        product = b @ a if self.swapped else (a @ b).transpose(1, 2)
        return product * self.scale


class Attention(nn.Module):
    def __init__(self, config: OwnConfig, combined: bool, kind: type[nn.Module]) -> None:
        super().__init__()
        scale, rows = config.alpha / config.dim, (HEADS + 2 * GROUPS) * WIDTH
        if combined:
            self.qkv_proj = LoRALinear(HIDDEN, rows, config.dim, scale, config.use_dora)
        else:
            self.q_proj = kind(HIDDEN, HEADS * WIDTH, config.dim, scale)
            self.k_proj = kind(HIDDEN, GROUPS * WIDTH, config.dim, scale)
            self.v_proj = nn.Linear(HIDDEN, GROUPS * WIDTH, bias=False).requires_grad_(False)
        self.o_proj = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False).requires_grad_(False)


class Mlp(nn.Module):
    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        scale = config.alpha / config.dim
        self.gate_up_proj = LoRALinear(HIDDEN, 2 * INNER, config.dim, scale, config.use_dora)
        self.down_proj = LoRALinear(INNER, HIDDEN, config.dim, scale, config.use_dora)


class Moe(nn.Module):
    def __init__(self, config: OwnConfig, rank: int, swapped: bool) -> None:
        super().__init__()
        self.experts = GroupedLoRA(rank, config.alpha / config.dim, swapped)


class Layer(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp


class Backbone(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class OwnForCausalLM(nn.Module):
    """Names as in the Hugging Face model but for the combined projections."""

    def __init__(self, layers: list[nn.Module], model_type: str = "own") -> None:
        super().__init__()
        self.model = Backbone(layers)
        self.lm_head = nn.Linear(HIDDEN, 32, bias=False).requires_grad_(False)
        self.config = SimpleNamespace(
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            head_dim=WIDTH,
            num_hidden_layers=len(layers),
            model_type=model_type,
            name_or_path="base/model",
        )


class Qwen3MoeStateDictAdapter:
    """The name is what tells Qwen3 MoE."""


def dense(config: OwnConfig, combined: bool = True, kind: type[nn.Module] = LoRALinear) -> OwnForCausalLM:
    torch.manual_seed(3)
    return OwnForCausalLM([Layer(Attention(config, combined, kind), Mlp(config)) for _ in range(2)])


def moe(config: OwnConfig, qwen: bool = True, rank: int | None = None, swapped: bool = False) -> OwnForCausalLM:
    torch.manual_seed(3)
    layers: list[nn.Module] = [
        Layer(Attention(config, False, LoRALinear), Moe(config, rank or config.dim, swapped)) for _ in range(2)
    ]
    model = OwnForCausalLM(layers)
    if qwen:
        model.state_dict_adapter = Qwen3MoeStateDictAdapter()
    return model
