"""Weights that bitsandbytes keeps quantized in memory, and what peft's layers are over the dequantized ones."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from shardwise.errors import QuantizationError
from shardwise.stateful_wrappers.wrapping import original_class
from shardwise.upstream.torch_modules import own_parameters

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

#: Of a 4-bit weight's state, and of the state that its scales are quantized with.
_TENSORS = ("absmax", "code", "offset")


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A linear layer's weight of bitsandbytes, that one process holds whole."""

    parameter: torch.Tensor  #: The weight as the module has it.
    shape: torch.Size  #: Shape of the dequantized weight: outputs, inputs.
    dtype: torch.dtype  #: The dtype that bitsandbytes dequantizes it to.
    sources: Mapping[str, torch.Tensor]  #: Name -> tensor, of all that dequantizing reads.
    _state: QuantState | None

    def dequantize(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The dequantized weight, as transformers and peft compute it, from a tensor for each name of ``sources``."""
        from bitsandbytes import functional

        if self._state is None:
            whole: torch.Tensor = functional.int8_vectorwise_dequant(values["weight"], values["SCB"])
            return whole
        state = _with_tensors(self._state, values)
        if self._state.state2 is not None:
            nested = {name.removeprefix("state2."): t for name, t in values.items() if name.startswith("state2.")}
            state.state2 = _with_tensors(self._state.state2, nested)
        four_bit: torch.Tensor = functional.dequantize_4bit(values["weight"], state)
        return four_bit


def _with_tensors(state: QuantState, values: Mapping[str, torch.Tensor]) -> QuantState:
    made = copy.copy(state)
    for name in _TENSORS:
        if name in values:
            setattr(made, name, values[name])
    return made


def quantized_weight(module: nn.Module) -> QuantizedWeight | None:
    """The weight of a linear layer of bitsandbytes; ``None`` of others, and where the weight is in shards.

    Raises:
        QuantizationError: The weight is in the layout that bitsandbytes gives it to compute on this processor.
    """
    if "bitsandbytes" not in sys.modules:
        return None
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight = own_parameters(module).get("weight")
    if weight is None:
        return None
    if isinstance(module, Linear4bit) and isinstance(weight, Params4bit) and weight.quant_state is not None:
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise QuantizationError(
                f"export_merged: 4-bit weights of {original_class(module).__name__} are in the layout in which "
                "bitsandbytes computes on this processor in eval mode, and cannot be dequantized from it",
                hint="Call the model's state_dict() before the save, with which bitsandbytes undoes the layout.",
            )
        sources = {"weight": weight.data, **_tensors(state, "")}
        if state.state2 is not None:
            sources |= _tensors(state.state2, "state2.")
        return QuantizedWeight(weight, torch.Size(state.shape), state.dtype, sources, state)
    if isinstance(module, Linear8bitLt) and isinstance(weight, Int8Params) and weight.dtype == torch.int8:
        scales = weight.SCB if module.state.SCB is None else module.state.SCB
        if scales is not None:
            sources = {"weight": weight.data, "SCB": scales}
            return QuantizedWeight(weight, weight.shape, torch.float32, sources, None)
    return None


def _tensors(state: QuantState, prefix: str) -> dict[str, torch.Tensor]:
    found = {f"{prefix}{name}": getattr(state, name) for name in _TENSORS}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def is_over_quantized(layer: nn.Module) -> bool:
    """Whether a layer is one of those with which peft adapts only quantized layers of bitsandbytes."""
    modules = (base.__module__ for base in original_class(layer).__mro__)
    return any(name.startswith("peft.") and name.endswith(".bnb") for name in modules)


def make_dense(layer: nn.Module) -> bool:
    """Make a copy of a LoRA layer over a quantized layer the one that peft puts around a dense one.

    Returns whether that is known: of LoRA's own two layers it is.
    """
    from peft.tuners import lora

    if type(layer) not in (lora.Linear4bit, lora.Linear8bitLt):
        return False
    layer.__class__ = lora.Linear
    layer.__dict__["is_target_conv_1d_layer"] = False
    return True
