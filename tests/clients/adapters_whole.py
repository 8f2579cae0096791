"""What the ranks do with adapters after an evaluation, with more than the adapter trained, and in separate stages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tests.clients.lora import step, values
from tests.peft.models import causal, randomise
from tests.peft.own_models import OwnConfig, dense
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from shardwise import Checkpointer, CheckpointingConfig

#: Adapters that have tensors in FSDP2's root group.
KINDS: dict[str, dict[str, object]] = {
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}
IDS = torch.tensor([[1, 5, 9, 3, 2]])


def adapted(kind: str, seed: int) -> nn.Module:
    """A model with adapters; of kind ``own`` they are the model's, and of kind ``more`` norms are trained as well."""
    import peft

    if kind == "own":
        made: nn.Module = dense(OwnConfig())
    else:
        settings = KINDS.get(kind, {"target_modules": ["q_proj"]})
        made = peft.get_peft_model(causal("llama"), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    if kind == "more":
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name or "embed_tokens" in name)
    randomise(made, seed)
    return made


def sharded(model: nn.Module, *, reshard: bool = True) -> nn.Module:
    """Under FSDP2, layer by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = model.base_model.model if hasattr(model, "base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh)


def evaluate(model: nn.Module) -> torch.Tensor:
    """A forward pass without a backward pass: FSDP2's root group is not resharded after it.

    The model with LoRA of its own has no forward pass; its parameters are gathered as one would, and are the result.
    """
    if hasattr(model, "base_model"):
        with torch.no_grad():
            return model.eval()(input_ids=IDS).logits.clone()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def checkpointer(root: Path, **settings: object) -> Checkpointer:
    """One that saves adapters."""
    return CheckpointingConfig(checkpoint_dir=root, is_peft=True, **settings).build()


def save_evaluated(kind: str, root: str, is_async: bool, reshard: bool) -> None:
    """A step, an evaluation, a save; then restore into another model that has been evaluated as well."""
    directory, config = Path(root), OwnConfig() if kind == "own" else None
    model = sharded(adapted(kind, 1), reshard=reshard)
    optimizer = step(model)
    before = evaluate(model)
    with checkpointer(directory, is_async=is_async) as saver:
        saver.save(0, 1, model, optimizer, peft_config=config)
        assert torch.equal(evaluate(model), before)
    _reshard(model)
    saved = values(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(saved, directory / "values.pt")
    other = sharded(adapted(kind, 9), reshard=reshard)
    fresh = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1.0)
    assert not torch.equal(evaluate(other), before)
    with checkpointer(directory) as loader:
        assert loader.restore(other, fresh) is not None
    assert torch.equal(evaluate(other), before)
    _reshard(other)
    restored = values(other, fresh)
    assert saved.keys() == restored.keys()
    for name, tensors in saved.items():
        assert all(torch.equal(a, b) for a, b in zip(restored[name], tensors, strict=True)), name


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def two_alone(store: str, function: Callable[..., None], *args: object) -> None:
    """Run a function on two ranks, in this process and in one that it forks; exit with the code of what failed."""
    child = os.fork()
    rank = int(child == 0)
    code = 1
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
        function(*args)
        dist.destroy_process_group()
        code = 0
    finally:
        sys.stderr.flush()
        if not rank:
            _, status = os.waitpid(child, 0)
            code = code or int(status != 0)
        if code or rank:
            os._exit(code)


def save_gathered(root: str) -> None:
    """An optimizer that was built while an evaluation had left the parameters gathered."""
    model = sharded(adapted("head", 1))
    evaluate(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with checkpointer(Path(root)) as saver:
        saver.save(0, 1, model, optimizer)


def save_more(root: str) -> None:
    """With norms and embeddings unfrozen beside the adapter."""
    directory = Path(root)
    model = sharded(adapted("more", 1))
    optimizer = step(model)
    with checkpointer(directory) as saver:
        saver.save(0, 1, model, optimizer)
    saved = values(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(saved, directory / "values.pt")


def staged(rank: int, **settings: object) -> nn.Module:
    """One pipeline stage, which is adapted by itself."""
    import peft

    model = causal("llama")
    model.model.layers = nn.ModuleDict({str(rank): model.model.layers[rank]})
    if rank == 0:
        del model.lm_head, model.model.norm
    else:
        del model.model.embed_tokens
    options = {"r": 4, "target_modules": "all-linear", "exclude_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    made: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**{**options, **settings}))
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def save_stages(root: str, ranks: list[int]) -> None:
    """Each stage with the rank of LoRA that is given for it; the last one trains its norm as well."""
    number = dist.get_rank()
    model = staged(number, r=ranks[number])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("model.norm.weight"))
    with CheckpointingConfig(checkpoint_dir=root, is_peft=True, is_async=True).build(0, 0, number) as saver:
        saver.save(0, 1, [model])
