"""What hosts refuse alike: settings of a checkpointer that they decide, and ways of sharding that are not saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shardwise.config import CheckpointingConfig
from shardwise.errors import ConfigError


def first_set(settings: CheckpointingConfig, names: Iterable[str]) -> str | None:
    """The first of the settings ``names`` that is not at its default, or ``None``. Local."""
    defaults = CheckpointingConfig()
    return next((name for name in names if getattr(settings, name) != getattr(defaults, name)), None)


def refuse_derived(settings: CheckpointingConfig, derived: Mapping[str, str], host: str) -> None:
    """Raise `ConfigError` where a setting is given that follows from one of the host's own (name -> name). Local."""
    if (name := first_set(settings, derived)) is not None:
        raise ConfigError(
            f"checkpointing sets {name}, which {host} takes from {derived[name]}",
            hint=f"Leave {name} out, and set {derived[name]}.",
        )


def refuse_ways(accelerator: Any, host: str, sharding: str, further: Mapping[str, tuple[bool, str]]) -> None:
    """Raise `ConfigError` where accelerate spreads a model in a way that is not saved, or one ``further`` is asked for.

    ``sharding`` is the hint that says what can be saved; ``further`` says by name whether it is asked for, and a hint.
    """
    from accelerate.utils import DistributedType

    kind, fsdp = accelerator.distributed_type, getattr(accelerator.state, "fsdp_plugin", None)
    asked = {
        "DeepSpeed": (kind == DistributedType.DEEPSPEED, sharding),
        "Megatron-LM": (kind == DistributedType.MEGATRON_LM, sharding),
        "torch_xla": (kind == DistributedType.XLA, sharding),
        "FSDP 1": (fsdp is not None and fsdp.fsdp_version != 2, "Set fsdp_version ('version' in fsdp_config) to 2."),
    }
    for name, (is_asked, hint) in [*asked.items(), *further.items()]:
        if is_asked:
            raise ConfigError(f"{host} does not support {name}", hint=hint)
