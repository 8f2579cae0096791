"""Tracing by property: any chain of rearrangements, traced and assembled through views, gives what torch gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.convert.provenance import Untraceable, axis_views
from shardwise.convert.trace import TracedTensor, traced
from shardwise.geometry import Box
from shardwise.plan.views import hub_views

Rearrange = Callable[..., object]


def through_views(result: TracedTensor, sources: list[torch.Tensor]) -> torch.Tensor:
    """The traced tensor's elements, each fetched through the views."""
    assert result.provenance is not None, result.why
    out = torch.full(tuple(result.shape), -1)
    filled = False
    for source, view in axis_views(result.provenance, [tuple(t.shape) for t in sources]):
        if view is None:
            return sources[source].clone()
        out = out if filled else out.reshape(view.hub_grid)
        filled = True
        for box, data in hub_views(view, Box.whole(tuple(sources[source].shape)), sources[source]):
            target = out[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]
            assert (target == -1).all(), "an element is there twice"
            target.copy_(data)
    return out.reshape(tuple(result.shape))


def numbered(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Tensors in which every element has a number of its own."""
    ends = [sum(math.prod(s) for s in shapes[: i + 1]) for i in range(len(shapes))]
    return [torch.arange(end - math.prod(s), end).reshape(s) for end, s in zip(ends, shapes, strict=True)]


def compare(rule: Rearrange, *shapes: tuple[int, ...]) -> None:
    sources = numbered(list(shapes))
    wanted = rule(*sources)
    found = rule(*(traced(i, shape, torch.int64) for i, shape in enumerate(shapes)))
    wanted, found = ([wanted], [found]) if isinstance(wanted, torch.Tensor) else (wanted, found)
    for real, result in zip(wanted, found, strict=True):
        assert result.shape == real.shape
        assert torch.equal(through_views(result, sources), real)


def interleave(t: torch.Tensor, dim: int) -> torch.Tensor:
    shape = [*t.shape[:dim], 2, t.shape[dim] // 2, *t.shape[dim + 1 :]]
    return t.reshape(shape).transpose(dim, dim + 1).reshape(t.shape).contiguous()


def rope(t: torch.Tensor, heads: int) -> torch.Tensor:
    rows = t.shape[0]
    return t.view(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(rows, -1)


CASES: dict[str, tuple[Rearrange, list[tuple[int, ...]]]] = {
    "nothing": (lambda t: t, [(2, 3)]),
    "scalar": (lambda t: t.clone(), [()]),
    "experts": (lambda t: [c.squeeze(0) for c in t.chunk(3)], [(3, 8, 5)]),
    "gate and up": (lambda t: [e.squeeze(0) for c in t.chunk(2, 1) for e in c.chunk(3)], [(3, 8, 5)]),
    "transposed": (lambda t: t.transpose(1, 2).contiguous(), [(3, 4, 5)]),
    "interleaved": (lambda t: interleave(t, 1), [(3, 8, 5)]),
    "interleaved join": (lambda a, b: interleave(torch.cat([a, b], 1), 1), [(3, 4, 5), (3, 4, 5)]),
    "fused rope": (lambda q, k, v: torch.cat([rope(q, 3), rope(k, 3), v]), [(24, 5)] * 3),
    "fused rope of few keys": (lambda q, k, v: torch.cat([rope(q, 3), rope(k, 3), v]), [(24, 5), (12, 5), (12, 5)]),
    "fused rope of odd values": (lambda q, k, v: torch.cat([rope(q, 2), rope(k, 2), v]), [(24, 1), (4, 1), (3, 1)]),
    "convolution": (lambda t: t.reshape(4, -1).contiguous(), [(4, 3, 2, 5, 5)]),
    "to convolution": (lambda t: t.view(4, 3, 2, 5, 5), [(4, 150)]),
    "stacked": (lambda *t: torch.stack(t), [(2, 3)] * 3),
    "stacked last": (lambda *t: torch.stack(t, -1), [(2, 3)] * 3),
    "every other": (lambda t: [t[:, ::2], t[:, 1::2]], [(3, 8)]),
    "across rows": (lambda t: t.reshape(-1)[3:11], [(4, 4)]),
    "across columns": (lambda t: t.t().reshape(-1)[3:11], [(4, 4)]),
    "ones": (lambda t: t.reshape(1, 6, 1).unsqueeze(0), [(2, 3)]),
    "one element": (lambda t: t.reshape(1), [(1, 1)]),
    "unbound": (lambda t: t.unbind(1), [(3, 4)]),
    "split sizes": (lambda t: t.permute(2, 0, 1).flatten(1).split([2, 3]), [(2, 3, 5)]),
    "joined unlike": (lambda a, b: torch.cat([a.t().reshape(-1), b]), [(2, 3), (5,)]),
    "many to many": (
        lambda a, b: [e for p in zip(a.chunk(2, 1), b.chunk(2, 1), strict=True) for t in p for e in t.unbind(0)],
        [(3, 4, 2), (2, 4, 2)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rules_as_they_occur(case: str) -> None:
    rule, shapes = CASES[case]
    compare(rule, *shapes)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    steps: list[tuple[str, tuple[int, ...]]] = []
    now = torch.empty(shape)
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["permute", "narrow", "fold", "split", "swap", "twice"]))
        dim = draw(st.integers(0, now.dim() - 1))
        n = now.shape[dim]
        if kind == "permute":
            step = (kind, tuple(draw(st.permutations(range(now.dim())))))
        elif kind in ("narrow", "swap"):
            start = draw(st.integers(0, n - 1))
            step = (kind, (dim, start, draw(st.integers(1, n - start))))
        elif kind == "split":
            step = (kind, (dim, draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))))
        else:
            step = (kind, (dim,))
        now = apply(now, *step)
        steps.append(step)
        if now.dim() > 5 or now.numel() > 400:
            break
    return shape, steps


def apply(t: torch.Tensor, kind: str, numbers: tuple[int, ...]) -> torch.Tensor:
    dim = numbers[0]
    if kind == "permute":
        return t.permute(numbers)
    if kind == "narrow":
        return t.narrow(*numbers)
    if kind == "swap":  # cut in two and join the other way round
        if numbers[1] == 0:
            return t
        return torch.cat([t.narrow(dim, numbers[1], t.shape[dim] - numbers[1]), t.narrow(dim, 0, numbers[1])], dim)
    if kind == "fold":
        return t if dim + 1 >= t.dim() else t.flatten(dim, dim + 1)
    if kind == "split":
        return t.unflatten(dim, (numbers[1], -1))
    return t.contiguous().clone()


@settings(max_examples=150, deadline=None)
@given(chains())
def test_any_chain_of_rearrangements(made: tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]]) -> None:
    shape, steps = made
    [real] = numbered([shape])
    result: torch.Tensor = traced(0, shape, torch.int64)
    wanted = real
    for step in steps:
        result, wanted = apply(result, *step), apply(wanted, *step)
    assert result.shape == wanted.shape
    assert isinstance(result, TracedTensor)
    if result.provenance is None:
        return  # it may give up; it must never be wrong
    try:
        found = through_views(result, [real])
    except Untraceable:
        return
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "rule",
    [
        lambda t: t + 1,
        lambda t: t.to(torch.int32),
        lambda t: t.expand(2, -1, -1),
        lambda t: t.flip(0),
        lambda t: torch.cat([t, torch.zeros(2, 3, dtype=torch.int64, device="meta")]),
        lambda t: t.sum(0),
    ],
)
def test_values_are_never_taken_for_views(rule: Callable[[torch.Tensor], torch.Tensor]) -> None:
    result = rule(traced(0, (2, 3), torch.int64))
    real = rule(torch.empty(2, 3, dtype=torch.int64, device="meta"))
    assert isinstance(result, TracedTensor)
    assert result.provenance is None
    assert result.why
    assert (result.shape, result.dtype) == (real.shape, real.dtype)


def test_an_element_used_twice_is_not_a_view() -> None:
    source = traced(0, (2, 3), torch.int64)
    twice = torch.cat([source, source])
    assert isinstance(twice, TracedTensor)
    assert twice.provenance is not None
    views = axis_views(twice.provenance, [(2, 3)])
    assert len(views) == 2  # the round-trip check refuses this; as a hub tensor it is well defined


def test_huge_tensors_cost_nothing() -> None:
    experts = traced(0, (512, 2 * 16384, 131072), torch.bfloat16)
    gate = experts.chunk(2, 1)[0].unbind(0)[511].contiguous()
    assert isinstance(gate, TracedTensor)
    assert gate.provenance is not None
    [(source, view)] = axis_views(gate.provenance, [(512, 2 * 16384, 131072)])
    assert source == 0
    assert view is not None
    assert view.hub_grid == (16384, 131072)
    assert view.fixed == ((0, 511),)
