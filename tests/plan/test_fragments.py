"""Fragments: regions of tensors with their memory."""

from __future__ import annotations

import pytest
import torch

from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, Part, hold, part_in_box
from shardwise.plan.placement import MeshKey, Sharded


@pytest.mark.parametrize("local", [(3, 4), (2, 8)])  # fewer elements than the placement says, or other ones
def test_local_memory_of_another_shape_is_refused_and_not_cut_to_what_there_is(local: tuple[int, ...]) -> None:
    part = Part((8, 4), MeshKey(("dp",), (2,)), (Sharded(0),))
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        hold(TensorSpec("w", (8, 4), "F32"), part, (0,), torch.zeros(local))


def test_a_part_shares_the_memory_and_reaches_no_further() -> None:
    whole = torch.arange(12.0).view(3, 4)
    part = part_in_box(whole, Box((1, 0), (2, 3)))
    assert torch.equal(part, whole[1:3, :3])
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert part_in_box(torch.tensor(7.0), Box((), ())).item() == 7
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        Fragment(Box((0, 0), (3, 4)), whole).cut(Box((2, 0), (2, 4)))
