"""Collectives on a process group itself, and how bytes travel in them.

``torch.distributed``'s functions look a group up in torch's registry first, which ``destroy_process_group()`` empties.
A group's own methods need no registry: a save that is still being written in the background when a training script
destroys its groups goes on to its end, since the connections live as long as the group does.

Each ends when gloo's thread has let go of the tensors, for which that thread needs Python's global lock. Whoever ends
the group waits for a thread that is not yet done. DDP's reducer does so while it holds the lock, and the process stands
still at its end: seen with torch 2.13, see https://github.com/pytorch/pytorch/issues/56297.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

#: Should anything else keep a tensor, nobody waits for it longer than this.
_RELEASE_SECONDS = 1.0
_PAUSE_SECONDS = 0.00001


def all_gather(group: dist.ProcessGroup, gathered: Sequence[torch.Tensor], own: torch.Tensor) -> None:
    """Fill ``gathered`` with every rank's tensor, in rank order."""
    _complete(lambda: group.allgather([list(gathered)], [own]), [*gathered, own])


def broadcast(group: dist.ProcessGroup, tensor: torch.Tensor, source: int) -> None:
    """Give every rank what rank ``source`` of the group has."""
    options = dist.BroadcastOptions()
    options.rootRank = source
    options.rootTensor = 0
    _complete(lambda: group.broadcast([tensor], options), [tensor])


def all_reduce(
    group: dist.ProcessGroup, tensor: torch.Tensor, how: dist.ReduceOp.RedOpType, seconds: float | None = None
) -> None:
    """Combine every rank's tensor in place, waiting ``seconds`` for the others; the group's time-out if not given."""
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(how)
    if seconds is not None:
        options.timeout = timedelta(seconds=seconds)
    _complete(lambda: group.allreduce([tensor], options), [tensor])


def all_to_all(
    group: dist.ProcessGroup,
    received: torch.Tensor,
    sent: torch.Tensor,
    received_counts: Sequence[int] = (),
    sent_counts: Sequence[int] = (),
) -> None:
    """Give each rank a part of this rank's tensor, in rank order; equal parts where no counts are given."""
    _complete(lambda: group.alltoall_base(received, sent, list(received_counts), list(sent_counts)), [received, sent])


def send(group: dist.ProcessGroup, tensor: torch.Tensor, to: int) -> dist.Work:
    """Begin to send to rank ``to`` of the group; the result is waited for."""
    return group.send([tensor], to, 0)


def receive(group: dist.ProcessGroup, tensor: torch.Tensor, source: int) -> dist.Work:
    """Begin to receive from rank ``source`` of the group; the result is waited for."""
    return group.recv([tensor], source, 0)


#: Bytes that travel in a message's first exchange, its length among them: most messages are shorter and need no second.
PACKET_BYTES = 512
_LENGTH_BYTES = 8


def packet(data: bytes) -> bytes:
    """The length of a message and its first bytes: all of it, if it is short."""
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data[: PACKET_BYTES - _LENGTH_BYTES]


def unpacked(packet: torch.Tensor) -> tuple[int, bytes]:
    """The length of a message, and as much of it as its packet holds."""
    raw = to_bytes(packet)
    size = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    return size, raw[_LENGTH_BYTES : _LENGTH_BYTES + size]


def to_tensor(data: bytes, size: int, device: torch.device) -> torch.Tensor:
    """Bytes as a tensor of ``size`` elements of ``uint8``, zeros behind them."""
    buffer = torch.zeros(size, dtype=torch.uint8)
    if data:
        buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return buffer.to(device)


def to_bytes(buffer: torch.Tensor) -> bytes:
    """The bytes of a tensor of ``uint8``."""
    return buffer.cpu().numpy().tobytes()


def _complete(begin: Callable[[], dist.Work], tensors: Sequence[torch.Tensor]) -> None:
    """Run a collective, and return when gloo has let go of its tensors."""
    before = [_references(tensors, number) for number in range(len(tensors))]
    begin().wait()
    limit = time.monotonic() + _RELEASE_SECONDS
    for number, count in enumerate(before):
        while _references(tensors, number) > count and time.monotonic() < limit:
            time.sleep(_PAUSE_SECONDS)


def _references(tensors: Sequence[torch.Tensor], number: int) -> int:
    """How often a tensor's Python object is referred to: once more for as long as anything below Python has it too.

    Of an accelerator's tensors a backend keeps some until their stream is done, and it has no thread like gloo's.
    """
    return sys.getrefcount(tensors[number]) if tensors[number].device.type == "cpu" else 0
