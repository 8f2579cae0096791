"""How modules save and load their state, and the entries of ``state_dict()`` by origin.

Modules use torch's methods, or overrides and hooks of their own. Entries are parameters and buffers themselves, or
values made by modules; names here are those of ``state_dict()``, with what wrappers put into them.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.errors import MisuseError, ModuleStateError
from shardwise.plan.deferred import Deferred
from shardwise.stateful_wrappers.wrapping import plain_name, wrapped
from shardwise.upstream import torch_modules as upstream
from shardwise.upstream.torch_dispatch import MESSAGES, OpOverload, TorchDispatchMode
from shardwise.upstream.torch_tensors import around, is_lazy, local_part, spread_of, storage_key


def has_torch_method(module: nn.Module, name: str) -> bool:
    """Whether a module inherits a method from ``nn.Module``."""
    return getattr(type(module), name) is getattr(nn.Module, name) and name not in vars(module)


def has_foreign_hooks(hooks: Iterable[object]) -> bool:
    """Whether one of the hooks may convert values: it is not on the list of harmless ones."""
    return not all((getattr(hook, "__module__", None) or "").startswith(upstream.HARMLESS_HOOKS) for hook in hooks)


def saves_subtree_itself(module: nn.Module) -> bool:
    """Whether a module, or a hook on it, makes the saved state of the module and of all modules below it."""
    return not has_torch_method(module, "state_dict") or has_foreign_hooks(upstream.saving_hooks(module))


def overrides_extra_state(module: nn.Module, method: str) -> bool:
    """Whether a module overrides ``get_extra_state`` or ``set_extra_state``."""
    return getattr(type(module), method, None) not in (None, getattr(nn.Module, method))


def loads_itself(module: nn.Module, *, norms: bool = False) -> bool:
    """Whether a module loads its state with its own code, or a hook changes it before.

    With ``norms`` torch's normalisation layers count too: they copy only if all their tensors are there.
    """
    if has_foreign_hooks(upstream.loading_pre_hooks(module)):
        return True
    if has_torch_method(module, upstream.LOAD_OWN):
        return False
    return norms or upstream.LOAD_OWN in vars(module) or not upstream.loads_as_norms_do(module)


def is_torchs_own(module: nn.Module, *, norms: bool) -> bool:
    """Whether a module makes and takes its state as torch does, and keeps it in dictionaries that can be watched."""
    return (
        has_torch_method(module, upstream.SAVE_OWN)
        and not saves_subtree_itself(module)
        and not loads_itself(module, norms=norms)
        and not overrides_extra_state(module, "get_extra_state")
        and not overrides_extra_state(module, "set_extra_state")
        and not isinstance(module, torch.jit.ScriptModule)
    )


def reaches_below(module: nn.Module) -> bool:
    """Whether loading a module's state may also change that of the modules below it.

    Hooks and methods are given the whole subtree's state. Torch's own methods look at the module's own alone.
    """
    if not any(child is not None for child in upstream.own_children(module).values()):
        return False
    if has_foreign_hooks(upstream.loading_pre_hooks(module)) or upstream.LOAD_OWN in vars(module):
        return True
    return not upstream.own_loader(type(module)).__module__.startswith("torch.")


def refuse_hooks_around(part: nn.Module, inner: nn.Module) -> None:
    """Check that the wrappers around a model, which are taken off first, have no state hooks."""
    wrapper: nn.Module | None = part
    while wrapper is not None and wrapper is not inner:
        around_loading = (*upstream.loading_pre_hooks(wrapper), *upstream.loading_post_hooks(wrapper))
        if has_foreign_hooks([*upstream.saving_hooks(wrapper), *around_loading]):
            raise ModuleStateError(
                f"the {type(wrapper).__name__} around the model has state_dict hooks of its own",
                hint="Register them on the module inside.",
            )
        wrapper = wrapped(wrapper)


def refuse_fsdp1(parts: Iterable[object]) -> None:
    """Check that no module is wrapped by FSDP1: its ``state_dict()`` depends on modes and gathers."""
    cls = upstream.fsdp1_class()
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
            if upstream.own_children(module):
                pending.extend([child for child in upstream.own_children(module).values() if child is not None])


def label(module: nn.Module, prefix: str) -> str:
    """A module for messages: its name and class."""
    name = prefix.removesuffix(".")
    return f"the module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


@contextlib.contextmanager
def failing(what: str, hint: str) -> Iterator[None]:
    """Say what a module's own code did where it fails."""
    try:
        yield
    except ModuleStateError:
        raise
    except Exception as error:
        raise ModuleStateError(f"{what}: {type(error).__name__}: {error}", hint=hint) from error


