"""The header of a safetensors file: written byte for byte as the library does, read as if it were hostile.

A file is the header's length in 8 bytes (little-endian), the header (JSON padded with spaces so that the data start at
a multiple of 8), and the data section, which the tensors tile without hole or overlap. Offsets in a header count from
the start of the data section.

Source: the safetensors format description, and the bytes that safetensors 0.8 writes; of the record in a shard, which
says where in their global tensors its tensors belong, what torch 2.13's ``HuggingFaceStorageWriter`` writes and its
``HuggingFaceStorageReader`` looks for.
"""

from __future__ import annotations

import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import NamedTuple, NoReturn

from shardwise.disk.guarded import open_regular, read_exactly
from shardwise.errors import HeaderError, MisuseError
from shardwise.format import strict_json as strict
from shardwise.format.sniff import FIRST_BYTES, Kind, what_is
from shardwise.format.strict_json import JsonValue
from shardwise.geometry import DTYPE_BYTES, TensorSpec

#: Longest header that the format allows, in bytes.
MAX_HEADER_BYTES = 100_000_000

#: Bytes that hold the header's length.
LENGTH_BYTES = 8

_METADATA_KEY = "__metadata__"
_RANK = {code: rank for rank, code in enumerate(DTYPE_BYTES)}
_SUB_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
#: The hint for a header that cannot be right.
DAMAGED = "The file is damaged or was not written by safetensors: fetch or save it again."


class TensorEntry(NamedTuple):
    """A tensor and the bytes ``begin`` to ``end`` of the data section that hold it."""

    spec: TensorSpec
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header: the tensors by their place in the file, and where in it the data section starts, in bytes.

    ``metadata`` are the ``__metadata__`` strings, empty where the file has none.
    """

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, ordered by their place in the file."""
        return tuple(entry.spec.name for entry in self.entries)

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.data_start + (self.entries[-1].end if self.entries else 0)


def arrange(specs: Iterable[TensorSpec]) -> tuple[TensorEntry, ...]:
    """Lay tensors out as the safetensors library does: by dtype (the widest first), then by name, without gaps.

    Two tensors of one name are a `MisuseError`.
    """
    by_dtype: defaultdict[str, list[TensorSpec]] = defaultdict(list)
    for spec in specs:
        by_dtype[spec.dtype].append(spec)
    names: set[str] = set()
    entries, begin = [], 0
    for dtype in sorted(by_dtype, key=_RANK.__getitem__, reverse=True):
        for spec in sorted(by_dtype[dtype], key=attrgetter("name")):
            if spec.name in names:
                what = "two tensors of a file have the same name"
                raise MisuseError(what, tensor=spec.name, hint="Rename one of them.")
            names.add(spec.name)
            entries.append(TensorEntry(spec, begin, begin + spec.nbytes))
            begin = entries[-1].end
    return tuple(entries)


