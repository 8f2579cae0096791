"""Reads from a model part what the metadata needs: the model inside its wrappers, its class, its dtype, its config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from shardwise.dtypes import FLOATS
from shardwise.errors import MisuseError
from shardwise.stateful_wrappers.wrapping import bare_model, inner_model, original_class
from shardwise.upstream.torch_modules import own_buffers, own_parameters
from shardwise.upstream.torch_tensors import local_part

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

#: Buffers in which packed integer weights are kept by layers that have no float weight (GPTQ, AWQ, compressed-tensors).
_PACKED_BUFFERS = frozenset({"qweight", "weight_packed"})

#: Parameter classes of bitsandbytes, known by name, so that the package may be absent.
_BITSANDBYTES_PARAMETERS = frozenset({"Params4bit", "Int8Params"})


def described_part(parts: Sequence[nn.Module]) -> nn.Module | None:
    """The part that describes the model, as `inner_model` finds it: the first with a config, else the first."""
    unwrapped = [bare_model(inner_model(part).module) for part in parts]
    with_config = (part for part in unwrapped if config_of(part) is not None)
    return next(with_config, unwrapped[0] if unwrapped else None)


def config_of(model: nn.Module) -> object | None:
    """A model's configuration, or ``None`` where it has none. It may be a property, and that may fail."""
    try:
        found: object = getattr(model, "config", None)
    except Exception as error:
        raise MisuseError(
            f"the config of {original_class(model).__name__} cannot be read: {type(error).__name__}: {error}",
            hint="Correct the property: the export's config.json is made of it.",
        ) from error
    return found


def written_dtype(parts: Iterable[nn.Module], mapping: Mapping[str, str] | None) -> str | None:
    """Torch's name of the dtype of the written weights, or ``None`` where there is no floating-point parameter.

    With a mapping (name in the file -> dtype as written) the dtype that most elements are written in; without, that of
    the first floating-point parameter, as transformers does in ``save_pretrained``. One-byte floats are storage formats
    of quantized weights and say nothing about the dtype to compute in.
    """
    parameters = [(name, p) for part in parts for name, p in part.named_parameters()]
    if mapping:
        sizes = {name: p.numel() for name, p in parameters}
        # Names that conversion changed have no size here; where none matches, every tensor counts the same.
        known = any(name in sizes for name in mapping)
        elements: Counter[str] = Counter()
        for name, code in mapping.items():
            dtype = FLOATS.get(code, code.removeprefix("torch."))
            if dtype in FLOATS.values():
                elements[dtype] += sizes.get(name, 0) if known else 1
        if elements:
            return elements.most_common(1)[0][0]
    return next((str(p.dtype).removeprefix("torch.") for _, p in parameters if _computes(p)), None)


def _computes(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1


def has_quantized_parameters(modules: Iterable[nn.Module]) -> bool:
    """Whether any weight that these modules have themselves (``model.modules()``) is held in a quantized form.

    That is: a parameter of a one-byte float or an integer dtype of up to 32 bits (64-bit integers are tables of ids),
    one of bitsandbytes' or torchao's own tensor classes (which report the dtype that they compute in), or a packed
    integer weight that its layer keeps as a buffer.
    """
    # Looked at in every save. Asking a DTensor for its data is slow, and most parameters of a model are of one kind.
    kinds: dict[tuple[type, type, torch.dtype], torch.Tensor] = {}
    for module in modules:
        for parameter in own_parameters(module).values():
            if parameter is not None:
                kinds.setdefault((type(parameter), type(local_part(parameter)), parameter.dtype), parameter)
        for name in _PACKED_BUFFERS.intersection(own_buffers(module).keys()):
            buffer = own_buffers(module)[name]
            if buffer is not None and not buffer.is_floating_point():
                return True
    return any(_is_quantized(parameter) for parameter in kinds.values())


def _is_quantized(parameter: torch.Tensor) -> bool:
    import torch

    from shardwise.stateful_wrappers.memory import stands_for_memory

    local = local_part(parameter)
    for tensor in (parameter, local, getattr(local, "data", local)):
        cls = type(tensor)
        if cls.__name__ in _BITSANDBYTES_PARAMETERS:
            return True
        # Float8 training's weights wrap plain ones, which are what is written.
        if cls.__module__.partition(".")[0] == "torchao" and not stands_for_memory(local):
            return True
    if parameter.dtype in (torch.bool, torch.int64, torch.uint64) or parameter.is_complex():
        return False
    return not _computes(parameter)
