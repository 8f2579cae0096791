"""What of a model is exported, and under which names what its modules share or its configuration ties is written.

A value head around a language model, or a running average, is exported as the language model alone: its files use the
model's own names, and the model's class opens them. Tensors outside that model are written to shards beside the export
under the outer module's names, and loading reads them from there.

A shared tensor is saved once, under one of its names. The manifest lists the aliases that the model does not declare as
tied, so that a model in which the modules have parameters of their own finds the values under each. Where a tie is
declared, a model without it is another model, and misses the tensor. Other libraries read files and no manifest. Of a
model that they build by themselves, a share that is not declared is therefore written under every name: transformers
would give those that are not there new random values.

A loader ties what the configuration says, whatever the files hold: transformers keeps two tensors that differ, others
(vLLM) load one and lose the other. Memory and configuration disagree where a tied model is given new memory
(``to_empty``), where head and embedding are separate FSDP units, and where the configuration is changed later.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import nn

from shardwise.addons.hf_config import untie_configs
from shardwise.convert import Conversion, HubTensor, adapter_of, derive, derive_for, to_hub
from shardwise.errors import ConversionError, NameCollisionError
from shardwise.format.manifest import TensorRecord
from shardwise.geometry import TensorSpec
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers import wrapping
from shardwise.stateful_wrappers.names import NamedTensor, declared_ties, is_lm_head, loaders_ties
from shardwise.stateful_wrappers.wrapping import Inner, inner_model, is_pretrained, plain_name, unwrap
from shardwise.upstream.torch_modules import unsaved_buffers

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class SharedNames:
    """How the aliases of a part's tensors are saved; names as in the files, except in ``absent``.

    Attributes:
        copies: The tensors again, under the aliases that are written too.
        kept: Undeclared alias -> the name under which the tensor is always written.
        absent: Aliases that are not written, under the model's names and under those of files.
    """

    copies: tuple[HeldTensor, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


def shared_names(part: nn.Module, tied: Sequence[tuple[str, HeldTensor]], expected: Collection[str]) -> SharedNames:
    """Decide how aliases, each with its tensor, are saved; ``expected`` are declared (`loaders_ties`). Local."""
    names = tuple(alias for alias, _ in tied)
    module = unwrap(part)
    if not tied or adapter_of(module) is not None:
        return SharedNames(absent=names)
    aliases = [tensor.renamed(alias) for alias, tensor in tied]
    specs = dict.fromkeys([*(tensor.spec for tensor in aliases), *(tensor.spec for _, tensor in tied)])
    try:
        conversion = derive(module, list(specs))
    except ConversionError:
        # A rule that needs more than these tensors gives them no separate names.
        return SharedNames(absent=names)
    # huggingface_hub's mixin loads into a model that shares what it shares.
    is_loaded_by_others = wrapping.is_loaded_by_others(module) and not wrapping.is_hub_mixin(module)
    undeclared = {alias for alias in names if alias not in expected} if is_loaded_by_others else set()
    written = [hub for hub in conversion.hub if undeclared.issuperset(each.native for each in hub.parts)]
    natives = {each.native for hub in written for each in hub.parts}
    copies = to_hub(Conversion(tuple(written)), [t for t in aliases if t.spec.name in natives]).held
    kept: dict[str, str] = {}
    for alias, tensor in tied:
        if alias in expected:
            continue
        theirs, ours = conversion.by_native(alias), conversion.by_native(tensor.spec.name)
        if _views(theirs) == _views(ours):
            kept |= {a.name: b.name for a, b in zip(theirs, ours, strict=True)}
    there = {tensor.spec.name for tensor in copies}
    hub_names = [hub.name for alias in names for hub in conversion.by_native(alias)]
    return SharedNames(copies, kept, tuple(name for name in dict.fromkeys([*names, *hub_names]) if name not in there))


def _views(tensors: Sequence[HubTensor]) -> list[object]:
    """Each tensor's view of its one native tensor; a unique object where it is made of several."""
    return [tensor.parts[0].view if len(tensor.parts) == 1 else object() for tensor in tensors]


