"""Exchanges of column shards, between ranks that are threads: the rows that are written make up the tensors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.simulate import (
    DTYPES,
    Simulation,
    Spread,
    ThreadGroup,
    in_threads,
    local_tensor,
    placements,
    raw,
    simulations,
)

from shardwise.engine.export import exchange_rows
from shardwise.errors import StorageError
from shardwise.geometry import Box, TensorSpec, stride_of
from shardwise.plan.fragments import Part, hold
from shardwise.plan.layout import Layout, lay_out
from shardwise.plan.placement import MeshKey, Replicated, Sharded, Strided
from shardwise.plan.roster import Declaration, Roster
from shardwise.plan.rows import FEW_RUNS, ROUND_BYTES, SHORT_RUN_BYTES, Exchange, ExchangePlanner
from shardwise.plan.schedule import SPLIT_REPLICATED_ABOVE_BYTES, WriteRun, schedule
from shardwise.plan.views import Axis, AxisView


def write_all(case: Simulation, layout: Layout, rows_per_round: int | None) -> tuple[list[bytearray], list[int]]:
    """Write every rank's runs and rows into memory; return the files and how often each byte was written."""
    files = [bytearray(file.size) for file in layout.files]
    marks = [bytearray(file.size) for file in layout.files]

    def put(run: WriteRun) -> None:
        data = raw(run.data)
        assert len(data) == run.nbytes
        files[run.file][run.offset : run.offset + len(data)] = data
        for at in range(run.offset, run.offset + len(data)):
            marks[run.file][at] += 1

    def one(group: ThreadGroup) -> Exception | None:
        plan = schedule(case.everyone[group.rank], layout, case.roster, group.rank)
        exchanges: list[tuple[int, Exchange]] = list(plan.exchanges)
        if rows_per_round is not None:
            exchanges = [(number, replace(e, rows_per_round=rows_per_round)) for number, e in exchanges]
        for run in plan.runs:
            put(run)
        return exchange_rows(exchanges, case.everyone[group.rank], layout, group, put)

    assert in_threads(case.world, one) == [None] * case.world
    return files, [
        sum(1 for byte in found[len(f.header) :] if byte != 1) for found, f in zip(marks, layout.files, strict=True)
    ]


# Long and thin, so that a cut along the second or third dimension has many short runs.
tall = st.tuples(st.integers(65, 90), st.integers(1, 6))
deep = st.tuples(st.integers(9, 12), st.integers(9, 11), st.integers(2, 5))


@settings(max_examples=60)
@given(simulations(tall | deep, most=3), st.none() | st.integers(1, 100))
def test_exchanged_rows_make_up_the_tensors(case: Simulation, rows_per_round: int | None) -> None:
    layout = lay_out(case.roster.specs, max_file_bytes=2000)
    files, wrong = write_all(case, layout, rows_per_round)
    assert wrong == [0] * len(files)
    for tensor, whole in zip(case.tensors, case.wholes, strict=True):
        place = layout.places[tensor.spec.name]
        assert bytes(files[place.file][place.offset :][: tensor.spec.nbytes]) == raw(whole)


@settings(max_examples=40)
@given(st.data())
def test_all_holders_plan_the_same_exchange(data: st.DataObject) -> None:
    mesh = data.draw(st.sampled_from([(2,), (4,), (2, 2), (2, 3)]))
    kinds = data.draw(placements(2, mesh))
    spec = TensorSpec(
        "w", data.draw(st.tuples(st.integers(65, 90), st.integers(1, 6))), data.draw(st.sampled_from(DTYPES))
    )
    case = Simulation(mesh, (Spread(spec, kinds),))
    found = [ExchangePlanner(case.roster).plan(case.everyone[rank][0]) for rank in range(case.world)]
    assert all(exchange == found[0] for exchange in found)
    if found[0] is None:
        return
    exchange = found[0]
    for target in exchange.members:
        # The sources of a target hold every element of its rows once.
        low, high = exchange.share(target)
        for row in range(low, high):
            pieces = [p for _, boxes in exchange.sources(target) for p in exchange.pieces(boxes, row, 1)]
            assert sum(box.numel for _, box in pieces) == math.prod(exchange.row_shape)
    rows = [exchange.target(t, turn) for turn in range(exchange.rounds) for t in exchange.members]
    assert sorted(r for start, count in rows for r in range(start, start + count)) == list(range(exchange.rows))
    # A replica beside the target spares a copy.
    for target in exchange.members:
        if any(isinstance(kind, Replicated) for kind in kinds):
            continue
        low, high = exchange.share(target)
        own = tuple(fragment.box for fragment in case.everyone[target][0].fragments)
        touches = any(True for _ in exchange.pieces(own, low, high - low))
        assert touches <= (target in [source for source, _ in exchange.sources(target)])


