"""Fresh adapters, the same on every topology."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from shardwise.errors import AdapterError, MisuseError
from shardwise.peft.builtin_lora import LinearSite, find_sites
from shardwise.peft.capture import capture_adapter, hold_adapter
from shardwise.peft.tensors import join, named_modules, seed_of
from shardwise.plan.fragments import HeldTensor, copy_whole
from shardwise.stateful_wrappers.tensors import MeshRegister
from shardwise.stateful_wrappers.wrapping import bare_model
from shardwise.upstream.torch_modules import own_parameters

#: Spellings of the initialisations.
_METHODS = {
    None: "kaiming",
    "kaiming": "kaiming",
    "kaiming_uniform": "kaiming",
    "xavier": "xavier",
    "xavier_normal": "xavier",
    "gaussian": "gaussian",
}


def initialise_adapters(
    parts: Sequence[nn.Module], peft_config: object | None = None, peft_init_method: str | None = None, *, seed: int = 0
) -> None:
    """Give fresh LoRA factors their initial values, in place. Every rank with a part calls; no communication.

    The product of the factors is zero: A is random and B zero, for embeddings the other way round. The random values
    depend on the tensor's name and ``seed`` alone, so that they are the same on every topology and replicas agree;
    each whole factor is drawn once, one at a time. Only LoRA factors are touched: DoRA's magnitudes follow from the
    base weights (`initialise_magnitudes`), and modules_to_save begin as copies of base modules.

    Args:
        parts: This rank's parts, on a real device.
        peft_config: As for `shardwise.addons.peft.capture_adapter`.
        peft_init_method: ``kaiming`` (the default; uniform within ``1 / sqrt(in)``, as peft), ``xavier`` (normal, of
            standard deviation ``sqrt(2 / (in + rank))``) or ``gaussian`` (normal, ``1 / rank``).
        seed: Another seed gives other values.

    Raises:
        MisuseError: The method is unknown, or a factor is on the meta device.
    """
    method = _METHODS.get(peft_init_method)
    if method is None:
        raise MisuseError(
            f"peft_init_method {peft_init_method!r} is unknown",
            hint=f"Use one of {', '.join(sorted(name for name in _METHODS if name))}.",
        )
    captured = capture_adapter(parts, peft_config, v4_compatible=False, legacy_paramwrapper_layout=False)
    for file in captured.files:
        for item, held in zip(file.entries, hold_adapter(file.entries, MeshRegister()), strict=True):
            leaf = item.spec.name.rpartition(".lora_")[2]
            if item.alias_of is None and leaf in ("A.weight", "B.weight", "B.bias", "embedding_A", "embedding_B"):
                if item.tensor.device.type == "meta":
                    raise MisuseError(
                        "a LoRA factor is still on the meta device",
                        tensor=item.fqn,
                        hint="Materialise the model first (to_empty).",
                    )
                _fill(held, leaf, method, f"{seed}/{file.adapter_name}/{item.spec.name}")


def _fill(held: HeldTensor, leaf: str, method: str, key: str) -> None:
    with torch.no_grad():
        if leaf in ("B.weight", "B.bias", "embedding_A"):
            for fragment in held.fragments:
                fragment.data.zero_()
        elif held.fragments:
            whole = _draw(held.spec.shape, "normal" if leaf == "embedding_B" else method, key).reshape(held.grid)
            copy_whole(whole, held)


def _draw(shape: tuple[int, ...], method: str, key: str) -> torch.Tensor:
    """A random float32 tensor that ``key`` determines. Source of the formulas: torch.nn.init, peft's LoraLayer."""
    generator = torch.Generator().manual_seed(seed_of(key))
    out = torch.empty(shape)
    rank, fan_in = shape[0], shape[1] if len(shape) > 1 else 1
    if method == "kaiming":
        bound = 1 / math.sqrt(fan_in)
        return out.uniform_(-bound, bound, generator=generator)
    deviation = {"xavier": math.sqrt(2 / (fan_in + rank)), "gaussian": 1 / rank}.get(method, 1.0)
    return out.normal_(0.0, deviation, generator=generator)


def initialise_magnitudes(parts: Sequence[nn.Module]) -> None:
    """Set DoRA's magnitudes in a model's own LoRA modules to the norms of the base weights' rows, in place.

    Call when the base weights are loaded and the factors' product is zero. Every rank that holds a part calls: norms of
    rows that are spread over ranks are summed by DTensor.
    """
    for part in parts:
        modules = dict(named_modules(bare_model(part)))
        for site in find_sites(part):
            if not isinstance(site, LinearSite) or site.magnitude is None:
                continue
            weight = own_parameters(modules[site.fqn]).get("weight")
            magnitude = site.magnitude.tensor
            if weight is None or weight.shape[0] != magnitude.numel():
                raise AdapterError(
                    "a module with a magnitude has no weight that fits it",
                    tensor=join(site.fqn, "weight"),
                    hint="Set the magnitude in the model's own code.",
                )
            with torch.no_grad():
                norms = torch.linalg.vector_norm(weight.detach(), dim=1).reshape(magnitude.shape)
                if isinstance(norms, DTensor) and isinstance(magnitude, DTensor):
                    norms = norms.redistribute(magnitude.device_mesh, magnitude.placements)
                magnitude.copy_(norms)
