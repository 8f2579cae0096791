"""Where a tensor's elements lie: whether two tensors are the same, and what memory is behind a tensor's class.

A tensor subclass that wraps others has no memory of its own: its address is always 0, and its class decides what its
elements are. So nothing here goes by addresses alone, and a wrapper's memory is used only after a trial has shown that
the wrapper reads and writes exactly the one tensor that it wraps. Memory that is not filled yet may be marked, so that
unfilled tensors are found and never trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from itertools import chain, compress, filterfalse
from operator import attrgetter, is_, itemgetter
from typing import NoReturn, Protocol, TypeAlias, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from shardwise.errors import MisuseError, TensorError
from shardwise.stateful_wrappers.wrapping import unwrap
from shardwise.upstream import torch_tensors as upstream
from shardwise.upstream.torch_modules import other_stores_in, own_buffers, parameters_in, unsaved_buffers

#: Classes that say nothing about how memory is read.
PLAIN: frozenset[type] = frozenset({torch.Tensor, nn.Parameter})

#: A wrapper is tried with at most so many elements in each dimension.
_TRIED = 16

#: Class, context, dtype, dimensions and device of wrappers -> whether they read and write the one tensor they wrap.
_KNOWN: dict[tuple[object, ...], bool] = {}
_MOST_KNOWN = 1000


class Wrapper(Protocol):
    """A subclass that wraps other tensors (``is_traceable_wrapper_subclass``)."""

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        """The attributes that hold the inner tensors, and everything else that the wrapper consists of."""


def _is_wrapper(tensor: torch.Tensor) -> bool:
    return type(tensor) not in PLAIN and upstream.is_wrapper(tensor)


def address(tensor: torch.Tensor) -> int:
    """A number that is equal for tensors of the same memory: enough to show that no two are the same."""
    local = upstream.local_part(tensor)
    if _is_wrapper(local):
        return hash(identity(tensor))
    try:
        return local.data_ptr() or -id(tensor)
    except (RuntimeError, ValueError):  # a sparse tensor, a parameter whose shape is not known yet
        return -id(tensor)


def identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """A key that is equal for two tensors if and only if they are the same memory, read in the same way.

    A tensor without comparable memory equals only itself.
    """
    if isinstance(tensor, DTensor):
        placements = upstream.placements_of(tensor)
        local = identity(upstream.local_part(tensor))
        return (upstream.mesh_of(tensor), placements, *map(type, placements), tuple(tensor.shape), local)
    if upstream.is_lazy(tensor):
        return (id(tensor),)
    cls = type(tensor)
    if _is_wrapper(tensor):
        wrapped, context = _flattened(tensor)
        inner = [(name, identity(value)) for name, value in wrapped.items()]
        return (cls, tuple(tensor.shape), tensor.stride(), tensor.dtype, _comparable(context), *inner)
    if (
        tensor.layout != torch.strided
        or tensor.is_nested
        or tensor.is_meta
        or tensor.is_quantized
        or tensor.numel() == 0
        or tensor.data_ptr() == 0
    ):
        return (id(tensor),)
    return (
        None if cls in PLAIN else cls,
        tensor.device,
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def plain_memory(name: str, local: torch.Tensor) -> torch.Tensor:
    """The plain tensor, detached, whose memory holds a local tensor's elements.

    A sparse, nested or uninitialized one is a `MisuseError`; one whose class wraps other tensors in another way than by
    being the one that it wraps a `TensorError`.
    """
    local = upstream.arrived(local)
    if type(local) not in PLAIN:
        local = _behind(name, local)
    if local.layout != torch.strided or local.is_nested:
        raise MisuseError(
            f"layout {'nested' if local.is_nested else local.layout} cannot be saved",
            tensor=name,
            hint="Make it a dense tensor.",
        )
    if local.requires_grad or type(local) is not torch.Tensor:
        local = local.detach()
    return _outside_inference(local) if local.is_inference() else local


def plain_view(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor or DTensor as one whose local tensor is plain; it shares the memory. Raises as `plain_memory`."""
    local = upstream.local_part(tensor)
    if type(local) in PLAIN and not local.is_inference():
        return tensor.detach()
    memory = plain_memory(name, local)
    return upstream.around(memory, upstream.spread_of(tensor)) if isinstance(tensor, DTensor) else memory


