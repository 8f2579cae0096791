"""Tensor subclasses that wrap other tensors, as libraries for low-precision training and quantization make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils import _pytree as pytree

_KEEPS = {
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.view.default,
    torch.ops.aten.as_strided.default,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten._to_copy.default,
}


class Casting(torch.Tensor):
    """Reads and writes the one tensor inside: as float8 training's weights."""

    kept: torch.Tensor
    note: str

    @staticmethod
    def __new__(cls, inner: torch.Tensor, note: str = "e4m3") -> Casting:
        made: Casting = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )
        return made

    def __init__(self, inner: torch.Tensor, note: str = "e4m3") -> None:
        self.kept, self.note = inner, note

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["kept"], {"note": self.note}

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, torch.Tensor], context: Mapping[str, str], size: object, stride: object
    ) -> Casting:
        return cls(inner["kept"], context["note"])

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        plain_args, plain_kwargs = pytree.tree_map_only(Casting, cls.read, (args, kwargs or {}))
        if func is torch.ops.aten.copy_.default and isinstance(args[0], Casting):
            args[0].kept.copy_(cls.write(plain_args[1]))
            return args[0]
        made = func(*plain_args, **plain_kwargs)
        if func not in _KEEPS:
            return made
        note = next(arg.note for arg in pytree.tree_leaves((args, kwargs)) if isinstance(arg, Casting))
        return pytree.tree_map_only(torch.Tensor, lambda tensor: cls(cls.write(tensor), note), made)

    @staticmethod
    def read(wrapper: Casting) -> torch.Tensor:
        return wrapper.kept

    @staticmethod
    def write(tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class Negated(Casting):
    """Has one tensor of its own shape and dtype inside, which is not what it is worth."""

    @staticmethod
    def read(wrapper: Casting) -> torch.Tensor:
        return torch.neg(wrapper.kept)

    @staticmethod
    def write(tensor: torch.Tensor) -> torch.Tensor:
        return torch.neg(tensor)


class Quantized(torch.Tensor):
    """Eight bits and a scale; whoever copies from it gets floats."""

    data8: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, data8: torch.Tensor, scale: torch.Tensor) -> Quantized:
        made: Quantized = torch.Tensor._make_wrapper_subclass(cls, data8.shape, dtype=scale.dtype)
        return made

    def __init__(self, data8: torch.Tensor, scale: torch.Tensor) -> None:
        self.data8, self.scale = data8, scale

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["data8", "scale"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], context: object, size: object, stride: object
    ) -> Quantized:
        return Quantized(inner["data8"], inner["scale"])

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.ops.aten.detach.default:
            (wrapper,) = args
            assert isinstance(wrapper, Quantized)
            return Quantized(wrapper.data8, wrapper.scale)
        plain = pytree.tree_map_only(Quantized, lambda w: w.data8 * w.scale, (args, kwargs or {}))
        return func(*plain[0], **plain[1])
