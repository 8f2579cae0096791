"""Private attributes of ``torch.nn.Module``, of modules that wrap others, and of optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, TypeAlias, cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, _IncompatibleKeys

from shardwise.upstream.python import imported_class

Hook: TypeAlias = Callable[..., object]

#: Attributes of a module that hold its parameters, buffers and children, as keys of ``vars(module)``.
PARAMETERS, BUFFERS, CHILDREN = "_parameters", "_buffers", "_modules"
STORES = (PARAMETERS, BUFFERS, CHILDREN)

#: The attribute of a module that names its buffers that are no part of its state.
UNSAVED = "_non_persistent_buffers_set"

#: From ``vars(module)``: its parameters; children, buffers, and hooks around saving.
parameters_in = itemgetter(PARAMETERS)
other_stores_in = itemgetter(CHILDREN, BUFFERS, "_state_dict_hooks", "_state_dict_pre_hooks")

#: The dictionaries in which a module keeps its own parameters, buffers and children, these under each of their names;
#: ``None`` stands for one that is registered and absent.
own_parameters: Callable[[nn.Module], dict[str, nn.Parameter | None]] = attrgetter(PARAMETERS)
own_buffers: Callable[[nn.Module], dict[str, Any]] = attrgetter(BUFFERS)
own_children: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter(CHILDREN)

#: The set in which a module keeps the names of its buffers that are no part of its state.
unsaved_buffers: Callable[[nn.Module], set[str]] = attrgetter(UNSAVED)

#: Methods that make and take a module's own state, but for that of its children.
SAVE_OWN = "_save_to_state_dict"
LOAD_OWN = "_load_from_state_dict"

#: The method with which modules of a class take their own state.
own_loader: Callable[[type[nn.Module]], Callable[..., object]] = attrgetter(LOAD_OWN)

#: The answer of ``load_state_dict`` of missing and unexpected keys; post-hooks may change the lists.
loading_answer: Callable[[list[str], list[str]], object] = _IncompatibleKeys

#: The version that a module's class notes beside its state.
state_version: Callable[[nn.Module], int] = attrgetter("_version")

#: Methods that give a module of torch's its initial values, in the order in which they are tried.
INITIALISERS = ("reset_parameters", "_reset_parameters")

#: The name under which a module's extra state stands among its entries.
EXTRA: str = _EXTRA_STATE_KEY_SUFFIX

#: Path components that torch.compile, activation checkpointing (and offloading) and FSDP1 put into names.
COMPILED = "_orig_mod"
CHECKPOINTED = "_checkpoint_wrapped_module"
FSDP1_WRAPPED = "_fsdp_wrapped_module"

#: Beginnings of the modules whose state-dict hooks convert nothing: FSDP2's put sharded parameters back in place,
#: activation checkpointing's strip a prefix.
HARMLESS_HOOKS = ("torch.distributed.fsdp.", "torch.distributed.algorithms._checkpoint.checkpoint_wrapper")

#: FSDP1's wrapper; ``None`` where its module was not imported, without which no model is wrapped by it.
fsdp1_class: Callable[[], type[Any] | None] = partial(
    imported_class, "torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"
)


def _hooks_in(*stores: str) -> Callable[[nn.Module], list[Hook]]:
    """A function that gives the hooks in some of a module's dictionaries."""
    return lambda module: [hook for store in stores for hook in getattr(module, store).values()]


#: The hooks that a module calls before it gives its state, also with those after; before it takes state, and after.
saving_pre_hooks = _hooks_in("_state_dict_pre_hooks")
saving_hooks = _hooks_in("_state_dict_hooks", "_state_dict_pre_hooks")
loading_pre_hooks = _hooks_in("_load_state_dict_pre_hooks")
loading_post_hooks = _hooks_in("_load_state_dict_post_hooks")


def take_off_hooks(module: nn.Module, source: str) -> None:
    """Take the hooks around giving and before taking state that come from a Python module off a module."""
    for hooks in (module._state_dict_hooks, module._state_dict_pre_hooks, module._load_state_dict_pre_hooks):
        for number, hook in list(hooks.items()):
            if getattr(hook, "__module__", None) == source:
                del hooks[number]


def save_own(module: nn.Module, entries: MutableMapping[str, object], prefix: str) -> None:
    """Let a module put its own parameters, buffers and extra state into ``entries``, detached."""
    module._save_to_state_dict(cast("dict[str, Any]", entries), prefix, False)


def load_own(
    module: nn.Module,
    values: Mapping[str, object],
    prefix: str,
    metadata: Mapping[str, object],
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Let a module take its own state from ``values``; what is wrong is appended to the three lists."""
    module._load_from_state_dict(values, prefix, metadata, True, missing, unexpected, errors)


def keys_of_answer(answer: object) -> tuple[list[str], list[str]]:
    """Missing and unexpected keys in an answer of ``load_state_dict``; none if it is not torch's."""
    if isinstance(answer, _IncompatibleKeys):
        return answer.missing_keys, answer.unexpected_keys
    return [], []


def loads_as_norms_do(module: nn.Module) -> bool:
    """Whether a module takes its own state by the method of torch's normalisation layers."""
    return own_loader(type(module)) is cast("object", _NormBase._load_from_state_dict)


def noted_versions(entries: object) -> dict[str, dict[str, object]]:
    """Torch's metadata of modules beside a state dict, by module name; empty where there is none."""
    return cast("dict[str, dict[str, object]]", getattr(entries, "_metadata", {}))


def note_versions(entries: object, noted: Mapping[str, Mapping[str, object]]) -> None:
    """Give a state dict torch's metadata of modules; it has to allow attributes, as an ``OrderedDict``'s subclass."""
    cast(Any, entries)._metadata = noted


def apply_to_tensors(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Replace every parameter and buffer of a module and all below it by what ``change`` makes of it."""
    module._apply(change)  # type: ignore[no-untyped-call]


def generated_bases() -> tuple[type, ...]:
    """The bases of the classes that FSDP2 and ``replicate`` put in front of a module's own."""
    from torch.distributed.fsdp import FSDPModule

    return (FSDPModule, imported_class("torch.distributed._composable.replicate", "DDP") or FSDPModule)


#: Attributes in which an optimizer keeps hooks on its state dict.
STATE_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

#: Entries of schedulers' states: learning rates of the parameter groups, the count of steps, the schedulers that one is
#: made of, and the steps at which these take turns.
LAST_RATES = "_last_lr"
STEP_COUNT = "_step_count"
INNER_SCHEDULERS = "_schedulers"
MILESTONES = "_milestones"

#: Class of an optimizer -> entries of a parameter's state that its step sets before it reads them: replicas may differ
#: in them, as ranks' losses do. Source: ``torch.optim.LBFGS.step``.
UNREAD_STATE = {"LBFGS": ("prev_loss",)}


def inner_schedulers(scheduler: object) -> object:
    """The schedulers that a scheduler is made of; ``None`` where it is made of none."""
    return getattr(scheduler, INNER_SCHEDULERS, None)
