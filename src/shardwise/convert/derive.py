"""Derive a conversion from transformers' own rules, by running them once on tensors without memory.

The rules that `transformers.core_model_loading.revert_weight_conversion` would apply when the model is saved are
applied to `TracedTensor`s, and where each element went is read off the results. This stays cheap for many tensors: a
name that no rule touches costs only a match against the patterns, and a rule is run once for each combination of shapes
and then replayed under other names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardwise.convert.mapping import revert
from shardwise.convert.provenance import Untraceable, axis_views
from shardwise.convert.rules import Computed, Conversion, HubPart, HubTensor, NativeSpec
from shardwise.convert.trace import TracedTensor, traced
from shardwise.convert.transformers_rule import ConverterRule, Member, RuleSet, may_have_rules, replay, rule_set, run
from shardwise.dtypes import dtype_code, torch_dtype
from shardwise.errors import ConversionError
from shardwise.geometry import TensorSpec
from shardwise.plan.views import AxisView
from shardwise.stateful_wrappers.wrapping import skeleton, unwrap
from shardwise.upstream.transformers import left_out
from shardwise.upstream.transformers_rules import in_loading_order, legacy_renamings

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
    rules = _rules(bare)
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
    return None if legacy_renamings(bare) or _rules(bare) is not None else left_out(bare)


def _rules(bare: torch.nn.Module) -> RuleSet | None:
    # Copying the modules of a large model takes longer than everything else here.
    return rule_set(skeleton(bare)) if may_have_rules(bare) else None


def _by_rules(rules: RuleSet, natives: Sequence[NativeSpec]) -> tuple[tuple[HubTensor, ...], tuple[Computed, ...]]:
    views: list[HubTensor] = []
    groups: defaultdict[str, list[tuple[Member, NativeSpec]]] = defaultdict(list)
    by_name = {spec.name: spec for spec in natives}
    for spec in map(by_name.__getitem__, in_loading_order(by_name)):
        group, pattern = rules.match(spec.name)
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
