"""A model without its wrappers, as transformers' rules expect to see it.

transformers finds the rules for a model by the class names and modules of its sub-models. FSDP2 renames classes
(``FSDPLlamaModel``, of a torch module, so that they even look like custom code), and activation checkpointing,
``torch.compile`` and DDP put modules of their own in between. A skeleton is a shallow copy of the module tree with the
original classes and without those modules; it shares every parameter, and the model itself is not touched.
"""

from __future__ import annotations

from functools import cache

import torch

#: Where a wrapper keeps the module that it wraps, by the wrapper's class name (DDP's attribute is too common a name).
_INNER = {"CheckpointWrapper": "_checkpoint_wrapped_module", "OptimizedModule": "_orig_mod"}
_INNER |= {"DistributedDataParallel": "module", "FullyShardedDataParallel": "_fsdp_wrapped_module"}


def original_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The module's class before FSDP2 replaced it."""
    return _original(type(module))  # type: ignore[arg-type]


@cache  # a model has few classes, and asking abstract ones what they are is slow
def _original(own: type[torch.nn.Module]) -> type[torch.nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    for cls in own.__mro__:
        if not issubclass(cls, FSDPModule) and issubclass(cls, torch.nn.Module):
            return cls
    return own


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside of wrappers, or the module itself."""
    while True:
        inner = module._modules.get(_INNER.get(type(module).__name__, ""))
        if inner is None:
            return module
        module = inner


def skeleton(module: torch.nn.Module) -> torch.nn.Module:
    """A shallow copy of the module tree, without wrappers and with the original classes.

    Modules that have no others in them are most of a model's; those of an original class are shared, not copied.
    """
    return _copy(module, {}, {})


def _copy(
    module: torch.nn.Module, done: dict[int, torch.nn.Module], originals: dict[type, type[torch.nn.Module]]
) -> torch.nn.Module:
    module = unwrapped(module)
    if id(module) in done:
        return done[id(module)]
    cls = originals.get(type(module))
    if cls is None:
        cls = originals[type(module)] = original_class(module)
    if cls is type(module) and not module._modules:
        return module
    copy = cls.__new__(cls)
    done[id(module)] = copy
    copy.__dict__.update(module.__dict__)
    children = {
        name: child if child is None else _copy(child, done, originals) for name, child in module._modules.items()
    }
    copy.__dict__["_modules"] = children
    return copy
