"""Tensors without memory that remember where each of their elements came from.

A conversion rule is ordinary code over torch tensors. Run on `TracedTensor`s, its views, copies and joins move a
`Provenance` instead of elements, so tracing costs the same for a tensor of any size, and ``contiguous()`` or
``torch.cat`` lose nothing. An operation that computes values gives a tensor whose provenance is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch

from shardwise.convert import provenance as pv
from shardwise.convert.provenance import Provenance, Untraceable
from shardwise.upstream.torch_dispatch import COPIES, RESHAPES, map_leaves
from shardwise.upstream.torch_tensors import make_wrapper

aten = torch.ops.aten


class TracedTensor(torch.Tensor):
    """A tensor on the meta device with a provenance."""

    provenance: Provenance | None  #: Where its elements came from; ``None`` where that is not a rearrangement.
    why: str  #: What made it unknown.

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, provenance: Provenance | None, why: str = ""
    ) -> TracedTensor:
        """Make a tensor that seems contiguous, so that rules never see strides."""
        made = make_wrapper(cls, shape, dtype, "meta")
        made.provenance = provenance
        made.why = why
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        """Move provenance through what rearranges; run the rest on the meta device."""
        options = cast(dict[str, object], kwargs or {})
        handler = _HANDLERS.get(func)
        why = f"{func} computes values"
        if handler is not None:
            try:
                return handler(*args, **options)
            except Untraceable as reason:
                why = f"{func}: {reason}"
        return _opaque(func, args, options, why)


def traced(source: int, shape: tuple[int, ...], dtype: torch.dtype) -> TracedTensor:
    """The source tensor with the given number."""
    return TracedTensor(shape, dtype, pv.whole(source, shape))


def _opaque(func: Callable[..., object], args: object, kwargs: object, why: str) -> object:
    """Find the result's shape and dtype on the meta device; where its elements came from is lost."""

    def unwrap(value: object) -> object:
        if isinstance(value, TracedTensor):
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    def wrap(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return TracedTensor(tuple(value.shape), value.dtype, None, why)
        return value

    plain_args, plain_kwargs = map_leaves(unwrap, (args, kwargs))
    return map_leaves(wrap, func(*plain_args, **plain_kwargs))


def _of(tensor: torch.Tensor) -> Provenance:
    if not isinstance(tensor, TracedTensor):
        raise Untraceable("a tensor from elsewhere")
    if tensor.provenance is None:
        raise Untraceable(tensor.why)
    return tensor.provenance


def _like(tensor: torch.Tensor, provenance: Provenance) -> TracedTensor:
    return TracedTensor(provenance.shape, tensor.dtype, provenance)


def _same(tensor: torch.Tensor, *_: object, dtype: torch.dtype | None = None, **__: object) -> TracedTensor:
    if dtype is not None and dtype != tensor.dtype:
        raise Untraceable(f"a cast to {dtype}")
    return _like(tensor, _of(tensor))


def _reshape(tensor: torch.Tensor, shape: list[int], *_: object) -> TracedTensor:
    sizes = list(shape)
    if -1 in sizes and (known := -math.prod(sizes)):
        sizes[sizes.index(-1)] = tensor.numel() // known
    if math.prod(sizes) != tensor.numel() or -1 in sizes:
        raise RuntimeError(f"shape {shape} is invalid for a tensor of {tensor.numel()} elements")
    return _like(tensor, pv.reshape(_of(tensor), tuple(sizes)))


def _transpose(tensor: torch.Tensor, dim0: int, dim1: int) -> TracedTensor:
    order = list(range(tensor.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _like(tensor, pv.permute(_of(tensor), order))


def _permute(tensor: torch.Tensor, dims: list[int]) -> TracedTensor:
    return _like(tensor, pv.permute(_of(tensor), [d % tensor.dim() for d in dims]))


def _unsqueeze(tensor: torch.Tensor, dim: int) -> TracedTensor:
    return _like(tensor, pv.insert(_of(tensor), dim % (tensor.dim() + 1)))


def _squeeze(tensor: torch.Tensor, dims: int | list[int] | None = None) -> TracedTensor:
    chosen = range(tensor.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    found = _of(tensor)
    for dim in sorted((d % tensor.dim() for d in chosen), reverse=True):
        if tensor.shape[dim] == 1:
            found = pv.remove(found, dim)
    return _like(tensor, found)


def _slice(
    tensor: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> TracedTensor:
    low, high, _ = slice(start, end).indices(tensor.shape[dim])
    return _like(tensor, pv.narrow(_of(tensor), dim % tensor.dim(), low, high, step))


def _select(tensor: torch.Tensor, dim: int, index: int) -> TracedTensor:
    at, index = dim % tensor.dim(), index % tensor.shape[dim]
    return _like(tensor, pv.remove(pv.narrow(_of(tensor), at, index, index + 1), at))


def _split(tensor: torch.Tensor, sizes: int | list[int], dim: int = 0) -> list[TracedTensor]:
    if isinstance(sizes, int):
        total = tensor.shape[dim]
        sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
    out, start = [], 0
    for size in sizes:
        out.append(_like(tensor, pv.narrow(_of(tensor), dim % tensor.dim(), start, start + size)))
        start += size
    return out


def _unbind(tensor: torch.Tensor, dim: int = 0) -> list[TracedTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _cat(tensors: list[torch.Tensor], dim: int = 0) -> TracedTensor:
    if len({t.dtype for t in tensors}) > 1:
        raise Untraceable("tensors of several dtypes in one")
    return _like(tensors[0], pv.join([_of(t) for t in tensors], dim % tensors[0].dim()))


def _stack(tensors: list[torch.Tensor], dim: int = 0) -> TracedTensor:
    return _cat([_unsqueeze(t, dim) for t in tensors], dim % (tensors[0].dim() + 1))


def _expand(tensor: torch.Tensor, shape: list[int], **_: object) -> TracedTensor:
    if len(shape) != tensor.dim() or any(s not in (-1, n) for s, n in zip(shape, tensor.shape, strict=True)):
        raise Untraceable("repeated elements")
    return _like(tensor, _of(tensor))


_HANDLERS: dict[object, Callable[..., object]] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, *RESHAPES), _reshape),
    **dict.fromkeys((aten.clone.default, aten.contiguous.default, aten.detach.default, *COPIES), _same),
    **dict.fromkeys((aten.alias.default, aten.lift_fresh.default), _same),
    aten.transpose.int: _transpose,
    aten.t.default: lambda tensor: _permute(tensor, list(range(tensor.dim()))[::-1]),
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _split),
    aten.unbind.int: _unbind,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.expand.default: _expand,
}
