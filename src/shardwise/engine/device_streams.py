"""The order of copies from an accelerator among its other work.

Work on an accelerator is queued on streams, and the host goes on. A copy out of device memory runs on a separate
stream. So that it does not read values of a later step, it waits for the work that its device's current stream has so
far, and later work on that stream waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, cast, runtime_checkable

import torch


@runtime_checkable
class DeviceModule(Protocol):
    """What ``torch.cuda``, ``torch.xpu`` and the modules of other accelerators with streams have in common."""

    def Stream(self, device: torch.device) -> torch.Stream:  # noqa: N802 - torch's name
        """A new stream."""

    def current_stream(self, device: torch.device) -> torch.Stream:
        """The stream that this thread's work goes to."""

    def stream(self, stream: torch.Stream) -> AbstractContextManager[object]:
        """Makes another stream the current one."""


class DeviceStreams:
    """Streams of whatever accelerators torch knows, one side stream for each device.

    For each asynchronous save, on the thread that saves: `has_streams` and `pinned` when memory is made, `copy` for
    each tensor, then for each device `mark` and `hold_back`. Later, on any thread that steps an optimizer, `hold_back`
    again. Before any other save, and before a load: `settle`.
    """

    def __init__(self, module_of: Callable[[torch.device], object] = torch.get_device_module) -> None:
        self._module_of = module_of
        self._sides: dict[torch.device, torch.Stream] = {}
        self._known: dict[torch.device, bool] = {}

    def has_streams(self, device: torch.device) -> bool:
        """Whether copies from ``device`` are queued; of Apple's GPUs, for one, they are done when ``copy_`` returns."""
        known = self._known.get(device)
        if known is None:
            known = device.type not in ("cpu", "meta") and isinstance(self._module_of(device), DeviceModule)
            self._known[device] = known
        return known

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Page-locked memory, which devices copy into without the host."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy behind all that the current stream of the source's device has been given.

        The memory of ``source`` may be freed once this returns: it is not given to others before it was read.
        """
        device = source.device
        module = self._module(device)
        side = self._sides.get(device)
        if side is None:
            side = self._sides[device] = module.Stream(device=device)
        side.wait_stream(module.current_stream(device))
        with module.stream(side):
            buffer.copy_(source, non_blocking=True)
            # The allocator knows only the stream that the memory was allocated on: record this one with it.
            source.record_stream(side)

    def mark(self, device: torch.device) -> torch.Event:
        """The point behind all copies that were queued from ``device``."""
        return self._sides[device].record_event()

    def hold_back(self, device: torch.device, event: torch.Event) -> None:
        """Let what this thread gives to the device's current stream from now on wait for ``event``; the host does not.

        Not while a graph is captured on it, which only records, and cannot wait for what is outside of it.
        """
        module = self._module(device)
        is_capturing = getattr(module, "is_current_stream_capturing", None)
        if is_capturing is None or not is_capturing():
            module.current_stream(device).wait_event(event)

    def settle(self, device: torch.device) -> None:
        """Return when all that this thread gave to the current stream of ``device`` is done."""
        self._module(device).current_stream(device).synchronize()

    def _module(self, device: torch.device) -> DeviceModule:
        return cast(DeviceModule, self._module_of(device))
