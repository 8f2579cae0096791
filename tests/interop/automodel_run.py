"""The run that wrote the files in `automodel/`, so that it can be gone on with; see `make_automodel.py`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tests.engine.setups import digest
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 16,
}


def build(seed: int) -> tuple[LlamaForCausalLM, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """A small model with two parameter groups; sharded where there are several ranks."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    if dist.get_world_size() > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def steps(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    first: int,
    count: int,
) -> list[float]:
    """Losses of some steps."""
    losses = []
    for step in range(first, first + count):
        tokens = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses


def everything(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Every bit of model and optimizer, each tensor whole, and the groups' options. All ranks call."""
    names = {param: name for name, param in model.named_parameters()}
    found: dict[str, object] = {name: digest(param.detach()) for name, param in model.named_parameters()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            found |= {f"{names[param]}/{key}": digest(value) for key, value in sorted(state.items())}
    found["groups"] = [repr({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
    return found
