"""A model's own converter: the `StateDictAdapter` interface, and deriving views from one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.convert.derive import RULE_ERRORS, derived, hub_tensor
from shardwise.convert.rules import Computed, Conversion, HubTensor, NativeSpec
from shardwise.convert.trace import traced
from shardwise.errors import ConversionError
from shardwise.format.dtypes import torch_dtype
from shardwise.types import TensorSpec


class StateDictAdapter(ABC):
    """What a model brings as ``model.state_dict_adapter`` to say how its tensors become those of its files.

    1. `convert_single_tensor_to_hf` is called once for each tensor, on any rank, with a tensor that has no memory; if
       it only rearranges elements, that is all; saving and loading then go through views.
    2. `to_hf` and `from_hf` are called with the whole tensors of one name at a time, for those that it computes.
    """

    @abstractmethod
    def to_hf(self, state_dict: Mapping[str, torch.Tensor], **options: object) -> dict[str, torch.Tensor]:
        """Convert native tensors by FQN to tensors of the files by name."""

    @abstractmethod
    def from_hf(
        self, state_dict: Mapping[str, torch.Tensor], device_mesh: object = None, **options: object
    ) -> dict[str, torch.Tensor]:
        """Convert tensors of the files by name to native tensors by FQN."""

    @abstractmethod
    def convert_single_tensor_to_hf(
        self, fqn: str, tensor: torch.Tensor, **options: object
    ) -> list[tuple[str, torch.Tensor]]:
        """Convert one native tensor to ``(name, tensor)`` pairs of the files."""

    @property
    def supports_write_through_checkpoint_load(self) -> bool:
        """Whether loading into what `to_hf` returns fills the native tensors, because it returns views of them."""
        return False


@dataclass(frozen=True, slots=True)
class AdapterRule:
    """An adapter, asked about one native tensor (a `shardwise.convert.rules.Rule`).

    Attributes:
        adapter: The model's adapter.
        native: FQN of the tensor.
        options: Passed to the adapter.
    """

    adapter: StateDictAdapter
    native: str
    options: Mapping[str, object]

    def forward(self, natives: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Native tensors by FQN to hub tensors by name."""
        return dict(self.adapter.convert_single_tensor_to_hf(self.native, natives[self.native], **self.options))

    def backward(self, hub: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Hub tensors by name to native tensors by FQN."""
        found = self.adapter.from_hf(dict(hub), **self.options)
        if set(found) != {self.native}:
            raise ConversionError(
                f"the adapter made {', '.join(sorted(found)) or 'nothing'} of the files' tensors for {self.native!r}",
                tensor=self.native,
                hint="from_hf has to undo convert_single_tensor_to_hf.",
            )
        return found


def derive_from_adapter(adapter: StateDictAdapter, natives: Sequence[NativeSpec], **options: object) -> Conversion:
    """Derive a conversion from a model's adapter. No collectives; any rank may call.

    Args:
        adapter: The adapter.
        natives: The model's tensors with their global shapes; tied ones once.
        options: Passed to `StateDictAdapter.convert_single_tensor_to_hf`.

    Raises:
        ConversionError: The adapter fails on a tensor, or gives two tensors one name.
    """
    views: list[HubTensor] = []
    computed: list[Computed] = []
    ignored: list[str] = []
    for spec in natives:
        try:
            pairs = adapter.convert_single_tensor_to_hf(
                spec.name, traced(0, spec.shape, torch_dtype(spec.dtype)), **options
            )
        except RULE_ERRORS as error:
            raise ConversionError(
                f"the model's state_dict_adapter fails on {spec.name!r}: {error}",
                tensor=spec.name,
                hint="It has to accept tensors on the meta device, in their global shapes.",
            ) from error
        results = [(name, derived(tensor, (spec,))) for name, tensor in pairs]
        reasons = [result.reason for _, result in results if result.reason]
        if not results:
            ignored.append(spec.name)
        elif reasons:
            hub = tuple(TensorSpec(name, result.shape, result.dtype) for name, result in results)
            computed.append(Computed((spec,), hub, AdapterRule(adapter, spec.name, options), reasons[0]))
        else:
            views += (hub_tensor(name, result, (spec,)) for name, result in results)
    return Conversion(tuple(views), tuple(computed), tuple(ignored))
