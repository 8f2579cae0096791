"""What the ranks do with adapters: adapt, shard in several ways, take a step, save and restore."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tests.clients.training import shard
from tests.peft.models import causal, randomise
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from shardwise import Checkpointer, CheckpointingConfig

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: Name -> family and settings of LoRA.
ADAPTERS: dict[str, tuple[str, dict[str, object]]] = {
    "dense": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6},
            "alpha_pattern": {"k_proj": 3},
            "use_rslora": True,
            "modules_to_save": ["lm_head"],
        },
    ),
    "plain": ("llama", {"target_modules": LINEAR}),
    "dora": ("qwen3", {"target_modules": "all-linear", "use_dora": True}),
    "experts": ("qwen3_moe", {"target_modules": LINEAR, "target_parameters": EXPERTS}),
}
Values = dict[str, list[torch.Tensor]]


def adapted(name: str, seed: int = 0, base: str | None = None) -> nn.Module:
    """A model with adapters, the same in every process."""
    import peft

    family, settings = ADAPTERS[name]
    model = causal(family)
    if base is not None:
        model.name_or_path = base
        model.config._name_or_path = base
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    made: nn.Module = peft.get_peft_model(model, config)
    randomise(made, seed)
    return made


def _tensor_parallel(name: str) -> Placement:
    if "o_proj" in name:
        return Shard(1) if "lora_A" in name else Replicate()
    return Shard(0) if "lora_B" in name or "magnitude" in name else Replicate()


def spread(model: nn.Module, how: str) -> nn.Module:
    """The model as this rank has it."""
    layers = model.base_model.model.model.layers
    if how == "fsdp":
        for layer in layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return shard(model)
    if how == "pipeline":
        rank, holder = dist.get_rank(), model.base_model.model
        holder.model.layers = nn.ModuleDict({str(rank): layers[rank]})
        if rank == 0:
            del holder.lm_head, holder.model.norm
        else:
            del holder.model.embed_tokens
        return model
    assert how == "fsdp+tp"
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for name, module in list(model.named_modules()):
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                placed = distribute_tensor(parameter.detach(), mesh["tp"], [_tensor_parallel(f"{name}.{leaf}")])
                module._parameters[leaf] = nn.Parameter(placed, requires_grad=parameter.requires_grad)
    for layer in layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def step(model: nn.Module) -> torch.optim.Optimizer:
    """One step over the adapter's parameters, with gradients that need no forward pass of a whole pipeline."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for parameter in trainable:
        parameter.grad = parameter.detach() * 0.5 + 0.01
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    """Name -> the whole parameter and its moments, of the parameters that this rank trains. All ranks call."""
    out = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            tensors = [parameter, *(state[key] for key in ("step", "exp_avg", "exp_avg_sq") if key in state)]
            out[name] = [_whole(tensor) for tensor in tensors]
    return out


def checkpointer(root: Path, how: str, **settings: object) -> Checkpointer:
    """One that saves adapters."""
    config = CheckpointingConfig(checkpoint_dir=root, is_peft=True, collective_timeout_seconds=60, **settings)
    return config.build(pp_rank=dist.get_rank() if how == "pipeline" else None)


def save(name: str, how: str, root: str, base: str | None = None, **settings: object) -> None:
    """Save both ways; what was saved is put aside."""
    directory = Path(root)
    model = spread(adapted(name, base=base), how)
    optimizer = step(model)
    torch.save(values(model, optimizer), directory / f"saved_{dist.get_rank()}.pt")
    with checkpointer(directory, how, **settings) as saver:
        saver.save_model([model], directory / "alone")
        saver.save(0, 1, [model], optimizer)


def _parallelized(seed: int, fsdp: bool) -> nn.Module:
    """A model whose base layers and factors torch has parallelized, and FSDP2 around it or not."""
    model = adapted("plain", seed)
    size = dist.get_world_size() // 2 if fsdp else 1
    mesh = init_device_mesh("cpu", (size, 2), mesh_dim_names=("dp", "tp"))
    layers = model.base_model.model.model.layers
    for layer in layers:
        plan: dict[str, ParallelStyle] = {
            f"self_attn.{name}.{leaf}": ColwiseParallel()
            for name in ("q_proj", "k_proj", "v_proj")
            for leaf in ("base_layer", "lora_B.default")
        }
        plan |= {f"self_attn.o_proj.{leaf}": RowwiseParallel() for leaf in ("base_layer", "lora_A.default")}
        parallelize_module(layer, mesh["tp"], plan)
        if fsdp:
            fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]) if fsdp else model


def save_parallelized(root: str, fsdp: bool, is_async: bool) -> None:
    """A step, an evaluation, a save; then restore into another that has been evaluated as well."""
    directory, ids = Path(root), torch.tensor([[1, 5, 9, 3, 2]])
    models = [_parallelized(seed, fsdp) for seed in (1, 9)]
    optimizers = [step(models[0]), torch.optim.AdamW([p for p in models[1].parameters() if p.requires_grad], lr=1.0)]
    with torch.no_grad():
        before, other = (model.eval()(input_ids=ids).logits.clone() for model in models)
    assert not torch.equal(before, other)
    with checkpointer(directory, "fsdp", is_async=is_async) as saver:
        saver.save(0, 1, models[0], optimizers[0])
        saver.restore(models[1], optimizers[1])
    with torch.no_grad():
        assert torch.equal(models[1].eval()(input_ids=ids).logits, before)
    if fsdp:
        for model in models:
            model.reshard()
    saved, restored = (values(*pair) for pair in zip(models, optimizers, strict=True))
    for name, tensors in saved.items():
        assert all(torch.equal(a, b) for a, b in zip(restored[name], tensors, strict=True)), name
    torch.save(saved, directory / f"saved_{dist.get_rank()}.pt")


def save_variant(name: str, root: str, settings: dict[str, object]) -> None:
    """`save` under FSDP2 with other settings."""
    save(name, "fsdp", root, **settings)


def restore(name: str, how: str, root: str) -> None:
    """Restore into another model, spread in another way; what it then has is put aside."""
    directory = Path(root)
    model = spread(adapted(name, seed=9), how)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with checkpointer(directory, how) as loader:
        assert loader.restore([model], optimizer) is not None
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
    torch.save(values(model, optimizer), directory / f"restored_{how}_{dist.get_rank()}.pt")
    alone = spread(adapted(name, seed=8), how)
    with checkpointer(directory, how) as loader:
        loader.load_model([alone], directory / "alone" / "model")
    for (key, ours), (_, theirs) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.equal(_whole(ours), _whole(theirs)), key


def save_without_a_stage(root: str) -> None:
    """Both ranks have the first stage: the second is on no rank of the group."""
    model = adapted("dense")
    holder = model.base_model.model
    holder.model.layers = nn.ModuleDict({"0": holder.model.layers[0]})
    with checkpointer(Path(root), "fsdp") as saver:
        saver.save(0, 1, [model])


def save_without_a_shard(root: str) -> None:
    """Each rank saves by itself what two hold together."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    model = spread(adapted("dense"), "fsdp")
    config = CheckpointingConfig(checkpoint_dir=Path(root) / str(dist.get_rank()), is_peft=True)
    with config.build(process_group=groups[dist.get_rank()]) as saver:
        saver.save(0, 1, model)
