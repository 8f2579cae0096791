"""Which modules only wrap a model, and which model the files describe: the one place that knows.

Four questions, since a wrapper may have state of its own:

* `unwrap`: which module has just the state of this one? DDP, DataParallel, torch.compile, activation checkpointing and
  FSDP1 add a prefix to names and nothing else.
* `inner_model`: which module do the files belong to? A running average (``AveragedModel``), a value head around a
  language model, a SentenceTransformer are modules with further state; their files are the model's inside, under
  its own names, and the rest is saved separately.
* `adapted_model`: which module did peft adapt? The ``PeftModel`` itself, or the model with adapters injected into it.
* `bare_model`: which module is the base model, in which peft's layers are, out of an average too?
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, cast

from torch import nn

from shardwise.upstream.hugging_face import hub_mixin, model_mixin
from shardwise.upstream.python import imported_class
from shardwise.upstream.torch_modules import (
    CHECKPOINTED,
    CHILDREN,
    COMPILED,
    FSDP1_WRAPPED,
    generated_bases,
    own_children,
)
from shardwise.upstream.transformers import config_class, model_class

#: The children in which some wrappers keep the module that they wrap, and these as components of names.
_WRAPPED = (COMPILED, CHECKPOINTED, FSDP1_WRAPPED)
_SEGMENTS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_WRAPPED)})\.")


def plain_name(name: str) -> str:
    """A tensor's name without what torch.compile, activation checkpointing and FSDP1 put into it."""
    return _SEGMENTS.sub("", name) if "_mod." in name or "_wrapped_module." in name else name


def plain_path(path: str) -> str:
    """The same of a module's path; empty for the replacement of the wrapped module."""
    return plain_name(f"{path}.").rstrip(".")


def wrapped(module: nn.Module) -> nn.Module | None:
    """The module that this one wraps and has the same state as; ``None`` where it wraps none."""
    for name in _WRAPPED:
        inner = own_children(module).get(name)
        if inner is not None:  # not by truth: a module may have a length, and a compiled one asks the model's
            return inner
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return cast("nn.Module", module.module)
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel, torch.compile, activation checkpointing and FSDP1."""
    while (inner := wrapped(module)) is not None:
        module = inner
    return module


def bare_model(module: nn.Module) -> nn.Module:
    """The base model inside everything that `unwrap` takes off, inside ``AveragedModel`` and inside a ``PeftModel``."""
    while True:
        module = unwrap(module)
        if isinstance(module, _averaged()):
            module = cast("nn.Module", module.module)
            continue
        if not (hasattr(type(module), "get_base_model") and hasattr(module, "peft_config")):
            return module
        inner = cast("nn.Module", module.get_base_model())  # type: ignore[operator]
        if inner is module:
            return module
        module = inner


def adapted_model(part: nn.Module) -> nn.Module:
    """The part out of what only wraps it, a ``PeftModel`` included; of a SentenceTransformer, the model inside."""
    inner = unwrap(part)
    return inner_model(inner).module if is_sentence_transformer(inner) else inner


class Inner(NamedTuple):
    """The model that the files of a part are of."""

    module: nn.Module  #: The model, out of everything around it.
    prefix: str = ""  #: What its names begin with in the part's state; empty where they are the same.
    has_rest: bool = False  #: Whether the part may have state outside of it.


def inner_model(part: nn.Module) -> Inner:
    """The model that a save of ``part`` writes files of: ``part`` itself out of its wrappers, or a model inside it.

    A model is looked for inside of ``AveragedModel``, and of a module that is no library's pretrained model and shows
    the configuration of one that it holds. Where several could be meant, none is.
    """
    inner = Inner(unwrap(part))
    while (found := _inside(inner.module)) is not None:
        path, module, has_rest = found
        prefix = f"{inner.prefix}{path}."
        while (below := wrapped(module)) is not None:
            # Below the top, DDP's own name for what it wraps is in the state's names.
            prefix += "" if any(name in own_children(module) for name in _WRAPPED) else "module."
            module = below
        inner = Inner(module, _SEGMENTS.sub("", prefix), inner.has_rest or has_rest)
    return inner


def _inside(module: nn.Module) -> tuple[str, nn.Module, bool] | None:
    """The path of the module that the files describe, that module, and whether there is further state."""
    if isinstance(module, _averaged()):
        return "module", cast("nn.Module", module.module), True
    if is_loaded_by_others(module) or _speaks_for_itself(module):
        return None
    config = _transformers_config(module)
    if config is None and not is_sentence_transformer(module):
        return None
    found = list(outermost_pretrained(module))
    own = [pair for pair in found if getattr(pair[1], "config", None) is config] or found
    if len(own) != 1:
        return None
    return own[0][0], own[0][1], True


def is_average(module: nn.Module) -> bool:
    """Whether a module is a running average of another, with a count beside it."""
    return isinstance(unwrap(module), _averaged())


def _averaged() -> type:
    # Not imported here: a model without an average should not pay for it.
    return imported_class("torch.optim.swa_utils", "AveragedModel") or type(None)


def _speaks_for_itself(module: nn.Module) -> bool:
    """Whether a module says by itself what its files are: an adapter of state dicts, an exporter, a peft model."""
    methods = ("_get_consolidated_hf_metadata_exporter", "get_base_model")
    return (
        any(hasattr(type(module), name) for name in methods) or getattr(module, "state_dict_adapter", None) is not None
    )


def _transformers_config(module: nn.Module) -> object | None:
    """The configuration of transformers that a module shows."""
    known = config_class()
    if known is None:
        return None
    try:
        config: object = getattr(module, "config", None)
    except Exception:  # noqa: BLE001 - a property may raise anything
        return None
    return config if isinstance(config, known) else None


def outermost_pretrained(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each of transformers' models below a module, but for those inside another."""
    pending = [(name, child) for name, child in reversed(list(module.named_children()))]
    while pending:
        name, child = pending.pop()
        if is_pretrained(child):
            yield name, child
        else:
            below = [(f"{name}.{inner}", module) for inner, module in child.named_children()]
            pending.extend(reversed(below))


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is of one of transformers' classes of models."""
    return isinstance(module, model_class() or ())