def install(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a tensor's local elements into another's, unless the two are one memory. Both come from `plain_view`."""
    pair = [upstream.local_part(tensor) for tensor in (target, value)]
    if identity(pair[0]) != identity(pair[1]):
        pair[0].copy_(pair[1])


def stands_for_memory(tensor: torch.Tensor) -> bool:
    """Whether `plain_view` has a form for a tensor's class: it is plain, or wraps one tensor that it reads as it is."""
    try:
        plain_view("", tensor)
    except (MisuseError, TensorError):
        return False
    return True


def require_own_elements(name: str, memory: torch.Tensor) -> None:
    """Check that each element of a tensor to load into has its own memory, as torch's ``copy_`` does."""
    if memory.is_contiguous():
        return
    if any(stride == 0 and size > 1 for size, stride in zip(memory.shape, memory.stride(), strict=True)):
        raise TensorError(
            f"several elements of this expanded tensor (shape {list(memory.shape)}, strides {list(memory.stride())}) "
            "are one memory: it cannot hold the values of a checkpoint",
            tensor=name,
            hint="Give it memory of its own (tensor.clone() in the place of tensor.expand(...)) before loading.",
        )


def _behind(name: str, local: torch.Tensor) -> torch.Tensor:
    cls = type(local)
    if upstream.is_lazy(local):
        raise MisuseError(
            "this parameter has no shape yet: its module is lazy and has not run",
            tensor=name,
            hint="Run the model once on an example, or build it with its sizes, before saving or loading.",
        )
    if _is_wrapper(local):
        if local.is_nested:
            return local
        wrapped, context = _flattened(local)
        inner = next(iter(wrapped.values())) if len(wrapped) == 1 else None
        if inner is None or not _is_the_same(local, inner, context):
            raise _wrapping(name, cls, list(wrapped))
        return plain_memory(name, inner)
    own = None if cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ else _own_memory(local)
    if own is None:
        raise _wrapping(name, cls, [])
    return own


def _own_memory(local: torch.Tensor) -> torch.Tensor | None:
    """The memory of a subclass that has some, whatever functions of torch it overrides."""
    with upstream.as_plain_tensors():
        try:
            memory = local.detach()
            has_some = memory.is_meta or memory.layout != torch.strided or not memory.numel() or memory.data_ptr()
        except RuntimeError:  # FSDP1's sharded tensors
            return None
        return memory if has_some else None


def _wrapping(name: str, cls: type, wrapped: list[str]) -> TensorError:
    of = f"around {', '.join(wrapped)}" if wrapped else "without memory of its own"
    return TensorError(
        f"a {cls.__module__}.{cls.__qualname__} {of} has no exact form in a file of plain tensors",
        tensor=name,
        hint="Save and load the model before it is quantized or otherwise wrapped, or dequantize it first; of a model "
        "with adapters, is_peft saves the adapter alone.",
    )


def _flattened(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], object]:
    """A wrapper's inner tensors by attribute, and its context."""
    # Without what it keeps for the next step alone (float8 training's precomputed scale).
    detached = tensor.detach()
    names, context = cast(Wrapper, detached).__tensor_flatten__()
    return {name: cast(torch.Tensor, getattr(detached, name)) for name in names}, context


def _is_the_same(outer: torch.Tensor, inner: torch.Tensor, context: object) -> bool:
    """Whether a wrapper's elements are, one by one, those of the one tensor that it wraps, to read and to write."""
    if isinstance(inner, DTensor) or (outer.shape, outer.dtype) != (inner.shape, inner.dtype):
        return False
    device = "cpu" if inner.is_meta else inner.device
    shape = tuple(min(size, _TRIED) for size in inner.shape)
    key = (type(outer), type(inner), _comparable(context), inner.dtype, shape, str(device))
    if key not in _KNOWN:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        with torch.no_grad():
            _KNOWN[key] = _reads_and_writes(outer, inner, context, shape, device)
    return _KNOWN[key]


def _reads_and_writes(
    outer: torch.Tensor, inner: torch.Tensor, context: object, shape: tuple[int, ...], device: torch.device | str
) -> bool:
    """Try it on a small tensor of the same class and context."""
    if 0 in shape:
        shape = tuple(max(size, 1) for size in shape)
    values = (torch.arange(torch.Size(shape).numel()) % 97 + 1).view(shape).to(device=device, dtype=inner.dtype)
    (attribute,) = cast(Wrapper, outer.detach()).__tensor_flatten__()[0]
    try:
        source, target = values.clone(), torch.zeros_like(values)
        read = torch.zeros_like(values)
        read.copy_(_wrapped(outer, inner, attribute, source, context))
        _wrapped(outer, inner, attribute, target, context).copy_(values)
    except Exception:  # noqa: BLE001 - whatever it is, it is not known to be exact
        return False
    return all(torch.equal(_bits(values), _bits(found)) for found in (read, target))


