"""Every model type, saved and loaded by two processes through the whole engine."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.convert import compare
from tests.convert.tiny_models import CannotBuildError, build, quiet
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from shardwise import CheckpointingConfig
from shardwise.errors import ShardwiseError
from shardwise.stateful_wrappers.names import list_parameters

SAME = "yes"


def spread(key: str, mesh: DeviceMesh) -> tuple[nn.Module, str]:
    """The tiny model of a type over the mesh, and how: by FSDP2 or, where that refuses, every parameter by itself."""
    model = build(key)
    try:
        fully_shard(model, mesh=mesh)
    except Exception:  # noqa: BLE001 - whatever it refuses, there is another way
        model = build(key)
        _every_parameter(model, mesh)
        return model, "distribute_tensor"
    return model, "fully_shard"


def _every_parameter(model: nn.Module, mesh: DeviceMesh) -> None:
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is None:
                continue
            if id(param) not in made:
                where = [Shard(0)] if param.dim() else None
                data = distribute_tensor(param.data, mesh, where, src_data_rank=None)
                made[id(param)] = nn.Parameter(data, requires_grad=param.requires_grad)
            module._parameters[name] = made[id(param)]


def check(key: str, mesh: DeviceMesh, root: Path) -> tuple[str, str]:
    """How a type was spread, and `SAME` or what differs. Both ranks call."""
    model, how = spread(key, mesh)
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every")
    with config.build(dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0) as engine:
        engine.save_model(model, root)
        tensors = {named.name: named.tensor for named in list_parameters([model])}
        before = {name: _local(tensor).clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            for tensor in tensors.values():
                _local(tensor).fill_(1)
        engine.load_model(model, root / "model")
    for name, tensor in tensors.items():
        assert torch.equal(_local(tensor), before[name]), f"{name}: other values after loading"
    if dist.get_rank() == 0:
        found: compare.Tensors = {}
        for path in sorted((root / "model" / "consolidated").glob("*.safetensors")):
            found |= load_file(path)
        compare.assert_same(found, compare.reference(build(key)))
    return how, SAME


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_all(keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """`check` of every type; what one of them fails with is its outcome. Two ranks call."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    outcomes: dict[str, tuple[str, str]] = {}
    for key in keys:
        told: list[str | None] = [tempfile.mkdtemp(prefix="types-") if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(told)
        with _removed(str(told[0])) as root, quiet():
            try:
                outcomes[key] = check(key, mesh, Path(root))
            except CannotBuildError as error:
                outcomes[key] = "", f"not built: {error}"
            except (AssertionError, ShardwiseError) as error:
                outcomes[key] = "", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            dist.barrier()
    return outcomes


@contextlib.contextmanager
def _removed(path: str) -> Iterator[str]:
    try:
        yield path
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
