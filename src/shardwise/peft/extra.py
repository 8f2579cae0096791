"""Values that change while an adapter is trained and are not in its file: parameters unfrozen by hand, and statistics.

peft saves what its layers and ``modules_to_save`` hold. Norms and embeddings that are unfrozen beside them, and the
running statistics of a batch norm, would be the base model's again after a restore, while the optimizer keeps its state
for them. So would base weights that an adapter's initialisation changed at random or from measured data: a new
initialisation gives other weights, which the saved adapter does not fit. The running means of AdaLoRA's rank allocator,
and the ranks that it kept, decide what the next steps do, and no state dict of peft's holds them. All of these are
saved in a file of this library's own beside the adapter's.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from shardwise.errors import NameCollisionError
from shardwise.peft.builtin_lora import find_sites
from shardwise.peft.models import adapter_configs, adapters_prefixes, is_below, is_peft_adapted
from shardwise.peft.tensors import PEFT_PREFIX, AdapterEntry, AdapterFile, entry, join, named_modules
from shardwise.stateful_wrappers.names import NamedTensor, list_parameters, own_tensors
from shardwise.stateful_wrappers.wrapping import adapted_model, plain_path
from shardwise.upstream import peft as upstream
from shardwise.upstream.torch_modules import own_buffers, unsaved_buffers

if TYPE_CHECKING:
    from peft.tuners.adalora import AdaLoraModel

#: LoRA initialisations that change base weights at random (a randomized decomposition) or from measured data.
_NOT_REPEATED = ("pissa_niter_", "lora_ga", "corda")


def extra_entries(
    parts: Sequence[nn.Module], files: Sequence[AdapterFile], stepped: Collection[int] = ()
) -> tuple[AdapterEntry, ...]:
    """Parameters that are trained, and buffers that training may change, that no adapter's file holds. Local.

    Trained are parameters that an optimizer has state of (``stepped``: their identities) or that require a gradient.
    """
    taken = {id(item.tensor) for file in files for item in file.entries}
    out: dict[str, AdapterEntry] = {}
    for part in parts:
        for named in _changing(part, stepped):
            name = named.name.removeprefix(PEFT_PREFIX)
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
            yield tuple(name.removeprefix(PEFT_PREFIX) for name in (named.name, *named.aliases)), named.tensor


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


# --- AdaLoRA's rank allocator ----------------------------------------------------------------------------------------


#: Beginning of these tensors' names in that file.
ALLOCATOR_PREFIX = "rank_allocator."

#: The allocator's running values of each parameter; ``ipt`` is recomputed before it is read. Source:
#: ``peft.tuners.adalora.layer.RankAllocator``.
_MEANS = ("exp_avg_ipt", "exp_avg_unc")

_KEPT = "rank_pattern"


@dataclass(frozen=True, slots=True, eq=False)
class _Allocator:
    """One part's allocator, with the path of the model whose parameters it names, and their plain names -> its names.

    The tuner's ``rankallocator`` holds the means, and the allocator's own configuration the kept ranks.
    """

    tuner: AdaLoraModel
    path: str
    names: Mapping[str, str]

    def kept(self) -> dict[str, list[bool]]:
        found: dict[str, list[bool]] | None = self.tuner.rankallocator.peft_config.rank_pattern
        return dict(found or {})

    def plain(self, name: str) -> str:
        """A parameter's name in the file."""
        return join(self.path, plain_path(name)).removeprefix(PEFT_PREFIX)


def _allocators(parts: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, _Allocator]]:
    if "peft" not in sys.modules:
        return
    from peft.tuners.adalora import AdaLoraModel

    for part in parts:
        for path, module in named_modules(adapted_model(part)):
            if isinstance(module, AdaLoraModel) and hasattr(module, "rankallocator"):
                names = {plain_path(name): name for name, _ in module.model.named_parameters()}
                # Once peft has saved the pattern, the adapter's name is missing from it.
                middle = f".{module.rankallocator.adapter_name}"
                names |= {plain_path(name).replace(middle, ""): name.replace(middle, "") for name in names.values()}
                yield part, _Allocator(module, join(path, "model"), names)


def allocator_entries(parts: Sequence[nn.Module]) -> Iterator[AdapterEntry]:
    """The current state of the parts' allocators, for a save. Local."""
    for _, allocator in _allocators(parts):
        for kind in _MEANS:
            for name, tensor in getattr(allocator.tuner.rankallocator, kind).items():
                plain = allocator.plain(name)
                yield entry(f"{ALLOCATOR_PREFIX}{kind}.{plain}", plain, tensor)
        for name, kept in allocator.kept().items():
            plain = allocator.plain(name)
            yield entry(f"{ALLOCATOR_PREFIX}{_KEPT}.{plain}", plain, torch.tensor(kept, dtype=torch.bool))


@dataclass(frozen=True, slots=True, eq=False)
class AllocatorRestore:
    """State to be read for the parts' allocators."""

    tensors: Mapping[str, torch.Tensor]  #: Name in the file -> memory to read into; not yet the allocators'.
    #: For each allocator and kind, the allocator's names and that memory.
    _given: Sequence[tuple[_Allocator, str, Mapping[str, torch.Tensor]]]

    def install(self) -> None:
        """Replace the allocators' state by what was read. Local."""
        for allocator, kind, values in self._given:
            if kind != _KEPT:
                setattr(allocator.tuner.rankallocator, kind, dict(values))
                if kind == _MEANS[0]:
                    allocator.tuner.rankallocator.ipt = {name: torch.zeros_like(t) for name, t in values.items()}
                continue
            kept = {name: tensor.tolist() for name, tensor in values.items()}
            allocator.tuner.rankallocator.peft_config.rank_pattern = kept or None


def restore_allocators(parts: Sequence[nn.Module], shapes: Mapping[str, Sequence[int]]) -> AllocatorRestore:
    """Allocate memory for a file's allocator state; an allocator without saved state starts again. Local."""
    tensors: dict[str, torch.Tensor] = {}
    given: list[tuple[_Allocator, str, Mapping[str, torch.Tensor]]] = []
    for part, allocator in _allocators(parts):
        parameters = own_tensors(adapted_model(part))
        for kind in (*_MEANS, _KEPT):
            values: dict[str, torch.Tensor] = {}
            for plain, name in allocator.names.items():
                key = f"{ALLOCATOR_PREFIX}{kind}.{allocator.plain(plain)}"
                if key not in shapes:
                    continue
                like = parameters.get(join(allocator.path, plain))
                if kind == _KEPT or like is None:
                    values[name] = torch.zeros(tuple(shapes[key]), dtype=torch.bool)
                else:
                    values[name] = torch.zeros_like(like.detach())
                tensors[key] = values[name]
            given.append((allocator, kind, values))
    return AllocatorRestore(tensors, given)
