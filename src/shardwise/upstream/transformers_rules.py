"""transformers' rules between the names and tensors of files and those of models, and what they do not document."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers.core_model_loading import WeightConverter as WeightConverter  # noqa: PLC0414
    from transformers.core_model_loading import WeightRenaming as WeightRenaming  # noqa: PLC0414


def legacy_renamings(model: object) -> dict[str, str]:
    """The renamings that a model's class has as a dictionary, as before transformers had rules; mostly empty."""
    return getattr(model, "_checkpoint_conversion_mapping", None) or {}


def loaded_with(model: object) -> list[Any] | None:
    """The rules with which ``from_pretrained`` loaded a model; ``None`` for one that it did not load."""
    return cast("list[Any] | None", getattr(model, "_weight_conversions", None))


def registered_rules(model: nn.Module, *, legacy: bool = True) -> list[Any]:
    """The rules for a class and model type, for loading; ``legacy`` ones are for files of the first releases."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return cast("list[Any]", get_model_conversion_mapping(cast(Any, model), add_legacy=legacy))


def renamings_of(rules: Iterable[object]) -> list[WeightRenaming]:
    """Those of some rules that only rename."""
    from transformers.core_model_loading import WeightRenaming

    return [rule for rule in rules if isinstance(rule, WeightRenaming)]


def converters_of(rules: Iterable[object]) -> list[WeightConverter]:
    """Those of some rules that make other tensors."""
    from transformers.core_model_loading import WeightConverter

    return [rule for rule in rules if isinstance(rule, WeightConverter)]


def without_prefix_changes(rules: Iterable[Any]) -> list[Any]:
    """Rules without those that remove or add a prefix: only loading shows whether those were needed."""
    from transformers.core_model_loading import PrefixChange

    return [rule for rule in rules if not isinstance(rule, PrefixChange)]


def matching_converter(name: str, converters: Sequence[WeightConverter]) -> tuple[str, str | None]:
    """The name of the group that a tensor belongs to, and the pattern that it fills; ``None`` if it has none.

    At most one converter takes a name: the first that matches.
    """
    for converter in converters:
        name, pattern = rename(converter, name)
        if pattern is not None:
            return name, pattern
    return name, None


def renamed(name: str, renamings: Sequence[WeightRenaming]) -> str:
    """A name after some renamings, one after the other. They remember what they were applied to."""
    for renaming in renamings:
        name, _ = rename(renaming, name)
    return name


def in_loading_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which transformers loads them: numbers between dots by their value."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def reversed_rule(rule: Any) -> Any:
    """A rule for the other direction, made from a copy; ``NotImplementedError`` or ``ValueError`` where it has none."""
    return deepcopy(rule).reverse_transform()


def rename(rule: WeightRenaming | WeightConverter, name: str) -> tuple[str, str | None]:
    """A name after one rule, and the rule's pattern that it fills; ``None`` if it does not match.

    The rule remembers it.
    """
    found, pattern = rule.rename_source_key(name)
    return str(found), None if pattern is None else str(pattern)


def search_of(rule: WeightRenaming) -> Callable[[str], object] | None:
    """A search that fails where a renaming would change nothing, without the detour through match objects and groups.

    ``None`` where the rule is not transformers' own, or looks at more than its patterns.
    """
    is_known = type(rule).__module__ == "transformers.core_model_loading" and rule.scope_prefix is None
    return cast("Callable[[str], object]", rule.compiled_sources.search) if is_known else None


def patterns_of(converter: WeightConverter) -> Sequence[str]:
    """The patterns of the tensors that a converter takes."""
    return cast("Sequence[str]", converter.source_patterns)


def filled(converter: WeightConverter, group: str, members: Iterable[tuple[str, str, object]]) -> WeightConverter:
    """A copy of a converter that was given a group, with name, pattern and value of each of its tensors, in order."""
    copy = deepcopy(converter)
    for name, pattern, value in members:
        copy.add_tensor(group, name, pattern, value)
    return copy


def looks_at_names(converter: WeightConverter) -> bool:
    """Whether one of a converter's operations takes the group's name."""
    return any("full_layer_name" in inspect.signature(op.convert).parameters for op in converter.operations)


def convert_filled(
    converter: WeightConverter,
    group: str,
    operations: Sequence[object] | None = None,
    last: object | None = None,
    **of_model: object,
) -> dict[str, Any]:
    """Run a converter that `filled` made for a group, once; values by full name.

    Other operations may take the place of its own, or one come last. ``of_model`` has ``model`` and ``config``, where
    operations may look at them.
    """
    own = converter.operations if operations is None else operations
    converter.operations = [*own, *([] if last is None else [last])]
    return cast("dict[str, Any]", converter.convert(group, **of_model))
