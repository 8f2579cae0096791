"""Exit codes."""

from __future__ import annotations

from collections.abc import Iterable

from shardwise.errors import FormatError, IntegrityError, ShardwiseError, TensorError, UnverifiableError

#: Unverifiable is not whole: a script that goes on after 0 must not go on with what nobody checked.
FINE, FOUND, MISUSE, UNVERIFIABLE = 0, 1, 2, 3
#: An error of the program itself (EX_SOFTWARE of sysexits.h); 1, which Python gives, would read as "damaged".
CRASHED = 70
INTERRUPTED = 130

_GRAVEST = (INTERRUPTED, CRASHED, FOUND, MISUSE, UNVERIFIABLE, FINE)


def code_of(error: ShardwiseError) -> int:
    """The exit code of a command that ended with this error."""
    if isinstance(error, UnverifiableError):
        return UNVERIFIABLE
    return FOUND if isinstance(error, (FormatError, IntegrityError, TensorError)) else MISUSE


def gravest(codes: Iterable[int]) -> int:
    """The code of a command for several paths: found before misuse before unverifiable before fine."""
    return min(codes, key=_GRAVEST.index, default=FINE)
