"""Copies state to memory of its own, so that training may go on while it is written.

The memory belongs to the `Stager` and is reused by every save: one arena for each component, pinned where a source is
on an accelerator with streams, and in huge pages on the CPU: their first touch costs a fraction of that of small ones.

Work on an accelerator is queued on streams, and the host goes on. A copy out of device memory runs on a separate
stream. So that it does not read values of a later step, it waits for the work that its device's current stream has so
far, and later work on that stream waits for it.

A training loop does not have to know any of this: work that the thread that called `Stager.stage` submits afterwards to
a device's current stream runs behind the copies, and so does work that an optimizer's ``step`` submits to any stream
of any thread. Nothing here keeps a source's memory alive.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from shardwise.errors import MisuseError
from shardwise.plan.deferred import deferred, release, resolve
from shardwise.plan.fragments import HeldTensor
from shardwise.timing import phase
from shardwise.upstream.torch_tensors import around, arrived, local_part, spread_of

#: Buffers start at multiples of this, a cache line.
_ALIGN = 64


@runtime_checkable
class DeviceModule(Protocol):
    """What ``torch.cuda``, ``torch.xpu`` and the modules of other accelerators with streams have in common."""

    def Stream(self, device: torch.device) -> torch.Stream:  # noqa: N802 - torch's name
        """A new stream."""

    def current_stream(self, device: torch.device) -> torch.Stream:
        """The stream that this thread's work goes to."""

    def stream(self, stream: torch.Stream) -> contextlib.AbstractContextManager[object]:
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


@dataclass(frozen=True, slots=True)
class _Plan:
    """A component's staging memory.

    Attributes:
        layout: What the buffers were made for, as `_layout` describes it.
        queued: The devices that copies are queued on.
        arena: All of the memory, as bytes.
        buffers: One for each source, contiguous.
        held: The tensors with the buffers as their memory, where the component consists of held tensors.
    """

    layout: object
    queued: frozenset[torch.device]
    arena: torch.Tensor
    buffers: tuple[torch.Tensor, ...]
    held: list[HeldTensor]


