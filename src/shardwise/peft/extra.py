"""Values that change while an adapter is trained and are not in its file: parameters unfrozen by hand, and statistics.

peft saves what its layers and ``modules_to_save`` hold. Norms and embeddings that are unfrozen beside them, and the
running statistics of a batch norm, would be the base model's again after a restore, while the optimizer keeps its state
for them. So would base weights that an adapter's initialisation changed at random or from measured data: a new
initialisation gives other weights, which the saved adapter does not fit. All of these are saved in a file of this
library's own beside the adapter's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn as nn

from shardwise.errors import NameCollisionError
from shardwise.peft.builtin_lora import find_sites
from shardwise.peft.models import adapter_configs, adapters_prefixes, is_below, is_peft_adapted
from shardwise.peft.names import join, named_modules
from shardwise.peft.tensors import PEFT_PREFIX, AdapterEntry, AdapterFile, entry
from shardwise.stateful_wrappers.names import NamedTensor, list_parameters
from shardwise.stateful_wrappers.wrapping import adapted_model
from shardwise.upstream import peft as upstream
from shardwise.upstream.torch_modules import own_buffers, unsaved_buffers

#: LoRA initialisations that change base weights at random (a randomized decomposition) or from measured data.
_NOT_REPEATED = ("pissa_niter_", "lora_ga", "corda")


def extra_name(name: str) -> str:
    """A tensor's name in that file: the model's own, with or without a ``PeftModel`` around it."""
    return name.removeprefix(PEFT_PREFIX)


def extra_entries(
    parts: Sequence[nn.Module], files: Sequence[AdapterFile], stepped: Collection[int] = ()
) -> tuple[AdapterEntry, ...]:
    """Parameters that are trained, and buffers that training may change, that no adapter's file holds. Local.

    Args:
        parts: This rank's parts.
        files: All of their adapters.
        stepped: Identities of parameters that an optimizer has state of. Others are trained if they require a gradient.
    """
    taken = {id(item.tensor) for file in files for item in file.entries}
    out: dict[str, AdapterEntry] = {}
    for part in parts:
        for named in _changing(part, stepped):
            name = extra_name(named.name)
            if id(named.tensor) in taken:
                continue
            if name in out:
                raise NameCollisionError(
                    "two parts train a tensor of this name beside the adapter",
                    tensor=name,
                    hint="Give the pipeline stages distinct module names.",
                )
            out[name] = entry(name, named.name, named.tensor)
    return tuple(out.values())


def base_tensors(parts: Sequence[nn.Module]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """All names that a tensor of this rank's parts may have in such a file, and the tensor."""
    for part in parts:
        for named in list_parameters([part]):
            yield tuple(extra_name(name) for name in (named.name, *named.aliases)), named.tensor


def _changing(part: nn.Module, stepped: Collection[int]) -> Iterator[NamedTensor]:
    model = adapted_model(part)
    listed = list_parameters([model])
    prepared = _is_prepared(model, listed)
    changed = _statistics(model) | _changed_at_start(model)
    for named in listed:
        trained = (named.tensor.requires_grad and prepared) or id(named.tensor) in stepped
        if (trained and isinstance(named.tensor, nn.Parameter)) or named.name in changed:
            yield named


def _changed_at_start(model: nn.Module) -> frozenset[str]:
    """Names of base weights that an adapter's initialisation changed, and that another one would change otherwise."""
    if not is_peft_adapted([model]):
        return frozenset()
    chosen = {
        name
        for name, config in adapter_configs([model], None).items()
        if str(getattr(config, "init_lora_weights", None)).lower().startswith(_NOT_REPEATED)
        or getattr(config, "kasa_config", None) is not None  # truncated otherwise where the weights are shards
    }
    return frozenset(
        join(path, "base_layer.weight")
        for path, module in named_modules(model)
        if any(upstream.has_adapter(module, name) for name in chosen)
    )


def _is_prepared(model: nn.Module, listed: Sequence[NamedTensor]) -> bool:
    """Whether the base is frozen at least in part, so that ``requires_grad`` shows what is trained.

    For a model with its own LoRA and nothing frozen, only the optimizer's state shows it.
    """
    if is_peft_adapted([model]) or not find_sites(model, strict=False):
        return True
    return not all(n.tensor.requires_grad for n in listed if isinstance(n.tensor, nn.Parameter))


def _statistics(model: nn.Module) -> frozenset[str]:
    """Names of the base's buffers that its own forward pass may change: all but those that are quantized weights."""
    owned = adapters_prefixes(model) if is_peft_adapted([model]) else {}
    found: set[str] = set()
    for name, module in named_modules(model):
        buffers = {
            join(name, leaf): buffer
            for leaf, buffer in own_buffers(module).items()
            if buffer is not None and leaf not in unsaved_buffers(module)
        }
        if buffers and not any(_is_packed(key, buffer) for key, buffer in buffers.items()):
            found |= {key for key in buffers if is_below(key, owned) is None}
    return frozenset(found)


def _is_packed(name: str, buffer: torch.Tensor) -> bool:
    """Whether a buffer is a matrix of whole numbers or bytes: quantized weights, a mask, positions; no statistic is."""
    narrow = buffer.is_floating_point() and buffer.element_size() < 2
    whole = narrow or not (buffer.is_floating_point() or buffer.is_complex())
    return name.rpartition(".")[2] in ("weight", "qweight") or (whole and buffer.dim() > 1)
