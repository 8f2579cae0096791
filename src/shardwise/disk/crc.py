"""CRC-32C (Castagnoli), and how the digest of a whole follows from those of its parts.

A digest must not depend on how many ranks wrote a tensor. The CRC of a concatenation follows from the CRCs and lengths
of its parts: appending ``n`` bytes multiplies the polynomial of what stands before by ``x**(8n)`` modulo the generator.
Here polynomials over GF(2) are 32-bit integers in reflected bit order (bit 31 is ``x**0``), as in CRC-32C itself
(RFC 3720, appendix B.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from awscrt.checksums import combine_crc32c
from awscrt.checksums import crc32c as _crc32c

if TYPE_CHECKING:
    from typing_extensions import Buffer


def crc32c(data: Buffer, value: int = 0) -> int:
    """Return the CRC-32C of ``data`` appended to bytes whose CRC-32C is ``value`` (0 for none).

    ``data`` is any C-contiguous buffer. The interpreter's lock is released while large buffers are read.
    """
    return int(_crc32c(data, value))


def combine(crc_a: int, crc_b: int, len_b: int) -> int:
    """Return the CRC-32C of the concatenation of two runs of bytes, the second of ``len_b`` bytes."""
    return int(combine_crc32c(crc_a, crc_b, len_b))


def shift(crc: int, nbytes: int) -> int:
    """Return what ``crc`` contributes to the CRC-32C of a run in which ``nbytes`` further bytes follow it."""
    return combine(crc, 0, nbytes)