def planned(mesh: tuple[int, ...], shape: tuple[int, ...], *kinds: Replicated | Sharded | Strided) -> Exchange | None:
    case = Simulation(mesh, (Spread(TensorSpec("w", shape, "F32"), kinds),))
    return ExchangePlanner(case.roster).plan(case.everyone[0][0])


def test_only_many_short_runs_are_exchanged() -> None:
    assert planned((2,), (FEW_RUNS + 1, 8), Sharded(1)) is not None
    assert planned((2,), (FEW_RUNS, 8), Sharded(1)) is None
    assert planned((2,), (4 * FEW_RUNS, 8), Sharded(0)) is None
    assert planned((2,), (FEW_RUNS + 1, SHORT_RUN_BYTES // 2), Sharded(1)) is None
    assert planned((2,), (FEW_RUNS + 1, SHORT_RUN_BYTES // 2 - 2), Sharded(1)) is not None


def test_a_round_is_bounded() -> None:
    exchange = planned((2,), (30_000, 512), Sharded(1))
    assert exchange is not None
    row = 512 * 4
    assert exchange.rounds > 1
    assert all(exchange.target(r, t)[1] * row <= ROUND_BYTES for r in (0, 1) for t in range(exchange.rounds))
    assert [exchange.target(0, 0)[0], exchange.target(1, 0)[0]] == [0, 15_000]


def test_large_replicated_tensors_are_not_exchanged() -> None:
    assert planned((2,), (SPLIT_REPLICATED_ABOVE_BYTES // 16, 8), Replicated()) is None


@pytest.mark.parametrize("mesh", [(2,), (3,)])
def test_a_rank_that_cannot_write_still_serves_its_peers(mesh: tuple[int, ...]) -> None:
    case = Simulation(mesh, tuple(Spread(TensorSpec(f"w{i}", (80, 4), "F32"), (Sharded(1),)) for i in range(2)))
    layout = lay_out(case.roster.specs)
    written: list[int] = []

    def one(group: ThreadGroup) -> Exception | None:
        plan = schedule(case.everyone[group.rank], layout, case.roster, group.rank)
        assert len(plan.exchanges) == 2

        def put(run: WriteRun) -> None:
            if group.rank == 0:
                raise StorageError("the disk is full")
            written.append(run.nbytes)

        exchanges = [(number, replace(e, rows_per_round=7)) for number, e in plan.exchanges]
        return exchange_rows(exchanges, case.everyone[group.rank], layout, group, put)

    found = in_threads(case.world, one)
    assert isinstance(found[0], StorageError)
    assert found[1:] == [None] * (case.world - 1)
    # Of three ranks the last holds nothing of four columns and takes no part.
    assert sum(written) == 2 * 40 * 16


def test_row_boxes_follow_the_order_of_the_file() -> None:
    exchange = Exchange((), (3, 4, 5), 2, 100)
    assert exchange.row_shape == (5,)
    boxes = exchange.row_boxes(2, 7)
    assert boxes == (Box((0, 2, 0), (1, 2, 5)), Box((1, 0, 0), (1, 4, 5)), Box((2, 0, 0), (1, 1, 5)))


@settings(max_examples=40)
@given(st.data())
def test_experts_are_exchanged_where_their_own_boxes_ask_for_it(data: st.DataObject) -> None:
    experts, rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(60, 70)), data.draw(st.integers(1, 5))
    native, mesh = (experts, rows, columns), MeshKey(("",) * 2, data.draw(st.sampled_from([(2, 2), (3, 2), (2, 4)])))
    kinds = data.draw(placements(3, mesh.shape))
    everyone = list(itertools.product(*(range(n) for n in mesh.shape)))
    grid = tuple((n,) for n in native)
    spread = [
        Part(native, mesh, kinds, AxisView(grid, native[1:], (Axis(1, 0, 0, rows), Axis(2, 0, 0, columns)), ((0, e),)))
        for e in data.draw(st.permutations(range(experts)))
    ]
    specs = [TensorSpec(f"experts.{i}", native[1:], "F32") for i in range(experts)]
    held = [
        [
            hold(spec, part, where, local_tensor(torch.zeros(native), mesh.shape, kinds, where))
            for spec, part in zip(specs, spread, strict=True)
        ]
        for where in everyone
    ]
    own = Declaration.of(held[0])
    roster = Roster({own.digest: own}, (own.digest,) * len(everyone), tuple({mesh: where} for where in everyone))
    planner = ExchangePlanner(roster)
    for tensor, part in zip(held[0], spread, strict=True):
        boxes = [box for where in everyone for box in part.boxes(where)]
        ways = [stride_of(box, native[1:]) for box in boxes]
        found = planner.plan(tensor)
        assert (found is not None) == any(way.count > FEW_RUNS for way in ways)
        if found is not None:
            assert found.outer == max(way.outer for way in ways)
            holders = {rank for rank, where in enumerate(everyone) if part.boxes(where)}
            assert set(found.members) == holders
