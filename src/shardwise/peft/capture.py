"""The content of an adapter checkpoint as one rank holds it: the adapters' counterpart of capturing a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch.nn as nn

from shardwise.errors import ModuleStateError, NameCollisionError
from shardwise.peft.builtin_lora import capture_own
from shardwise.peft.config import rank_setting
from shardwise.peft.extra import allocator_entries, extra_entries
from shardwise.peft.models import adapter_configs, capture_peft, is_peft_adapted
from shardwise.peft.tensors import (
    PEFT_PREFIX,
    AdapterEntry,
    AdapterFile,
    AdapterTensors,
    join,
    named_modules,
    text_config,
)
from shardwise.plan.fragments import HeldTensor, seen_through
from shardwise.stateful_wrappers.names import own_tensors
from shardwise.stateful_wrappers.state_dict_overrides import (
    has_foreign_hooks,
    has_torch_method,
    overrides_extra_state,
    refuse_hooks_around,
    saves_subtree_itself,
)
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.stateful_wrappers.units import label
from shardwise.stateful_wrappers.wrapping import adapted_model, bare_model, plain_path, unwrap
from shardwise.upstream.torch_modules import (
    LOAD_OWN,
    SAVE_OWN,
    loading_pre_hooks,
    own_children,
    own_loader,
    saving_hooks,
)


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
        parts: This rank's parts of the model: adapted with Hugging Face ``peft`` (with or without ``PeftModel``), or
            with LoRA modules of its own (see `shardwise.peft.builtin_lora`).
        peft_config: A ``PeftConfig`` for parts that do not carry one; for a model's own LoRA its configuration, of
            which ``dim`` is read (or ``r`` of what `shardwise.peft.config.read_adapter_config` returns).
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
            files.append(AdapterFile(name, adapter_directory(name), _joined(found)))
    else:
        for part in parts:
            # So that the code below finds shards, not parameters that a forward pass left gathered.
            own_tensors(adapted_model(part))
        dim = rank_setting(peft_config)
        files = [AdapterFile("default", "", _joined([capture_own(part, dim, **layout) for part in parts]))]
    _require_plain_state(parts, files)
    extra = (*extra_entries(parts, files, stepped), *allocator_entries(parts))
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


def adapter_directory(adapter_name: str) -> str:
    """Where peft keeps an adapter below the directory that it saves into."""
    return "" if adapter_name == "default" else adapter_name


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