_GIVE = "state_dict() of the model has to succeed on every rank."


@dataclass(frozen=True, slots=True, eq=False)
class Maker:
    """Gives entries of the state: a module that makes them, or a tensor that its module loads by methods of its own."""

    label: str  #: For messages.
    whose: object  #: The module or the tensor.
    entries: Callable[[], Mapping[str, object]]

    def make(self) -> Mapping[str, torch.Tensor]:
        """The tensors among the entries, as far as this rank holds them."""
        return {key: local_of(value) for key, value in self.entries().items() if isinstance(value, torch.Tensor)}


def entries_by(module: nn.Module, prefix: str, *, whole: bool) -> Mapping[str, object]:
    """Entries that a module makes, with torch's ``_metadata``: its own, or with ``whole`` also those below it."""
    made: Mapping[str, object] = OrderedDict()
    upstream.note_versions(made, OrderedDict())
    with failing(f"{label(module, prefix)} failed to give its state", _GIVE), torch.no_grad():
        if not whole:
            upstream.noted_versions(made)[prefix[:-1]] = {"version": upstream.state_version(module)}
            upstream.save_own(module, cast("dict[str, object]", made), prefix)
        elif prefix:
            # As its parent calls it, which does not look at what is returned.
            module.state_dict(destination=cast("dict[str, object]", made), prefix=prefix, keep_vars=False)
        else:
            made = module.state_dict()
    stray = next((key for key in made if not str(key).startswith(prefix)), None)
    if stray is not None:
        raise ModuleStateError(
            f"{label(module, prefix)} puts {stray!r} into the state, which is not below its own name",
            hint="Let the module (or the hook on it) make names that start with the prefix that it is given.",
        )
    return made


@dataclass(frozen=True, slots=True, eq=False)
class Taker:
    """A module that loads entries of the state with its own methods."""

    module: nn.Module
    prefix: str  #: The prefix of its names.
    whole: bool  #: Whether it takes those of the modules below it too.
    is_lenient: bool  #: Whether it decides names and shapes itself, by its own methods or hooks for loading.
    calls_root: bool = False  #: Whether the model's own ``load_state_dict`` is what takes them.


class Step(NamedTuple):
    """One step of loading, in torch's order."""

    #: ``take``: a module takes its entries; ``extra``: it takes its extra state; ``post``: its hooks are called.
    kind: str
    module: nn.Module
    prefix: str  #: The prefix of its names.
    taker: Taker | None = None  #: Who takes, where entries are taken.


class Aside(NamedTuple):
    """A value of the state that is no ordinary tensor, and the module that gives it."""

    value: object
    label: str


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, detached."""
    local = local_part(tensor)
    return local.detach().as_subclass(torch.Tensor) if _is_ordinary(local) else local.detach()


def _is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory of its own that is its values: its class does not say otherwise."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


class StandIns:
    """Gives equal stand-ins for equal values from save to save, so that the plan is kept."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[torch.Tensor, object]] = {}
        self._used: dict[tuple[object, ...], tuple[torch.Tensor, object]] = {}
        self._takers: dict[tuple[object, ...], Taker] = {}

    def begin(self) -> None:
        """Forget what the last listing did not use."""
        self._known, self._used = self._used, {}

    def of(self, value: torch.Tensor, key: str, maker: Maker, taker: Taker, needs_grad: bool) -> torch.Tensor:
        """The stand-in for ``value``; a DTensor where that is one."""
        local = torch.empty(0, dtype=value.dtype, device="meta") if is_lazy(value) else local_of(value)
        spread = (value.device_mesh, value.placements, value.shape) if isinstance(value, DTensor) else ()
        how = (local.shape, local.dtype, value.device, spread, needs_grad)
        seen = (key, id(maker.whose), id(taker), *how)
        known = self._known.get(seen) or self._used.get(seen)
        if known is None:
            template = partial(around, spread=spread_of(value)) if isinstance(value, DTensor) else None
            is_flexible = taker.is_lenient and template is None
            what = Deferred(key, tuple(local.shape), local.dtype, value.device, maker, taker, template, is_flexible)
            stand_in = what.stand_in() if template is None else template(what.stand_in())
            if needs_grad and stand_in.dtype.is_floating_point:
                stand_in.requires_grad_(True)
            # Keep alive the objects whose ids are in the key.
            known = (stand_in, (maker.whose, taker))
        self._used[seen] = known
        return known[0]

    def taker(self, module: nn.Module, prefix: str, whole: bool, is_lenient: bool, calls_root: bool = False) -> Taker:
        """Equal takers are one, too."""
        seen = (id(module), prefix, whole, is_lenient, calls_root)
        return self._takers.setdefault(seen, Taker(module, prefix, whole, is_lenient, calls_root))