def encode_header(entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a file up to its data section.

    The result equals what ``safetensors.torch.save_file`` writes for tensors in the order of `arrange`. Metadata keys
    are sorted, where the library takes them in the order of a hash table, which differs from run to run.

    Raises:
        MisuseError: A name is reserved, too long or not valid Unicode, or the header would exceed `MAX_HEADER_BYTES`.
    """
    table: list[str] = []
    if metadata is not None:
        table.append(f"{strict.quoted(_METADATA_KEY)}:{strict.dumps({key: metadata[key] for key in sorted(metadata)})}")
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}  # many tensors share what stands between name and offsets
    for (name, shape, dtype), begin, end in entries:
        if name == _METADATA_KEY:
            raise MisuseError(f"no tensor can be called {_METADATA_KEY!r}", tensor=name, hint="Rename the tensor.")
        if len(name) > strict.MAX_NAME:
            raise MisuseError(
                f"a tensor name has {len(name)} characters; at most {strict.MAX_NAME} are written",
                hint="Shorten the name.",
            )
        code = kinds.get((dtype, shape))
        if code is None:
            code = kinds[dtype, shape] = (
                f':{{"dtype":{strict.dumps(dtype)},"shape":{strict.dumps(shape)},"data_offsets":['
            )
        table.append(f"{strict.quoted(name)}{code}{begin},{end}]}}")
    try:
        text = f"{{{','.join(table)}}}".encode()
    except UnicodeEncodeError as error:
        raise MisuseError(
            f"a tensor name or metadata text is not valid Unicode: {error.object[error.start : error.end]!r}",
            hint="Rename the tensor or change the text.",
        ) from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise MisuseError(
            f"the header would take {len(text)} bytes; the format allows {MAX_HEADER_BYTES}",
            hint="Spread the tensors over more files.",
        )
    return struct.pack("<Q", len(text)) + text


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a safetensors file, behind links; `HeaderError` for what is none, or contradicts its file.

    Memory is bounded by a small multiple of the header, which is never longer than the file or `MAX_HEADER_BYTES`.
    """
    with open_regular(path, HeaderError) as (stream, size):
        text = os.fspath(path)
        start = read_exactly(stream, FIRST_BYTES)
        length = _header_length(start, size, text)
        buffer = start + read_exactly(stream, LENGTH_BYTES + length - len(start))
    return parse_header(buffer, size, text)


def parse_header(buffer: bytes, file_size: int, path: str) -> Header:
    """Validate a header in memory: ``buffer`` has the first bytes of the file, at least to the end of the header.

    `HeaderError` where it is malformed, or the file is shorter or longer than it says.
    """
    length = _header_length(buffer[:FIRST_BYTES], file_size, path)
    text = bytes(buffer[LENGTH_BYTES : LENGTH_BYTES + length])

    def fail(reason: str) -> NoReturn:
        raise HeaderError(f"the header of {path!r} {reason}", path=path, hint=DAMAGED)

    if len(text) < length:
        fail(f"has {length} bytes, of which only {len(text)} are there")
    if not text.startswith(b"{"):
        _refuse_start(buffer, path, f"the header of {path!r} does not start with '{{'")
    table = strict.as_object(strict.loads(text, fail=fail), "which", fail)
    noted = table.pop(_METADATA_KEY, None)
    entries = [_entry(name, value, path) for name, value in table.items()]
    # The safetensors library takes null for an absent entry.
    strings = {} if noted is None else strict.as_object(noted, _METADATA_KEY, fail)
    metadata = {key: strict.as_text(value, f"metadata {key!r}", fail) for key, value in strings.items()}
    entries.sort(key=itemgetter(1, 2))
    data_start = LENGTH_BYTES + length
    _check_tiling(entries, file_size - data_start, path)
    return Header(tuple(entries), metadata, data_start)


def _refuse_start(start: bytes, path: str, wrong: str) -> NoReturn:
    """Raise an error that names the format, if the file is of another known one, and what is wrong otherwise."""
    found = what_is(start)
    if found is not None and found.kind is not Kind.SAFETENSORS:
        raise HeaderError(f"{path!r} is {found.name}, not a safetensors file", path=path, hint=found.hint)
    raise HeaderError(wrong, path=path, hint=DAMAGED)


def _header_length(start: bytes, file_size: int, path: str) -> int:
    missing = LENGTH_BYTES - min(len(start), file_size)
    if missing > 0:
        _refuse_start(start, path, f"{path!r} is truncated: {missing} bytes of the header's length are missing")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    missing = LENGTH_BYTES + length - file_size
    if length > MAX_HEADER_BYTES:
        most = f"at most {MAX_HEADER_BYTES} are allowed"
        _refuse_start(start, path, f"{path!r} claims a header of {length} bytes; {most}")
    if missing > 0:
        _refuse_start(start, path, f"{path!r} is truncated: {missing} of its header's {length} bytes are missing")
    return length


def _entry(name: str, value: JsonValue, path: str) -> TensorEntry:
    def fail(reason: str) -> NoReturn:
        tensor = name if len(name) <= strict.MAX_NAME else None
        raise HeaderError(f"the header of {path!r} {reason}", path=path, tensor=tensor, hint=DAMAGED)

    if len(name) > strict.MAX_NAME:
        fail(f"has a tensor name of {len(name)} characters, starting with {name[:80]!r}")
    info = strict.as_object(value, "the entry of a tensor", fail)
    strict.exact_keys(info, _ENTRY_KEYS, "the entry of a tensor", fail)
    dtype = strict.as_text(info["dtype"], "dtype", fail)
    if dtype not in DTYPE_BYTES:
        what, hint = f"unknown dtype {dtype[:40]!r}", f"Known are {', '.join(DTYPE_BYTES)}."
        if dtype in _SUB_BYTE:
            what = f"sub-byte dtype {dtype}, which shardwise does not read"
            hint = "Convert the checkpoint to a dtype of whole bytes."
        raise HeaderError(f"the tensor has the {what}", path=path, tensor=name, hint=hint)
    shape = strict.as_counts(info["shape"], "shape", fail)
    strict.check_magnitude(shape, "the shape", fail)
    offsets = strict.as_counts(info["data_offsets"], "data_offsets", fail)
    if len(offsets) != 2:
        fail(f"gives {len(offsets)} data_offsets where two belong")
    begin, end = offsets
    spec = TensorSpec(name, shape, dtype)
    if begin > end:
        fail(f"has reversed data_offsets {begin}, {end}")
    if end - begin != spec.nbytes:
        fail(f"gives {end - begin} bytes to {list(shape)} elements of {dtype}, which take {spec.nbytes}")
    return TensorEntry(spec, begin, end)


def _check_tiling(entries: Sequence[TensorEntry], data_bytes: int, path: str) -> None:
    position = 0
    for spec, begin, end in entries:
        if begin != position:
            wrong = "overlaps the one before" if begin < position else f"leaves {begin - position} bytes unused"
            what = f"in {path!r} a tensor at bytes {begin} to {end} of the data {wrong}"
            raise HeaderError(what, path=path, tensor=spec.name, hint=DAMAGED)
        position = end
    if position > data_bytes:
        cut = next(entry.spec.name for entry in entries if entry.end > data_bytes)
        what = f"{path!r} is truncated: {position - data_bytes} of {position} data bytes are missing"
        hint = "The copy or download was cut short: fetch or save the file again."
        raise HeaderError(what, path=path, tensor=cut, hint=hint)
    if position < data_bytes:
        what = f"{path!r} has {data_bytes - position} bytes more than its tensors take"
        raise HeaderError(what, path=path, hint=DAMAGED)


#: Key of ``__metadata__`` that holds the record.
DCP_SHARDING_KEY = "DCP_SHARDING_INFO"


def encode_sharding_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the ``__metadata__`` that makes a shard, whose tensors start there, readable by DCP."""
    record = {name: {"saved_offsets": list(offsets[name])} for name in sorted(offsets)}
    return {DCP_SHARDING_KEY: json.dumps(record), "DCP_VERSION": "1.0", "format": "pt"}


def saved_offsets(header: Header) -> dict[str, tuple[int, ...]] | None:
    """Return where each tensor of a DCP shard starts in its global tensor, or ``None`` where the file has no record.

    A record that is malformed, lacks a tensor or disagrees with one's number of dimensions is a `HeaderError`.
    """
    text = header.metadata.get(DCP_SHARDING_KEY)
    if text is None:
        return None
    tensor: str | None = None

    def fail(reason: str) -> NoReturn:
        raise HeaderError(f"the record {DCP_SHARDING_KEY} {reason}", tensor=tensor, hint=DAMAGED)

    record = strict.as_object(strict.loads(text.encode("utf-8"), fail=fail), "which", fail)
    result: dict[str, tuple[int, ...]] = {}
    for (tensor, shape, _), _, _ in header.entries:
        if tensor not in record:
            fail("lacks the tensor")
        offsets = strict.as_counts(
            strict.as_object(record[tensor], "its entry", fail).get("saved_offsets"), "saved_offsets", fail
        )
        if len(offsets) != len(shape):
            fail(f"gives {len(offsets)} offsets for {len(shape)} dimensions")
        if any(offset + size > strict.MAX_INT for offset, size in zip(offsets, shape, strict=True)):
            fail("puts it outside any possible tensor")
        result[tensor] = offsets
    return result
