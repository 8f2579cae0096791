from __future__ import annotations

import pytest
import torch

from shardwise.convert.adapter import check_round_trip
from shardwise.convert.derive import identity
from shardwise.convert.rules import Computed, Conversion, HubPart, HubTensor, NativeSpec, to_hub
from shardwise.errors import ConversionError
from shardwise.geometry import Box
from shardwise.plan.fragments import Part, hold
from shardwise.plan.placement import MeshKey, Sharded
from shardwise.plan.views import Axis, AxisView

SPEC = NativeSpec("experts", (4, 6, 5), "F32")


def half(start: int, expert: int) -> AxisView:
    """Rows ``start .. start + 3`` of one expert."""
    return AxisView(((4,), (6,), (5,)), (3, 5), (Axis(1, start, 0, 3), Axis(2, 0, 0, 5)), ((0, expert),))


def split(names: range = range(4)) -> Conversion:
    return Conversion(
        tuple(
            HubTensor(f"{i}.{name}", (3, 5), (HubPart("experts", half(start, i)),))
            for i in names
            for name, start in (("gate", 0), ("up", 3))
        )
    )


def test_under_expert_parallelism_a_rank_describes_all_and_holds_its_own() -> None:
    mesh = MeshKey(("ep",), (2,))
    local = torch.randn(2, 6, 5)
    converted = to_hub(split(), [hold(SPEC, Part(SPEC.shape, mesh, (Sharded(0),)), (1,), local)])
    held = {tensor.spec.name: tensor for tensor in converted.held}
    assert len(held) == 8
    assert {name for name, tensor in held.items() if list(tensor.fragments)} == {"2.gate", "2.up", "3.gate", "3.up"}
    [fragment] = held["3.up"].fragments
    assert fragment.box == Box((0, 0), (3, 5))
    assert torch.equal(fragment.data, local[1, 3:])
    assert fragment.data.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    assert held["3.up"].parts[0].part.boxes((0,)) == ()


def test_names_alone_keep_the_fragments() -> None:
    tensor = hold(SPEC, Part(SPEC.shape), (), torch.zeros(SPEC.shape))
    conversion = Conversion((HubTensor("renamed", SPEC.shape, (HubPart("experts"),)),))
    [held] = to_hub(conversion, [tensor]).held
    assert held.spec == NativeSpec("renamed", SPEC.shape, "F32")
    assert held.parts == tensor.parts


def test_an_unknown_or_converted_tensor_is_an_error() -> None:
    tensor = hold(SPEC, Part(SPEC.shape), (), torch.zeros(SPEC.shape))
    with pytest.raises(ConversionError, match="unknown"):
        to_hub(identity([]), [tensor])
    [converted, *_] = to_hub(split(), [tensor]).held
    with pytest.raises(ConversionError, match="already converted"):
        to_hub(split(), [converted])


class Twice:
    def forward(self, natives):
        return {"hub": natives["experts"] * 2}

    def backward(self, hub):
        return {"experts": hub["hub"] / 2}


def test_computed_groups_are_kept_apart() -> None:
    group = Computed((SPEC,), (NativeSpec("hub", SPEC.shape, "F32"),), Twice(), "values")
    tensor = hold(SPEC, Part(SPEC.shape), (), torch.ones(SPEC.shape))
    converted = to_hub(Conversion((), (group,)), [tensor])
    assert converted.held == ()
    [held] = converted.groups
    assert held.computed is group
    assert held.natives == (tensor,)
    assert to_hub(Conversion((), (group,)), []).groups == ()


def test_the_round_trip_check_finds_what_is_lost() -> None:
    check_round_trip(split(), [SPEC])
    with pytest.raises(ConversionError, match="lost: experts"):
        check_round_trip(split(range(3)), [SPEC])
    with pytest.raises(ConversionError, match="lost: experts"):
        check_round_trip(Conversion(()), [SPEC])


def test_the_round_trip_check_finds_what_is_there_twice() -> None:
    view = AxisView(((4,), (6,), (5,)), (4, 4, 5), (Axis(0, 0, 0, 4), Axis(1, 0, 0, 4), Axis(2, 0, 0, 5)))
    again = HubTensor("again", (4, 4, 5), (HubPart("experts", view),))
    with pytest.raises(ConversionError, match="twice: experts"):
        check_round_trip(Conversion((*split().hub, again)), [SPEC])
    with pytest.raises(ConversionError, match="twice: experts"):
        check_round_trip(Conversion((*split().hub, HubTensor("same", SPEC.shape, (HubPart("experts"),)))), [SPEC])


def test_views_on_different_grids_are_compared_on_a_common_one() -> None:
    spec = NativeSpec("w", (6,), "F32")
    pairs = AxisView(((3, 2),), (3,), (Axis(0, 0, 0, 3),), ((1, 0),))
    odd = AxisView(((3, 2),), (3,), (Axis(0, 0, 0, 3),), ((1, 1),))
    run = AxisView(((6,),), (3,), (Axis(0, 3, 0, 3),))

    def files(*views: AxisView) -> Conversion:
        return Conversion(tuple(HubTensor(str(i), (3,), (HubPart("w", view),)) for i, view in enumerate(views)))

    check_round_trip(files(pairs, odd), [spec])
    with pytest.raises(ConversionError, match="twice: w"):
        check_round_trip(files(pairs, run), [spec])


def test_a_name_that_two_tensors_claim_is_an_error() -> None:
    with pytest.raises(ConversionError, match="written as one: same"):
        Conversion(tuple(HubTensor("same", (2,), (HubPart(name),)) for name in "ab"))
    group = Computed((SPEC,), (NativeSpec("same", SPEC.shape, "F32"),), Twice(), "values")
    with pytest.raises(ConversionError, match="written as one: same"):
        Conversion((HubTensor("same", (2,), (HubPart("a"),)),), (group,))


def test_looking_up_a_name_that_no_view_has_is_an_error() -> None:
    with pytest.raises(ConversionError, match="no native tensor"):
        split().by_hub("nothing")
