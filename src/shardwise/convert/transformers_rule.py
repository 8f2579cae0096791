"""The one place that talks to transformers' conversion rules: find them, run them, replay them.

The order of the steps is that of `transformers.core_model_loading.revert_weight_conversion` (5.23): at most one
converter for a name, names in natural order, then every renaming on what the converter returned. The steps themselves
(matching, converting, naming) are transformers' own methods, called on copies, because they change the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shardwise.errors import ConversionError
from shardwise.upstream import transformers_rules as upstream
from shardwise.upstream.transformers import model_class

if TYPE_CHECKING:
    from shardwise.upstream.transformers_rules import WeightConverter, WeightRenaming


class Watched:
    """A model that remembers whether a rule read from it (``touched``): its result may then depend on the layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self.touched = model, False

    def __getattr__(self, name: str) -> object:
        self.touched = True
        return getattr(self._model, name)


class _Record:
    """A last operation that keeps what the others returned."""

    keys: tuple[str, ...] = ()
    values: tuple[object, ...] = ()

    def convert(self, collected: Mapping[str, object], **_: object) -> Mapping[str, object]:
        self.keys, self.values = tuple(collected), tuple(collected.values())
        return collected


@dataclass(frozen=True, slots=True)
class _Replay:
    """An only operation that returns numbers under known keys, so that the converter only finds the names."""

    keys: tuple[str, ...]

    def convert(self, _: object, **__: object) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.keys)}


@dataclass(frozen=True)
class RuleSet:
    """A model's rules in the direction native to hub, with what they came from."""

    renamings: tuple[WeightRenaming, ...]  #: Applied to a name one after the other.
    #: By the pattern that they take tensors from; at most one applies to a name.
    converters: tuple[WeightConverter, ...]
    origins: tuple[WeightConverter, ...]  #: For each of ``converters``, the rule in the direction hub to native.
    #: The renamings in the direction hub to native, in the order of loading.
    forward_renamings: tuple[WeightRenaming, ...]
    model: torch.nn.Module  #: The model, without wrappers.
    #: For each of ``renamings`` a search that fails where it changes nothing; ``None`` without such a search.
    quick: tuple[Callable[[str], object] | None, ...]

    def match(self, name: str) -> tuple[str, str | None]:
        """The name of the group that a native tensor belongs to and the pattern it fills; ``None`` if it has none."""
        return upstream.matching_converter(name, self.converters)

    def rename(self, name: str) -> str:
        """The hub name of what is called ``name`` once the converters are done with it."""
        for quick, renaming in zip(self.quick, self.renamings, strict=True):
            if quick is None or quick(name) is not None:
                name, _ = upstream.rename(renaming, name)
        return name

    def converter(self, pattern: str) -> int:
        """The number of the converter for ``pattern``: the last one, as transformers' own table has it."""
        return max(i for i, c in enumerate(self.converters) if pattern in upstream.patterns_of(c))


def may_have_rules(model: torch.nn.Module) -> bool:
    """Whether transformers could have rules for ``model``, which may be wrapped: it is one of its classes."""
    # A model of transformers' cannot exist before its import, which takes seconds and is not made for other modules.
    return isinstance(model, model_class() or ())


