"""A model's adapters before anything is written or read: captured, checked, and what all ranks know of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import nn

from shardwise.checkpointing.merged_state import check_merging
from shardwise.checkpointing.session import Session
from shardwise.comm import JsonValue
from shardwise.engine.agreement import Agreement
from shardwise.errors import AdapterError, MisuseError
from shardwise.peft.builtin_lora import find_sites
from shardwise.peft.capture import capture_adapter, hold_adapter
from shardwise.peft.check import check_adapter, check_stages
from shardwise.peft.check import check_opens as check_opens_in_peft
from shardwise.peft.config import adapter_settings
from shardwise.peft.diffusers_lora import as_peft, check_opens, require_component
from shardwise.peft.models import is_peft_adapted
from shardwise.peft.tensors import AdapterTensors
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.roster import Roster
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.state_dict_overrides import refuse_fsdp1
from shardwise.stateful_wrappers.tensors import MeshRegister
from shardwise.stateful_wrappers.wrapping import is_average


def capture(
    session: Session, parts: Sequence[nn.Module], config: object | None, stepped: Collection[int] = ()
) -> AdapterTensors:
    """The adapters of this rank's parts, in the layout that the settings promise. Local."""
    return capture_adapter(
        list(parts),
        config,
        v4_compatible=session.config.v4_compatible,
        legacy_paramwrapper_layout=session.config.legacy_paramwrapper_layout,
        base=session.base_name(),
        stepped=stepped,
    )


@dataclass(frozen=True, slots=True)
class Declared:
    """Gathered facts about the ranks' parts of an adapted model.

    Attributes:
        inventories: Each rank's layers, where one of them has a part of a model; else empty.
        extra: Whether any rank has tensors that are trained beside the adapter.
    """

    inventories: tuple[Mapping[str, Sequence[int]], ...]
    extra: bool


def declare(session: Session, captured: AdapterTensors) -> Declared:
    """Gather the layers of the model on each rank. All ranks call.

    Raises:
        AdapterError: A pipeline stage is missing.
    """
    group = session.group
    layers: dict[str, JsonValue] = {path: list(indices) for path, indices in captured.inventory.items()}
    own: JsonValue = [layers, bool(captured.cut), session.stage, bool(captured.extra)]
    rows = cast(
        "list[tuple[dict[str, list[int]], bool, int, bool]]", group.gather_json(own, "comparing the stages' layers")
    )
    check_stages({stage for _, _, stage, _ in rows})
    # A list with fewer layers than the configuration says is a pruned model; a stage's has keys, or holes.
    inventories = tuple(theirs for theirs, *_ in rows) if any(cut for _, cut, _, _ in rows) else ()
    return Declared(inventories, any(extra for *_, extra in rows))


def diffusers_component(session: Session, parts: Sequence[nn.Module], peft_config: object | None) -> str:
    """The model's name in a pipeline of diffusers, where its adapter is saved for one; else empty."""
    return require_component(parts, peft_config) if session.config.diffusers_compatible else ""


def check_adapter_file(
    roster: Roster,
    settings: Mapping[str, object],
    declared: Declared,
    captured: AdapterTensors,
    name: str,
    parts: Sequence[nn.Module],
    component: str,
) -> None:
    """Raise `AdapterError` unless an adapter's file is complete and its library would open it. Local."""
    specs = [as_peft(spec, component) for spec in roster.specs] if component else roster.specs
    check_adapter(specs, settings, declared.inventories, captured.layers, declared=True)
    check_opens_in_peft(parts, name, [spec.name for spec in specs], settings)


def hold_extra(session: Session, captured: AdapterTensors, parts: Sequence[nn.Module]) -> tuple[HeldTensor, ...]:
    """The tensors that are trained beside the adapter, as this rank holds them."""
    named = [(entry.spec.name, entry.tensor) for entry in captured.extra]
    return hold_adapter(captured.extra, MeshRegister(session.may_differ.of_adapter(named, parts)))


def check_before_training(session: Session, model: nn.Module | Sequence[nn.Module], *, is_adapted: bool) -> None:
    """Describe and check a model's adapters as a save would, and write nothing. All ranks call.

    A configuration that only saves are given (for a model's own LoRA) is checked there. With ``is_adapted`` a model
    without an adapter is refused.

    Raises:
        ShardwiseError: What the first save would raise.
    """
    group = session.group
    session.base_name()  # looked for here, since all ranks have to
    parts = ModelState(model).model

    def kind_of_adapter() -> str:
        refuse_wrappers(parts)
        return "peft" if is_peft_adapted(parts) else "own" if any(find_sites(part) for part in parts) else ""

    kinds = group.gather(kind_of_adapter, "looking at the adapter")
    if not any(kinds):
        if is_adapted:
            raise AdapterError(
                "the model has no adapter, and is_peft is true",
                hint="Adapt it before it is restored, or set is_peft to false.",
            )
        return

    def describe() -> tuple[str, AdapterTensors]:
        component = diffusers_component(session, parts, None)
        return component, capture(session, parts, None) if kinds[group.rank] else AdapterTensors((), {})

    component, captured = group.attempt(describe, "describing the adapter")
    declared = declare(session, captured)
    if set(kinds) == {"peft"}:
        settings = adapter_settings(parts, None, group, v4_compatible=session.config.v4_compatible)
        for file in captured.files:
            roster = _roster(session, partial(hold_adapter, file.entries, MeshRegister()))
            with group.together(f"checking the adapter {file.adapter_name}"):
                check_adapter_file(
                    roster, settings[file.adapter_name], declared, captured, file.adapter_name, parts, ""
                )
                if component:
                    check_opens(parts, None, file, session.logged)
    if declared.extra:
        _roster(session, partial(hold_extra, session, captured, parts))
    if session.config.export_merged:
        with group.together("describing the merged model"):
            check_merging(session, parts)


def _roster(session: Session, hold: Callable[[], tuple[HeldTensor, ...]]) -> Roster:
    return Agreement(session.group, session.stage).roster(hold, "describing the adapter's tensors")


def refuse_wrappers(parts: Sequence[nn.Module]) -> None:
    """Raise `MisuseError` for FSDP1, and for an average: no adapter file has a place for its count. Local."""
    refuse_fsdp1(parts)
    if any(is_average(part) for part in parts):
        raise MisuseError(
            "the model is an AveragedModel, and is_peft is true: an adapter's files have no place for the average's "
            "n_averaged, which would be lost",
            hint="Save the adapted model, and pass the average as ema; or set is_peft to false.",
        )
