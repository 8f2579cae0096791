"""The ways in which two ranks have an adapted model, and how they compute with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from tests.adapters.methods import IDS, ROWS, build, opened
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

ONE, FSDP, DDP, TP, STAGES = "1 process", "FSDP2, 2 ranks", "DDP, 2 ranks", "TP, 2 ranks", "2 pipeline stages"
SPREADS = (ONE, FSDP, DDP, TP, STAGES)
#: Those that compute what one process computes, bit for bit.
SAME_SUMS = (ONE, FSDP, DDP)


def made(name: str, spread: str, root: Path, seed: int) -> nn.Module:
    """A model as this rank has it. Ranks have equal values, which depend on the seed."""
    row = ROWS[name]
    if spread == TP:
        model = _widths(build(name, root, seed, _tensor_parallel(row.family, root)))
    elif spread == STAGES:
        model = build(name, root, seed, _stage(opened(row.family, root), dist.get_rank()))
    else:
        model = build(name, root, seed)
    _stir(model, seed, spread)
    if spread == FSDP:
        mesh = init_device_mesh("cpu", (2,))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        layers = {} if row.whole else {id(layer): layer for each in lists for layer in each}
        for layer in layers.values():
            if type(layer).__name__.endswith(("DecoderLayer", "Block", "ShadowLayer")):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif spread == DDP:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    return model


def _stir(model: nn.Module, seed: int, spread: str) -> None:
    """Give what is trained other values than it begins with, which are often zeros. The same on any topology."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(seed * 1000 + sum(name.encode()))
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05
                if isinstance(parameter, DTensor):
                    noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
                parameter.add_(noise)


def _tensor_parallel(family: str, root: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM, DistributedConfig

    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": "2"}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        root / family, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
    )
    return model


def _widths(model: nn.Module) -> nn.Module:
    """Linear layers say how wide they are, which transformers reads.

    peft 0.21.2 gives factors of layers that are split by columns their shard's width, and transformers 5.23 then fails.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            module.out_features, module.in_features = module.weight.shape
    return model


def _body(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that has the layers, and their name in it."""
    found = next(m for m in model.modules() if hasattr(m, "embed_tokens") or hasattr(m, "layers") or hasattr(m, "h"))
    return found, "h" if hasattr(found, "h") else "layers"


def _stage(model: nn.Module, rank: int) -> nn.Module:
    """One of two pipeline stages."""
    body, layers = _body(model)
    setattr(body, layers, nn.ModuleDict({str(rank): getattr(body, layers)[rank]}))
    dropped = {"layers": ("norm", "embed_tokens"), "h": ("ln_f", "wte")}[layers][rank]
    delattr(body, dropped)
    if layers == "h" and rank == 1:
        del body.wpe
    if rank == 0:
        del model.lm_head
    elif model.config.tie_word_embeddings:
        raise NotImplementedError("tied embeddings are on two stages, and nobody adds up their gradients")
    return model


def forward(name: str, model: nn.Module, spread: str, *, loss: bool = False) -> torch.Tensor | None:
    """A forward pass: the logits, or with `loss` the loss, of which the backward pass has been done as well.

    Of pipeline stages the last one returns logits, the first one nothing.
    """
    if spread == STAGES:
        return _staged(model, loss=loss)
    out = model(input_ids=IDS, labels=IDS, **ROWS[name].inputs)
    if loss:
        out.loss.backward()
        return None
    logits = out.logits
    return (logits.full_tensor() if isinstance(logits, DTensor) else logits).detach().clone()


def _staged(model: nn.Module, *, loss: bool) -> torch.Tensor | None:
    """One microbatch through two stages and, for a loss, back."""
    rank = dist.get_rank()
    body, layers = _body(model)
    hidden = torch.zeros(*IDS.shape, model.config.hidden_size)
    positions = torch.arange(IDS.shape[1]).expand(IDS.shape)
    if rank == 0:
        hidden = body.wte(IDS) + body.wpe(positions) if layers == "h" else body.embed_tokens(IDS)
    else:
        dist.recv(hidden, 0)
        hidden.requires_grad_(loss)
    begun = hidden
    mask = torch.full((IDS.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    around = {} if layers == "h" else {"position_embeddings": body.rotary_emb(hidden, positions)}
    for layer in getattr(body, layers).values():
        out = layer(hidden, attention_mask=mask, **around)
        hidden = out[0] if isinstance(out, tuple) else out
    if rank == 0:
        dist.send(hidden.detach().contiguous(), 1)
        if loss:
            gradient = torch.zeros_like(hidden)
            dist.recv(gradient, 1)
            if hidden.requires_grad:
                hidden.backward(gradient)
        return None
    logits = head(model)((body.ln_f if layers == "h" else body.norm)(hidden))
    if loss:
        model_loss(model, logits).backward()
        dist.send(begun.grad.contiguous(), 0)
        return None
    return logits.detach().clone()


def head(model: nn.Module) -> nn.Module:
    """What makes logits."""
    found: nn.Module = next(m.lm_head for m in model.modules() if hasattr(m, "lm_head"))
    return found


def model_loss(model: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """The loss that transformers computes."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    out: torch.Tensor = ForCausalLMLoss(logits, IDS, vocab_size=model.config.vocab_size)
    return out


def resharded(model: nn.Module) -> None:
    """FSDP2's shards again, which an evaluation leaves gathered in the root group."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered. All ranks that hold parts of it call."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Each parameter and buffer, gathered, and what the optimizer keeps of it. All ranks call."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    out = {name: whole(buffer) for name, buffer in inner.named_buffers(remove_duplicate=False)}
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        out[name] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{name} {key}"] = whole(value)
    return out


def filled(model: nn.Module, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """A model of one process with values that were gathered."""
    with torch.no_grad():
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            tensor.copy_(values[name])
    return model
