"""Values that a module makes in its ``state_dict()``: described now, made when they are written or loaded.

A *stand-in* is a tensor on the meta device that takes the place of such a value. Planning looks at tensors only by
views, and a view of a stand-in still has its storage, to which the description is attached. Code that needs
the bytes calls `resolve`, which makes the values again, one maker at a time: memory is that of the largest maker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from shardwise.errors import ModuleStateError
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldTensor

_ATTRIBUTE = "_shardwise_deferred"


class Maker(Protocol):
    """Makes values, some at a time."""

    @property
    def label(self) -> str:
        """Its name, for messages."""

    def make(self) -> Mapping[str, torch.Tensor]:
        """Values by key, as this rank holds them, dense."""


@dataclass(frozen=True, slots=True, eq=False)
class Deferred:
    """The description of a value, as this rank holds it, that is made when it is needed.

    Attributes:
        key: The maker's name for it.
        maker: Makes it; ``None`` where it can only be loaded.
        owner: The module that loads it. Compared by identity.
        template: Makes the DTensor of this rank's part, which the owner is given; ``None`` for plain tensors.
        is_flexible: Whether the owner decides which shapes it accepts.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    maker: Maker | None
    owner: object
    template: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_flexible: bool = False

    def empty(self) -> torch.Tensor:
        """Memory for this rank's part."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def stand_in(self) -> torch.Tensor:
        """A tensor without memory that takes the place of this rank's part."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="meta")
        setattr(tensor.untyped_storage(), _ATTRIBUTE, self)
        return tensor


def deferred(tensor: torch.Tensor) -> Deferred | None:
    """The description behind a stand-in, or a view of one; ``None`` for any other tensor."""
    if not tensor.is_meta:
        return None
    return cast(Deferred | None, getattr(tensor.untyped_storage(), _ATTRIBUTE, None))


class _Last:
    """The values of the maker that was asked last: tensors of one module are usually written one after the other."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.maker: Maker | None = None
        self.values: dict[str, torch.Tensor] = {}

    def value(self, what: Deferred) -> torch.Tensor:
        with self.lock:
            if self.maker is not what.maker:
                self.clear()
                assert what.maker is not None
                self.values = dict(what.maker.make())
                self.maker = what.maker
            found = self.values.get(what.key)
            if found is None or tuple(found.shape) != what.shape or found.dtype != what.dtype:
                raise _other(what, found)
            found = self.values[what.key] = found.detach().resolve_conj().resolve_neg().contiguous()
            return found

    def clear(self) -> None:
        with self.lock:
            self.maker, self.values = None, {}


_LAST = _Last()


def resolve(tensor: torch.Tensor) -> torch.Tensor:
    """The values behind a stand-in or a view of one, made now; any other tensor as it is.

    Raises `ModuleStateError`: they are not of the kind that was described.
    """
    what = deferred(tensor)
    if what is None:
        return tensor
    if what.maker is None:
        raise ModuleStateError("this value can be loaded, and not saved", tensor=what.key)
    return bound(tensor, _LAST.value(what))


def release() -> None:
    """Let go of the values that were made last."""
    _LAST.clear()


def bound(view: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The view of ``values``, contiguous, that ``view`` is of the stand-in for them."""
    return values.as_strided(view.size(), view.stride(), values.storage_offset() + view.storage_offset())


def split(tensor: HeldTensor) -> tuple[HeldTensor | None, list[tuple[object, HeldTensor]]]:
    """Split a tensor into what is in memory and what its owners load: ``(in memory, [(owner, theirs)])``."""
    found = [deferred(fragment.data) for part in tensor.parts for fragment in part.fragments if fragment.data.is_meta]
    owners = {id(what.owner): what.owner for what in found if what is not None}
    if not owners:
        return tensor, []
    direct = _only(tensor, None)
    return direct if direct.parts else None, [(owner, _only(tensor, owner)) for owner in owners.values()]


def _only(tensor: HeldTensor, owner: object | None) -> HeldTensor:
    def wanted(fragment: Fragment) -> bool:
        what = deferred(fragment.data)
        return what is None if owner is None else what is not None and what.owner is owner

    parts = (part._replace(fragments=tuple(filter(wanted, part.fragments))) for part in tensor.parts)
    return tensor._replace(parts=tuple(part for part in parts if part.fragments))


def refuse_stand_ins(tensors: Iterable[HeldTensor]) -> None:
    """Raise `ModuleStateError` for a tensor that has no memory: its module takes it, by a method of its own."""
    for tensor in tensors:
        for fragment in tensor.fragments:
            if (what := deferred(fragment.data)) is not None:
                raise ModuleStateError(
                    "this tensor is computed from others of the files, and its module takes it by a method of its own",
                    tensor=what.key,
                    hint="Let the model's state_dict_adapter only rearrange it, or let the module load as torch does.",
                )


class Buffers:
    """Memory for the values that one owner is about to load, behind its stand-ins."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Deferred, torch.Tensor]] = {}
        self._regions: dict[int, dict[tuple[object, ...], int]] = {}

    def behind(self, tensor: HeldTensor) -> HeldTensor:
        """The same tensor, with memory instead of stand-ins."""
        return tensor.elsewhere(self._memory)

    def _memory(self, view: torch.Tensor) -> torch.Tensor:
        what = deferred(view)
        if what is None:
            return view
        if id(what) not in self._made:
            self._made[id(what)] = (what, what.empty())
        region = (view.storage_offset(), view.size(), view.stride())
        self._regions.setdefault(id(what), {})[region] = view.numel()
        return bound(view, self._made[id(what)][1])

    def values(self) -> dict[str, torch.Tensor]:
        """The owner's values by key, without those that were requested only in part."""
        return {
            what.key: made if what.template is None else what.template(made)
            for number, (what, made) in self._made.items()
            if sum(self._regions[number].values()) == made.numel()
        }


def stands_alone(tensor: HeldTensor) -> Deferred | None:
    """The description of a file's tensor that is a single value, which its owner loads in any shape; else ``None``."""
    if len(tensor.parts) != 1 or len(tensor.parts[0].fragments) != 1 or tensor.parts[0].part.view is not None:
        return None
    what = deferred(tensor.parts[0].fragments[0].data)
    return what if what is not None and what.is_flexible else None


def held_whole(spec: TensorSpec, what: Deferred) -> HeldTensor:
    """A tensor of the file that is one value, whole."""
    return HeldTensor.alone(spec, [Fragment(Box.whole(spec.shape), what.stand_in())])


def _other(what: Deferred, found: torch.Tensor | None) -> ModuleStateError:
    made = "nothing" if found is None else f"{found.dtype} of shape {list(found.shape)}"
    label = what.maker.label if what.maker is not None else "the module"
    return ModuleStateError(
        f"{label} gave {what.dtype} of shape {list(what.shape)} when its state was described, and {made} when it was "
        "to be written",
        tensor=what.key,
        hint="What it gives in state_dict() has to be the same from call to call, as long as it is not trained.",
    )