def is_loaded_by_others(module: nn.Module) -> bool:
    """Whether a library builds and loads a module's class by itself: transformers, diffusers, huggingface_hub."""
    return is_pretrained(module) or isinstance(module, model_mixin() or ()) or is_hub_mixin(module)


def is_hub_mixin(module: nn.Module) -> bool:
    """Whether a module has huggingface_hub's ``PyTorchModelHubMixin``."""
    return isinstance(module, hub_mixin() or ())


def is_sentence_transformer(module: nn.Module) -> bool:
    """Whether a module is a whole model of sentence-transformers."""
    return is_of(module, "sentence_transformers", "SentenceTransformer")


def is_of(module: nn.Module, where: str, name: str) -> bool:
    """Whether a module is of a class of a library, which is not imported for this: it could not exist without."""
    return isinstance(module, imported_class(where, name) or ())


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as its author wrote it: FSDP2 and ``replicate`` put a generated one in front of it."""
    return _original(type(module))  # type: ignore[arg-type]


@cache  # a model has few classes, and asking abstract ones what they are is slow
def _original(own: type[nn.Module]) -> type[nn.Module]:
    generated = generated_bases()
    for cls in own.__mro__:
        if not issubclass(cls, generated) and issubclass(cls, nn.Module):
            return cls
    return own


# --- a model without its wrappers, as transformers' rules expect to see it -------------------------------------------


def skeleton(module: nn.Module) -> nn.Module:
    """A shallow copy of the module tree, without wrappers and with the original classes.

    transformers finds the rules for a model by the class names and modules of its sub-models. FSDP2 renames classes
    (``FSDPLlamaModel``, of a torch module, so that they even look like custom code), and activation checkpointing,
    ``torch.compile`` and DDP put modules of their own in between. Every parameter is shared, and the model itself is
    not touched. Modules that have no others in them are most of a model's; those of an original class are not copied.
    """
    return _copy(module, {})


def _copy(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    module = unwrap(module)
    if id(module) in done:
        return done[id(module)]
    cls = original_class(module)
    if cls is type(module) and not own_children(module):
        return module
    copy = done[id(module)] = cls.__new__(cls)
    copy.__dict__.update(module.__dict__)
    children = own_children(module).items()
    copy.__dict__[CHILDREN] = {name: child if child is None else _copy(child, done) for name, child in children}
    return copy