class Stager:
    """Owns the staging memory of one checkpointer. Threads may share it."""

    def __init__(self, streams: DeviceStreams | None = None) -> None:
        self._streams = streams or DeviceStreams()
        self._plans: dict[str, _Plan] = {}
        self._arenas: dict[str, torch.Tensor] = {}
        self._pending: dict[torch.device, torch.Event] = {}
        self._before_steps: RemovableHandle | None = None
        self._readers = 0
        self._lock = threading.Lock()
        self._unread = threading.Condition(self._lock)

    def allocate(self, component: str, held: Sequence[HeldTensor] | Mapping[str, torch.Tensor]) -> None:
        """Make a component's memory, for `stage` or `stage_tensors`, and touch its pages before the first save does."""
        with self._writable():
            if isinstance(held, Mapping):
                plan = self._planned(component, (), [_local(name, tensor) for name, tensor in held.items()])
            else:
                plan = self._planned(component, held, _sources(held))
            plan.arena.fill_(0)

    @phase("stage")
    def stage(self, component: str, held: Sequence[HeldTensor]) -> list[HeldTensor]:
        """Copy every fragment into the component's memory; returns the same tensors with that memory behind them.

        They are the same objects as long as tensors of the same kind are staged. What is on the CPU is copied when this
        returns, what is on an accelerator when `wait` does.
        """
        return self._staged(component, held, _sources(held)).held

    @phase("stage")
    def stage_tensors(self, component: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `stage`, of plain tensors and what this rank has of DTensors.

        DTensors are DTensors again, of the same mesh and placements, around memory that is the CPU's whatever the mesh
        is of: they may be written, and not computed with. Raises `MisuseError`: a tensor's class does not keep its
        values as one dense block.
        """
        plan = self._staged(component, (), [_local(name, tensor) for name, tensor in tensors.items()])
        return {
            name: around(buffer, spread_of(tensor)) if isinstance(tensor, DTensor) else buffer
            for (name, tensor), buffer in zip(tensors.items(), plan.buffers, strict=True)
        }

    @phase("stage")
    def wait(self) -> None:
        """Return when the sources may be overwritten, by whatever stream. Any thread calls."""
        with self._lock:
            pending = dict(self._pending)
        for event in pending.values():
            event.synchronize()
        with self._lock:
            for device, event in pending.items():
                if self._pending.get(device) is event:
                    del self._pending[device]

    def lend(self) -> None:
        """Mark the staged memory as being read: staging again waits for `take_back`."""
        with self._lock:
            self._readers += 1

    def take_back(self) -> None:
        """Undo a `lend`."""
        with self._unread:
            self._readers -= 1
            self._unread.notify_all()

    def clear(self) -> None:
        """Release the memory, and forget about optimizers."""
        self.wait()
        with self._lock:
            self._plans.clear()
            self._arenas.clear()
            handle, self._before_steps = self._before_steps, None
        if handle is not None:
            handle.remove()

    # --- inside -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """While the arenas are written: by one thread, and not while a save reads them.

        Memory made inside ``torch.inference_mode()`` could not be written outside of it.
        """
        with self._unread:
            self._unread.wait_for(lambda: self._readers == 0)
            with torch.inference_mode(False), torch.no_grad():
                yield

    def _planned(self, component: str, held: Sequence[HeldTensor], sources: Sequence[torch.Tensor]) -> _Plan:
        queued = frozenset(filter(self._streams.has_streams, map(_device, sources)))
        layout = (queued, _layout(held, sources))
        known = self._plans.get(component)
        if known is not None and known.layout == layout:
            return known
        offsets, end = [], 0
        for source in sources:
            offsets.append(end)
            end += -(-source.numel() * source.element_size() // _ALIGN) * _ALIGN
        # The old plan's buffers would keep an outgrown arena alive while the next one is made.
        del known
        self._plans.pop(component, None)
        arena = self._arena(component, end, bool(queued))
        buffers = []
        for source, offset in zip(sources, offsets, strict=True):
            flat = arena[offset : offset + source.numel() * source.element_size()]
            buffers.append(flat.view(source.dtype).view(source.shape))
        rest = iter(buffers)
        plan = _Plan(layout, queued, arena, tuple(buffers), [tensor.elsewhere(lambda _: next(rest)) for tensor in held])
        self._plans[component] = plan
        return plan

    def _arena(self, component: str, nbytes: int, pinned: bool) -> torch.Tensor:
        """Memory of at least ``nbytes``; what the component has already, if that is enough."""
        known = self._arenas.get(component)
        if known is not None and known.numel() >= nbytes and (known.is_pinned() or not pinned):
            return known
        self._arenas.pop(component, None)
        del known
        made = self._streams.pinned(nbytes) if pinned else _huge_pages(nbytes)
        self._arenas[component] = made
        return made

    def _staged(self, component: str, held: Sequence[HeldTensor], sources: Sequence[torch.Tensor]) -> _Plan:
        """Copy, and order later work behind the copies, also where one of them fails."""
        used: dict[torch.device, None] = {}
        with self._writable():
            plan = self._planned(component, held, sources)
            try:
                for buffer, given in zip(plan.buffers, sources, strict=True):
                    source = resolve(given)
                    if source.device in plan.queued:
                        used[source.device] = None
                        self._streams.copy(buffer, source)
                    else:
                        buffer.copy_(source)
            finally:
                release()
                for device in used:
                    event = self._pending[device] = self._streams.mark(device)
                    self._streams.hold_back(device, event)
                if used and self._before_steps is None:
                    self._before_steps = register_optimizer_step_pre_hook(self._before_step)
        return plan

    def _before_step(self, *_: object) -> None:
        """Called before any optimizer's ``step``, which may run on another stream or thread than the save did."""
        with self._lock:
            pending = list(self._pending.items())
        for device, event in pending:
            self._streams.hold_back(device, event)


def _sources(held: Sequence[HeldTensor]) -> list[torch.Tensor]:
    return [fragment.data for tensor in held for part in tensor.parts for fragment in part.fragments]


def _device(source: torch.Tensor) -> torch.device:
    """A source's device; for a tensor that its module makes when asked, the device where it will be made."""
    what = deferred(source) if source.is_meta else None
    return source.device if what is None else what.device


def _layout(held: Sequence[HeldTensor], sources: Sequence[torch.Tensor]) -> object:
    """The properties that buffers depend on, without references to sources; equal where buffers can be reused.

    In flat lists, which are made and compared in a fraction of the time: this is done for every tensor of every save.
    """
    parts = [part for tensor in held for part in tensor.parts]
    return (
        [source.dtype for source in sources],
        [source.shape for source in sources],
        [tensor.spec for tensor in held],
        [tensor.grid for tensor in held],
        [len(tensor.parts) for tensor in held],
        [part.part for part in parts],
        [part.coordinate for part in parts],
        [len(part.fragments) for part in parts],
        [fragment.box for part in parts for fragment in part.fragments],
    )


def _local(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, as memory that can be copied byte by byte."""
    local = arrived(local_part(tensor).detach())
    if local.layout != torch.strided or type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        what = f"a {type(local).__name__} of layout {local.layout} cannot be staged as it is"
        raise MisuseError(what, tensor=name, hint='Set model_save_format to "safetensors", or is_async to false.')
    return local


def _huge_pages(nbytes: int) -> torch.Tensor:
    """Anonymous memory, in huge pages where the system grants them."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without huge pages refuses; small ones do as well, only slower at the first touch.
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(region, dtype=np.uint8))
