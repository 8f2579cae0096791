"""The content of an adapter checkpoint as one rank holds it: the adapters' counterpart of capturing a model.

Beside what peft saves (its layers and ``modules_to_save``), other values change while an adapter is trained. Norms and
embeddings that are unfrozen by hand, and the running statistics of a batch norm, would be the base model's again after
a restore, while the optimizer keeps its state for them. So would base weights that an adapter's initialisation changed
at random or from measured data: a new initialisation gives other weights, which the saved adapter does not fit. The
running means of AdaLoRA's rank allocator, and the ranks that it kept, decide what the next steps do, and no state dict
of peft's holds them. All of these are saved in a file of this library's own beside the adapter's.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from shardwise.errors import ModuleStateError, NameCollisionError
from shardwise.peft.builtin_lora import capture_own, find_sites
from shardwise.peft.config import rank_setting
from shardwise.peft.models import adapter_configs, adapters_prefixes, capture_peft, is_below, is_peft_adapted
from shardwise.peft.tensors import (
    PEFT_PREFIX,
    AdapterEntry,
    AdapterFile,
    AdapterTensors,
    entry,
    join,
    named_modules,
    text_config,
)
from shardwise.plan.fragments import HeldTensor, seen_through
from shardwise.stateful_wrappers.names import (
    NamedTensor,
    list_parameters,
    own_tensors,
)
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.stateful_wrappers.units import (
    has_foreign_hooks,
    has_torch_method,
    label,
    overrides_extra_state,
    refuse_hooks_around,
    saves_subtree_itself,
)
from shardwise.stateful_wrappers.wrapping import adapted_model, bare_model, plain_path, unwrap
from shardwise.upstream import peft as upstream
from shardwise.upstream.torch_modules import (
    LOAD_OWN,
    SAVE_OWN,
    loading_pre_hooks,
    own_buffers,
    own_children,
    own_loader,
    saving_hooks,
    unsaved_buffers,
)

if TYPE_CHECKING:
    from peft.tuners.adalora import AdaLoraModel

#: LoRA initialisations that change base weights at random (a randomized decomposition) or from measured data.
_NOT_REPEATED = ("pissa_niter_", "lora_ga", "corda")


def capture_adapter(
    parts: Sequence[nn.Module],
    peft_config: object | None,
    *,
    v4_compatible: bool,
    legacy_paramwrapper_layout: bool,
    base: str | None = None,
    stepped: Collection[int] = (),
) -> AdapterTensors:
    """Describe the adapters of a model, for saving and for loading alike. Local: no rank communicates.

    Every tensor refers to the memory of a parameter, of which a DTensor holds this rank's shard; nothing is copied or
    gathered. Ranks of one pipeline stage describe the same tensors.

    Args:
        parts: Adapted with Hugging Face ``peft`` (with or without ``PeftModel``), or with LoRA modules of their own
            (see `shardwise.peft.builtin_lora`).
        peft_config: A ``PeftConfig`` for parts that do not carry one; for a model's own LoRA its configuration.
        v4_compatible: Describe expert adapters as one pair for each expert and projection.
        legacy_paramwrapper_layout: Describe adapters of fused expert parameters as peft up to 0.19.0 lays them out.
        base: The base model, for an adapter that does not name it.
        stepped: Identities of parameters with optimizer state: trained, even if they are frozen now.

    Raises:
        AdapterError: The adapter cannot be described.
        ModuleStateError: A module to be saved has its own state_dict methods or hooks.
        NameCollisionError: Two parts have a tensor of one name.
    """
    inventory, cut = _inventory(parts)
    layout = {"v4_compatible": v4_compatible, "legacy_layout": legacy_paramwrapper_layout}
    if is_peft_adapted(parts, peft_config):
        configs = adapter_configs(parts, peft_config)
        files = []
        # Sorted, so that all ranks have one order: stages may have received their adapters in different ones.
        for name in sorted(configs):
            found = [capture_peft(part, configs, name, base=base, is_stage=bool(cut), **layout) for part in parts]
            files.append(AdapterFile(name, _joined(found)))
    else:
        for part in parts:
            # So that the code below finds shards, not parameters that a forward pass left gathered.
            own_tensors(adapted_model(part))
        dim = rank_setting(peft_config)
        files = [AdapterFile("default", _joined([capture_own(part, dim, **layout) for part in parts]))]
    _require_plain_state(parts, files)
    extra = (*_extra_entries(parts, files, stepped), *_allocator_entries(parts))
    counts = (getattr(text_config(bare_model(part)), "num_hidden_layers", None) for part in parts)
    layers = next((n for n in counts if isinstance(n, int) and not isinstance(n, bool)), None)
    return AdapterTensors(tuple(files), inventory, layers, cut, extra)


def hold_adapter(entries: Iterable[AdapterEntry], meshes: MeshRegister) -> tuple[HeldTensor, ...]:
    """What this rank holds of one `AdapterFile`'s entries: sources for a save, destinations for a load."""
    out: list[HeldTensor] = []
    for item in entries:
        native = held_tensor(item.spec.name, item.tensor, meshes)
        parts = tuple(seen_through(item.view, part) for part in native.parts)
        out.append(HeldTensor(item.spec, item.grid, parts))
    return tuple(out)


