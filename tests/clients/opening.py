"""Opens exports as their users do, and compares what they compute with the trained weights in one process."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn as nn
import transformers
from safetensors import safe_open
from tests.clients.families import FAMILIES, result

from shardwise.dtypes import dtype_code


def opened(directory: Path, opener: str, **settings: object) -> nn.Module:
    """Open with transformers, which must find every tensor, no other, and none that it has to initialise."""
    cls = getattr(transformers, opener)
    model, info = cls.from_pretrained(directory, output_loading_info=True, **settings)
    complaints = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    assert not complaints, complaints
    loaded: nn.Module = model.eval()
    return loaded


def same_weights(model: nn.Module, whole: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert set(state) == set(whole)
    for name, tensor in whole.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def computes_the_same(directory: Path, name: str, reference: nn.Module, whole: dict[str, torch.Tensor]) -> None:
    """Whether an export of a family has the weights and gives bit for bit the result of ``reference``."""
    family = FAMILIES[name]
    model = opened(directory, family.opener)
    assert type(model) is type(reference)
    same_weights(model, whole)
    reference.load_state_dict(whole)
    assert torch.equal(result(model, family.inputs()), result(reference, family.inputs()))


def weight_map(directory: Path) -> dict[str, str]:
    """Name -> file, from the index if there is one."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return found
    with safe_open(directory / "model.safetensors", framework="pt") as reader:
        return dict.fromkeys(reader.keys(), "model.safetensors")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files."""
    out: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as reader:
            out |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a mapping
    return out


def dtypes_of(directory: Path) -> dict[str, str]:
    """safetensors codes by name."""
    return {name: dtype_code(tensor.dtype) for name, tensor in tensors_of(directory).items()}
