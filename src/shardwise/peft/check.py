"""Whether an adapter is whole: every factor with its counterpart, every layer, of the configured rank. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from shardwise.errors import AdapterError
from shardwise.geometry import TensorSpec
from shardwise.peft.tensors import PEFT_PREFIX

#: The factors of a pair: side A, side B. Source: the names under which peft saves LoRA of linear layers and embeddings.
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))

_SHOWN = 8


def check_adapter(
    specs: Iterable[TensorSpec],
    config: Mapping[str, object],
    inventories: Sequence[Mapping[str, Sequence[int]]] = (),
    layers: int | None = None,
    *,
    declared: bool = False,
) -> None:
    """Check the tensors that all ranks together are about to write as one adapter.

    That the ranks hold every element of each tensor is the engine's check; this one is about which tensors there are.

    Args:
        specs: The union of all ranks' tensors.
        config: What ``adapter_config.json`` will say.
        inventories: Each rank's `shardwise.peft.tensors.AdapterTensors.inventory`, where the ranks have parts
            of a model; nothing where each has a whole one.
        layers: Number of transformer layers that the model's configuration promises.
        declared: Whether each rank has compared its tensors with its modules, as `capture_adapter` does. Target names
            of the settings, which peft matches by its own rules, are then not checked.

    Raises:
        AdapterError: The adapter has no tensor, a factor lacks its counterpart, shapes contradict each other or the
            configured ranks, a target has no tensors, or a layer is on no rank. The message lists what is wrong.
    """
    by_name = {spec.name: spec for spec in specs}
    if not by_name:
        raise AdapterError("the adapter has no tensors", hint="Check that target_modules matches modules of the model.")
    faults = [f"{name} is empty" for name, spec in by_name.items() if spec.numel == 0]
    if str(config.get("peft_type", "LORA")).rpartition(".")[2] == "LORA":
        pairs = dict(_pairs(by_name))
        faults += _pair_faults(pairs, config)
        faults += _magnitude_faults(by_name, pairs, config)
        faults += [] if declared else _target_faults(pairs, config)
    faults += _layer_faults(inventories, layers)
    if faults:
        more = f" (and {len(faults) - _SHOWN} more)" if len(faults) > _SHOWN else ""
        raise AdapterError(
            f"the adapter is not complete: {'; '.join(faults[:_SHOWN])}{more}",
            hint="Save with a process group that holds every pipeline stage, from the model as it was adapted; where "
            "layers were removed on purpose, let the model's config say how many there are.",
        )


Pair = tuple[TensorSpec | None, TensorSpec | None]


def _pairs(by_name: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Pair]]:
    """Module name (with peft's prefix) -> its two factors."""
    for a_suffix, b_suffix in _PAIRS:
        owners = dict.fromkeys(
            name.removesuffix(f".{suffix}")
            for name in by_name
            for suffix in (a_suffix, b_suffix)
            if name.endswith(f".{suffix}")
        )
        for owner in owners:
            yield owner, (by_name.get(f"{owner}.{a_suffix}"), by_name.get(f"{owner}.{b_suffix}"))


def _pair_faults(pairs: Mapping[str, Pair], config: Mapping[str, object]) -> Iterator[str]:
    for owner, (a, b) in pairs.items():
        if a is None or b is None:
            yield f"{owner} has no lora_{'A' if a is None else 'B'}"
            continue
        # B of a grouped convolution, or either factor of BD-LoRA, has a block of the rank alone.
        low, high = sorted((a.shape[0], b.shape[1])) if min(len(a.shape), len(b.shape)) > 1 else (0, 0)
        if not low or high % low:
            yield f"{owner} has lora_A {a.shape} and lora_B {b.shape}, which do not fit together"
            continue
        rank, configured = a.shape[0], _configured_rank(owner, config)
        several = bool(config.get("target_parameters"))
        if configured is not None and rank != configured and not (several and _divides(config, rank)):
            yield f"{owner} has rank {rank}, configured is {configured}"


#: X-LoRA keeps the model with its experts' adapters one level deeper.
_MIXTURE_PREFIX = "base_model.lora_model.model."


def adapted_modules(names: Iterable[str]) -> frozenset[str]:
    """The modules that a file's LoRA factors adapt, by its tensors' names."""
    sides = tuple(f".{suffix}" for pair in _PAIRS for suffix in pair)
    return frozenset(_adapted(name.removesuffix(side)) for name in names for side in sides if name.endswith(side))


def _adapted(owner: str) -> str:
    """The module that is adapted: parts of it, or several of its parameters, are called after peft's inner layers."""
    for prefix in (PEFT_PREFIX, _MIXTURE_PREFIX):
        owner = owner.removeprefix(prefix)
    return owner.partition(".base_layer")[0]


def _configured_rank(owner: str, config: Mapping[str, object]) -> int | None:
    module = _adapted(owner)
    patterns = config.get("rank_pattern")
    for key, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if re.match(rf"(.*\.)?({key})$", module) and isinstance(value, int):
            return value
    rank = config.get("r")
    return rank if isinstance(rank, int) else None


def _divides(config: Mapping[str, object], rank: int) -> bool:
    """Whether ``rank`` can be that of several experts side by side."""
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, Mapping) else ())]
    return any(isinstance(r, int) and r > 0 and rank % r == 0 for r in ranks)


