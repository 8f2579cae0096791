"""Dequantization by the slice against the whole-tensor formula in float32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part, in_shape
from shardwise.plan.quantized import (
    Quantized,
    bounding,
    byte_box,
    dequantize,
    disjoint,
    plan_slabs,
    scale_box,
    scales_to_float,
)
from shardwise.plan.reads import SourceChunk, SourceTensor

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def source(name: str, tensor: torch.Tensor, code: str) -> SourceTensor:
    shape = tuple(tensor.shape)
    return SourceTensor(TensorSpec(name, shape, code), (SourceChunk(Box.whole(shape), 0, 0),))


def region(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]


def held(name: str, shape: tuple[int, ...], grid: tuple[int, ...], fragments: list[Fragment]) -> HeldTensor:
    part = HeldPart(Part(shape), (), tuple(fragments))
    return HeldTensor(TensorSpec(name, shape, "F32"), grid, (part,))


def fill(
    tensor: Quantized, values: torch.Tensor, scales: torch.Tensor, wanted: HeldTensor, piece: int, slab: int
) -> list[Box]:
    """What an executor does with slabs; returns every box of scales that it looked at."""
    seen: list[Box] = []
    for part in plan_slabs(tensor, wanted, piece, slab):
        grid = torch.full(part.around.sizes, math.nan)
        for box in part.scales:
            region(grid, box.relative_to(part.around)).copy_(scales_to_float(region(scales, box)))
            seen.append(box)
        for each in part.pieces:
            assert each.box.numel <= piece
            raw = region(values, byte_box(each.box) if tensor.packed else each.box)
            each.dest.copy_(dequantize(raw, grid, tensor, each.box, part.around))
    return seen


def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = [draw(st.integers(0, n - 1)) for n in shape]
    return Box(tuple(offsets), tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))


@st.composite
def fp8_cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    block = tuple(draw(st.sampled_from([1, 3, 8, n])) for n in shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    grid = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    scales = torch.rand(grid, generator=generator) * 0.1 + 1e-4
    return values, scales, block, [cuts(draw, shape) for _ in range(draw(st.integers(1, 3)))]


def reference(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    for dim, (size, n) in enumerate(zip(block, values.shape, strict=True)):
        scales = scales.repeat_interleave(size, dim).narrow(dim, 0, n)
    return values.to(torch.float32) * scales


@settings(max_examples=100)
@given(fp8_cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 300))
def test_any_slice_of_block_scaled_fp8_equals_the_formula(
    case: tuple[torch.Tensor, torch.Tensor, tuple[int, ...], list[Box]], dtype: torch.dtype, piece: int
) -> None:
    values, scales, block, boxes = case
    shape = tuple(values.shape)
    tensor = Quantized(TensorSpec("w", shape, "F32"), source("w", values, "F8_E4M3"), source("s", scales, "F32"), block)
    expected = reference(values, scales, block).to(dtype)
    fragments = [Fragment(box, torch.full(box.sizes, math.nan, dtype=dtype)) for box in boxes]
    for slab in (2**20, 4):
        seen = fill(tensor, values, scales, held("w", shape, shape, fragments), piece, slab)
        for fragment in fragments:
            assert torch.equal(fragment.data, region(expected, fragment.box))
            fragment.data.fill_(math.nan)
        if slab > 4:
            covered = torch.zeros(scales.shape)
            for box in seen:
                region(covered, box).add_(1)
            needed = torch.zeros(scales.shape)
            for box in boxes:
                region(needed, scale_box(box, block)).fill_(1)
            assert torch.equal(covered, needed)  # each scale once, and none that no slice needs


@settings(max_examples=50)
@given(st.data())
def test_any_slice_of_mxfp4_equals_the_formula(data: st.DataObject) -> None:
    experts, out, groups = (data.draw(st.integers(1, n)) for n in (2, 3, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    packed = torch.randint(0, 256, (experts, out, groups * 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 255, (experts, out, groups), dtype=torch.uint8, generator=generator)
    bytes_ = packed.tolist()
    plain64 = torch.empty(experts, out, groups * 32, dtype=torch.float64)
    for e in range(experts):
        for o in range(out):
            for i in range(groups * 32):
                half = (bytes_[e][o][i // 2] >> (4 * (i % 2))) & 0xF
                number = FP4[half & 7] * (-1 if half & 8 else 1)
                plain64[e, o, i] = number * 2.0 ** (int(scales[e, o, i // 32]) - 127)
    plain = plain64.to(torch.float32)
    stored = Quantized(
        TensorSpec("w", tuple(plain.shape), "F32"),
        source("w", packed, "U8"),
        source("s", scales, "U8"),
        (1, 1, 32),
        packed=True,
    )
    turned = data.draw(st.booleans())
    tensor, expected = (stored.turned(), plain.transpose(1, 2)) if turned else (stored, plain)
    assert tensor.spec.shape == tuple(expected.shape)
    box = data.draw(st.composite(lambda draw: cuts(draw, tuple(expected.shape)))())
    fragment = Fragment(box, torch.full(box.sizes, math.nan, dtype=torch.bfloat16))
    fill(tensor, packed, scales, held("w", tensor.spec.shape, tensor.spec.shape, [fragment]), 50, 2**20)
    assert torch.equal(fragment.data, region(expected.to(torch.bfloat16), box))


def test_scales_of_one_byte_are_powers_of_two() -> None:
    found = scales_to_float(torch.arange(256, dtype=torch.uint8))
    assert found[:255].tolist() == [2.0 ** (n - 127) for n in range(255)]
    assert math.isnan(found[255])
    viewed = scales_to_float(torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu))
    assert torch.equal(viewed, found[:255])


@given(st.data())
def test_a_region_of_a_grid_is_the_same_elements_of_the_tensor(data: st.DataObject) -> None:
    factors = data.draw(
        st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3), label="factors"
    )
    shape, grid = tuple(math.prod(f) for f in factors), tuple(n for f in factors for n in f)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    box = data.draw(st.composite(lambda draw: cuts(draw, grid))())
    order = data.draw(st.permutations(range(len(grid))))
    inverse = [order.index(d) for d in range(len(grid))]
    memory = torch.full([box.sizes[d] for d in order], -1).permute(inverse)  # strided in any order
    for where, view in in_shape(Fragment(box, memory), grid, shape, strided=True):
        assert tuple(view.shape) == where.sizes
        view.copy_(region(whole, where))
    assert torch.equal(memory, region(whole.reshape(grid), box))
    for where, part in in_shape(Fragment(box, memory), grid, shape):
        assert torch.equal(part.reshape(where.sizes), region(whole, where))


@given(st.data())
def test_disjoint_boxes_cover_the_same_elements_once(data: st.DataObject) -> None:
    shape = (9, 7)
    boxes = [data.draw(st.composite(lambda draw: cuts(draw, shape))()) for _ in range(data.draw(st.integers(1, 5)))]
    count, wanted = torch.zeros(shape), torch.zeros(shape)
    for box in disjoint(boxes):
        region(count, box).add_(1)
    for box in boxes:
        region(wanted, box).fill_(1)
    assert torch.equal(count, wanted)
    around = bounding(boxes)
    assert all(around.intersect(box) == box for box in boxes)


@pytest.mark.parametrize("most", [1, 7, 64])
def test_slabs_of_many_scales_share_no_scale(most: int) -> None:
    values, scales = torch.zeros(40, 33).to(torch.float8_e4m3fn), torch.rand(10, 9)
    tensor = Quantized(
        TensorSpec("w", (40, 33), "F32"), source("w", values, "F8_E4M3"), source("s", scales, "F32"), (4, 4)
    )
    box = Box((1, 2), (38, 30))
    wanted = held("w", (40, 33), (40, 33), [Fragment(box, torch.empty(box.sizes))])
    count = torch.zeros(10, 9)
    for slab in plan_slabs(tensor, wanted, 10, most):
        assert slab.around.numel <= most
        region(count, slab.around).add_(1)
    needed = torch.zeros(10, 9)
    region(needed, scale_box(box, (4, 4))).fill_(1)
    assert torch.equal(count, needed)
