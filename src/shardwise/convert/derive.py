"""Derive a conversion from transformers' own rules, by running them once on tensors without memory.

The rules that `transformers.core_model_loading.revert_weight_conversion` would apply when the model is saved are
applied to `TracedTensor`s, and where each element went is read off the results. This stays cheap for many tensors: a
name that no rule touches costs only a match against the patterns, and a rule is run once for each combination of shapes
and then replayed under other names.

The order of the steps is that function's (5.23): at most one converter for a name, names in natural order, then every
renaming on what the converter returned. The steps themselves (matching, converting, naming) are transformers' own
methods, called on copies, because they change the rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from shardwise.convert.mapping import rename, revert
from shardwise.convert.provenance import Untraceable, axis_views
from shardwise.convert.rules import Computed, Conversion, HubPart, HubTensor, NativeSpec, Rule
from shardwise.convert.trace import TracedTensor, traced
from shardwise.dtypes import dtype_code, torch_dtype
from shardwise.errors import ConversionError
from shardwise.geometry import TensorSpec
from shardwise.plan.views import AxisView
from shardwise.stateful_wrappers.wrapping import skeleton, unwrap
from shardwise.upstream import transformers as upstream
from shardwise.upstream.transformers import in_loading_order, left_out, legacy_renamings, model_class

if TYPE_CHECKING:
    from shardwise.upstream.transformers import WeightConverter, WeightRenaming

#: Errors that conversion code may raise on a tensor that it does not expect.
RULE_ERRORS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Derived:
    """How a hub tensor is made, whatever its name and its group."""

    shape: tuple[int, ...]  #: Its global shape.
    dtype: str  #: Its dtype code.
    parts: tuple[tuple[int, AxisView | None], ...]  #: Number of a native tensor in the group, and the view of it.
    reason: str = ""  #: Why no view expresses it; empty where one does.


#: By converter and shapes: the keys of its results, and how each is made.
_Cache = dict[object, tuple[tuple[str, ...], tuple[Derived, ...]]]


def identity(natives: Sequence[NativeSpec]) -> Conversion:
    """The conversion under which files and model are the same."""
    return Conversion(tuple(HubTensor(spec.name, spec.shape, (HubPart(spec.name),)) for spec in natives))


def derive(model: torch.nn.Module, natives: Sequence[NativeSpec]) -> Conversion:
    """Derive how a model's tensors become those of its Hugging Face files. No collectives; any rank may call.

    The model is transformers', wrapped or not, or any other module, whose files then have its names. Neither it nor its
    rules are changed. The tensors have global shapes, tied ones once. A rule that cannot be reversed or does not fit,
    and two tensors of one name, raise `ConversionError`.
    """
    bare = unwrap(model)
    absent = left_out(bare)
    kept = [spec for spec in natives if spec.name not in absent]
    ignored = tuple(spec.name for spec in natives if spec.name in absent)
    rules = rule_set(bare)
    if rules is not None:
        return Conversion(*_by_rules(rules, kept), ignored)
    mapping = legacy_renamings(bare)
    own = [spec.name for spec in kept]
    names = revert(own, mapping) if mapping else own
    renamed = tuple(HubTensor(name, spec.shape, (HubPart(spec.name),)) for name, spec in zip(names, kept, strict=True))
    return Conversion(renamed, (), ignored)


def kept_out(model: torch.nn.Module) -> frozenset[str] | None:
    """FQNs that a model without a state-dict adapter keeps out of its files, if all others are written unchanged.

    ``None`` where anything is renamed or converted, so that only a conversion shows the names.
    """
    bare = unwrap(model)
    return None if legacy_renamings(bare) or rule_set(bare) is not None else left_out(bare)


def _by_rules(rules: RuleSet, natives: Sequence[NativeSpec]) -> tuple[tuple[HubTensor, ...], tuple[Computed, ...]]:
    views: list[HubTensor] = []
    groups: defaultdict[str, list[tuple[Member, NativeSpec]]] = defaultdict(list)
    by_name = {spec.name: spec for spec in natives}
    for spec in map(by_name.__getitem__, in_loading_order(by_name)):
        group, pattern = upstream.matching_converter(spec.name, rules.converters)
        if pattern is None:
            views.append(HubTensor(rules.rename(spec.name), spec.shape, (HubPart(spec.name),)))
        else:
            groups[group].append((Member(spec.name, pattern), spec))
    computed: list[Computed] = []
    cache: _Cache = {}
    for group, pairs in groups.items():
        members = tuple(member for member, _ in pairs)
        specs = tuple(spec for _, spec in pairs)
        names, results = _results(rules, group, members, specs, cache)
        reasons = [result.reason for result in results if result.reason]
        if reasons:
            hub = tuple(TensorSpec(name, r.shape, r.dtype) for name, r in zip(names, results, strict=True))
            rule = ConverterRule(rules, rules.converter(members[0].pattern), group, members)
            computed.append(Computed(specs, hub, rule, reasons[0]))
        else:
            views += (hub_tensor(name, result, specs) for name, result in zip(names, results, strict=True))
    return tuple(views), tuple(computed)


def _results(
    rules: RuleSet, group: str, members: tuple[Member, ...], specs: tuple[NativeSpec, ...], cache: _Cache
) -> tuple[list[str], tuple[Derived, ...]]:
    """Hub names of a group's results, and how each is made."""
    number = rules.converter(members[0].pattern)
    key = (number, tuple((m.pattern, s.shape, s.dtype) for m, s in zip(members, specs, strict=True)))
    known = cache.get(key)
    if known is not None:
        keys, results = known
        return [rules.rename(name) for name in replay(rules.converters[number], group, members, keys)], results
    sources = [traced(i, spec.shape, torch_dtype(spec.dtype)) for i, spec in enumerate(specs)]
    try:
        outcome = run(rules.converters[number], group, members, sources, rules.model)
    except RULE_ERRORS as error:
        raise ConversionError(
            f"the conversion rule for {group!r} does not fit the model's tensors: {error}",
            tensor=members[0].name,
            hint="Check that all tensors of the group are there in their global shapes.",
        ) from error
    results = tuple(derived(tensor, specs) for tensor in outcome.tensors)
    if outcome.replayable:
        cache[key] = (outcome.keys, results)
    return [rules.rename(name) for name in outcome.names], results


