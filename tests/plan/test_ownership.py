"""Who writes what, over all simulated ranks: each byte has exactly one writer, and the work is shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from tests.support.simulate import Simulation, Spread, raw, simulations

from shardwise.errors import IncompleteTensorError, NameCollisionError
from shardwise.geometry import TensorSpec
from shardwise.plan.layout import lay_out
from shardwise.plan.placement import Replicated, Sharded
from shardwise.plan.roster import Declaration, Roster
from shardwise.plan.schedule import SPLIT_REPLICATED_ABOVE_BYTES, own, plan_shards, schedule


@given(simulations())
def test_every_byte_has_one_writer_and_is_the_right_one(case: Simulation) -> None:
    layout = lay_out(case.roster.specs, max_file_bytes=64)
    files = [bytearray(file.size) for file in layout.files]
    written = [bytearray(file.size) for file in layout.files]
    for rank in range(case.world):
        plan = schedule(case.everyone[rank], layout, case.roster, rank)
        assume(not plan.exchanges)  # of more than 64 short rows: tests/plan/test_rows.py has those
        assert sum(run.nbytes for run in plan.runs) == plan.nbytes
        for run in plan.runs:
            data = raw(run.data)
            assert len(data) == run.nbytes
            files[run.file][run.offset : run.offset + run.nbytes] = data
            for at in range(run.offset, run.offset + run.nbytes):
                written[run.file][at] += 1
    for tensor, whole in zip(case.tensors, case.wholes, strict=True):
        place = layout.places[tensor.spec.name]
        assert bytes(files[place.file][place.offset :][: tensor.spec.nbytes]) == raw(whole)
    for file, marks in zip(layout.files, written, strict=True):
        assert set(marks[len(file.header) :]) <= {1}
        assert not any(marks[: len(file.header)])


@given(simulations())
def test_shard_files_hold_every_element_once(case: Simulation) -> None:
    seen = {t.spec.name: torch.zeros(t.spec.shape, dtype=torch.int64) for t in case.tensors}
    wholes = {t.spec.name: whole for t, whole in zip(case.tensors, case.wholes, strict=True)}
    names: set[str] = set()
    entries: set[str] = set()
    for rank in range(case.world):
        for file in plan_shards(case.everyone[rank], case.roster, rank):
            assert file.layout.name not in names
            names.add(file.layout.name)
            for entry in file.layout.entries:
                piece = file.pieces[entry.spec.name]
                entries.add(entry.spec.name)
                where = tuple(slice(o, e) for o, e in zip(piece.box.offsets, piece.box.ends, strict=True))
                seen[entry.spec.name][where] += 1
                assert raw(piece.data) == raw(wholes[entry.spec.name][where])
                assert entry.spec.shape == piece.box.sizes
    assert all((count == 1).all() for count in seen.values())
    # A tensor without elements is not forgotten.
    assert entries == set(wholes)


def test_replicas_share_the_work() -> None:
    big = TensorSpec("big", (SPLIT_REPLICATED_ABOVE_BYTES // 256, 256), "F32")
    small = [TensorSpec(f"small{i}", (100 + i,), "F32") for i in range(40)]
    kinds = (Replicated(), Sharded(0))
    case = Simulation((2, 2), tuple(Spread(spec, kinds) for spec in [big, *small]))
    loads = [
        sum(fragment.box.numel * 4 for _, fragment in own(case.everyone[rank], case.roster, rank)) for rank in range(4)
    ]
    assert sum(loads) == big.nbytes + sum(spec.nbytes for spec in small)
    assert max(loads) < 1.05 * min(loads)


def test_tensors_that_everybody_holds_are_shared_out() -> None:
    specs = [TensorSpec(f"w{i}", (10,), "F32") for i in range(9)]
    case = Simulation((3,), tuple(Spread(spec, None) for spec in specs))
    assert [len(own(case.everyone[rank], case.roster, rank)) for rank in range(3)] == [3, 3, 3]


@given(simulations())
def test_what_may_differ_is_written_by_the_lowest_rank_that_holds_it(case: Simulation) -> None:
    for rank, held in enumerate(case.everyone):
        lowest = {
            number: case.roster.shard_set(held[number].spec.name, part.part).replicas_of(rank)[0]
            for number, part, _ in case.roster.holders(held)
            if part.part.may_differ
        }
        written = {number for number, _ in own(held, case.roster, rank)} & lowest.keys()
        assert all(lowest[number] == rank for number in written)


def test_ranks_start_in_different_files() -> None:
    specs = [TensorSpec(f"w{i}", (12,), "F32") for i in range(8)]
    case = Simulation((4,), tuple(Spread(spec, (Sharded(0),)) for spec in specs))
    layout = lay_out(case.roster.specs, max_file_bytes=48)
    orders = [[run.file for run in schedule(case.everyone[r], layout, case.roster, r).runs] for r in range(4)]
    assert [order[0] for order in orders] == [0, 2, 4, 6]
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_ranks_that_do_not_hold_all_of_a_tensor_are_found() -> None:
    case = Simulation((4,), (Spread(TensorSpec("w", (8,), "F32"), (Sharded(0),)),))
    whole = case.roster
    part = Roster(whole.declarations, whole.digests[:3], whole.coordinates[:3])
    whole.check_complete(case.everyone[0])
    with pytest.raises(IncompleteTensorError, match="3 of 4 pieces") as found:
        part.check_complete(case.everyone[0])
    assert found.value.tensor == "w"


def test_ranks_that_declare_one_name_differently_are_found() -> None:
    case = Simulation((2,), (Spread(TensorSpec("w", (8,), "F32"), (Sharded(0),)),))
    other = Simulation((2,), (Spread(TensorSpec("w", (9,), "F32"), (Sharded(0),)),))
    declarations = [Declaration.of(case.everyone[0]), Declaration.of(other.everyone[1])]
    roster = Roster({d.digest: d for d in declarations}, tuple(d.digest for d in declarations), ({}, {}))
    with pytest.raises(NameCollisionError, match=r"\[8\].*\[9\]"):
        _ = roster.specs


def test_stages_that_share_a_name_are_found_and_their_order_is_theirs() -> None:
    one = Simulation((1,), (Spread(TensorSpec("a", (8,), "F32"), None),))
    two = Simulation((1,), (Spread(TensorSpec("b", (8,), "F32"), None),))

    def roster(first: Declaration, second: Declaration) -> Roster:
        return Roster({d.digest: d for d in (first, second)}, (first.digest, second.digest), ({}, {}))

    late, early = Declaration.of(one.everyone[0], 1), Declaration.of(two.everyone[0], 0)
    assert [spec.name for spec in roster(late, early).specs] == ["b", "a"]
    with pytest.raises(NameCollisionError, match="pipeline stages 0 and 1"):
        _ = roster(Declaration.of(one.everyone[0], 0), late).specs