def ties_by_config(module: nn.Module) -> dict[str, str]:
    """The ties of a transformers model's present configuration, in its own names: tied name -> what it is tied to."""
    module = unwrap(module)
    if not is_pretrained(module):
        return {}
    expand = getattr(module, "get_expanded_tied_weights_keys", None)
    known: object = None
    if callable(expand):
        try:
            known = expand(all_submodels=True)
        except ValueError:
            # A pipeline stage lacks tensors that its class ties; the ties found when the model was built are used.
            known = None
    if not isinstance(known, dict):
        known = getattr(module, "all_tied_weights_keys", None)
    ties = cast("Mapping[str, str]", known) if isinstance(known, dict) else declared_ties([module])
    return {plain_name(str(name)): plain_name(str(source)) for name, source in ties.items() if source}


def expected_ties(parts: Sequence[ExportedPart]) -> frozenset[str]:
    """Names that a loader of these parts ties to others, so that files may lack them.

    None for a model with a tie in its configuration that is not one in memory: it may have to be exported as untied,
    and then its files have to have every name.
    """
    found: set[str] = set()
    for part in parts:
        if not is_pretrained(unwrap(part.module)):
            found |= loaders_ties([part.module]).keys()
            continue
        ties = ties_by_config(part.module)
        if not _loose(ties, part):
            found |= ties.keys()
    return frozenset(found)


def _loose(ties: Mapping[str, str], part: ExportedPart) -> bool:
    places = {name: number for number, (named, _) in enumerate(part.own) for name in (named.name, *named.aliases)}
    return any(name in places and source in places and places[name] != places[source] for name, source in ties.items())


def loose_ties(parts: Sequence[nn.Module], written: Collection[str]) -> dict[str, str]:
    """The configuration's ties with both names in the files of all ranks, ``written``: tied name -> what it is tied to.

    Pipeline stages may have one name of a tie each. A tie with one name in the files is a tie in memory as well.
    """
    found: dict[str, str] = {}
    for module in exported_modules(parts):
        for name, source in ties_by_config(module).items():
            found[file_name(module, name)] = file_name(module, source)
    return {name: source for name, source in found.items() if name in written and source in written}


def settle_ties(ties: Mapping[str, str], tensors: Iterable[TensorRecord], directory: Path) -> bool:
    """Untie a directory's configuration where tensors that it ties were written with different values. Rank 0 calls.

    Two tensors are equal where their digests are; these are of the whole tensors. Returns whether it was changed.
    """
    differ = differing_ties(ties, tensors)
    if not differ:
        return False
    untie_configs(directory)
    name, source = next(iter(differ.items()))
    _LOG.warning(
        "the configuration ties %s to %s%s, and they have different values: tie_word_embeddings is false in the "
        "export. Call model.tie_weights() after giving the model memory, if they are to be one",
        name,
        source,
        f" and {len(differ) - 1} more" if len(differ) > 1 else "",
    )
    return True


def differing_ties(ties: Mapping[str, str], tensors: Iterable[TensorRecord]) -> dict[str, str]:
    """The ties with two written tensors that have different values."""
    written = {tensor.spec.name: (tensor.crc32c, tensor.spec[1:]) for tensor in tensors} if ties else {}
    return {
        name: source
        for name, source in ties.items()
        if name in written and source in written and written[name] != written[source]
    }


def file_name(part: nn.Module, name: str) -> str:
    """Name in the model's files of a tensor that conversion only renames."""
    made = derive_for(unwrap(part), (TensorSpec(name, (1,), "F32"),))
    return made.hub[0].name if len(made.hub) == 1 else name


_Pair = tuple[NamedTensor, HeldTensor]


