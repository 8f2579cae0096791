"""A model's tensors under the names of its Hugging Face files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from shardwise.convert import (
    Conversion,
    HeldGroup,
    StateDictAdapter,
    check_round_trip,
    derive,
    derive_from_adapter,
    to_hub,
)
from shardwise.engine.memo import Memo
from shardwise.errors import ConversionError
from shardwise.plan.collector import collector_paused
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.names import NamedTensor, plain_name, unwrap
from shardwise.stateful_wrappers.snapshot import Snapshot, place_of
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.types import TensorSpec

#: Dtypes between which an export may convert: those of ordinary weights.
_FLOATS = {"F64": 3, "F32": 2, "F16": 1, "BF16": 1}


@dataclass(frozen=True)
class HubState:
    """What this rank holds of the model, in the terms of its files.

    Attributes:
        native: Under the model's own names.
        held: Under the hub's names, as views.
        groups: What has to be computed.
        absent: Names that files of this model may have and these do not: other names of tied tensors, and what the
            class keeps out of its files.
    """

    native: tuple[HeldTensor, ...]
    held: tuple[HeldTensor, ...]
    groups: tuple[HeldGroup, ...]
    absent: tuple[str, ...] = ()


class HubNames:
    """Derives a model's conversion once and applies it at every save and load."""

    def __init__(self) -> None:
        self._known: dict[tuple[type[nn.Module], tuple[TensorSpec, ...]], Conversion] = {}
        self._captured: Memo[HubState] = Memo()
        self._last: tuple[Snapshot, HubState] | None = None

    def capture(self, state: ModelState, tensors: Sequence[NamedTensor] | None = None) -> HubState:
        """The model's tensors under their names in the files. Local; no element is copied.

        As long as the model's tensors are the same objects at the same addresses, the same result is given.

        Args:
            state: The model.
            tensors: What ``state.tensors()`` gave a moment ago, where the caller has it.
        """
        if tensors is None and state.is_whole and self._last is not None and self._last[0].holds(state.model):
            return self._last[1]
        tensors = state.tensors() if tensors is None else tensors
        names_and_places = [(named.name, place_of(named.tensor)) for named in tensors]
        held = [named.tensor for named in tensors]
        found = self._captured.get(held, names_and_places, lambda: self._capture(state, tensors))
        if state.is_whole and (self._last is None or found is not self._last[1] or self._last[0].is_plain):
            # FSDP2 adds its hooks at the first step: a snapshot of before that holds no longer, though nothing moved.
            self._last = (Snapshot(state.model, held), found)
        return found

    @collector_paused()
    def _capture(self, state: ModelState, tensors: Sequence[NamedTensor]) -> HubState:
        native = held_tensors(((named.name, named.tensor) for named in tensors), MeshRegister())
        by_name = {tensor.spec.name: tensor for tensor in native}
        aliases = {named.name: named.aliases for named in tensors}
        held: list[HeldTensor] = []
        groups: list[HeldGroup] = []
        absent: list[str] = []
        for part in state.model:
            own = [by_name.pop(name) for name in _names(part) if name in by_name]
            conversion = self._conversion(part, own)
            converted = to_hub(conversion, own)
            held += converted.held
            groups += converted.groups
            tied = [tensor.spec._replace(name=alias) for tensor in own for alias in aliases[tensor.spec.name]]
            absent += [*conversion.ignored, *_file_names(part, tied)]
        return HubState(tuple(native), tuple(held), tuple(groups), tuple(absent))

    def _conversion(self, part: nn.Module, own: Sequence[HeldTensor]) -> Conversion:
        specs = tuple(tensor.spec for tensor in own)
        module = unwrap(part)
        # Models of two classes may have the same tensors and other rules.
        key = (type(module), specs)
        known = self._known.get(key)
        if known is None:
            adapter = getattr(module, "state_dict_adapter", None)
            if isinstance(adapter, StateDictAdapter):
                known = derive_from_adapter(adapter, specs)
            else:
                known = derive(module, specs)
            check_round_trip(known, specs)
            self._known[key] = known
        return known


def _file_names(part: nn.Module, specs: Sequence[TensorSpec]) -> list[str]:
    """The names of tensors that are written under other names, as the model has them and as its files would."""
    own = [spec.name for spec in specs]
    module = unwrap(part)
    if not specs or isinstance(getattr(module, "state_dict_adapter", None), StateDictAdapter):
        return own
    try:
        conversion = derive(module, specs)
    except ConversionError:
        # A rule that needs more than these tensors gives them no names of their own.
        return own
    return [*own, *(tensor.name for tensor in conversion.hub)]


def _names(part: nn.Module) -> list[str]:
    return [plain_name(name) for name in unwrap(part).state_dict(keep_vars=True)]


def with_base_dtypes(
    held: Sequence[HeldTensor], base: Mapping[str, TensorSpec]
) -> tuple[list[HeldTensor], list[HeldTensor]]:
    """Give each tensor the dtype that the base model has it in.

    Returns:
        The tensors to export, and those among the originals whose values the base's dtype cannot hold exactly: a run
        that trains in float32 from a bfloat16 base exports bfloat16 and resumes from float32.
    """
    export, exact = [], []
    for tensor in held:
        known = base.get(tensor.spec.name)
        have = tensor.spec.dtype
        if known is None or known.dtype == have or not {known.dtype, have} <= _FLOATS.keys():
            export.append(tensor)
            continue
        export.append(tensor._replace(spec=tensor.spec._replace(dtype=known.dtype)))
        if _FLOATS[known.dtype] <= _FLOATS[have]:
            exact.append(tensor)
    return export, exact


def materialised(tensors: Iterable[NamedTensor]) -> bool:
    """Whether none of a model's tensors is on the meta device."""
    return all(named.tensor.device.type != "meta" for named in tensors)
