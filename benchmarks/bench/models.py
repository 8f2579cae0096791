"""Models of a given size: the shapes of a Llama, as a bare module that need not run."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 2048, 5632, 256, 32_000
_LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


class _Leaf(nn.Module):
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))


def _nested(leaves: dict[str, nn.Module]) -> nn.Module:
    root = nn.Module()
    groups: dict[str, dict[str, nn.Module]] = {}
    for name, leaf in leaves.items():
        head, _, rest = name.partition(".")
        if rest:
            groups.setdefault(head, {})[rest] = leaf
        else:
            root.add_module(head, leaf)
    for head, inner in groups.items():
        root.add_module(head, _nested(inner))
    return root


def llama_like(gigabytes: float, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A module on the meta device with a Llama's parameters, about ``gigabytes`` large."""
    per_layer = sum(torch.Size(shape).numel() for shape in _LAYER.values()) * dtype.itemsize
    vocabulary = VOCABULARY if gigabytes > 0.5 else VOCABULARY // 8
    ends = 2 * vocabulary * HIDDEN * dtype.itemsize
    layers = max(1, round((gigabytes * 1e9 - ends) / per_layer))
    leaves: dict[str, nn.Module] = {"model.embed_tokens": _Leaf((vocabulary, HIDDEN), dtype)}
    for number in range(layers):
        for name, shape in _LAYER.items():
            leaves[f"model.layers.{number}.{name}"] = _Leaf(shape, dtype)
    leaves["model.norm"] = _Leaf((HIDDEN,), dtype)
    leaves["lm_head"] = _Leaf((vocabulary, HIDDEN), dtype)
    return _nested(leaves)


def shard(model: nn.Module, mesh: DeviceMesh, dim: int = 0) -> nn.Module:
    """Shard such a model by FSDP2 over ``mesh`` along ``dim``, or the last dimension of parameters that lack it."""

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(min(dim, parameter.ndim - 1))

    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    return model


def sharded(gigabytes: float, mesh: DeviceMesh | None, seed: int = 0, dim: int = 0) -> nn.Module:
    """Such a model in warm memory with random bytes, sharded over ``mesh`` if one is given."""
    model = llama_like(gigabytes)
    if mesh is not None:
        shard(model, mesh, dim)
    model.to_empty(device="cpu")
    fill(model, seed)
    return model


def local_tensors(model: nn.Module) -> list[torch.Tensor]:
    """This rank's memory of every parameter."""
    return [getattr(p, "_local_tensor", p).detach() for p in model.parameters()]


def fill(model: nn.Module, seed: int) -> None:
    """Fill this rank's memory with random bytes, all of it different in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randint(-(2**15), 2**15 - 1, (2**20 + 7,), dtype=torch.int16, generator=generator)
    for number, tensor in enumerate(local_tensors(model)):
        flat = tensor.view(torch.int16).view(-1)
        for start in range(0, flat.numel(), pattern.numel()):
            part = flat[start : start + pattern.numel()]
            torch.add(pattern[: part.numel()], number * 131 + start % 97, out=part)


def total_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of the whole model."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
