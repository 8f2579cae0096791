"""Matches a model's tensors with the names in files that other tools wrote, a base model's among them.

Our checkpoints, and those of today's ``save_pretrained``, have the names that the model's conversion gives. Other files
come with the original authors' names, with legacy endings, without the base model's prefix, or with some tensors
unconverted; `shardwise.convert.derive.for_files` maps them as transformers would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from shardwise.convert.adapter import conversion_of
from shardwise.convert.derive import for_files, identity
from shardwise.convert.rules import Conversion, Converted, HeldGroup, NativeSpec, to_hub
from shardwise.geometry import TensorSpec
from shardwise.peft.builtin_lora import find_sites
from shardwise.peft.builtin_lora import natives as site_natives
from shardwise.plan.deferred import deferred, refuse_stand_ins
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.model import post_steps
from shardwise.stateful_wrappers.names import NamedTensor, declared_ties, list_state
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.stateful_wrappers.units import Step
from shardwise.stateful_wrappers.wrapping import adapted_model, bare_model, plain_name
from shardwise.upstream import peft
from shardwise.upstream.transformers import class_ties, may_be_missing


@dataclass(frozen=True, eq=False)
class BaseWanted:
    """The tensors that a base fills on this rank."""

    held: list[HeldTensor] = field(default_factory=list)  #: Destinations under the names of the base's files.
    groups: list[HeldGroup] = field(default_factory=list)  #: Native tensors that have to be computed from the base's.
    #: ``(from, to)``: tensors to copy after loading.
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)  #: The model's tensors behind all of these.
    #: For each part, its tensors and how they become those of the files.
    conversions: list[tuple[tuple[NativeSpec, ...], Conversion]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)  #: What modules do that take their state by methods of their own.
    #: Those of ``tensors`` that the files fill; the model does not expect the others to be there.
    filled: list[torch.Tensor] = field(default_factory=list)


def match_base(
    parts: Sequence[nn.Module],
    names: Sequence[str],
    *,
    base_ties: bool,
    skip_prefixes: Sequence[str] = (),
    key_mapping: Mapping[str, str] | None = None,
    before: BaseWanted | None = None,
) -> BaseWanted:
    """Match a model, which may still be on the meta device, with the tensors in a base's files. Local.

    Adapters are left out: their layers' base weights are matched under the names that they have without. A tied tensor
    is matched under whichever of its names the files have; a head that this model does not tie and the files lack gets
    the embedding that the model's class would tie it to, if the base may tie (``base_ties``), so that files without a
    head are whole. Tensors whose names start with one of ``skip_prefixes`` are left out.

    ``key_mapping`` maps the files' names to the model's. ``before`` is what the same call found when the tensors were
    others of the same names and shapes (on the meta device).
    """
    register = MeshRegister()
    available = frozenset(names)
    found = BaseWanted()
    held: list[HeldTensor] = []
    for number, module in enumerate(parts):
        bare, named_tensors, named_copies, steps = _part(module, names)
        kept = [t for t in named_tensors if not (skip_prefixes and t.name.startswith(tuple(skip_prefixes)))]
        kept = list(_present(bare, kept, names, key_mapping))
        natives = [held_tensor(named.name, named.tensor, register) for named in kept]
        specs = tuple(native.spec for native in natives)
        # Initialising may have tied what was not.
        same = before is not None and before.conversions[number][0] == specs
        known = before.conversions[number][1] if before is not None and same else None
        conversion, converted = under_names_of_files(bare, natives, names, key_mapping, known)
        found.conversions.append((specs, conversion))
        ties = _class_ties(bare) if base_ties else {}
        lacking = {
            tensor.spec.name: conversion.by_hub(tensor.spec.name).parts[0].native
            for tensor in converted.held
            if tensor.spec.name not in available and tensor.parts[0].part.view is None
        }
        moved = names_of_ties(bare, lacking, ties, names, key_mapping)
        expected = list(_expected(bare, converted.held, available, moved))
        held += expected
        unfilled = _unfilled(conversion, converted.held, expected)
        by_name = {named.name: named.tensor for named in kept}
        copies = [(name, copy) for name, copy in named_copies if name in by_name]
        refuse_stand_ins(held_tensor(name, by_name[name], register) for name, _ in copies)
        found.groups.extend(converted.groups)
        found.copies.extend((by_name[name], copy) for name, copy in copies)
        found.tensors.extend(by_name.values())
        found.filled.extend(tensor for name, tensor in by_name.items() if name not in unfilled)
        found.steps.extend(steps)
    refuse_stand_ins(native for group in found.groups for native in group.natives)
    own, doubled = _once(held)
    found.held.extend(own)
    found.copies[:0] = doubled
    return found


def under_names_of_files(
    module: nn.Module,
    natives: Sequence[HeldTensor],
    names: Sequence[str],
    key_mapping: Mapping[str, str] | None = None,
    known: Conversion | None = None,
) -> tuple[Conversion, Converted]:
    """A part's tensors under the names that the files have; one that is not there keeps its hub name. Local.

    ``key_mapping`` maps the files' names to the model's; ``known`` is the conversion that was found before.
    """
    if known is None:
        specs = tuple(native.spec for native in natives)
        known = for_files(module, conversion_of(module, specs), specs, names, key_mapping)
    return known, to_hub(known, natives)


def names_of_ties(
    module: nn.Module,
    lacking: Mapping[str, str],
    ties: Mapping[str, str],
    names: Sequence[str],
    key_mapping: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """For tensors that the files lack, the names there of those that they are tied to. Local.

    ``lacking`` has the name that a tensor would have in the files -> its native name, ``ties`` native name -> the
    native name that it is tied to.
    """
    wanted = {name: ties[native] for name, native in lacking.items() if native in ties}
    found = names_in_files(module, wanted.values(), names, key_mapping) if wanted else {}
    return {name: found[source] for name, source in wanted.items() if source in found}


def names_in_files(
    module: nn.Module, natives: Iterable[str], names: Sequence[str], key_mapping: Mapping[str, str] | None = None
) -> dict[str, str]:
    """For each of some native names that is in the files, its name there. Local."""
    specs = [TensorSpec(name, (), "F32") for name in dict.fromkeys(natives)]
    conversion = for_files(module, identity(specs), specs, names, key_mapping)
    available = frozenset(names)
    return {hub.parts[0].native: hub.name for hub in conversion.hub if hub.name in available}


def _expected(
    module: nn.Module, held: Iterable[HeldTensor], available: Collection[str], moved: Mapping[str, str]
) -> Iterator[HeldTensor]:
    """The destinations that the files fill, or should; a head of which they have only the embedding gets that."""
    ignorable = tuple(map(re.compile, may_be_missing(module)))
    for tensor in held:
        name = tensor.spec.name
        if name in moved:
            yield tensor._replace(spec=tensor.spec._replace(name=moved[name]))
        elif name in available or not any(pattern.search(name) for pattern in ignorable):
            yield tensor


def _unfilled(conversion: Conversion, held: Iterable[HeldTensor], expected: Iterable[HeldTensor]) -> frozenset[str]:
    """Native tensors of which the files are not expected to have anything."""
    kept = {id(part) for tensor in expected for part in tensor.parts}
    dropped = [tensor.spec.name for tensor in held if not any(id(part) in kept for part in tensor.parts)]
    natives = {part.native for name in dropped for part in conversion.by_hub(name).parts}
    return frozenset(natives.union(conversion.ignored))


def _present(
    module: nn.Module, tensors: Sequence[NamedTensor], names: Sequence[str], key_mapping: Mapping[str, str] | None
) -> Iterator[NamedTensor]:
    """The tensors, tied ones under a name that the files have if they have one of them."""
    tied = [name for named in tensors if named.aliases for name in (named.name, *named.aliases)]
    found = names_in_files(module, tied, names, key_mapping) if tied else {}
    for named in tensors:
        choices = [name for name in (named.name, *named.aliases) if name in found]
        yield named._replace(name=choices[0]) if named.aliases and choices else named


def _class_ties(module: nn.Module) -> dict[str, str]:
    """The ties that a model's class or configuration declares, target -> source, whether or not this model has them."""
    declared = class_ties(type(module))
    ties = {str(t): str(s) for t, s in declared.items()} if isinstance(declared, dict) else {}
    return ties | {target: source for target, source in declared_ties([module]).items() if source}


