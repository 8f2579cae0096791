"""Values of tensors that no initialisation touches, from building their modules once more.

Rotary tables and other buffers that are in no file are computed by a module's constructor; so its class is called with
the arguments that the module keeps, or the whole model's with its config. Nothing here knows a model.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from shardwise.base.slots import Slot
from shardwise.plan.fragments import copy_whole
from shardwise.stateful_wrappers.markers import has_mark
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.stateful_wrappers.wrapping import original_class

_LOG = logging.getLogger(__name__)

#: What a constructor may raise when it is called with arguments that turn out not to be its own.
_CONSTRUCTOR_ERRORS = (ArithmeticError, AttributeError, AssertionError, LookupError, NotImplementedError, RuntimeError,
                       TypeError, ValueError)  # fmt: skip

#: Attributes of every module: no constructor's arguments, though a ``ParameterDict`` takes some called ``parameters``.
_MODULES_OWN = frozenset(vars(nn.Module()))


class _EmptyOnMeta(TorchFunctionMode):
    """Puts uninitialised memory, of which layers make their weights, on the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def rebuilt(model: nn.Module, left: list[Slot], *, with_weights: bool = True) -> list[Slot]:
    """Fill tensors from modules built anew; returns those that this did not fill.

    ``with_weights`` says whether a module may be given memory for its weights if it cannot be built without.
    """
    if not left:
        return left
    config = getattr(model, "config", None)
    built: dict[int, nn.Module | None] = {}
    for real in (False, True) if with_weights else (False,):
        rest = []
        for slot in left:
            owner, leaf = slot.places[0]
            if real or id(owner) not in built:
                built[id(owner)] = _again(owner, config, real)
            if not _fill(slot, built[id(owner)], leaf):
                rest.append(slot)
        left = rest
        if not left:
            return left
    whole = _again(model, config, False, strict=False)
    return [slot for slot in left if not _fill(slot, whole, slot.name)]


def _again(module: nn.Module, config: object, real: bool, *, strict: bool = True) -> nn.Module | None:
    """The module built once more on the CPU, or ``None`` where its arguments are not known.

    Args:
        module: Any module.
        config: The model's configuration, for a module that takes one and does not keep it.
        real: Whether weights get memory.
        strict: Whether arguments that have defaults must be known too: a default that was not the argument would give
            values that are wrong without a sign.
    """
    cls = original_class(module)
    arguments = _arguments(module, cls, config, strict)
    if arguments is None:
        return None
    mode = contextlib.nullcontext() if real else _EmptyOnMeta()
    try:
        with torch.device("cpu"), mode:
            return cls(**arguments)
    except _CONSTRUCTOR_ERRORS as error:
        _LOG.debug("building %s once more failed: %s", cls.__name__, error)
        return None


def _arguments(module: nn.Module, cls: type[nn.Module], config: object, strict: bool) -> dict[str, object] | None:
    found: dict[str, object] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in ("device", "dtype"):
            continue
        kept = (key for key in (name, f"_{name}") if key in vars(module) and key not in _MODULES_OWN)
        value = next((vars(module)[key] for key in kept), parameter.empty)
        if value is parameter.empty and name == "config" and config is not None:
            value = config
        known = value is not parameter.empty and not isinstance(value, torch.Tensor)
        if known and parameter.kind is not parameter.POSITIONAL_ONLY:
            found[name] = value
        elif strict or parameter.default is parameter.empty:
            return None
    return found


def _fill(slot: Slot, built: nn.Module | None, path: str) -> bool:
    value: object = built
    for piece in path.split("."):
        value = getattr(value, piece, None)
    if not isinstance(value, torch.Tensor) or value.device.type == "meta" or value.shape != slot.tensor.shape:
        return False
    whole = value.detach()
    if has_mark(whole):  # it holds what was to be filled, or memory that nobody has filled
        return False
    copy_whole(whole, held_tensor(slot.name, slot.tensor, MeshRegister()))
    return True