def _joined(per_part: Sequence[Sequence[AdapterEntry]]) -> tuple[AdapterEntry, ...]:
    out: dict[str, AdapterEntry] = {}
    for entries in per_part:
        for item in entries:
            if item.spec.name in out:
                raise NameCollisionError(
                    "two parameters claim one name in the adapter",
                    tensor=item.spec.name,
                    hint="Give the pipeline stages distinct module names.",
                )
            out[item.spec.name] = item
    return tuple(out.values())


def _inventory(parts: Sequence[nn.Module]) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """The outermost lists and dictionaries of numbered layers, and which of them are incomplete.

    A layer is a module with modules in it: neither numbered heads nor dictionaries keyed by adapter names count.
    """
    found: dict[str, set[int]] = {}
    cut: set[str] = set()
    for part in parts:
        pending = [("", adapted_model(part))]
        while pending:
            path, module = pending.pop()
            children = {name: child for name, child in own_children(module).items() if child is not None}
            numbered = bool(children) and all(name.isdecimal() for name in children)
            layered = any(any(True for _ in unwrap(child).children()) for child in children.values())
            kept = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
            if kept and numbered and layered:
                name = plain_path(path).removeprefix(PEFT_PREFIX)
                found.setdefault(name, set()).update(map(int, children))
                if isinstance(module, nn.ModuleDict) or len(children) < len(own_children(module)):
                    cut.add(name)
                if not isinstance(module, nn.Sequential):  # which may also be a model and its head
                    continue
            pending.extend((join(path, name), child) for name, child in children.items())
    return {name: tuple(sorted(indices)) for name, indices in sorted(found.items())}, frozenset(cut)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's state is its parameters and buffers, and loading copies into these, as torch's own do."""
    return not (
        saves_subtree_itself(module)
        or not has_torch_method(module, SAVE_OWN)
        or overrides_extra_state(module, "get_extra_state")
        or overrides_extra_state(module, "set_extra_state")
        or has_foreign_hooks(loading_pre_hooks(module))
        or LOAD_OWN in vars(module)
    ) and own_loader(type(module)).__module__.startswith("torch.nn.")


def _require_plain_state(parts: Sequence[nn.Module], files: Sequence[AdapterFile]) -> None:
    """Check that each saved module's state is its parameters and buffers, and is loaded into these unchanged."""
    owners = {item.fqn.rpartition(".")[0] for file in files for item in file.entries}
    around = {name[:at] for name in owners for at, letter in enumerate(name) if letter == "."}
    for part in parts:
        refuse_hooks_around(part, adapted_model(part))
        for name, module in (*named_modules(adapted_model(part)), *named_modules(bare_model(part))):
            # Modules around it may override state_dict(), as peft's layers do; peft picks from the result.
            hooked = (name in around or not name) and has_foreign_hooks(saving_hooks(module))
            if hooked or (name in owners and not _is_plain(module)):
                raise ModuleStateError(
                    f"{label(module, name)} saves or loads its state by its own methods or hooks, and an adapter's "
                    "file holds parameters and buffers unchanged",
                    hint="Remove its state_dict hooks, or leave it out of modules_to_save.",
                )


# --- values that change beside the adapter ----------------------------------------------------------------------------


def _extra_entries(
    parts: Sequence[nn.Module], files: Sequence[AdapterFile], stepped: Collection[int] = ()
) -> tuple[AdapterEntry, ...]:
    """Parameters that are trained, and buffers that training may change, that no adapter's file holds. Local.

    Trained are parameters that an optimizer has state of (``stepped``: their identities) or that require a gradient.
    """
    taken = {id(item.tensor) for file in files for item in file.entries}
    out: dict[str, AdapterEntry] = {}
    for part in parts:
        model = adapted_model(part)
        listed = list_parameters([model])
        prepared = _is_prepared(model, listed)
        changed = _statistics(model) | _changed_at_start(model)
        for named in listed:
            trained = (named.tensor.requires_grad and prepared) or id(named.tensor) in stepped
            counts = (trained and isinstance(named.tensor, nn.Parameter)) or named.name in changed
            if not counts or id(named.tensor) in taken:
                continue
            name = named.name.removeprefix(PEFT_PREFIX)
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


def _allocator_entries(parts: Sequence[nn.Module]) -> Iterator[AdapterEntry]:
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
