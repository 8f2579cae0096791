"""The arguments of a save, by position or by name, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.arguments import whole_number
from shardwise.checkpointing.optimizers import Optimizers, Schedulers
from shardwise.errors import MisuseError
from shardwise.stateful_wrappers.model import Model

_NAMES = ("epoch", "step", "model", "optimizer", "scheduler")
_HINT = (
    "Call save(step=..., model=..., optimizer=...), with epoch=... if you like, or save(epoch, step, model, optimizer)."
)


@dataclass(frozen=True, slots=True)
class WhatToSave:
    """The arguments of a save that may be given by position or by name."""

    epoch: int
    step: int
    model: Model
    optimizer: Optimizers | None
    scheduler: Schedulers | None
    tokenizer: SavesPretrained | None = None
    peft_config: object | None = None
    metrics: Mapping[str, float] | None = None
    extra_state: Mapping[str, object] | None = None
    is_final_checkpoint: bool = False
    ema: Model | None = None
    dataloader: object | None = None

    @staticmethod
    def of(
        positional: Sequence[object], named: Mapping[str, object], epoch: int
    ) -> tuple[WhatToSave, MisuseError | None]:
        """Sort the arguments by their names.

        ``epoch`` is meant where none is given. A mistake is returned, to be raised where all ranks receive it.
        """
        given = dict(zip(_NAMES, positional, strict=False))
        mistake = _mistake(positional, given, named)
        given = {**given, **{name: value for name, value in named.items() if name in _NAMES}}
        if given.get("epoch") is None:
            given["epoch"] = epoch
        what = WhatToSave(
            whole_number(cast(int, given["epoch"])),
            whole_number(cast(int, given.get("step"))),
            cast(nn.Module, given.get("model")),
            cast("Optimizers | None", given.get("optimizer")),
            cast("Schedulers | None", given.get("scheduler")),
        )
        return what, mistake


def _mistake(
    positional: Sequence[object], given: Mapping[str, object], named: Mapping[str, object]
) -> MisuseError | None:
    if len(positional) > len(_NAMES):
        return MisuseError(f"save() was given {len(positional)} arguments by position", hint=_HINT)
    if positional and isinstance(positional[0], nn.Module):
        return MisuseError("save() was given the model in the place of the epoch", hint=_HINT)
    for name, value in named.items():
        if name not in _NAMES:
            return MisuseError(f"save() has no argument {name}", hint=_HINT)
        if name in given:
            return MisuseError(
                f"save() was given {name} twice: {_shown(given[name])} by position, {_shown(value)} by name", hint=_HINT
            )
    lacks = [name for name in ("step", "model") if name not in given and name not in named]
    if lacks:
        return MisuseError(f"save() was not given {' and '.join(lacks)}", hint=_HINT)
    return None


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int) else f"a {type(value).__name__}"