class Described:
    """The state of one part, looked at as torch does. Local.

    A module may give what cannot be described, which is a `ModuleStateError`. ``stand_ins`` are those of last time.
    Without ``values`` the state is not for a save, and extra state is not requested; with ``norms`` torch's
    normalisation layers take their state themselves, since some of it may be absent.

    Attributes:
        tensors: Name -> a parameter or buffer itself, or a stand-in for what is made on the fly.
        aside: Name -> any other value of the state.
        metadata: Module name -> torch's metadata of modules with their own methods for state.
        steps: How it is loaded, except for tensors that are read into memory directly.
    """

    def __init__(self, root: nn.Module, stand_ins: StandIns, *, values: bool, norms: bool) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.aside: dict[str, Aside] = {}
        self.metadata: dict[str, dict[str, object]] = {}
        self._root, self._stand_ins, self._values, self._norms = root, stand_ins, values, norms
        # By plain name: a module's own hook may have stripped what a wrapper puts into it.
        self._owned: dict[str, tuple[torch.Tensor, Taker | None]] = {}
        self._modules: dict[str, tuple[nn.Module, str, Taker | None]] = {}
        self._steps: list[Step] = []
        self._default: dict[str, Taker] = {}
        self._memory: dict[tuple[object, ...], torch.Tensor] = {}
        taker = None
        if not has_torch_method(root, "load_state_dict"):
            taker = stand_ins.taker(root, "", True, True, True)
        self._look_at_takers(root, "", taker)
        self._look_at_makers(root, "")
        self.steps = [step for step in map(self._settled, self._steps) if step is not None]

    def _settled(self, step: Step) -> Step | None:
        """A step with who takes; ``None`` where nothing is left for a module to take."""
        if step.kind != "take" or step.taker is not None:
            return step
        default = self._default.get(plain_name(step.prefix))
        return step._replace(taker=default) if default is not None and default.module is step.module else None

    # --- who takes --------------------------------------------------------------------------------------------------

    def _look_at_takers(self, module: nn.Module, prefix: str, taker: Taker | None) -> None:
        is_first = taker is None
        own = taker
        if taker is None and loads_itself(module, norms=self._norms):
            own = self._stand_ins.taker(module, prefix, reaches_below(module), True)
        below = own if own is not None and own.whole else None
        if is_first or (own is not None and own.calls_root and module is self._root):
            self._steps.append(Step("take", module, prefix, own))
        if own is None and overrides_extra_state(module, "set_extra_state"):
            self._steps.append(Step("extra", module, prefix))
        if own is not None:
            self.metadata.setdefault(prefix[:-1], {"version": upstream.state_version(module)})
        self._modules[plain_name(prefix)] = (module, prefix, own)
        for name, tensor in saved_tensors(module):
            self._owned[plain_name(prefix + name)] = (tensor, own)
            self._memory.setdefault(_memory(tensor), tensor)
        for name, child in upstream.own_children(module).items():
            if child is not None:
                self._look_at_takers(child, f"{prefix}{name}.", below)
        if below is None and upstream.loading_post_hooks(module):
            self._steps.append(Step("post", module, prefix))

    def _nearest(self, key: str) -> tuple[str, tuple[nn.Module, str, Taker | None]]:
        """The module that a name is below: its plain prefix, itself, its prefix and who takes what is its."""
        where = plain_name(key)
        while True:
            where = where.rpartition(".")[0]
            known = self._modules.get(f"{where}." if where else "")
            if known is not None:
                return (f"{where}." if where else ""), known

    # --- who makes --------------------------------------------------------------------------------------------------

    def _look_at_makers(self, module: nn.Module, prefix: str) -> None:
        if saves_subtree_itself(module):
            self._add_made(module, prefix, whole=True)
            return
        for hook in upstream.saving_pre_hooks(module):  # FSDP2's
            hook(module, prefix, True)
        if not has_torch_method(module, upstream.SAVE_OWN):
            self._add_made(module, prefix, whole=False)
        else:
            for name, tensor in saved_tensors(module):
                self._add(prefix + name, tensor, None)
            if self._values and overrides_extra_state(module, "get_extra_state"):
                name = label(module, prefix)
                with failing(f"get_extra_state of {name} failed", _GIVE), torch.no_grad():
                    extra = module.get_extra_state()
                self._add_aside(prefix + upstream.EXTRA, extra, name)
                self.metadata.setdefault(prefix[:-1], {"version": upstream.state_version(module)})
        for name, child in upstream.own_children(module).items():
            if child is not None:
                self._look_at_makers(child, f"{prefix}{name}.")

    def _add_made(self, module: nn.Module, prefix: str, *, whole: bool) -> None:
        unit = Maker(label(module, prefix), module, partial(entries_by, module, prefix, whole=whole))
        has_peers = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        with _NoMessages(unit.label) if has_peers else contextlib.nullcontext():
            entries = unit.entries()
        for name, noted in upstream.noted_versions(entries).items():
            self.metadata[name] = dict(noted)
        for key, value in entries.items():
            is_extra = key.rpartition(".")[2] == upstream.EXTRA
            if isinstance(value, torch.Tensor) and not is_extra and (is_lazy(value) or _is_dense(value)):
                self._add(key, value, unit)
            else:
                self._add_aside(key, value, unit.label)

    def _add_aside(self, key: str, value: object, whose: str) -> None:
        if self._values:
            self.aside[key] = Aside(value, whose)

    def _add(self, key: str, value: torch.Tensor, unit: Maker | None) -> None:
        own, taker = self._owned.get(plain_name(key)) or (
            # A wrapper may rename an entry; if it loads as torch does, it is still the same tensor.
            self._memory.get(_memory(value)),
            self._nearest(key)[1][2],
        )
        if taker is None and own is not None and (value is own or _memory(value) == _memory(own)):
            self.tensors[key] = own
            return
        if is_lazy(value) and self._values:
            raise ModuleStateError(
                "this parameter has no values yet: its module makes it at the first forward pass",
                tensor=key,
                hint="Call the model once before it is saved.",
            )
        if taker is None:
            where, (module, prefix, taker) = self._nearest(key)
            taker = taker or self._default.setdefault(where, self._stand_ins.taker(module, prefix, False, False))
        if not _is_ordinary(local_part(value)):
            raise ModuleStateError(
                f"{label(taker.module, taker.prefix)} saves or loads its state by its own methods, and gives a "
                f"{type(value).__name__}, "
                "which cannot be described",
                tensor=key,
                hint="Give out a plain tensor in state_dict(), and take one.",
            )
        maker = unit or Maker(repr(key), value, lambda: {key: value})
        needs_grad = own is not None and own.requires_grad
        self.tensors[key] = self._stand_ins.of(value, key, maker, taker, needs_grad)


