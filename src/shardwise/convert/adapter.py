"""A model's own converter: the `StateDictAdapter` interface, and deriving views from one."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shardwise.convert.derive import RULE_ERRORS, derive, derived, hub_tensor
from shardwise.convert.provenance import Provenance, SourcePiece, Span, Untraceable, on_one_grid
from shardwise.convert.rules import Computed, Conversion, HubTensor, NativeSpec
from shardwise.convert.trace import traced
from shardwise.dtypes import torch_dtype
from shardwise.errors import ConversionError
from shardwise.geometry import Box, TensorSpec, overlap
from shardwise.plan.views import AxisView
from shardwise.stateful_wrappers.wrapping import skeleton

_LOG = logging.getLogger(__name__)

_METHODS = ("to_hf", "from_hf", "convert_single_tensor_to_hf")


class StateDictAdapter(ABC):
    """The interface of ``model.state_dict_adapter``, which converts a model's tensors to those of its files.

    1. `convert_single_tensor_to_hf` is called once for each tensor, on any rank, with a tensor that has no memory; if
       it only rearranges elements, that is all; saving and loading then go through views.
    2. `from_hf` is called with the whole tensors of one name at a time, for those that it computes. What
       `convert_single_tensor_to_hf` made of a tensor has to become that tensor again, bit for bit.
    3. Any class that has the three methods is one: models bring their own.
    """

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Any class with the three methods."""
        if cls is not StateDictAdapter:
            return super().__subclasshook__(other)
        return all(callable(getattr(other, name, None)) for name in _METHODS)

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


def adapter_of(module: nn.Module) -> StateDictAdapter | None:
    """The adapter that a model brings, or ``None``; one that lacks a method is not used, which the log says."""
    found: object = getattr(module, "state_dict_adapter", None)
    if found is None or isinstance(found, StateDictAdapter):
        return found
    lacking = [name for name in _METHODS if not callable(getattr(found, name, None))]
    _LOG.warning(
        "%s.state_dict_adapter, a %s, is not used: it has no %s",
        type(module).__name__,
        type(found).__name__,
        " and no ".join(lacking),
    )
    return None


