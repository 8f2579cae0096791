"""JSON as the formats mean it: UTF-8, no duplicate keys, no NaN, bounded depth.

Python's own parser accepts all of those. Its result is untyped: callers check it field by field with the functions
below, which report errors through the caller's ``fail``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeAlias, Union

#: A value that JSON can hold. `Sequence` and `Mapping` so that read-only containers are accepted too.
JsonValue: TypeAlias = Union[bool, int, float, str, "Sequence[JsonValue]", "Mapping[str, JsonValue]", None]

#: Largest size, offset or dimension in any format read here: that of a signed 64-bit integer.
MAX_INT = 2**63 - 1

#: Longest tensor name that is written or read, in characters: an error that names it has to stay readable.
MAX_NAME = 4096

#: Larger than any tensor that torch makes, small enough that products of dimensions stay cheap.
MAX_DIMS = 64

_SURROGATE = re.compile("[\ud800-\udfff]")

#: Raises the caller's error; the argument says what is wrong.
Fail: TypeAlias = Callable[[str], NoReturn]


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:200]!r} stands twice in one object")
            seen.add(key)
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)

#: Compact text of a value, one encoder for all: making one takes longer than a short text. Numbers must be finite.
dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode

#: Text as a JSON string, as `dumps` gives it, for the names of tens of thousands of tensors: a third of the time.
quoted: Callable[[str], str] = json.encoder.encode_basestring


def loads(data: bytes, *, fail: Fail) -> JsonValue:
    """Parse UTF-8 text strictly; ``fail`` is called with the reason where it is not strict JSON.

    Takes time and memory linear in ``len(data)``, which the caller bounds. Nesting is bounded by the interpreter's
    recursion limit, which the parser obeys; parts of free form are checked with `check_depth`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"is not valid UTF-8 at byte {error.start}")
    try:
        value: JsonValue = _DECODER.decode(text)
        # Escapes can spell half of a surrogate pair, which no UTF-8 text can hold.
        if "\\u" in text:
            _refuse_surrogates(value)
    except RecursionError:
        fail("is nested too deeply")
    except ValueError as error:
        fail(f"is not valid JSON: {str(error)[:300]}")
    return value


def check_depth(value: JsonValue, max_depth: int, what: str, fail: Fail) -> None:
    """Make sure that objects and arrays are nested at most ``max_depth`` deep."""
    level: list[JsonValue] = [value]
    for _ in range(max_depth + 1):
        inner: list[JsonValue] = []
        for item in level:
            if isinstance(item, Mapping):
                inner.extend(item.values())
            elif isinstance(item, Sequence) and not isinstance(item, str):
                inner.extend(item)
        if not inner:
            return
        level = inner
    fail(f"{what} is nested deeper than {max_depth} levels")


def _refuse_surrogates(value: JsonValue) -> None:
    pending: list[JsonValue] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if _SURROGATE.search(item):
                raise ValueError("a string holds an unpaired surrogate")
        elif isinstance(item, Mapping):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, Sequence):
            pending.extend(item)


def as_count(value: JsonValue, what: str, fail: Fail) -> int:
    """Return ``value`` where it is an integer from 0 to `MAX_INT`; ``True`` and ``1.0`` are not."""
    if type(value) is not int or not 0 <= value <= MAX_INT:
        fail(f"{what} must be an integer from 0 to 2**63 - 1, not {_show(value)}")
    return value


def as_counts(value: JsonValue, what: str, fail: Fail) -> tuple[int, ...]:
    """Return ``value`` where it is an array of at most `MAX_DIMS` integers from 0 to `MAX_INT`."""
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        fail(f"{what} must be an array of at most {MAX_DIMS} integers, not {_show(value)}")
    for item in value:
        if type(item) is not int or not 0 <= item <= MAX_INT:
            as_count(item, what, fail)
    return tuple(value)


def as_text(value: JsonValue, what: str, fail: Fail) -> str:
    """Return ``value`` where it is a string."""
    if not isinstance(value, str):
        fail(f"{what} must be a string, not {_show(value)}")
    return value


def as_object(value: JsonValue, what: str, fail: Fail) -> dict[str, JsonValue]:
    """Return ``value`` where it is an object."""
    if not isinstance(value, dict):
        fail(f"{what} must be an object, not {_show(value)}")
    return value


def as_array(value: JsonValue, what: str, fail: Fail) -> list[JsonValue]:
    """Return ``value`` where it is an array."""
    if not isinstance(value, list):
        fail(f"{what} must be an array, not {_show(value)}")
    return value


def as_row(value: JsonValue, count: int, what: str, fail: Fail) -> list[JsonValue]:
    """Return ``value`` where it is an array of ``count`` items."""
    row = as_array(value, what, fail)
    if len(row) != count:
        fail(f"has {what} with {len(row)} fields where {count} belong")
    return row


def exact_keys(value: dict[str, JsonValue], keys: frozenset[str], what: str, fail: Fail) -> None:
    """Make sure that the object holds these keys and no others."""
    if value.keys() != keys:
        missing, extra = sorted(keys - value.keys()), sorted(value.keys() - keys)
        wrong = f"lacks {missing}" if missing else f"has the unknown keys {_show(list(extra[:5]))}"
        fail(f"{what} {wrong}")


def check_magnitude(shape: tuple[int, ...], what: str, fail: Fail) -> None:
    """Make sure that the strides and the number of elements of ``shape`` fit into 64 bits, empty dimensions aside."""
    product = 1
    for size in shape:
        product *= size or 1
        if product > MAX_INT:
            fail(f"{what} {list(shape)} has more elements than 64 bits can count")


def _show(value: JsonValue) -> str:
    if isinstance(value, (list, dict)) and len(value) > 8:
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)} items"
    if type(value) is int and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:120]