def _once(held: Sequence[HeldTensor]) -> tuple[tuple[HeldTensor, ...], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Destinations that read nothing twice: a region wanted in two places is read into one and copied to the other."""
    seen: dict[tuple[object, ...], torch.Tensor] = {}
    doubled: list[tuple[torch.Tensor, torch.Tensor]] = []
    out: list[HeldTensor] = []
    for tensor in held:
        parts = []
        for part in tensor.parts:
            fresh = []
            for fragment in part.fragments:
                if deferred(fragment.data) is not None:  # what a module takes itself is read for it
                    fresh.append(fragment)
                    continue
                first = seen.setdefault((tensor.spec.name, tensor.grid, fragment.box), fragment.data)
                if first is fragment.data:
                    fresh.append(fragment)
                else:
                    doubled.append((first, fragment.data))
            parts.append(part._replace(fragments=tuple(fresh)))
        out.append(tensor._replace(parts=tuple(parts)))
    return tuple(out), doubled


def _part(
    module: nn.Module, there: Sequence[str]
) -> tuple[nn.Module, list[NamedTensor], list[tuple[str, torch.Tensor]], Sequence[Step]]:
    """A part without wrappers and adapters, and its tensors under the names of its base.

    Then names of these with further tensors that begin as copies of them, and what its modules do that take their state
    by methods of their own.
    """
    inner = bare_model(module)
    wrapped, saved = _peft_layers(inner)
    first = _replicated(module, inner)
    adapters = {id(native.tensor) for site in find_sites(inner) for native in site_natives(site)}
    tensors: list[NamedTensor] = []
    copies: list[tuple[str, torch.Tensor]] = []
    taken: set[str] = set()
    # Torch's normalisation layers know files from before they counted.
    counts = any(name.rpartition(".")[2] == "num_batches_tracked" for name in there)
    listing = list_state([inner], values=False, norms=not counts)
    for named in listing.tensors:
        if id(named.tensor) in adapters:
            continue
        names = [_base_name(name, wrapped, saved) for name in (named.name, *named.aliases)]
        names = [(first(name), is_copy) for name, is_copy in names]
        own = list(dict.fromkeys(name for name, is_copy in names if name and not is_copy))
        if own and own[0] in taken:  # a layer's replica, which has been distributed apart
            copies.append((own[0], named.tensor))
        elif own:
            taken.update(own)
            tensors.append(NamedTensor(own[0], named.tensor, tuple(own[1:])))
        else:
            copies += [(name, named.tensor) for name, is_copy in names[:1] if name and is_copy]
    return inner, tensors, copies, listing.steps[0] or post_steps(inner)


def _peft_layers(module: nn.Module) -> tuple[dict[str, str], frozenset[str]]:
    """Names of the modules below that peft put in place of others: adapted layers, and modules trained as copies.

    Of an adapted layer also the child that it replaced.
    """
    if not peft.is_imported():  # a model with its layers cannot exist without it
        return {}, frozenset()
    modules = [(plain_name(name), m) for name, m in module.named_modules() if name]
    layers = {name: "base_layer" for name, m in modules if isinstance(m, peft.layer_class())}
    layers |= {name: "model" for name, m in modules if isinstance(m, peft.attention_classes())}
    return layers, frozenset(name for name, m in modules if isinstance(m, peft.copy_class()))


def _replicated(part: nn.Module, inner: nn.Module) -> Callable[[str], str]:
    """From a tensor's name to that in the base, whose layers ``layer_replication`` has repeated and moved.

    Source: ``peft.tuners.tuners_utils.replicate_layers``, which looks for the list of layers in these places.
    """
    configs = getattr(adapted_model(part), "peft_config", None)
    config = next(iter(configs.values()), None) if isinstance(configs, Mapping) else None
    ranges = getattr(config, "layer_replication", None)
    if not ranges:
        return str
    sources = [index for start, end in ranges for index in range(start, end)]
    holder, path = inner, ""
    while isinstance(child := getattr(holder, "model", None), nn.Module):
        holder, path = child, f"{path}model."
    if isinstance(child := getattr(holder, "bert", None), nn.Module):
        holder, path = child, f"{path}bert."
    leaf = "layers" if hasattr(holder, "layers") else "encoder.layer" if hasattr(holder, "encoder") else "h"
    pattern = re.compile(rf"{re.escape(path + leaf)}\.(\d+)\.")

    def first(name: str) -> str:
        found = pattern.match(name)
        return name if found is None else f"{path}{leaf}.{sources[int(found[1])]}.{name[found.end() :]}"

    return first


def _base_name(name: str, layers: Mapping[str, str], saved: frozenset[str]) -> tuple[str, bool]:
    """The name that a tensor has without adapters (empty for an adapter's), and whether it is a copy to be trained."""
    kept: list[str] = []
    pieces = name.split(".")
    prefix, is_copy = "", False
    while pieces:
        piece = pieces.pop(0)
        if prefix in layers:
            if piece != layers[prefix]:
                return "", False
        elif prefix in saved:
            if piece == "modules_to_save" and pieces:
                is_copy = True
                piece = f"{piece}.{pieces.pop(0)}"
            elif piece not in ("original_module", "token_adapter"):  # the latter is a layer around the original
                return "", False
        else:
            kept.append(piece)
        prefix = f"{prefix}.{piece}" if prefix else piece
    return ".".join(kept), is_copy
