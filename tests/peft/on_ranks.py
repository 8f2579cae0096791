"""What each rank of the two-rank adapter tests does. Run by `test_peft_ranks`, which compares the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file
from tests.peft.models import Parts, where
from tests.peft.own_models import OwnConfig, OwnForCausalLM, dense, moe
from tests.peft.test_models import EXPERTS, LINEAR, adapted
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shardwise.addons import PeftAddon
from shardwise.addons.base import SaveHookArgs
from shardwise.comm import Group, JsonValue
from shardwise.errors import ShardwiseError
from shardwise.geometry import TensorSpec
from shardwise.peft.capture import capture_adapter, hold_adapter
from shardwise.peft.check import check_adapter
from shardwise.peft.config import adapter_settings
from shardwise.peft.initial_values import initialise_adapters, initialise_magnitudes
from shardwise.stateful_wrappers.tensors import MeshRegister

DENSE: dict[str, object] = {
    "target_modules": LINEAR,
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "task_type": None,
}
SOME_LAYERS: dict[str, object] = {"target_modules": LINEAR, "layers_to_transform": [1]}
MOE: dict[str, object] = {"target_modules": LINEAR, "target_parameters": EXPERTS}


def fsdp(model: nn.Module, layers: Sequence[nn.Module], mesh: DeviceMesh) -> nn.Module:
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    if hasattr(model, "base_model"):
        fully_shard(model.base_model.model, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def contradicting() -> None:
    """Two ranks of one stage, the same module with factors of another rank on each."""
    model = dense(OwnConfig())
    module = model.model.layers[0].mlp.down_proj
    inner = 2 + dist.get_rank()
    module.lora_A = nn.Linear(module.lora_A.in_features, inner, bias=False)
    module.lora_B = nn.Linear(inner, module.lora_B.out_features, bias=False)
    adapter_settings([model], OwnConfig(), Group.current())


def ordered() -> list[str]:
    """The first rank has the layer whose name comes last, each with factors of another rank than the configured."""
    model = dense(OwnConfig())
    module = model.model.layers[1 - dist.get_rank()].mlp.down_proj
    module.lora_A = nn.Linear(module.lora_A.in_features, 2, bias=False)
    module.lora_B = nn.Linear(2, module.lora_B.out_features, bias=False)
    settings = adapter_settings([model], OwnConfig(), Group.current())["default"]
    return list(cast("dict[str, int]", settings["rank_pattern"]))


def distribute(model: nn.Module, mesh: DeviceMesh, rule: Callable[[str], Placement]) -> nn.Module:
    """Make every parameter a DTensor."""
    for name, module in list(model.named_modules()):
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                placed = distribute_tensor(parameter.detach(), mesh, [rule(f"{name}.{leaf}")])
                module._parameters[leaf] = nn.Parameter(placed, requires_grad=parameter.requires_grad)
    return model


def by_tensor_parallel(name: str) -> Placement:
    if "o_proj" in name:
        return Shard(1) if "lora_A" in name else Replicate()
    return Shard(0) if "lora_B" in name or "magnitude" in name else Replicate()


def by_expert(name: str) -> Placement:
    return Shard(0) if ".experts." in name else Replicate()


def stage(model: nn.Module, holder: nn.Module, rank: int) -> nn.Module:
    """Keep one layer, under its name in the whole model."""
    holder.layers = nn.ModuleDict({str(rank): holder.layers[rank]})
    return model


def peft_layers(model: nn.Module) -> Sequence[nn.Module]:
    return list(model.base_model.model.model.layers)


def scenarios(rank: int, mesh: DeviceMesh) -> dict[str, tuple[nn.Module, object | None]]:
    config = OwnConfig(use_dora=True)
    hf_dense, hf_moe, piped = adapted("llama", DENSE), adapted("qwen3_moe", MOE), adapted("llama", DENSE)
    some = adapted("llama", SOME_LAYERS)
    own: OwnForCausalLM = dense(config)
    own_piped = dense(config)
    own_moe = moe(OwnConfig())
    return {
        "hf_fsdp": (fsdp(hf_dense, peft_layers(hf_dense), mesh), None),
        "hf_experts_fsdp": (fsdp(hf_moe, peft_layers(hf_moe), mesh), None),
        "hf_tp": (distribute(adapted("llama", DENSE), mesh, by_tensor_parallel), None),
        "hf_pipeline": (stage(piped, piped.base_model.model.model, rank), None),
        "hf_pipeline_some": (stage(some, some.base_model.model.model, rank), None),
        "hf_ddp": (DistributedDataParallel(adapted("llama", DENSE)), None),
        "own_fsdp": (fsdp(own, list(own.model.layers), mesh), config),
        "own_tp": (distribute(dense(config), mesh, by_tensor_parallel), config),
        "own_experts_ep": (distribute(own_moe, mesh, by_expert), OwnConfig()),
        "own_pipeline": (stage(own_piped, own_piped.model, rank), config),
    }


VARIANTS = {
    "": {"v4_compatible": False, "legacy_paramwrapper_layout": False},
    "_v4": {"v4_compatible": True, "legacy_paramwrapper_layout": False},
    "_legacy": {"v4_compatible": False, "legacy_paramwrapper_layout": True},
}


def dump(model: nn.Module, config: object | None, path: Path, options: dict[str, bool]) -> None:
    """Write this rank's fragments, for the parent to put together."""
    captured = capture_adapter([model], config, **options)
    rows = []
    for tensor in hold_adapter(captured.files[0].entries, MeshRegister()):
        spec = (tensor.spec.name, list(tensor.spec.shape), tensor.spec.dtype, list(tensor.grid))
        pieces = [(list(f.box.offsets), list(f.box.sizes), f.data.clone().contiguous()) for f in tensor.fragments]
        rows.append((spec, pieces))
    torch.save(rows, path)


