from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from tests.convert import compare

from shardwise.convert.adapter import StateDictAdapter, check_round_trip, derive_from_adapter
from shardwise.convert.rules import NativeSpec, to_hub
from shardwise.errors import ConversionError


class Fused(StateDictAdapter):
    """Experts fused in memory, transposed and one by one in the files; a scale stored as its inverse."""

    def convert_single_tensor_to_hf(self, fqn: str, tensor: torch.Tensor, **options: object):
        if fqn.endswith("experts"):
            return [(f"{fqn}.{i}.weight", expert.t().contiguous()) for i, expert in enumerate(tensor.unbind(0))]
        if fqn.endswith("scale"):
            return [(f"{fqn}_inv", 1 / tensor)]
        if fqn.endswith("cache"):
            return []
        return [(f"{options.get('prefix', 'model')}.{fqn}", tensor)]

    def to_hf(self, state_dict: Mapping[str, torch.Tensor], **options: object) -> dict[str, torch.Tensor]:
        return dict(
            pair
            for fqn, tensor in state_dict.items()
            for pair in self.convert_single_tensor_to_hf(fqn, tensor, **options)
        )

    def from_hf(
        self, state_dict: Mapping[str, torch.Tensor], device_mesh: object = None, **options: object
    ) -> dict[str, torch.Tensor]:
        return {name.removesuffix("_inv"): 1 / tensor for name, tensor in state_dict.items() if name.endswith("_inv")}


STATE = {
    "experts": torch.randn(3, 4, 5),
    "norm": torch.randn(4),
    "scale": torch.tensor([1.0, 2.0, 4.0]),
    "cache": torch.zeros(2),
}


def test_views_where_it_rearranges_and_computed_where_it_calculates() -> None:
    adapter = Fused()
    specs = compare.specs_of(STATE)
    conversion = derive_from_adapter(adapter, specs)
    assert [tensor.name for tensor in conversion.by_native("experts")] == [f"experts.{i}.weight" for i in range(3)]
    assert [spec.name for group in conversion.computed for spec in group.hub] == ["scale_inv"]
    assert conversion.ignored == ("cache",)
    check_round_trip(conversion, specs)
    compare.check_whole(conversion, STATE, adapter.to_hf(STATE))
    for size, placement in compare.SPREADS:
        compare.check_sharded(conversion, STATE, adapter.to_hf(STATE), size, placement)


def test_options_reach_the_adapter() -> None:
    conversion = derive_from_adapter(Fused(), [NativeSpec("norm", (4,), "F32")], prefix="base")
    assert conversion.names == ("base.norm",)


def test_views_of_what_it_converts_share_memory() -> None:
    held = to_hub(derive_from_adapter(Fused(), compare.specs_of(STATE)), compare.whole(STATE)).held
    for tensor in held:
        for fragment in tensor.fragments:
            assert any(
                fragment.data.untyped_storage().data_ptr() == native.untyped_storage().data_ptr()
                for native in STATE.values()
            )


def test_it_does_not_write_through_unless_it_says_so() -> None:
    assert Fused().supports_write_through_checkpoint_load is False


def test_an_adapter_that_fails_is_an_error_that_names_the_tensor() -> None:
    class Broken(Fused):
        def convert_single_tensor_to_hf(self, fqn: str, tensor: torch.Tensor, **options: object):
            return [(fqn, tensor.view(7))]

    with pytest.raises(ConversionError, match="fails on 'norm'") as caught:
        derive_from_adapter(Broken(), [NativeSpec("norm", (4,), "F32")])
    assert caught.value.tensor == "norm"


def test_an_adapter_that_does_not_come_back_is_an_error() -> None:
    class OneWay(Fused):
        def from_hf(self, state_dict: Mapping[str, torch.Tensor], device_mesh: object = None, **options: object):
            return {}

    [group] = derive_from_adapter(OneWay(), [NativeSpec("scale", (3,), "F32")]).computed
    with pytest.raises(ConversionError, match="nothing"):
        group.rule.backward({"scale_inv": torch.ones(3)})
