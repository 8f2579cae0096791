"""One adapter's settings, combined from those of its pipeline stages: peft configures each stage by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shardwise.errors import AdapterError
from shardwise.peft.config import jsonable

if TYPE_CHECKING:
    from peft import PeftConfig

#: Settings that peft completes from the modules that it sees: ``all-linear``, ranks found for each layer, heads.
_FOUND = ("target_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern")

#: Settings that have to be the same, since the whole adapter has one value of each.
_SAME = ("peft_type", "r", "lora_alpha", "bias", "use_dora", "use_rslora")


def part_settings(config: PeftConfig) -> dict[str, object]:
    """What the stages of one adapter have to agree on or to unite, as values that can travel."""
    values = config.to_dict()
    if str(values.get("target_modules")).lower() == "all-linear":
        values["target_modules"] = None  # of a stage in which peft has looked for nothing yet
    return {key: jsonable(values[key], key) for key in (*_FOUND, *_SAME) if key in values}


def united(adapter_name: str, stages: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The settings of the whole adapter that differ between its stages.

    Args:
        adapter_name: For messages.
        stages: What `part_settings` gave on each rank.

    Raises:
        AdapterError: Two stages contradict each other.
    """
    out: dict[str, object] = {}
    for key in (*_FOUND, *_SAME):
        values = [settings.get(key) for settings in stages]
        if all(value == values[0] for value in values):
            continue
        whole = _united(values) if key in _FOUND else None
        if whole is None:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise AdapterError(
                f"the adapter {adapter_name!r} has {key} {values[0]!r} on rank 0 and {values[other]!r} on rank {other}",
                hint="Adapt every pipeline stage with the same settings; names may be listed for each stage apart.",
            )
        out[key] = whole
    return out


def _united(values: Sequence[object]) -> object | None:
    """All names of several lists, or entries of several mappings; ``None`` where they contradict each other."""
    given = [value for value in values if value is not None]
    if all(isinstance(value, (list, tuple)) for value in given):
        return sorted({str(name) for value in given for name in value})  # type: ignore[attr-defined]
    if not all(isinstance(value, Mapping) for value in given):
        return None
    whole: dict[str, object] = {}
    for value in given:
        for key, entry in value.items():  # type: ignore[attr-defined]
            if whole.setdefault(key, entry) != entry:
                return None
    return whole
