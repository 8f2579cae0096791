"""A module's tensors under their plain names, and which of them are the same tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from shardwise.errors import NameCollisionError
from shardwise.stateful_wrappers.memory import address, identity
from shardwise.stateful_wrappers.units import (
    Aside,
    Described,
    StandIns,
    Step,
    has_foreign_hooks,
    has_torch_method,
    is_torchs_own,
    refuse_fsdp1,
    refuse_hooks_around,
    saved_tensors,
)
from shardwise.stateful_wrappers.wrapping import plain_name, unwrap
from shardwise.upstream.torch_modules import own_children, saving_pre_hooks
from shardwise.upstream.transformers import class_ties, configured_ties


class NamedTensor(NamedTuple):
    """A tensor of the model's state. Two are never compared but by identity."""

    name: str  #: Plain fully qualified name.
    tensor: torch.Tensor  #: The parameter or buffer itself (not detached).
    aliases: tuple[str, ...] = ()  #: Further names of the very same tensor.
    part: int = 0  #: Number of the first of the model's parts that has it under this name.
    position: int = 0  #: Index of the name among all names of all parts.


class Listing(NamedTuple):
    """A model's state."""

    #: Parameters and persistent buffers, each once, in the model's order; stand-ins where modules make or load their
    #: entries by their own methods.
    tensors: tuple[NamedTensor, ...]
    #: The modules that have them, possibly some twice; ``None`` where one has its own methods for state.
    modules: tuple[nn.Module, ...] | None
    aside: Mapping[str, Aside]  #: Plain name -> a value of the state that is no ordinary tensor.
    #: Plain module name -> torch's metadata of modules with their own methods for state.
    metadata: Mapping[str, Mapping[str, object]]
    #: For each part, how it loads entries that are not read into its memory directly; empty for most models.
    steps: tuple[tuple[Step, ...], ...]


def list_state(
    parts: Sequence[nn.Module], stand_ins: StandIns | None = None, *, values: bool = True, norms: bool = False
) -> Listing:
    """The content of ``state_dict()`` of a rank's model parts, each tensor once, in the model's order.

    Two names are the same tensor if they are the same object or the same memory read in the same way. The name that
    is kept is the one that the model does not declare as tied to another (transformers' ``_tied_weights_keys``) and
    that is no head's, else the first. Different tensors of one name in two parts are a `NameCollisionError`.

    ``stand_ins`` are those of last time, for what modules make on the fly. Without ``values`` the state is not for a
    save, and extra state is not requested; with ``norms`` torch's normalisation layers take their state themselves.
    """
    refuse_fsdp1(parts)
    stand_ins = stand_ins or StandIns()
    stand_ins.begin()
    entries: list[Mapping[str, torch.Tensor]] = []
    modules: list[nn.Module] | None = []
    aside: dict[str, Aside] = {}
    metadata: dict[str, Mapping[str, object]] = {}
    steps: list[tuple[Step, ...]] = []
    for part in parts:
        module = unwrap(part)
        refuse_hooks_around(part, module)
        plain = _plain_entries(module, norms)
        if plain is None:
            modules = None
            described = Described(module, stand_ins, values=values, norms=norms)
            aside |= {plain_name(name): value for name, value in described.aside.items()}
            metadata |= {plain_name(f"{name}.")[:-1]: noted for name, noted in described.metadata.items()}
            steps.append(tuple(described.steps))
            entries.append(described.tensors)
        else:
            own, all_below = plain
            steps.append(())
            entries.append(own)
            if modules is not None:
                modules += all_below
    listed = _listed(entries, parts)
    return Listing(listed, None if modules is None else tuple(modules), aside, metadata, tuple(steps))


def list_parameters(parts: Sequence[nn.Module]) -> tuple[NamedTensor, ...]:
    """As `list_state`, but parameters and buffers as the modules have them, whatever they give out when asked."""
    refuse_fsdp1(parts)
    return _listed([_own_entries(unwrap(part)) for part in parts], parts)


