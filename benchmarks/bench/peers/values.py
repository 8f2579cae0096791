"""The model that every peer saves and loads, and what each of its elements has to be.

A value follows from the parameter's number and the element's place alone, so that any rank can say what any part of
any tensor must be, however it is sharded, without having seen what was saved.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.models import local_tensors, shard

DTYPE = torch.bfloat16
#: What an element belongs to: the parameter, and AdamW's two moments.
PARAMETER, FIRST_MOMENT, SECOND_MOMENT = range(3)
_MOMENTS = (("exp_avg", FIRST_MOMENT), ("exp_avg_sq", SECOND_MOMENT))
_STEP = 3.0


class WrongBytesError(Exception):
    """What is in a file or in a model is not what was saved: the time that it took is worth nothing."""


def llama_config(gigabytes: float) -> LlamaConfig:
    """A Llama of about this size in bfloat16; narrower below half a gigabyte."""
    hidden, intermediate, vocabulary = (2048, 5632, 32_000) if gigabytes > 0.5 else (512, 1408, 4_000)
    per_layer = (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * intermediate) * DTYPE.itemsize
    ends = 2 * vocabulary * hidden * DTYPE.itemsize
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=max(1, round((gigabytes * 1e9 - ends) / per_layer)),
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def empty(config: LlamaConfig, mesh: DeviceMesh | None, dim: int = 0) -> LlamaForCausalLM:
    """The model on the meta device, sharded by FSDP2 along ``dim`` where a mesh is given."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(DTYPE)
    if mesh is not None:
        shard(model, mesh, dim)
    return model


def filled(config: LlamaConfig, mesh: DeviceMesh | None, dim: int = 0) -> LlamaForCausalLM:
    """The model with memory, each element as it has to be."""
    model = empty(config, mesh, dim)
    model.to_empty(device="cpu")
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    """Give every parameter its values."""
    for number, (_, parameter) in enumerate(_parameters(model)):
        _local(parameter).copy_(_part(parameter, number, PARAMETER))


def clear(model: nn.Module) -> None:
    """Set every parameter to zero, so that what is right afterwards was loaded."""
    for tensor in local_tensors(model):
        tensor.zero_()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with moments for every parameter, each element as it has to be."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        moments = {key: torch.empty_like(parameter.detach()) for key, _ in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(_STEP), **moments}
    fill_moments(model, optimizer)
    return optimizer


def fill_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give every moment its values."""
    for number, (_, parameter) in enumerate(_parameters(model)):
        for key, kind in _MOMENTS:
            _local(optimizer.state[parameter][key]).copy_(_part(parameter, number, kind))


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """This rank's memory of an optimizer's moments."""
    return [_local(state[key]) for state in optimizer.state.values() for key, _ in _MOMENTS]


def check_model(model: nn.Module) -> None:
    """Every parameter of this rank has its values.

    Raises:
        WrongBytesError: One has not.
    """
    for number, (name, parameter) in enumerate(_parameters(model)):
        _compare(name, _local(parameter), _part(parameter, number, PARAMETER))


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every moment of this rank has its values, and the steps are there.

    Raises:
        WrongBytesError: One has not.
    """
    for number, (name, parameter) in enumerate(_parameters(model)):
        state = optimizer.state[parameter]
        if float(state["step"]) != _STEP:
            raise WrongBytesError(f"the step of {name} is {float(state['step'])}")
        for key, kind in _MOMENTS:
            _compare(f"{key} of {name}", _local(state[key]), _part(parameter, number, kind))


def check_files(directory: Path, config: LlamaConfig) -> None:
    """The safetensors files of a directory are the whole model, each element as it has to be.

    Raises:
        WrongBytesError: A tensor is missing, is there twice, or differs.
    """
    wanted = {name: (number, p.shape) for number, (name, p) in enumerate(_parameters(empty(config, None)))}
    found: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                if name in found or name not in wanted:
                    raise WrongBytesError(f"{path.name} has {name}, which is not wanted (again)")
                found.add(name)
                number, shape = wanted[name]
                _compare(name, file.get_tensor(name), _whole(number, tuple(shape), PARAMETER))
    if missing := sorted(set(wanted) - found):
        raise WrongBytesError(f"{len(missing)} tensors are not in {directory.name}, such as {missing[0]}")


def _parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def _part(like: torch.Tensor, number: int, kind: int) -> torch.Tensor:
    whole = _whole(number, tuple(like.shape), kind)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


@functools.cache
def _pattern() -> torch.Tensor:
    return torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(5)).to(DTYPE)


def _whole(number: int, shape: tuple[int, ...], kind: int) -> torch.Tensor:
    pattern, count = _pattern(), torch.Size(shape).numel()
    start = (number * 7919 + kind * 104_729) % len(pattern)
    repeated = pattern.repeat((start + count) // len(pattern) + 1)
    return repeated[start : start + count].view(shape)


def _compare(name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    if got.dtype != wanted.dtype or not torch.equal(got, wanted):
        raise WrongBytesError(f"{name} is not what was saved")
