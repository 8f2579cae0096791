"""Whatever bytes stand in a file, the readers return a valid record or raise their own error."""

from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st
from tests.format.builders import aliased_manifest, manifest_text, sample_manifest, sign, tensor_file

from shardwise.errors import HeaderError, ManifestError, WeightIndexError
from shardwise.format.header import Header, arrange, encode_header, parse_header, saved_offsets
from shardwise.format.index import encode_index, parse_index
from shardwise.format.manifest import encode_manifest, parse_manifest
from shardwise.geometry import TensorSpec

SPECS = [TensorSpec("a", (2, 3), "F32"), TensorSpec("b", (), "BF16"), TensorSpec("c", (0, 2), "I64")]
FILE = encode_header(arrange(SPECS), {"format": "pt", "DCP_SHARDING_INFO": "{}"}) + bytes(26)
INDEX = encode_index({"a": "x.safetensors", "b": "y.safetensors"}, 26)
MANIFEST = encode_manifest(sample_manifest())
ALIASED = encode_manifest(aliased_manifest())

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
sizes = st.integers(-2, 40) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "nonsense"]) | scalars,
        "shape": st.lists(sizes, max_size=4) | scalars,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | scalars,
    }
)


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    """The data with some bytes replaced, removed or doubled."""
    place = st.integers(0, len(data) - 1)

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        result = data
        for start, length, new in edits:
            result = result[:start] + new + result[start + length :]
        return result

    piece = st.binary(max_size=3) | st.sampled_from(
        [b"-", b"9" * 20, b'"', b"[", b"}", b"null", b"\\ud800", b"1e5", b","]
    )
    return st.lists(st.tuples(place, st.integers(0, 4), piece), min_size=1, max_size=4).map(apply)


def check_header(data: bytes, size: int) -> None:
    try:
        header = parse_header(data, size, "p")
    except HeaderError as error:
        assert error.hint  # noqa: PT017
        return
    check_invariants(header, size)
    try:
        saved_offsets(header)
    except HeaderError as error:
        assert error.hint  # noqa: PT017


def check_invariants(header: Header, size: int) -> None:
    assert header.file_size == size
    position = 0
    for item in header.entries:
        assert (item.begin, item.end) == (position, position + item.spec.nbytes)
        position = item.end
    assert len(set(header.names)) == len(header.entries)


@given(st.binary(max_size=80), st.integers(0, 200))
@example(b"\x02" + bytes(7) + b"{}", 10)
def test_header_of_random_bytes(data: bytes, size: int) -> None:
    check_header(data, size)
    check_header(data, len(data))


@given(st.binary(max_size=60))
def test_header_with_random_text(text: bytes) -> None:
    data = tensor_file(text)
    check_header(data, len(data))


@given(mutations(FILE))
def test_mutated_tensor_file(data: bytes) -> None:
    check_header(data, len(data))


@given(st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | values, max_size=3), st.integers(0, 64))
def test_header_of_random_entries(table: dict[str, object], data_bytes: int) -> None:
    data = tensor_file(table, data_bytes)
    check_header(data, len(data))


def check_index(data: bytes) -> None:
    try:
        index = parse_index(data, "p")
    except WeightIndexError as error:
        assert error.hint  # noqa: PT017
        return
    assert all(file and "/" not in file and file not in (".", "..") for file in index.files)


@given(st.binary(max_size=80) | mutations(INDEX))
def test_mutated_index(data: bytes) -> None:
    check_index(data)


@given(st.fixed_dictionaries({"weight_map": values}, optional={"metadata": values}))
def test_index_of_random_values(table: dict[str, object]) -> None:
    check_index(json.dumps(table).encode())


def check_manifest(data: bytes) -> None:
    try:
        manifest = parse_manifest(data, "p")
    except ManifestError as error:
        assert error.hint  # noqa: PT017
        return
    assert parse_manifest(encode_manifest(manifest), "p") == manifest


@given(st.binary(max_size=80) | mutations(MANIFEST) | mutations(ALIASED))
def test_mutated_manifest(data: bytes) -> None:
    check_manifest(data)


@given(mutations(MANIFEST[: MANIFEST.rindex(b'"crc32c"')]) | mutations(ALIASED[: ALIASED.rindex(b'"crc32c"')]))
def test_mutated_manifest_with_the_right_digest(body: bytes) -> None:
    check_manifest(sign(body))


@given(
    st.fixed_dictionaries(
        {"format": st.just("shardwise-manifest"), "version": st.just(1)},
        optional={"info": values, "files": values, "tensors": values},
    )
)
def test_manifest_of_random_values(table: dict[str, object]) -> None:
    check_manifest(manifest_text(table))
