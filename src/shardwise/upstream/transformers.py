"""Private and undocumented names of transformers, and its rules between names and tensors of files and models."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

from shardwise.upstream.python import imported_class

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers.core_model_loading import WeightConverter as WeightConverter  # noqa: PLC0414
    from transformers.core_model_loading import WeightRenaming as WeightRenaming  # noqa: PLC0414

#: Entries of configurations that say where they came from: a path of the machine, a model's own configuration.
NAME_OR_PATH = "_name_or_path"
FROM_MODEL_CONFIG = "_from_model_config"

#: Tables that give a configuration's classes of models, those for pretraining and generating first.
_TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
)


# --- models and configurations ----------------------------------------------------------------------------------------


#: The base of transformers' models, and that of its configurations; ``None`` where its module was not imported.
model_class = partial(imported_class, "transformers.modeling_utils", "PreTrainedModel")
config_class = partial(imported_class, "transformers.configuration_utils", "PreTrainedConfig")


def registered_classes(config: type) -> list[type]:
    """The classes that transformers' auto classes would open a configuration with."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[type, None] = {}
    for table in _TABLES:
        try:
            cls: object = getattr(auto, table)[config]
        except (AttributeError, KeyError):
            continue
        for each in cls if isinstance(cls, tuple) else (cls,):
            found[cast(type, each)] = None
    return list(found)


def auto_class(cls: type) -> object:
    """The auto class that a class itself was registered for; ``None`` where it was not."""
    return vars(cls).get("_auto_class")


#: The patterns of the tensors that a converter takes.
patterns_of: Callable[[WeightConverter], Sequence[str]] = attrgetter("source_patterns")


# --- ties and names that a class expects or leaves out ----------------------------------------------------------------


def class_ties(model: object) -> object:
    """The ties that a model or class declares, whatever its configuration says: target -> source, or targets."""
    return getattr(model, "_tied_weights_keys", None)


def configured_ties(model: object) -> object:
    """The ties that a model has as its configuration says, target -> source; ``None`` where it has no such list."""
    return getattr(model, "all_tied_weights_keys", None)


def may_be_missing(model: object) -> tuple[str, ...]:
    """Patterns of names that a model does not expect in its files."""
    return _patterns(getattr(model, "_keys_to_ignore_on_load_missing", None))


def may_be_unexpected(model: object) -> tuple[str, ...]:
    """Patterns of names in its files that a model has no use for."""
    return _patterns(getattr(model, "_keys_to_ignore_on_load_unexpected", None))


def _patterns(declared: object) -> tuple[str, ...]:
    return tuple(map(str, declared)) if isinstance(declared, (list, tuple, set)) else ()


def left_out(model: object) -> frozenset[str]:
    """Names that a model leaves out of the files that it writes."""
    return frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Patterns of the names that transformers keeps in float32 when it loads a model in a dtype."""
    import torch

    patterns: list[str] = []
    for name, dtypes in (
        ("_keep_in_fp32_modules", (torch.float16,)),
        ("_keep_in_fp32_modules_strict", (torch.float16, torch.bfloat16)),
    ):
        patterns += getattr(model, name, None) or () if dtype in dtypes else ()
    return [pattern.replace("*", ".*") for pattern in patterns]


def forget_initialised(module: nn.Module | torch.Tensor) -> None:
    """Have transformers take a module, a parameter or a buffer for one without initial values."""
    vars(module).pop("_is_hf_initialized", None)


def mark_initialised(tensor: torch.Tensor) -> None:
    """Have transformers' initialisation leave a tensor alone."""
    cast(Any, tensor)._is_hf_initialized = True


# --- loading without memory -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of loading by transformers."""

    missing: frozenset[str]  #: Names that the model has and did not find.
    unexpected: frozenset[str]  #: Names that it has no use for.
    #: Name, shape in the files and shape in the model.
    mismatched: tuple[tuple[str, Sequence[int], Sequence[int]], ...]
    failed: tuple[str, ...]  #: Names whose conversion failed.


def load_on_meta(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Loaded:
    """Let transformers load tensors without memory into a model without memory, ties and all."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    built = cast(Any, model)
    rules = registered_rules(model)
    options = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=rules)
    if _fits_as_it_is(built, tensors, rules):
        # transformers compiles a regular expression for each tensor: most of the time for tens of thousands.
        info, _ = convert_and_load_state_dict_in_model(built, {}, options)
        info.missing_keys -= tensors.keys()
    else:
        info, _ = convert_and_load_state_dict_in_model(built, dict(tensors), options)
    built.mark_tied_weights_as_initialized(info)
    built.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    built._adjust_missing_and_unexpected_keys(info)
    return Loaded(
        frozenset(map(str, info.missing_keys)),
        frozenset(map(str, info.unexpected_keys)),
        tuple((str(name), ours, theirs) for name, ours, theirs in info.mismatched_keys),
        tuple(map(str, info.conversion_errors)),
    )


def _fits_as_it_is(model: Any, tensors: Mapping[str, torch.Tensor], rules: Sequence[Any]) -> bool:
    """Whether transformers would load each tensor under its own name and shape; if so, they are marked as loaded."""
    own = model.state_dict(keep_vars=True)
    renamings, converters = renamings_of(rules), converters_of(rules)
    prefix = f"{model.base_model_prefix}."
    for name, tensor in tensors.items():
        if name not in own or getattr(own[name], "shape", None) != tensor.shape:
            return False
        # A name that is there with the prefix and without is for transformers to decide.
        if prefix + name in own or (name.startswith(prefix) and name.removeprefix(prefix) in own):
            return False
        if renamed(name, renamings) != name or matching_converter(name, converters) != (name, None):
            return False
    for name in tensors:
        mark_initialised(own[name])
    return True


@contextlib.contextmanager
def without_initial_values() -> Iterator[None]:
    """While active, models are built without initial values and ties."""
    from transformers import initialization

    with (
        initialization.no_init_weights(),
        initialization.no_tie_weights(),
        initialization.meta_device_safe_creation_ops(),
    ):
        yield


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
    """A name after one rule, which remembers it, and the rule's pattern that it fills; ``None`` if none matches."""
    found, pattern = rule.rename_source_key(name)
    return str(found), None if pattern is None else str(pattern)


def search_of(rule: WeightRenaming) -> Callable[[str], object] | None:
    """A search that fails where a renaming would change nothing, without the detour through match objects and groups.

    ``None`` where the rule is not transformers' own, or looks at more than its patterns.
    """
    is_known = type(rule).__module__ == "transformers.core_model_loading" and rule.scope_prefix is None
    return cast("Callable[[str], object]", rule.compiled_sources.search) if is_known else None


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
