"""Checkpoints that torch itself writes rank by rank, as verl and loops of one's own do: what each rank runs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tests.ops.damaged import gpt2, save_dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

#: No dimension is a multiple of the ranks: shards are uneven, and some are empty.
UNEVEN = {"n_embd": 6, "n_head": 2, "vocab_size": 33, "n_positions": 17}


def verl_directory(root: Path, **changes: object) -> Path:
    """What verl puts beside its files: the model's configuration in ``huggingface``, and a note of its own."""
    config = gpt2(**changes).config  # type: ignore[arg-type]
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(root / "huggingface")
    (root / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
    return root


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    # A tied tensor under each of its names, as state_dict() gives them.
    return dict(model.state_dict())


def save_fsdp2(root: str, seed: int, changes: dict[str, object]) -> None:
    """FSDP2 over all ranks; the optimizer's file is beside, as verl writes it."""
    model = gpt2(seed, **changes)
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.save(_state(model), Path(root) / f"model_world_size_{world}_rank_{rank}.pt")
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save(optimizer, Path(root) / f"optim_world_size_{world}_rank_{rank}.pt")
    torch.save({"lr_scheduler": {"last": 3}}, Path(root) / f"extra_state_world_size_{world}_rank_{rank}.pt")


def save_hybrid(root: str, seed: int) -> None:
    """HSDP: two groups of two ranks with the same shards."""
    model = gpt2(seed)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
    fully_shard(model, mesh=mesh)
    state = _state(model)
    if dist.get_rank() == 2:
        local = state["transformer.wpe.weight"]
        assert isinstance(local, DTensor)
        with torch.no_grad():
            local.to_local().add_(1.0)
    torch.save(state, Path(root) / f"model_world_size_4_rank_{dist.get_rank()}.pt")


class Gated(nn.Module):
    """Two layers as tensor parallelism cuts them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))  # type: ignore[no-any-return]


def save_fsdp_and_tp(root: str) -> None:
    """FSDP2 over tensor parallelism on a 2 by 2 mesh; sizes that neither divides evenly."""
    torch.manual_seed(3)
    model = Gated()
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), Path(root) / "whole" / "weights.pt")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["fsdp"])
    torch.save(model.state_dict(), Path(root) / f"model_world_size_4_rank_{dist.get_rank()}.pt")


def save_forms(root: str) -> None:
    """DTensors in every form: along each dimension, replicated, empty on a rank, compiled, beside an optimizer."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    whole = forms()
    kinds = {"rows": Shard(0), "columns": Shard(1), "last": Shard(2), "alike": Replicate(), "one": Shard(0)}
    model = {f"_orig_mod.{n}": distribute_tensor(whole[n], mesh, [kind]) for n, kind in kinds.items()}
    model |= {f"_orig_mod.{n}": whole[n] for n in ("plain", "scalar", "bytes", "half")}
    model["_orig_mod._extra_state"] = None  # type: ignore[assignment]
    state = {"model": model, "optimizer": {"state": {}}, "epoch": 3}
    torch.save(state, Path(root) / f"part-{dist.get_rank()}.pt")


def forms() -> dict[str, torch.Tensor]:
    """The tensors of `save_forms`."""
    numbers = torch.arange(60.0)
    return {
        "rows": numbers[:15].view(5, 3),
        "columns": numbers[:12].view(2, 6),
        "last": numbers.view(3, 4, 5).to(torch.bfloat16),
        "alike": numbers[:6].view(3, 2),
        "one": numbers[:3].view(1, 3),
        "plain": numbers[:4],
        "scalar": torch.tensor(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.arange(6, dtype=torch.float16).view(2, 3),
    }


def save_fsdp1(root: str, seed: int, changes: dict[str, object], with_optimizer: bool) -> None:
    """FSDP1's sharded state dict, saved by every rank under a name of its own."""
    model = gpt2(seed, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT):
            state = wrapped.state_dict()
        saved = {"model": state, "step": 5} if with_optimizer else state
        torch.save(saved, Path(root) / f"shard{dist.get_rank()}.pth")
        if with_optimizer:
            first = {name: value for name, value in state.items() if name.endswith("wpe.weight")}
            torch.save({"state": first, "param_groups": []}, Path(root) / f"optimizer{dist.get_rank()}.pth")


def save_flat(root: str, seed: int) -> None:
    """FSDP1's local state dict: flat pieces of parameters, without their shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(gpt2(seed), device_id=torch.device("cpu"), use_orig_params=True)
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.LOCAL_STATE_DICT):
            torch.save(wrapped.state_dict(), Path(root) / f"pytorch_model_fsdp_rank{dist.get_rank()}.bin")


def save_by_accelerate(root: str, seed: int, form: str, use_dcp: bool, version: int) -> None:
    """The function of accelerate, with as much of an accelerator as it asks for: it has no FSDP on a CPU."""
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model

    world, rank = dist.get_world_size(), dist.get_rank()
    PartialState(cpu=True)  # for its logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plugin = FullyShardedDataParallelPlugin(fsdp_version=version, state_dict_type=form)
            model: nn.Module = gpt2(seed)
            if version == 1:
                model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
            else:
                fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
            accelerator = SimpleNamespace(
                process_index=rank, num_processes=world, wait_for_everyone=dist.barrier, is_fsdp2=version == 2
            )
            save_fsdp_model(plugin, accelerator, model, root, use_dcp=use_dcp)
    finally:
        PartialState._reset_state()
    dist.barrier()


def trainer_directory(root: Path) -> Path:
    """What transformers' Trainer and accelerate put beside a model, by hand: none of it is a model's."""
    (root / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": []}))
    for name in ("scheduler.pt", "rng_state_0.pth", "training_args.bin", "optimizer.bin"):
        torch.save({"state": {"weight": torch.ones(2)}, "param_groups": []}, root / name)
    (root / "random_states_0.pkl").write_bytes(b"\x80\x04N.")
    state = {"optimizer": {"state": {"lm_head.weight": {"exp_avg": torch.ones(3)}}}}
    save_dcp(state, root / "optimizer_0")
    return root


def save_state(root: str, state: dict[str, torch.Tensor]) -> None:
    """Cut tensors along their first dimension, under verl's names."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in state.items()}
    torch.save(cut, Path(root) / f"model_world_size_{mesh.size()}_rank_{dist.get_rank()}.pt")


def meshes() -> dict[str, torch.Tensor]:
    """The tensors of `save_meshes`."""
    torch.manual_seed(9)
    plain = {f"plain.{name}": value.clone() for name, value in Gated().state_dict().items()}
    return {
        **plain,
        "flat": torch.arange(14.0).view(7, 2),
        "part": torch.arange(9.0),
        "both": torch.arange(30.0).view(5, 6),
    }


def save_meshes(root: str) -> None:
    """FSDP1 with a mesh, which gives DTensors; DTensors of a flattened mesh, of a part of one, of two dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = meshes()
    torch.manual_seed(9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(
            Gated(),
            device_mesh=mesh,
            device_id=torch.device("cpu"),
            use_orig_params=True,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        )
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT):
            state = {f"plain.{name}": value for name, value in wrapped.state_dict().items()}
    assert all(isinstance(value, DTensor) for value in state.values())
    state["flat"] = distribute_tensor(whole["flat"], mesh["a", "b"]._flatten("ab"), [Shard(0)])
    state["part"] = distribute_tensor(whole["part"], mesh["b"], [Shard(0)])
    state["both"] = distribute_tensor(whole["both"], mesh, [Shard(1), Shard(0)])
    torch.save(state, Path(root) / f"model_world_size_4_rank_{dist.get_rank()}.pt")