def _magnitude_faults(
    by_name: Mapping[str, TensorSpec], pairs: Mapping[str, Pair], config: Mapping[str, object]
) -> Iterator[str]:
    have = {n.removesuffix(".lora_magnitude_vector") for n in by_name if n.endswith(".lora_magnitude_vector")}
    if config.get("use_dora"):
        yield from (f"{owner} has no lora_magnitude_vector" for owner in pairs if owner not in have)
    elif have:
        yield f"{min(have)} has a lora_magnitude_vector, and use_dora is off"


def _target_faults(pairs: Mapping[str, Pair], config: Mapping[str, object]) -> Iterator[str]:
    targets = config.get("target_modules")
    if not isinstance(targets, (list, tuple, set)) or not targets:
        return
    modules = {_adapted(owner) for owner in pairs}
    # Only a path with a layer number means one module; a suffix may match modules of some layers.
    whole = [t for t in targets if isinstance(t, str) and re.search(r"(^|\.)\d+\.", t)]
    if not config.get("exclude_modules"):
        lost = (t for t in whole if not any(f".{module}".endswith(f".{t}") for module in modules))
        yield from (f"{target} is a target and has no tensors" for target in lost)
    if config.get("target_parameters"):
        return
    known = set(targets)
    for module in modules:
        parts = module.split(".")
        if not any(".".join(parts[i:]) in known for i in range(len(parts))):
            yield f"{module} has tensors and is no target"


def _layer_faults(inventories: Sequence[Mapping[str, Sequence[int]]], layers: int | None) -> Iterator[str]:
    """The layers that the model's configuration promises and no rank has."""
    union: dict[str, set[int]] = {}
    for inventory in inventories:
        for container, indices in inventory.items():
            union.setdefault(container, set()).update(indices)
    most = max(map(len, union.values()), default=0)
    if layers is None or not most or most >= layers:
        return
    yield f"the ranks have {most} of {layers} layers"
    for container, found in union.items():
        missing = sorted(set(range(layers)) - found)
        if len(found) == most and missing:
            yield f"no rank has {container}.{missing[0]}"


def check_stages(stages: Collection[int]) -> None:
    """Check that the ranks that save together, of these ``stages``, have each pipeline stage below their last."""
    missing = sorted(set(range(max(stages, default=0))) - set(stages))
    if missing:
        raise AdapterError(
            f"the adapter is not complete: the ranks have the pipeline stages {sorted(set(stages))}, and not "
            f"{missing[0]}",
            hint="Save with a process group that holds every pipeline stage, from the model as it was adapted.",
        )
