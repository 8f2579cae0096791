"""Copying state aside, so that training may go on while it is written.

The memory belongs to the `Stager` and is reused by every save: one arena for each component, pinned where the source
is on a GPU (the copy then runs on a stream of its own), and in huge pages on the CPU, whose first touch costs a
fraction of that of small ones.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardwise.engine.memo import Memo
from shardwise.plan.deferred import release, resolve
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor

#: Buffers start at multiples of this, a cache line.
_ALIGN = 64


@dataclass(frozen=True)
class _Staged:
    """Where a component's memory goes.

    Attributes:
        arena: Keeps the memory alive, as bytes.
        pairs: Which buffer takes which source.
        held: The tensors, with the buffers as their memory.
    """

    arena: torch.Tensor
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    held: list[HeldTensor]


class Stager:
    """Owns the staging memory of one checkpointer."""

    def __init__(self) -> None:
        self._memos: dict[str, Memo[_Staged]] = {}
        self._arenas: dict[str, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas."""
        return sum(arena.numel() for arena in self._arenas.values())

    def allocate(self, component: str, held: Sequence[HeldTensor]) -> None:
        """Make the memory for a component and touch its pages, so that the first save does not have to."""
        staged = self._staged(component, held)
        staged.arena.fill_(0)

    def stage(self, component: str, held: Sequence[HeldTensor]) -> list[HeldTensor]:
        """Copy every fragment into the component's memory.

        Returns:
            The same tensors, with that memory behind them. CPU sources are copied when this returns, GPU sources when
            `wait` does.
        """
        staged = self._staged(component, held)
        for buffer, source in staged.pairs:
            self._copy(buffer, source)
        release()
        if self._stream is not None:
            self._event = self._stream.record_event()
        return staged.held

    def wait(self) -> None:
        """Return when the sources may be overwritten."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None

    def clear(self) -> None:
        """Release the memory."""
        self.wait()
        self._memos.clear()
        self._arenas.clear()

    def _staged(self, component: str, held: Sequence[HeldTensor]) -> _Staged:
        memo = self._memos.setdefault(component, Memo())
        return memo.get(held, None, lambda: self._plan(component, held))

    def _plan(self, component: str, held: Sequence[HeldTensor]) -> _Staged:
        sources = [fragment.data.detach() for tensor in held for part in tensor.parts for fragment in part.fragments]
        offsets, end = [], 0
        for source in sources:
            offsets.append(end)
            end += -(-source.numel() * source.element_size() // _ALIGN) * _ALIGN
        arena = self._arena(component, end, any(source.device.type == "cuda" for source in sources))
        buffers = []
        for source, offset in zip(sources, offsets, strict=True):
            flat = arena[offset : offset + source.numel() * source.element_size()]
            buffers.append(flat.view(source.dtype).view(source.shape))
        remaining = iter(buffers)
        tensors = [_rebuilt(tensor, remaining) for tensor in held]
        return _Staged(arena, tuple(zip(buffers, sources, strict=True)), tensors)

    def _arena(self, component: str, nbytes: int, pinned: bool) -> torch.Tensor:
        """Memory of at least ``nbytes``; what the component has already, if that is enough."""
        known = self._arenas.get(component)
        if known is not None and known.numel() >= nbytes and (known.is_pinned() or not pinned):
            return known
        made = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if pinned else _huge_pages(nbytes)
        self._arenas[component] = made
        return made

    def _copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        source = resolve(source)
        if source.device.type != "cuda":
            buffer.copy_(source)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(source, non_blocking=True)
            source.record_stream(self._stream)


def _huge_pages(nbytes: int) -> torch.Tensor:
    """Anonymous memory, in huge pages where the system grants them."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without huge pages refuses; small ones do as well, only slower at the first touch.
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(region, dtype=np.uint8))


def _rebuilt(tensor: HeldTensor, buffers: Iterator[torch.Tensor]) -> HeldTensor:
    parts = tuple(
        HeldPart(
            part.part, part.coordinate, tuple(Fragment(fragment.box, next(buffers)) for fragment in part.fragments)
        )
        for part in tensor.parts
    )
    return tensor._replace(parts=parts)
