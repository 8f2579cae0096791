"""CRC-32C, tiling, the weight index and the manifest."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.format.builders import GOLDEN, aliased_manifest, sample_manifest

from shardwise.disk.crc import combine, crc32c, shift
from shardwise.errors import CheckpointNotFoundError, ManifestError, MisuseError
from shardwise.format.index import encode_index, parse_index, read_index
from shardwise.format.manifest import (
    MANIFEST_NAME,
    AliasRecord,
    ChunkRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    encode_manifest,
    parse_manifest,
    read_manifest,
)
from shardwise.geometry import Box, TensorSpec, tiles

runs = st.binary(max_size=300)


def test_crc_of_the_standard_check_string() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0


@given(runs, runs)
def test_combine_equals_the_crc_of_the_concatenation(a: bytes, b: bytes) -> None:
    assert combine(crc32c(a), crc32c(b), len(b)) == crc32c(a + b)
    assert crc32c(b, crc32c(a)) == crc32c(a + b)


@given(runs, runs, runs)
def test_combine_is_associative(a: bytes, b: bytes, c: bytes) -> None:
    left = combine(combine(crc32c(a), crc32c(b), len(b)), crc32c(c), len(c))
    right = combine(crc32c(a), combine(crc32c(b), crc32c(c), len(c)), len(b) + len(c))
    assert left == right == crc32c(a + b + c)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**60), st.integers(0, 2**60))
def test_shifts_add_up(crc: int, first: int, second: int) -> None:
    assert shift(shift(crc, first), second) == shift(crc, first + second)
    assert shift(crc, 0) == crc


def test_combine_over_a_length_beyond_32_bits() -> None:
    block = bytes(2**20)
    crc = crc32c(block)
    for doubling in range(13):
        crc = combine(crc, crc, 2 ** (20 + doubling))
    serial = 0
    for _ in range(2**13):
        serial = crc32c(block, serial)
    assert crc == serial


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        splittable = [d for d, size in enumerate(box.sizes) if size > 1]
        if not splittable:
            boxes.append(box)
            continue
        d = draw(st.sampled_from(splittable))
        at = draw(st.integers(1, box.sizes[d] - 1))
        for start, size in ((0, at), (at, box.sizes[d] - at)):
            offsets = tuple(o + (start if i == d else 0) for i, o in enumerate(box.offsets))
            boxes.append(Box(offsets, tuple(size if i == d else s for i, s in enumerate(box.sizes))))
    return shape, draw(st.permutations(boxes))


@given(tilings())
def test_any_tiling_is_recognised(tiling: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = tiling
    assert tiles(shape, boxes)
    assert not tiles(shape, boxes[1:])
    assert not tiles(shape, [*boxes, boxes[0]])


@given(st.data())
def test_tiling_agrees_with_counting_elements(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
    boxes = []
    for _ in range(data.draw(st.integers(0, 4))):
        offsets = tuple(data.draw(st.integers(0, size)) for size in shape)
        boxes.append(Box(offsets, tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))))
    covered = [
        sum(all(o <= i < e for i, o, e in zip(index, box.offsets, box.ends, strict=True)) for box in boxes)
        for index in itertools.product(*map(range, shape))
    ]
    assert tiles(shape, boxes) == all(count == 1 for count in covered)


def test_golden_index() -> None:
    index = read_index(GOLDEN / "model.safetensors.index.json")
    assert dict(index.weight_map) == {
        "a.w\u00e9": "model-00001-of-00002.safetensors",
        "b.weight": "model-00002-of-00002.safetensors",
    }
    assert (index.metadata["total_size"], index.metadata["total_parameters"]) == (1234, 617)
    again = encode_index(index.weight_map, 1234, total_parameters=617)
    assert again == (GOLDEN / "model.safetensors.index.json").read_bytes()
    assert again == (json.dumps(json.loads(again), indent=2, sort_keys=True) + "\n").encode()


@given(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=9), st.sampled_from("abc")))
def test_index_comes_back(weight_map: dict[str, str]) -> None:
    index = parse_index(encode_index(weight_map, 5), "i")
    assert (dict(index.weight_map), index.metadata) == (weight_map, {"total_size": 5})
    assert index.files == tuple(sorted(set(weight_map.values())))


@pytest.mark.parametrize("metadata", ["", '"metadata":null,', '"metadata":{"total_size":8.0,"by":["x"]},'])
def test_indexes_of_other_tools(metadata: str) -> None:
    index = parse_index(f'{{{metadata}"weight_map":{{"w":"m.safetensors"}}}}'.encode(), "i")
    assert index.metadata.get("total_size") == (8 if "total" in metadata else None)


def test_index_writer_refuses_paths() -> None:
    with pytest.raises(MisuseError, match="plain name"):
        encode_index({"w": "sub/m.safetensors"}, 1)


def test_golden_manifest() -> None:
    golden = GOLDEN / MANIFEST_NAME
    assert read_manifest(golden) == read_manifest(GOLDEN) == sample_manifest()
    assert encode_manifest(sample_manifest()) == golden.read_bytes()
    json.loads(golden.read_bytes())


def test_golden_manifest_with_aliases() -> None:
    golden = GOLDEN / "manifest-aliases.json"
    assert read_manifest(golden) == aliased_manifest()
    assert encode_manifest(aliased_manifest()) == golden.read_bytes()
    assert b'"version":2,' in golden.read_bytes()
    json.loads(golden.read_bytes())


def percent_manifest() -> Manifest:
    """Names with what text is put together with."""
    chunk = ChunkRecord("100%s.safetensors", 8, 4, Box((0,), (1,)), 5)
    files = (FileRecord("100%s.safetensors", 12, 1, 8), FileRecord("%d.json", 3, 2, None))
    return Manifest(files, (TensorRecord("%", TensorSpec("%(w)s%%", (1,), "F32"), 6, (chunk,)),), {"%s": "%s"})


@pytest.mark.parametrize("sample", [sample_manifest, aliased_manifest, percent_manifest])
def test_what_is_written_is_read_back(sample: Callable[[], Manifest]) -> None:
    assert parse_manifest(encode_manifest(sample()), "m") == sample()


def with_first_chunk(manifest: Manifest, **values: object) -> Manifest:
    first, *rest = manifest.tensors
    changed = first._replace(chunks=(first.chunks[0]._replace(**values), *first.chunks[1:]))  # type: ignore[arg-type]
    return replace(manifest, tensors=(changed, *rest))


def spoiled(manifest: Manifest) -> list[Manifest]:
    first, *rest = manifest.tensors
    tensor_file = next(file for file in manifest.files if file.header_bytes is not None)
    others = tuple(file for file in manifest.files if file is not tensor_file)
    return [
        with_first_chunk(manifest, offset=first.chunks[0].offset + 1),
        with_first_chunk(manifest, file="elsewhere"),
        with_first_chunk(manifest, crc32c=-1),
        replace(manifest, tensors=(first._replace(crc32c=2**32), *rest)),
        replace(manifest, tensors=(first, first, *rest)),
        replace(manifest, files=(*manifest.files, manifest.files[-1])),
        replace(manifest, files=(replace(tensor_file, size=tensor_file.size + 1), *others)),
        replace(manifest, files=(*manifest.files, FileRecord("../up", 1, 1, None))),
        replace(manifest, files=(*manifest.files, FileRecord("x", -1, 1, None))),
        replace(manifest, aliases=(AliasRecord(first.component, first.spec.name, "none"),)),
    ]


@pytest.mark.parametrize("number", range(len(spoiled(sample_manifest()))))
def test_a_manifest_that_contradicts_itself_is_not_written(number: int) -> None:
    with pytest.raises(ManifestError):
        encode_manifest(spoiled(sample_manifest())[number])


def test_manifest_lookups() -> None:
    sizes = {file.path: file.size for file in read_manifest(GOLDEN).files}
    assert sizes["config.json"] == 7
    assert "absent.txt" not in sizes


@pytest.mark.parametrize("sample", [sample_manifest, aliased_manifest])
def test_every_flipped_bit_in_a_manifest_is_noticed(sample: Callable[[], Manifest]) -> None:
    data = encode_manifest(sample())
    for position in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[position // 8] ^= 1 << position % 8
        with pytest.raises(ManifestError):
            parse_manifest(bytes(spoilt), "m")


@pytest.mark.parametrize("sample", [sample_manifest, aliased_manifest])
def test_every_truncation_of_a_manifest_is_noticed(sample: Callable[[], Manifest]) -> None:
    data = encode_manifest(sample())
    for cut in range(len(data)):
        with pytest.raises(ManifestError):
            parse_manifest(data[:cut], "m")


@pytest.mark.parametrize(
    "info",
    [{"loss": float("nan")}, {"x": object()}, {"x": {1, 2}}, {"x": "\ud800"}],
    ids=["nan", "object", "set", "text"],
)
def test_info_that_json_cannot_hold(info: dict[str, object]) -> None:
    with pytest.raises(ManifestError, match="cannot be written"):
        encode_manifest(Manifest((), (), info))  # type: ignore[arg-type]


def test_contradictions_are_refused_when_writing() -> None:
    good = sample_manifest()
    for files, tensors in (
        (good.files[:2], good.tensors[:1]),
        (good.files[1:], good.tensors),
        ((*good.files, good.files[2]), good.tensors),
        ((replace(good.files[0], crc32c=2**32), *good.files[1:]), good.tensors),
        ((*good.files[:2], replace(good.files[2], path="../x")), good.tensors),
        (good.files, (*good.tensors, good.tensors[2])),
    ):
        with pytest.raises(ManifestError, match="cannot be written"):
            encode_manifest(Manifest(files, tensors))


@pytest.mark.parametrize(
    "row",
    [
        ("model", "b\u00e9", "w"),
        ("model", "w", "w"),
        ("model", "v", "u"),
        ("model", "v", "v"),
        ("model", "caf\u00e9", "w"),
        ("", "v", "w"),
        ("model", "v" * 100_000, "w"),
    ],
    ids=["a tensor", "itself", "of nothing", "of itself", "twice", "no component", "overlong"],
)
def test_aliases_that_contradict_are_refused_when_writing(row: tuple[str, str, str]) -> None:
    with pytest.raises(ManifestError, match="cannot be written"):
        encode_manifest(replace(sample_manifest(), aliases=(AliasRecord("model", "caf\u00e9", "w"), AliasRecord(*row))))


def test_large_manifest_comes_back(tmp_path: Path) -> None:
    path = "model/consolidated/model-00001-of-00001.safetensors"
    tensors = tuple(
        TensorRecord(
            "model",
            TensorSpec(f"layers.{number}.weight", (4, 2), "BF16"),
            number,
            (ChunkRecord(path, 8 + 16 * number, 16, Box((0, 0), (4, 2)), number),),
        )
        for number in range(40_000)
    )
    manifest = Manifest((FileRecord(path, 8 + 16 * 40_000, 1, 8),), tensors, {"step": 3})
    (tmp_path / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    assert read_manifest(tmp_path) == manifest


def test_absent_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"manifest\.json"):
        read_manifest(tmp_path)
