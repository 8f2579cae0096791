"""Copying state aside, so that training may go on while it is written.

The buffers belong to the `Stager` and are reused by every save; they are pinned where the source is on a GPU, and the
copy then runs on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from shardwise.engine.memo import Memo
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor


@dataclass(frozen=True, slots=True)
class _Key:
    """Which fragment of which tensor a buffer belongs to."""

    component: str
    name: str
    part: int
    fragment: int


class Stager:
    """Owns the staging buffers of one checkpointer."""

    def __init__(self) -> None:
        self._buffers: dict[_Key, torch.Tensor] = {}
        self._plans: dict[str, Memo[tuple[list[tuple[torch.Tensor, torch.Tensor]], list[HeldTensor]]]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def allocate(self, component: str, held: Sequence[HeldTensor]) -> None:
        """Make the buffers for a component and touch their pages, so that the first save does not have to."""
        for key, fragment in _fragments(component, held):
            self._buffer(key, fragment)

    def stage(self, component: str, held: Sequence[HeldTensor]) -> list[HeldTensor]:
        """Copy every fragment into its buffer.

        Returns:
            The same tensors, with the buffers as their memory. CPU sources are copied when this returns, GPU sources
            when `wait` does.
        """
        memo = self._plans.setdefault(component, Memo())
        pairs, staged = memo.get(held, None, lambda: self._plan(component, held))
        for buffer, source in pairs:
            self._copy(buffer, source)
        if self._stream is not None:
            self._event = self._stream.record_event()
        return staged

    def _plan(
        self, component: str, held: Sequence[HeldTensor]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[HeldTensor]]:
        """Which buffer takes which memory, and the tensors as they are once copied."""
        pairs, staged = [], {}
        for key, fragment in _fragments(component, held):
            buffer = self._buffer(key, fragment)
            pairs.append((buffer, fragment.data.detach()))
            staged[key] = Fragment(fragment.box, buffer)
        return pairs, [_rebuilt(component, tensor, staged) for tensor in held]

    def wait(self) -> None:
        """Return when the sources may be overwritten."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None

    def clear(self) -> None:
        """Release the buffers."""
        self.wait()
        self._buffers.clear()
        self._plans.clear()

    def _buffer(self, key: _Key, fragment: Fragment) -> torch.Tensor:
        source = fragment.data
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            pinned = source.device.type == "cuda"
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
            if buffer.numel():
                buffer.view(-1).view(torch.uint8).fill_(0)
            self._buffers[key] = buffer
        return buffer

    def _copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        if source.device.type != "cuda":
            buffer.copy_(source)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(source, non_blocking=True)
            source.record_stream(self._stream)


def _fragments(component: str, held: Sequence[HeldTensor]) -> list[tuple[_Key, Fragment]]:
    return [
        (_Key(component, tensor.spec.name, p, f), fragment)
        for tensor in held
        for p, part in enumerate(tensor.parts)
        for f, fragment in enumerate(part.fragments)
    ]


def _rebuilt(component: str, tensor: HeldTensor, staged: dict[_Key, Fragment]) -> HeldTensor:
    parts = tuple(
        HeldPart(
            part.part,
            part.coordinate,
            tuple(staged[_Key(component, tensor.spec.name, p, f)] for f in range(len(part.fragments))),
        )
        for p, part in enumerate(tensor.parts)
    )
    return replace(tensor, parts=parts)