@dataclass(frozen=True, slots=True, eq=False)
class ExportedPart:
    """A part of the model, divided into what is exported and what is not.

    Attributes:
        module: The exported model.
        own: The exported tensors, under the exported model's names.
        outside: Tensors of the part that are not exported, under the part's names.
        outer: Name outside the exported model of a tensor that it shares -> the exported model's name.
    """

    module: nn.Module
    own: tuple[_Pair, ...]
    outside: tuple[HeldTensor, ...] = ()
    outer: Mapping[str, str] = field(default_factory=dict)

    @property
    def ties(self) -> dict[str, str]:
        """Alias of a tensor -> the exported model's name under which it is kept."""
        return {**self.outer, **{alias: named.name for named, _ in self.own for alias in named.aliases}}


def exported_part(part: nn.Module, own: Sequence[_Pair]) -> ExportedPart:
    """Divide a part's tensors into exported ones and others. Local."""
    inner = inner_model(part)
    if not inner.has_rest and not inner.prefix:
        return ExportedPart(part, tuple(own))
    theirs = _names_inside(inner, (name for named, _ in own for name in (named.name, *named.aliases)))
    ties = declared_ties([inner.module])
    found: list[_Pair] = []
    outside: list[HeldTensor] = []
    outer: dict[str, str] = {}
    for named, held in own:
        names = (named.name, *named.aliases)
        inside = [theirs[name] for name in names if name in theirs]
        if not inside:
            outside.append(held)
            continue
        free = [name for name in inside if name not in ties]
        kept = next((name for name in free if not is_lm_head(name)), (free or inside)[0])
        aliases = tuple(name for name in inside if name != kept)
        found.append((named._replace(name=kept, aliases=aliases), held.renamed(kept)))
        outer |= {name: kept for name in names if name not in theirs}
    return ExportedPart(inner.module, tuple(found), tuple(outside), outer)


def _names_inside(inner: Inner, names: Iterable[str]) -> dict[str, str]:
    """Names in the part that belong to the inner model -> the inner model's own names."""
    listed = list(names)
    found = {name: name[len(inner.prefix) :] for name in listed if name.startswith(inner.prefix)}
    if inner.prefix and not found:
        # A part with its own state_dict() may leave the prefix out, as TRL's value heads do.
        own = {plain_name(name) for name in inner.module.state_dict(keep_vars=True)}
        found = {name: name for name in listed if name in own}
    return found


def exported_modules(parts: Sequence[nn.Module]) -> list[nn.Module]:
    """The exported model of each part."""
    return [unwrap(inner_model(part).module) for part in parts]


def outer_names(parts: Iterable[ExportedPart], held: Iterable[HeldTensor]) -> dict[str, str]:
    """Names outside the exported models of tensors that are written -> the names they are written under."""
    found = {name: kept for part in parts for name, kept in part.outer.items()}
    written = {tensor.spec.name for tensor in held} if found else set()
    return {name: kept for name, kept in found.items() if kept in written and name not in written}


def check_outside(outside: Iterable[HeldTensor], held: Iterable[HeldTensor], absent: Iterable[str]) -> None:
    """Raise `NameCollisionError` if a tensor outside the exported model has a name that the files may have."""
    names = {tensor.spec.name for tensor in outside}
    twice = sorted(names & {*(tensor.spec.name for tensor in held), *absent}) if names else []
    if twice:
        raise NameCollisionError(
            f"a module around the model has a tensor under a name that the model's files use: {twice[0]}",
            tensor=twice[0],
            hint="Rename it in the module, or save the model inside by itself.",
        )


def recomputed_buffers(module: nn.Module) -> set[str]:
    """Names of buffers that are in no file, each with its module's name alone: releases move such modules about."""
    found: set[str] = set()
    for name, inner in module.named_modules():
        found |= {f"{name.rpartition('.')[2]}.{buffer}".removeprefix(".") for buffer in unsaved_buffers(inner)}
    return found