def _wrapped(
    outer: torch.Tensor, inner: torch.Tensor, attribute: str, values: torch.Tensor, context: object
) -> torch.Tensor:
    """A wrapper as ``outer`` around values, which a wrapper as ``inner`` is around where that is one as well."""
    if _is_wrapper(inner):
        wrapped, own = _flattened(inner)
        ((name, innermost),) = wrapped.items()
        values = _wrapped(inner, innermost, name, values, own)
    unflatten = cast(Callable[..., torch.Tensor], type(outer).__tensor_unflatten__)  # type: ignore[attr-defined]
    return unflatten({attribute: values}, context, values.shape, values.stride())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _outside_inference(local: torch.Tensor) -> torch.Tensor:
    """A tensor of the same memory that may be written to outside of ``torch.inference_mode``."""
    with torch.inference_mode(False):
        conj, neg = local.is_conj(), local.is_neg()
        local = local.conj() if conj else local
        local = upstream.negated_view(local) if neg else local
        made = torch.empty(0, dtype=local.dtype, device=local.device)
        made.set_(local.untyped_storage(), local.storage_offset(), local.shape, local.stride())
        made = upstream.negated_view(made) if neg else made
        return made.conj() if conj else made


def _comparable(context: object) -> object:
    """A wrapper's context as a hashable value; one that cannot be hashed equals nothing."""
    if isinstance(context, torch.Tensor):
        return object()
    if isinstance(context, Mapping):
        return tuple((str(key), _comparable(context[key])) for key in sorted(context, key=str))
    if isinstance(context, (list, tuple)):
        return (type(context), *map(_comparable, context))
    try:
        hash(context)
    except TypeError:
        return object()
    return context


# --- a marker in memory that is not filled yet -----------------------------------------------------------------------


def mark(tensor: torch.Tensor) -> bool:
    """Fill this rank's part with the mark; ``False`` for a dtype in which every value is an ordinary one."""
    signal = _signal(tensor.dtype)
    if signal is not None:
        upstream.local_part(tensor).detach().fill_(signal)
    return signal is not None


def is_untouched(tensor: torch.Tensor) -> bool:
    """Whether all of this rank's part is still the mark; never for an empty part."""
    local, signal = upstream.local_part(tensor).detach(), _signal(tensor.dtype)
    if local.numel() == 0 or signal is None:
        return False
    if isinstance(signal, float):
        wide = local.to(torch.float32) if local.dtype.itemsize == 1 else local
        # The first element decides for all but tensors that were never written.
        return bool(wide.flatten()[0].isnan()) and bool(wide.isnan().all())
    return bool((local == signal).all())


def has_mark(tensor: torch.Tensor) -> bool:
    """Whether any element of this rank's part is still the mark.

    For integers, where the mark is a possible value, only a part that is nothing else counts.
    """
    local = upstream.local_part(tensor).detach()
    if not isinstance(_signal(tensor.dtype), float):
        return is_untouched(tensor)
    return bool((local.to(torch.float32) if local.dtype.itemsize == 1 else local).isnan().any())


def _signal(dtype: torch.dtype) -> float | int | None:
    """A value that no initialisation leaves everywhere; ``None`` where there is no such value."""
    if dtype == torch.bool:
        return None
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan") if dtype not in (torch.float8_e8m0fnu,) else None
    info = torch.iinfo(dtype)
    return info.max if info.min == 0 else info.min


# --- whether a model still consists of the same tensors, without listing them again ----------------------------------

# Listing a model's state takes several microseconds for each tensor, at every save. A snapshot compares the
# dictionaries in which modules keep their tensors, and is kept in flat lists that the interpreter walks by itself. For
# 40,000 modules of one parameter each listing took 0.37 s and the look 0.05 s, of the 0.3 s that planning a later save
# may take (`benchmarks/run.py plan`, on a busy machine).

_Kept: TypeAlias = dict[str, object]

_SHAPE = attrgetter("shape")
_DTYPE = attrgetter("dtype")
_BUFFERS = itemgetter(1)


class _DifferentTensorsError(Exception):
    """Dictionaries that are compared have different tensors under one key."""


class _ByIdentity(TorchFunctionMode):
    """Dictionaries are compared by what they hold, but tensors are never compared by their values.

    Python asks for equality only where two values are not the same object.
    """

    def __torch_function__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> NoReturn:
        raise _DifferentTensorsError


