"""Messages as tensors: how bytes travel between ranks."""

from __future__ import annotations

import torch

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