def own_tensors(root: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a module under their plain names, a tied one under each of its names.

    As in `list_parameters`, FSDP2's hooks are called first: parameters that a forward pass left gathered, in memory
    that FSDP2 may free at any time, are replaced by the shards that training owns.
    """
    return {plain_name(name): tensor for name, tensor in _own_entries(root).items()}


def _listed(entries: Sequence[Mapping[str, torch.Tensor]], parts: Sequence[nn.Module]) -> tuple[NamedTensor, ...]:
    """The tensors with the first of the parts that has them, names of one tensor together."""
    found: dict[str, NamedTensor] = {}
    for number, own in enumerate(entries):
        for key, tensor in own.items():
            name = plain_name(key)
            known = found.setdefault(name, NamedTensor(name, tensor, (), number, len(found)))
            if known.tensor is not tensor:
                raise NameCollisionError(
                    "two of this rank's model parts have different tensors of this name",
                    tensor=name,
                    hint="Give each stage's modules the names that they have in the whole model.",
                )
    listed = tuple(found.values())
    if len({address(named.tensor) for named in listed}) < len(listed):
        return _merged(listed, declared_ties(parts))
    return listed


def _merged(listed: Sequence[NamedTensor], declared: Mapping[str, str]) -> tuple[NamedTensor, ...]:
    """Put names of one tensor together."""
    groups: dict[tuple[object, ...], list[NamedTensor]] = {}
    for named in listed:
        groups.setdefault(identity(named.tensor), []).append(named)
    out = []
    for alike in groups.values():
        # A head gives way to the embedding also where nothing is declared: that is the name that files have.
        undeclared = [named for named in alike if named.name not in declared]
        kept = next((named for named in undeclared if not is_lm_head(named.name)), (undeclared or alike)[0])
        out.append(kept._replace(aliases=tuple(named.name for named in alike if named is not kept)))
    return tuple(out)


def is_lm_head(name: str) -> bool:
    """Whether a name is that of a language model's head: ``lm_head.weight``, at the top or inside a wrapper."""
    return name == "lm_head.weight" or name.endswith(".lm_head.weight")


def _plain_entries(root: nn.Module, norms: bool) -> tuple[dict[str, torch.Tensor], list[nn.Module]] | None:
    """The entries of torch's ``state_dict``, in its order, in a third of its time; and the modules.

    ``None`` where a module overrides how its state is made or loaded, or has a hook of another library.
    """
    found: dict[str, torch.Tensor] = {}
    modules: list[nn.Module] = []
    if not has_torch_method(root, "load_state_dict"):
        return None
    for prefix, module in _with_prefixes(root):
        if not is_torchs_own(module, norms=norms):
            return None
        modules.append(module)
        found |= _entries_of(module, prefix)
    return found, modules


def _own_entries(root: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under the names that the modules have them under."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in _with_prefixes(root):
        found |= _entries_of(module, prefix)
    return found


def _entries_of(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    for hook in saving_pre_hooks(module):  # FSDP2's, which puts sharded parameters back in place
        if not has_foreign_hooks([hook]):
            hook(module, prefix, True)
    return {prefix + name: tensor for name, tensor in saved_tensors(module)}


def _with_prefixes(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and all below it, in torch's order, with the prefixes of their names."""
    pending = [("", root)]
    while pending:
        prefix, module = pending.pop()
        yield prefix, module
        if children := own_children(module):
            below = [(f"{prefix}{name}.", child) for name, child in children.items() if child is not None]
            pending.extend(reversed(below))


def declared_ties(parts: Sequence[nn.Module]) -> dict[str, str]:
    """Names that the model declares as tied to another: ``{"lm_head.weight": "model.embed_tokens.weight"}``.

    Declarations only; whether the tensors really are one is not checked. The other name is empty where none is given.
    """
    ties: dict[str, str] = {}
    for module in map(unwrap, parts):
        ties |= _as_mapping(configured_ties(module) or class_ties(module))
    return ties


def promised_ties(parts: Sequence[nn.Module]) -> dict[str, str]:
    """As `declared_ties`, but only ties that the parts' configuration asks for: an untied head is not among them.

    A pipeline stage may have its own copy of a tensor that another stage has under the name that it is tied to.
    """
    return {target: source for target, source in loaders_ties(parts).items() if source}


def loaders_ties(parts: Sequence[nn.Module]) -> dict[str, str]:
    """As `declared_ties`, but what transformers ties depends on the configuration.

    With ``tie_word_embeddings=False`` a declared tie does not count. A loader fills these names from other tensors.
    """
    ties: dict[str, str] = {}
    for module in map(unwrap, parts):
        known = configured_ties(module)
        ties |= _as_mapping(known if isinstance(known, dict) else class_ties(module))
    return ties


def _as_mapping(declared: object) -> dict[str, str]:
    if isinstance(declared, dict):
        return {str(target): str(source) for target, source in declared.items()}
    return {str(target): "" for target in cast("Iterable[object]", declared or ())}


def undeclared_names(tensors: Iterable[NamedTensor], parts: Sequence[nn.Module]) -> dict[str, str]:
    """Further names of tensors that the parts do not declare to be tied -> the names that are kept."""
    found = {alias: named.name for named in tensors if named.aliases for alias in named.aliases}
    declared = loaders_ties(parts) if found else ()
    return {alias: name for alias, name in found.items() if alias not in declared}
