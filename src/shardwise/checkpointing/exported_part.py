"""The model inside a module that has state beside it: which tensors are exported, and which stay outside the export.

A value head around a language model, or a running average, is exported as the language model alone: its files use the
model's own names, and the model's class opens them. Tensors outside that model are written to shards beside the export
under the outer module's names, and loading reads them from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from shardwise.errors import NameCollisionError
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.names import NamedTensor, declared_ties, is_lm_head
from shardwise.stateful_wrappers.wrapping import Inner, inner_model, plain_name, unwrap

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
        found.append((named._replace(name=kept, aliases=aliases), held._replace(spec=held.spec._replace(name=kept))))
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