def derived(tensor: torch.Tensor, natives: Sequence[NativeSpec]) -> Derived:
    """Read off the result of a rule how it is made of the native tensors."""
    shape, dtype = tuple(tensor.shape), dtype_code(tensor.dtype)
    if not isinstance(tensor, TracedTensor):
        return Derived(shape, dtype, (), "made from nothing")
    if tensor.provenance is None:
        return Derived(shape, dtype, (), tensor.why)
    try:
        return Derived(shape, dtype, axis_views(tensor.provenance, [spec.shape for spec in natives]))
    except Untraceable as reason:
        return Derived(shape, dtype, (), str(reason))


def hub_tensor(name: str, made: Derived, natives: Sequence[NativeSpec]) -> HubTensor:
    """A hub tensor from its name and how it is made."""
    return HubTensor(name, made.shape, tuple(HubPart(natives[source].name, view) for source, view in made.parts))


# --- transformers' rules: find them, run them, replay them -----------------------------------------------------------


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


def rule_set(bare: torch.nn.Module) -> RuleSet | None:
    """The rules that transformers would apply to save an unwrapped model, or ``None`` where there are none.

    The rules with which `from_pretrained` loaded the model, else those registered for its classes and model types; a
    `PrefixChange` only if it was used in loading, since the name alone does not show it.
    """
    if not may_have_rules(bare):
        return None
    model = skeleton(bare)  # copying the modules of a large model takes longer than everything else here
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


# --- the names that a given set of files happens to use --------------------------------------------------------------

# Files of one model come under several names: with or without the base model's prefix, in the original authors' names
# or in transformers' own, with legacy endings, saved unconverted. They are matched by transformers' own code: two names
# mean the same tensor if its renamings for loading make one name of both.


@dataclass(frozen=True, slots=True)
class RenamedRule:
    """A rule whose hub tensors have other names in the files (a `shardwise.convert.rules.Rule`)."""

    rule: Rule  #: The rule under the hub's names.
    in_files: Mapping[str, str]  #: Name in the files of each hub name.

    def forward(self, natives: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `shardwise.convert.rules.Rule.forward`."""
        return {self.in_files[name]: tensor for name, tensor in self.rule.forward(natives).items()}

    def backward(self, hub: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `shardwise.convert.rules.Rule.backward`."""
        return self.rule.backward({name: hub[file] for name, file in self.in_files.items()})


def for_files(
    model: torch.nn.Module,
    conversion: Conversion,
    natives: Sequence[NativeSpec],
    names: Sequence[str],
    key_mapping: Mapping[str, str] | None = None,
) -> Conversion:
    """Put a conversion into the names of files to load. No collectives; any rank may call.

    A native tensor whose hub tensors are not in the files, while it is there itself, is taken unconverted. One that is
    not there in any form keeps its hub names, so that the loader misses it under the name that the hub would use; names
    of the files that the result does not have are unexpected. The user's ``key_mapping`` (regular expressions and
    replacements, from the files' names to the model's) applies first; it may not make one name of two.
    """
    if not key_mapping and set(conversion.names) <= set(names):
        return conversion
    bare = skeleton(model)
    files = dict(zip(loading_names(bare, rename(names, key_mapping or {})), names, strict=True))
    hub = _in_files(bare, conversion.names, files)
    unconverted = _in_files(bare, [spec.name for spec in natives], files)
    shapes = {spec.name: spec.shape for spec in natives}
    views: list[HubTensor] = []
    taken: set[str] = set()
    for tensor in conversion.hub:
        sources = [part.native for part in tensor.parts]
        if tensor.name not in hub and all(native in unconverted for native in sources):
            fresh = [native for native in dict.fromkeys(sources) if native not in taken]
            views += (HubTensor(unconverted[n], shapes[n], (HubPart(n),)) for n in fresh)
            taken.update(fresh)
        else:
            views.append(tensor._replace(name=hub.get(tensor.name, tensor.name)))
    computed: list[Computed] = []
    for group in conversion.computed:
        members = [spec.name for spec in group.natives]
        if all(s.name not in hub for s in group.hub) and all(native in unconverted for native in members):
            views += (HubTensor(unconverted[n], shapes[n], (HubPart(n),)) for n in members)
        else:
            in_files = {spec.name: hub.get(spec.name, spec.name) for spec in group.hub}
            specs = tuple(spec._replace(name=in_files[spec.name]) for spec in group.hub)
            computed.append(replace(group, hub=specs, rule=RenamedRule(group.rule, in_files)))
    return Conversion(tuple(views), tuple(computed), conversion.ignored)


def _in_files(model: torch.nn.Module, names: Sequence[str], files: Mapping[str, str]) -> dict[str, str]:
    """For each of ``names`` that is in the files, its name there: by what loading makes of both."""
    prefix: str = getattr(model, "base_model_prefix", "") or ""
    out: dict[str, str] = {}
    for name, key in zip(names, loading_names(model, names), strict=True):
        variants = (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
        found = next((files[variant] for variant in variants if variant in files), None)
        if found is not None:
            out[name] = found
    return out
