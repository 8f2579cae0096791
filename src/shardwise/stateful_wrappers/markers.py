"""A marker value in memory that is not filled yet, so that unfilled tensors are found and never trained."""

from __future__ import annotations

import torch

from shardwise.upstream.torch_tensors import local_part


def mark(tensor: torch.Tensor) -> bool:
    """Fill this rank's part with the mark; ``False`` for a dtype in which every value is an ordinary one."""
    signal = _signal(tensor.dtype)
    if signal is not None:
        _local(tensor).fill_(signal)
    return signal is not None


def is_untouched(tensor: torch.Tensor) -> bool:
    """Whether all of this rank's part is still the mark; never for an empty part."""
    local, signal = _local(tensor), _signal(tensor.dtype)
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
    local = _local(tensor)
    if not isinstance(_signal(tensor.dtype), float):
        return is_untouched(tensor)
    return bool((local.to(torch.float32) if local.dtype.itemsize == 1 else local).isnan().any())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return local_part(tensor).detach()


def _signal(dtype: torch.dtype) -> float | int | None:
    """A value that no initialisation leaves everywhere; ``None`` where there is no such value."""
    if dtype == torch.bool:
        return None
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan") if dtype not in (torch.float8_e8m0fnu,) else None
    info = torch.iinfo(dtype)
    return info.max if info.min == 0 else info.min
