"""How modules save and load their state: with torch's methods, or with overrides and hooks of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from shardwise.errors import MisuseError, ModuleStateError
from shardwise.stateful_wrappers.wrapping import wrapped
from shardwise.upstream.torch_modules import EXTRA as EXTRA  # noqa: PLC0414
from shardwise.upstream.torch_modules import (
    HARMLESS_HOOKS,
    LOAD_OWN,
    fsdp1_class,
    loading_post_hooks,
    loading_pre_hooks,
    loads_as_norms_do,
    own_children,
    own_loader,
    saving_hooks,
)


def has_torch_method(module: nn.Module, name: str) -> bool:
    """Whether a module inherits a method from ``nn.Module``."""
    return getattr(type(module), name) is getattr(nn.Module, name) and name not in vars(module)


def has_foreign_hooks(hooks: Iterable[object]) -> bool:
    """Whether one of the hooks may convert values: it is not on the list of harmless ones."""
    return not all((getattr(hook, "__module__", None) or "").startswith(HARMLESS_HOOKS) for hook in hooks)


def saves_subtree_itself(module: nn.Module) -> bool:
    """Whether a module, or a hook on it, makes the saved state of the module and of all modules below it."""
    return not has_torch_method(module, "state_dict") or has_foreign_hooks(saving_hooks(module))


def overrides_extra_state(module: nn.Module, method: str) -> bool:
    """Whether a module overrides ``get_extra_state`` or ``set_extra_state``."""
    return getattr(type(module), method, None) not in (None, getattr(nn.Module, method))


def loads_itself(module: nn.Module, *, norms: bool = False) -> bool:
    """Whether a module loads its state with its own code, or a hook changes it before.

    With ``norms`` torch's normalisation layers count too: they copy only if all their tensors are there.
    """
    return not loads_as_torch(module, norms=norms) or has_foreign_hooks(loading_pre_hooks(module))


def loads_as_torch(module: nn.Module, *, norms: bool = False) -> bool:
    """Whether a module's ``_load_from_state_dict`` copies each tensor into the parameter or buffer of its name."""
    if has_torch_method(module, LOAD_OWN):
        return True
    if norms or LOAD_OWN in vars(module):
        return False
    return loads_as_norms_do(module)


def reaches_below(module: nn.Module) -> bool:
    """Whether loading a module's state may also change that of the modules below it.

    Hooks and methods are given the whole subtree's state. Torch's own methods look at the module's own alone.
    """
    if not any(child is not None for child in own_children(module).values()):
        return False
    if has_foreign_hooks(loading_pre_hooks(module)) or LOAD_OWN in vars(module):
        return True
    return not own_loader(type(module)).__module__.startswith("torch.")


def refuse_hooks_around(part: nn.Module, inner: nn.Module) -> None:
    """Check that the wrappers around a model, which are taken off first, have no state hooks."""
    wrapper: nn.Module | None = part
    while wrapper is not None and wrapper is not inner:
        if has_foreign_hooks([*saving_hooks(wrapper), *loading_pre_hooks(wrapper), *loading_post_hooks(wrapper)]):
            raise ModuleStateError(
                f"the {type(wrapper).__name__} around the model has state_dict hooks of its own",
                hint="Register them on the module inside.",
            )
        wrapper = wrapped(wrapper)


def refuse_fsdp1(parts: Iterable[object]) -> None:
    """Check that no module is wrapped by FSDP1: its ``state_dict()`` depends on modes and gathers."""
    cls = fsdp1_class()
    if cls is None:
        return
    modules = [part for part in parts if isinstance(part, nn.Module)]
    if not any(isinstance(module, cls) for module in every_module(modules)):
        return
    for part in modules:
        for name, module in part.named_modules():
            if isinstance(module, cls):
                raise MisuseError(
                    f"the module {name or type(module.module).__name__!r} is wrapped by FSDP1 "
                    "(FullyShardedDataParallel), which keeps its parameters in flat tensors without names",
                    hint="Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead.",
                )


def every_module(roots: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Every module once, in no particular order: a fifth of the time of torch's ``modules()``, which names them."""
    seen: set[int] = set()
    pending = list(roots)
    while pending:
        module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            if own_children(module):
                pending.extend([child for child in own_children(module).values() if child is not None])