@dataclass(frozen=True, slots=True)
class AdapterRule:
    """An adapter, asked about the native tensor of one FQN (a `shardwise.convert.rules.Rule`)."""

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
    """Derive a conversion from a model's adapter, to which ``options`` are passed. No collectives; any rank may call.

    The tensors have global shapes, tied ones once. The adapter may fail on one, or give two one name
    (`ConversionError`).
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


def derive_for(module: nn.Module, natives: Sequence[NativeSpec]) -> Conversion:
    """A model's conversion, from the adapter that it brings or else from transformers' rules."""
    adapter = adapter_of(module)
    return derive(module, natives) if adapter is None else derive_from_adapter(adapter, natives)


def conversion_of(module: nn.Module, natives: Sequence[NativeSpec]) -> Conversion:
    """As `derive_for`, and checked: what is written would come back the same."""
    found = derive_for(module, natives)
    check_round_trip(found, natives)
    return found


def check_adapter(module: nn.Module, conversion: Conversion, natives: Sequence[NativeSpec]) -> None:
    """Check that a model's adapter, where it has one, keeps every parameter and names them all on the way back.

    Computed tensors are converted back and compared with real values while saving. An adapter that is written through
    needs no way back, and one whose ``from_hf`` does not accept tensors without memory cannot be checked here.
    """
    adapter = adapter_of(module)
    if adapter is None:
        return
    if conversion.ignored:
        parameters = {name for name, _ in skeleton(module).named_parameters(remove_duplicate=False)}
        dropped = [name for name in conversion.ignored if name in parameters]
        if dropped:
            raise ConversionError(
                f"the model's state_dict_adapter gives {len(dropped)} of its parameters no name in the files: "
                + ", ".join(dropped[:5]),
                tensor=dropped[0],
                hint="A checkpoint without them would not give the model back; let the adapter convert them.",
            )
    views = () if getattr(adapter, "supports_write_through_checkpoint_load", False) else conversion.hub
    dtypes = {spec.name: spec.dtype for spec in natives}
    hub: dict[str, torch.Tensor] = {
        tensor.name: torch.empty(tensor.shape, dtype=torch_dtype(dtypes[tensor.parts[0].native]), device="meta")
        for tensor in views
    }
    try:
        back = adapter.from_hf(dict(hub)) if hub else {}
    except Exception as error:  # noqa: BLE001  whatever it cannot do without values
        _LOG.debug("from_hf of the model's adapter does not accept tensors on the meta device: %s", error)
        return
    sources = {part.native for tensor in views for part in tensor.parts}
    lost = [s for s in natives if s.name in sources and (s.name not in back or tuple(back[s.name].shape) != s.shape)]
    if lost:
        made = f"as {list(back[lost[0].name].shape)}" if lost[0].name in back else "not at all"
        raise ConversionError(
            f"from_hf of the model's state_dict_adapter gives back {made} what has the shape {list(lost[0].shape)} in "
            f"the model ({len(lost)} tensors)",
            tensor=lost[0].name,
            hint="from_hf has to undo convert_single_tensor_to_hf, in names and shapes.",
        )


def check_round_trip(conversion: Conversion, natives: Sequence[NativeSpec]) -> None:
    """Check that every element of every native tensor, tied ones once, is in exactly one place of the files.

    Tensors that the model keeps out of its files are excepted, and so are computed groups, whose rules answer for
    themselves.
    """
    elsewhere = {spec.name for group in conversion.computed for spec in group.natives}
    elsewhere.update(conversion.ignored)
    views: defaultdict[str, list[AxisView | None]] = defaultdict(list)
    for tensor in conversion.hub:
        for part in tensor.parts:
            views[part.native].append(part.view)
    lost: list[str] = []
    twice: list[str] = []
    known: dict[object, int] = {}
    for spec in natives:
        if spec.name in elsewhere:
            continue
        key = (spec.shape, tuple(map(id, views[spec.name])))
        if key not in known:
            known[key] = _balance(spec.shape, views[spec.name])
        if known[key] < 0:
            lost.append(spec.name)
        elif known[key] > 0:
            twice.append(spec.name)
    if lost or twice:
        what = [f"{kind}: {', '.join(names[:5])}" for kind, names in (("lost", lost), ("twice", twice)) if names]
        raise ConversionError(
            f"the model's files would not give the model back ({'; '.join(what)})",
            tensor=(lost or twice)[0],
            hint="The conversion rules of the model type are not invertible; give the model a state_dict_adapter, or "
            "correct the one it has.",
        )


def _balance(shape: tuple[int, ...], views: Sequence[AxisView | None]) -> int:
    """0 where the views cover each element once, negative where some is missing, positive where one is there twice."""
    if len(views) == 1 and views[0] is None:
        return 0
    regions = [_region(shape, view) for view in views]
    try:
        for dim in range(len(shape)):
            regions = on_one_grid(regions, dim)
    except Untraceable:  # grids that cut across each other
        return 1
    boxes = [
        Box(tuple(span.start for span in piece.spans), tuple(span.length for span in piece.spans))
        for region in regions
        for piece in region.pieces
    ]
    twice = len(boxes) > 1 and (not boxes[0].sizes or overlap(boxes))
    return 1 if twice else sum(box.numel for box in boxes) - math.prod(shape)


def _region(shape: tuple[int, ...], view: AxisView | None) -> Provenance:
    """The region that a view covers, in its native grid without factors of 1."""
    grid = tuple((n,) for n in shape) if view is None else view.native_grid
    bounds = {dim: (0, n) for dim, n in enumerate(shape)}
    if view is not None:
        bounds = {dim: (index, 1) for dim, index in view.fixed}
        bounds |= {axis.native: (axis.start, axis.length) for axis in view.axes}
    at = 0
    dims: list[tuple[int, ...]] = []
    spans: list[Span] = []
    for factors in grid:
        kept = [i for i, n in enumerate(factors) if n != 1]
        dims.append(tuple(factors[i] for i in kept))
        spans += (Span(*bounds.get(at + i, (0, 1)), 0) for i in kept)
        at += len(factors)
    return Provenance(tuple(dims), (SourcePiece(0, 0, tuple(spans)),))