def fill(model: nn.Module, config: object | None, file: Path) -> None:
    """Load, as the engine does: each rank copies what its fragments cover."""
    saved = load_file(file)
    captured = capture_adapter([model], config, **VARIANTS[""])
    with torch.no_grad():
        for tensor in hold_adapter(captured.files[0].entries, MeshRegister()):
            whole = saved[tensor.spec.name].reshape(tensor.grid)
            for fragment in tensor.fragments:
                fragment.data.copy_(whole[where(fragment.box)])


Inventories = list[dict[str, list[int]]]


def whole_specs(group: Group, model: nn.Module, config: object | None) -> tuple[list[TensorSpec], Inventories]:
    captured = capture_adapter([model], config, **VARIANTS[""])
    row: JsonValue = [[e.spec.name, list(e.spec.shape), e.spec.dtype] for e in captured.files[0].entries]
    rows = cast("list[list[tuple[str, list[int], str]]]", group.gather_json(row))
    specs = {name: TensorSpec(name, tuple(shape), dtype) for theirs in rows for name, shape, dtype in theirs}
    inventory: JsonValue = {name: list(indices) for name, indices in captured.inventory.items()}
    return list(specs.values()), cast("Inventories", group.gather_json(inventory))


def check(group: Group, model: nn.Module, config: object | None) -> None:
    """The whole adapter passes; one rank's part of a pipeline does not."""
    specs, inventories = whole_specs(group, model, config)
    settings = adapter_settings([model], config, group)["default"]
    check_adapter(specs, settings, inventories, layers=2)


def alone(rank: int, model: nn.Module, config: object | None) -> str:
    """What is said of a stage that saves by itself, as with the wrong process group."""
    single = Group(None)
    specs, inventories = whole_specs(single, model, config)
    try:
        check_adapter(specs, adapter_settings([model], config, single)["default"], inventories, layers=2)
    except ShardwiseError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def broken_hook(group: Group, root: Path, rank: int) -> str:
    """Rank 1 has a model that cannot be described: both must leave with the same error."""
    model = dense(OwnConfig())
    if rank == 1:
        del model.model.layers[0].mlp.down_proj.lora_B
    args: SaveHookArgs = {
        "model_state": Parts([model]),
        "model_path": str(root / "broken"),
        "peft_config": OwnConfig(),
        "group": group,
    }
    try:
        PeftAddon().pre_save(**args)
    except ShardwiseError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(root: Path) -> None:
    """Two ranks call."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    group = Group.current()
    said = {}
    for name, (model, config) in scenarios(rank, mesh).items():
        variants = VARIANTS if "experts" in name else {"": VARIANTS[""]}
        for suffix, options in variants.items():
            directory = root / f"{name}{suffix}"
            args: SaveHookArgs = {"model_state": Parts([model]), "model_path": str(directory), "group": group}
            args["peft_config"] = config
            args["v4_compatible"] = options["v4_compatible"]
            PeftAddon().pre_save(**args)
            dump(model, config, directory / f"rank{rank}.pt", options)
        check(group, model, config)
        if name in ("hf_pipeline", "own_pipeline"):
            said[name] = alone(rank, model, config)
    reloaded = adapted("llama", DENSE, seed=5)
    fsdp(reloaded, peft_layers(reloaded), mesh)
    fill(reloaded, None, root / "reference/hf_fsdp/adapter_model.safetensors")
    (root / "reloaded").mkdir(exist_ok=True)
    dump(reloaded, None, root / f"reloaded/rank{rank}.pt", VARIANTS[""])
    fresh = dense(OwnConfig(use_dora=True))
    fsdp(fresh, list(fresh.model.layers), mesh)
    initialise_adapters([fresh], OwnConfig())
    initialise_magnitudes([fresh])
    (root / "fresh").mkdir(exist_ok=True)
    dump(fresh, OwnConfig(), root / f"fresh/rank{rank}.pt", VARIANTS[""])
    said["broken"] = broken_hook(group, root, rank)
    (root / f"said{rank}.json").write_text(json.dumps(said))
