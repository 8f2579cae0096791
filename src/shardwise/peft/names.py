"""Names: modules without wrappers, combined projections, and expert projections. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from shardwise.errors import AdapterError
from shardwise.stateful_wrappers.wrapping import plain_path

if TYPE_CHECKING:
    import torch.nn as nn

#: Projections that share one matrix, and the projections of the Hugging Face model that they stand for, in row order.
COMBINED_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

#: Model types whose hub files name the experts' projections otherwise. Source: the models' files on the hub.
_EXPERT_NAMES: dict[str, dict[str, str]] = {
    "mixtral": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
}


def join(*parts: str) -> str:
    """Join the non-empty parts of a dotted name."""
    return ".".join(part for part in parts if part)


def named_modules(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules``, under clean names; where a wrapper and the wrapped share one, the wrapped is given."""
    yield from {plain_path(name): module for name, module in part.named_modules()}.items()


def seed_of(text: str) -> int:
    """A generator's seed that follows from a text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def expert_projections(token: str, model_type: str | None) -> tuple[str, ...]:
    """The per-expert projections behind a grouped parameter called ``lora_<token>_A``.

    ``gate_and_up`` and ``gate_up`` stand for two projections, the gate in the first half of the output columns; any
    other token names its projection, with or without ``_proj`` or ``_projs`` at the end.
    """
    parameter = fused_parameter(token)
    names = COMBINED_PROJECTIONS.get(parameter, (parameter,))
    renamed = _EXPERT_NAMES.get(model_type or "", {})
    return tuple(renamed.get(name, name) for name in names)


def fused_parameter(token: str) -> str:
    """Name of the fused parameter of the Hugging Face model behind ``lora_<token>_A``: gate_up_proj or down_proj."""
    stem = re.sub(r"_projs?$", "", token)
    return "gate_up_proj" if stem in ("gate_and_up", "gate_up") else f"{stem}_proj"


def expand_combined(fqn: str, expand: bool) -> tuple[str, ...]:
    """The Hugging Face modules behind a module: several for a combined projection, else the module itself."""
    parent, _, leaf = fqn.rpartition(".")
    if not expand or leaf not in COMBINED_PROJECTIONS:
        return (fqn,)
    return tuple(join(parent, name) for name in COMBINED_PROJECTIONS[leaf])


def text_config(model: object) -> object | None:
    """The configuration that describes the language model: nested in that of a multimodal one."""
    config: object | None = getattr(model, "config", None)
    nested = getattr(config, "text_config", None)
    return config if nested is None or isinstance(nested, dict) else nested


def combined_sizes(fqn: str, rows: int, config: object | None) -> tuple[int, ...]:
    """Output rows of each projection behind a combined one of so many rows.

    The language model's configuration has ``num_attention_heads``, ``num_key_value_heads`` (the number of heads if
    absent) and ``head_dim`` (``hidden_size / num_attention_heads`` if absent).
    """
    leaf = fqn.rpartition(".")[2]
    if leaf == "gate_up_proj":
        sizes: Iterable[int] = (rows // 2, rows - rows // 2)
        known = rows % 2 == 0
    else:
        named = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
        values = (getattr(config, name, None) for name in named)
        heads, groups, width, hidden = (v if isinstance(v, int) and not isinstance(v, bool) else 0 for v in values)
        groups, width = groups or heads, width or (hidden // heads if heads else 0)
        sizes = (heads * width, groups * width, groups * width)
        known = heads > 0 and sum(sizes) == rows
    if not known:
        raise AdapterError(
            f"the rows of {fqn!r} ({rows}) do not split into {', '.join(COMBINED_PROJECTIONS[leaf])}",
            tensor=fqn,
            hint="Set num_attention_heads, num_key_value_heads and head_dim in the model's config.",
        )
    return tuple(sizes)