def rule_set(model: torch.nn.Module) -> RuleSet | None:
    """The rules that transformers would apply to save ``model``, or ``None`` where there are none.

    The rules with which `from_pretrained` loaded the model, else those registered for its classes and model types; a
    `PrefixChange` only if it was used in loading, since the name alone does not show it.
    """
    if not may_have_rules(model):
        return None
    rules = upstream.loaded_with(model)
    if rules is None:
        rules = upstream.without_prefix_changes(upstream.registered_rules(model, legacy=False))
    if not rules:
        return None
    pristine = [deepcopy(rule) for rule in rules]
    try:
        reverse = [upstream.reversed_rule(rule) for rule in pristine[::-1]]
    except (NotImplementedError, ValueError) as error:
        raise ConversionError(
            f"a conversion rule of {type(model).__name__} has no reverse: {error}",
            hint="Dequantize the model on load, or give it a state_dict_adapter.",
        ) from error
    origins = {id(rule): origin for rule, origin in zip(reverse, pristine[::-1], strict=True)}
    renamings, converters = tuple(upstream.renamings_of(reverse)), tuple(upstream.converters_of(reverse))
    return RuleSet(
        renamings=renamings,
        converters=converters,
        origins=tuple(origins[id(rule)] for rule in converters),
        forward_renamings=tuple(upstream.renamings_of(pristine)),
        model=model,
        quick=tuple(map(upstream.search_of, renamings)),
    )


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor of a converter's group: its name and the pattern that it fills."""

    name: str
    pattern: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a converter on a group."""

    keys: tuple[str, ...]  #: The converter's own keys of its results, from which it makes names.
    names: tuple[str, ...]  #: Full names, before renaming.
    tensors: tuple[torch.Tensor, ...]  #: Results, in the order of both.
    replayable: bool  #: Whether a group of the same shapes elsewhere in the model must come out the same.


def run(
    converter: WeightConverter,
    group: str,
    members: Sequence[Member],
    tensors: Sequence[torch.Tensor],
    model: torch.nn.Module,
) -> Outcome:
    """Run a converter on the tensors of one group."""
    record, watched = _Record(), Watched(model)
    copy = _filled(converter, group, members, tensors)
    by_name = upstream.looks_at_names(copy)
    named = upstream.convert_filled(copy, group, last=record, model=watched, config=model.config)
    names = {id(value): str(name) for name, value in named.items()}
    return Outcome(
        keys=record.keys,
        names=tuple(names[id(value)] for value in record.values),
        tensors=tuple(_single(value) for value in record.values),
        replayable=not (watched.touched or by_name) and len(names) == len(record.values),
    )


def replay(converter: WeightConverter, group: str, members: Sequence[Member], keys: tuple[str, ...]) -> list[str]:
    """The names that a converter gives to known results of another group."""
    copy = _filled(converter, group, members, [0] * len(members))
    named = upstream.convert_filled(copy, group, operations=[_Replay(keys)])
    return [str(name) for name, _ in sorted(named.items(), key=lambda item: int(item[1]))]


def _filled(
    converter: WeightConverter, group: str, members: Sequence[Member], values: Sequence[object]
) -> WeightConverter:
    given = ((member.name, member.pattern, value) for member, value in zip(members, values, strict=True))
    return upstream.filled(converter, group, given)


def _single(value: object) -> torch.Tensor:
    found = value[0] if isinstance(value, list) else value
    if not isinstance(found, torch.Tensor):
        raise ConversionError(f"a conversion rule returned a {type(found).__name__} where a tensor was due")
    return found


@dataclass(frozen=True, slots=True)
class ConverterRule:
    """One converter of a model's rules, run on whole tensors of one group (a `shardwise.convert.rules.Rule`)."""

    rules: RuleSet
    number: int
    group: str
    members: tuple[Member, ...]

    def forward(self, natives: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `shardwise.convert.rules.Rule.forward`."""
        tensors = [natives[member.name] for member in self.members]
        outcome = run(self.rules.converters[self.number], self.group, self.members, tensors, self.rules.model)
        return {self.rules.rename(name): t for name, t in zip(outcome.names, outcome.tensors, strict=True)}

    def backward(self, hub: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `shardwise.convert.rules.Rule.backward`."""
        origin = deepcopy(self.rules.origins[self.number])
        members: list[Member] = []
        tensors: list[torch.Tensor] = []
        group = ""
        for name in upstream.in_loading_order(hub):
            renamed = upstream.renamed(name, [deepcopy(renaming) for renaming in self.rules.forward_renamings])
            group, pattern = upstream.rename(origin, renamed)
            if pattern is None:
                raise ConversionError("the rule that made this tensor does not take it back", tensor=name)
            members.append(Member(name, pattern))
            tensors.append(hub[name])
        outcome = run(origin, group, members, tensors, self.rules.model)
        return dict(zip(outcome.names, outcome.tensors, strict=True))


def loading_names(model: torch.nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Names in files after transformers' renamings for loading into an unwrapped model, before any converter.

    They stay the same for a model that is not of transformers.
    """
    if not may_have_rules(model):
        return tuple(names)
    renamings = upstream.renamings_of(map(deepcopy, upstream.registered_rules(model)))
    renamed = {name: upstream.renamed(name, renamings) for name in upstream.in_loading_order(names)}
    return tuple(renamed[name] for name in names)