class Memory:
    """Remembers tensors, which it keeps alive, where they lie on this rank, and how their memory is read."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._plain: list[torch.Tensor] = []
        self._sharded: list[torch.Tensor] = []
        wrappers: list[torch.Tensor] = []
        for tensor in tensors:
            local = upstream.local_part(tensor) if isinstance(tensor, DTensor) else None
            if local is not None:
                self._sharded.append(tensor)
            if type(local if local is not None else tensor) not in PLAIN:
                wrappers.append(tensor)
            elif local is None:
                self._plain.append(tensor)
        # A wrapper's inner tensors may be replaced. Keeping the current ones alive keeps their addresses taken.
        self._wrappers = [(tensor, tensor.detach(), identity(tensor)) for tensor in wrappers]
        # A DTensor's local tensor is a separate object, whose dtype and layout are never changed in place.
        self._locals = list(map(upstream.local_in, self._sharded))
        # Reading strides takes as long as all the rest; those of a contiguous tensor follow from its shape.
        self._strided = [tensor for tensor in self._plain if not tensor.is_contiguous()]
        # A real tensor is never a conjugate.
        self._complex = [tensor for tensor in (*self._plain, *self._locals) if tensor.is_complex()]
        self._places = self._now()

    def _now(self) -> tuple[object, ...]:
        """All addresses, and for tensors whose memory may be replaced in place, how it is read."""
        return (
            list(map(torch.Tensor.data_ptr, self._plain)),
            list(map(torch.Tensor.data_ptr, self._locals)),
            list(map(_DTYPE, self._plain)),
            list(map(torch.Tensor.is_contiguous, self._plain)),
            list(map(_SHAPE, self._plain)),
            list(map(torch.Tensor.stride, self._strided)),
            list(map(torch.Tensor.is_neg, self._plain)),
            list(map(torch.Tensor.is_conj, self._complex)),
        )

    @property
    def unmoved(self) -> bool:
        """Whether the tensors still have the memory, the dtypes, the shapes and the strides that they had."""
        return (
            all(map(is_, map(upstream.local_in, self._sharded), self._locals))
            and self._now() == self._places
            and all(identity(tensor) == known for tensor, _, known in self._wrappers)
        )

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors`` are these, at their addresses."""
        return len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors)) and self.unmoved


class Snapshot:
    """Remembers a model's modules, which keep their state in torch's own way, and the memory of their tensors.

    ``is_plain`` says whether dictionaries show all that may change; otherwise the snapshot never holds.
    """

    def __init__(self, parts: Sequence[nn.Module], memory: Memory, modules: Sequence[nn.Module]) -> None:
        self._parts = [unwrap(part) for part in parts]
        self._memory = memory
        self._forgotten: list[Sized] = []
        self.is_plain = True
        self._modules = list(map(vars, modules))
        self._parameters = list(map(dict, map(parameters_in, self._modules)))
        each: list[tuple[_Kept, ...]] = list(map(other_stores_in, self._modules))
        kept = list(chain.from_iterable(each))
        self._full, self._empty = list(filter(None, kept)), list(filterfalse(None, kept))
        # Without buffers it does not matter which of them would be kept.
        for module in compress(modules, map(_BUFFERS, each)):
            if not unsaved_buffers(module):
                self._forgotten.append(unsaved_buffers(module))
            elif own_buffers(module).keys() - unsaved_buffers(module):
                self.is_plain = False
        values = chain.from_iterable(map(dict.values, chain(self._parameters, self._full)))
        if any(map(_defines_equality, {*map(type, modules), *map(type, values)})):
            self.is_plain = False
        # Equal if they have the same keys with the very same values.
        self._known = list(map(dict, self._full))
        self._ordered = [(kept, list(kept)) for kept in self._full if len(kept) > 1]
        self._several = [
            (own, list(of)) for own, of in zip(self._modules, self._parameters, strict=True) if len(of) > 1
        ]

    def holds(self, parts: Sequence[nn.Module]) -> bool:
        """Whether ``parts`` are the same, with the same modules and tensors at the same addresses."""
        if not self.is_plain or len(parts) != len(self._parts):
            return False
        return (
            all(unwrap(part) is known for part, known in zip(parts, self._parts, strict=True))
            and not any(self._empty)
            and not any(self._forgotten)
            and self._has_the_same()
            and all(list(kept) == keys for kept, keys in self._ordered)
            and all(list(parameters_in(own)) == keys for own, keys in self._several)
            and self._memory.unmoved
        )

    def _has_the_same(self) -> bool:
        """Whether the dictionaries have the very same under the same keys.

        Those of parameters are looked up again: libraries that manage parameters put dictionaries of their own there.
        """
        try:
            with _ByIdentity():
                return list(map(parameters_in, self._modules)) == self._parameters and self._full == self._known
        except _DifferentTensorsError:
            return False


def _defines_equality(cls: type) -> bool:
    """Whether modules or tensors of a class may be equal without being the same."""
    return issubclass(cls, nn.Module | torch.Tensor) and cls.__eq__ not in (object.__eq__, torch.Tensor.__eq__)
