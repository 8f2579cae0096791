"""CRC-32C (Castagnoli), and the arithmetic that puts the digest of a whole together from those of its parts.

A digest must not depend on how many ranks wrote a tensor. The CRC of a concatenation follows from the CRCs and lengths
of its parts: appending ``n`` bytes multiplies the polynomial of what stands before by ``x**(8n)`` modulo the generator.
Here polynomials over GF(2) are 32-bit integers in reflected bit order (bit 31 is ``x**0``), as in CRC-32C itself
(RFC 3720, appendix B.4).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import crc32c as _crc32c

if TYPE_CHECKING:
    from typing_extensions import Buffer

_POLYNOMIAL = 0x82F63B78
_ONE = 0x80000000


def crc32c(data: Buffer, value: int = 0) -> int:
    """Return the CRC-32C of ``data`` appended to bytes whose CRC-32C is ``value`` (0 for none).

    ``data`` is any C-contiguous buffer. The interpreter's lock is released while large buffers are read.
    """
    return _crc32c.crc32c(data, value)


def combine(crc_a: int, crc_b: int, len_b: int) -> int:
    """Return the CRC-32C of the concatenation of two runs of bytes.

    Args:
        crc_a: CRC-32C of the first run.
        crc_b: CRC-32C of the second run.
        len_b: Length of the second run in bytes.
    """
    return shift(crc_a, len_b) ^ crc_b


def shift(crc: int, nbytes: int) -> int:
    """Return what ``crc`` contributes to the CRC-32C of a run in which ``nbytes`` further bytes follow it."""
    return _multiply(_power(nbytes), crc)


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _squares() -> tuple[int, ...]:
    # x**8, x**16, x**32, ...: one entry for every bit of a 64-bit length.
    powers = [_ONE >> 8]
    for _ in range(63):
        powers.append(_multiply(powers[-1], powers[-1]))
    return tuple(powers)


_SQUARES = _squares()


@lru_cache(maxsize=4096)
def _power(nbytes: int) -> int:
    power = _ONE
    for bit, factor in enumerate(_SQUARES):
        if nbytes >> bit & 1:
            power = _multiply(factor, power)
    return power