def saved_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's own parameters and persistent buffers, without those of the modules below it."""
    found: list[tuple[str, torch.Tensor]]
    found = [(name, own) for name, own in upstream.own_parameters(module).items() if own is not None]
    if buffers := upstream.own_buffers(module):
        unsaved = upstream.unsaved_buffers(module)
        found += [(name, buffer) for name, buffer in buffers.items() if buffer is not None and name not in unsaved]
    return found


def _is_dense(value: torch.Tensor) -> bool:
    """Whether a value is one that files of tensors can hold; others are kept beside."""
    return value.layout is torch.strided and not value.is_nested and not value.is_quantized


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    """A key that is equal for two living tensors if they read the same memory in the same way."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_nested:
        return (id(tensor),)
    local, spread = tensor, None
    if isinstance(tensor, DTensor):
        local, spread = local_part(tensor), (tensor.device_mesh, tensor.placements, tensor.shape)
    if not _is_ordinary(local):
        return (id(tensor),)
    storage = storage_key(local)
    how = (local.dtype, local.shape, local.stride(), local.storage_offset(), local.is_conj(), local.is_neg())
    return (storage, how, spread)


class _NoMessages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what sends messages between ranks: a rank makes a module's values when it writes them, alone."""

    def __init__(self, label: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._label = label

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if any(issubclass(kind, DTensor) for kind in cast("tuple[type, ...]", types)):
            return NotImplemented
        if getattr(func, "namespace", "") in MESSAGES:
            raise ModuleStateError(
                f"{self._label} sends messages between ranks to give its state ({func})",
                hint="Give out what this rank holds, as a DTensor, and convert without gathering.",
            )
        return cast("OpOverload", func)(*args, **(kwargs or {}))
