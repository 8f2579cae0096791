"""The one number by which ranks see whether their replicas are equal."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.simulate import Simulation, Spread, simulations

from shardwise.engine.replicas import comparison, look_at, share_of
from shardwise.geometry import TensorSpec
from shardwise.plan.placement import Replicated, Sharded


def share(case: Simulation, rank: int) -> int:
    return share_of(look_at([comparison(case.everyone[rank], case.roster, rank)]))


@given(simulations())
def test_equal_replicas_add_up_to_zero(case: Simulation) -> None:
    assert sum(share(case, rank) for rank in range(case.world)) == 0


@given(simulations(), st.data())
def test_one_byte_on_one_rank_is_seen_where_others_hold_it_and_it_may_not_differ(
    case: Simulation, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, case.world - 1))
    held = case.everyone[rank]
    number = data.draw(st.integers(0, len(held) - 1))
    memory = [fragment.data for fragment in held[number].fragments if fragment.data.numel()]
    compared = {replica.name for replica in comparison(held, case.roster, rank).own}
    for fragment in memory[:1]:
        flat = fragment.reshape(-1).clone()
        flat.view(torch.uint8)[0] ^= 1
        fragment.copy_(flat.view(fragment.shape))
    total = sum(share(case, each) for each in range(case.world))
    assert (total != 0) == (bool(memory) and case.tensors[number].spec.name in compared)


def test_a_sharded_model_digests_nothing() -> None:
    specs = [TensorSpec(f"w{number}", (8, 4), "F32") for number in range(5)]
    case = Simulation((4,), tuple(Spread(spec, (Sharded(0),)) for spec in specs))
    assert [comparison(case.everyone[rank], case.roster, rank).own for rank in range(4)] == [()] * 4
    # Nor do buffers that every rank has.
    kept = replace(case, tensors=(*case.tensors, Spread(TensorSpec("mean", (4,), "F32"), None, may_differ=True)))
    assert [comparison(kept.everyone[rank], kept.roster, rank).own for rank in range(4)] == [()] * 4


def test_replicas_of_one_shard_are_compared_with_each_other_alone() -> None:
    case = Simulation((2, 2), (Spread(TensorSpec("w", (8,), "F32"), (Replicated(), Sharded(0))),))
    ranks = [comparison(case.everyone[rank], case.roster, rank).own[0].ranks for rank in range(4)]
    assert ranks == [(0, 2), (1, 3), (0, 2), (1, 3)]


def test_a_tensor_under_two_names_is_compared_under_both() -> None:
    case = Simulation((2,), (Spread(TensorSpec("w", (8,), "F32"), None), Spread(TensorSpec("v", (8,), "F32"), None)))
    for held in case.everyone:
        held[1] = held[1]._replace(parts=held[0].parts)
    assert [replica.name for replica in comparison(case.everyone[0], case.roster, 0).own] == ["w", "v"]
    assert sum(share(case, rank) for rank in range(2)) == 0
