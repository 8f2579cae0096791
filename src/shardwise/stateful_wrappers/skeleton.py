"""A model without its wrappers, as transformers' rules expect to see it.

transformers finds the rules for a model by the class names and modules of its sub-models. FSDP2 renames classes
(``FSDPLlamaModel``, of a torch module, so that they even look like custom code), and activation checkpointing,
``torch.compile`` and DDP put modules of their own in between. A skeleton is a shallow copy of the module tree with the
original classes and without those modules; it shares every parameter, and the model itself is not touched.
"""

from __future__ import annotations

import torch

from shardwise.stateful_wrappers.wrapping import original_class, unwrap
from shardwise.upstream.torch_modules import CHILDREN, own_children


def skeleton(module: torch.nn.Module) -> torch.nn.Module:
    """A shallow copy of the module tree, without wrappers and with the original classes.

    Modules that have no others in them are most of a model's; those of an original class are shared, not copied.
    """
    return _copy(module, {}, {})


def _copy(
    module: torch.nn.Module, done: dict[int, torch.nn.Module], originals: dict[type, type[torch.nn.Module]]
) -> torch.nn.Module:
    module = unwrap(module)
    if id(module) in done:
        return done[id(module)]
    cls = originals.get(type(module))
    if cls is None:
        cls = originals[type(module)] = original_class(module)
    if cls is type(module) and not own_children(module):
        return module
    copy = cls.__new__(cls)
    done[id(module)] = copy
    copy.__dict__.update(module.__dict__)
    children = {
        name: child if child is None else _copy(child, done, originals) for name, child in own_children(module).items()
    }
    copy.__dict__[CHILDREN] = children
    return copy
