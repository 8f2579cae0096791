"""The values of our own ``optim`` directories under the names that DCP has for an optimizer's state dict.

Both of torch's layouts are there: groups by number with lists of names, as ``get_optimizer_state_dict`` gives them, and
one entry for each parameter and option, as with ``flatten_optimizer_state_dict``. The tensors' names are DCP's anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from shardwise.errors import StateFormatError
from shardwise.sources.state_files import has_state, read_state

_RECORD = "optimizer"
#: Files of such a directory that hold no sharded tensors.
RECORD_TENSORS = frozenset({"optimizer.safetensors", "scheduler.safetensors"})


def has_record(directory: Path) -> bool:
    """Whether a directory is one of ours with an optimizer."""
    return has_state(directory / _RECORD)


def read_record(directory: Path) -> dict[str, object]:
    """DCP's name -> value, of all that is not a tensor of the optimizer's state; nothing where there is no record.

    Raises:
        StateFormatError: The record is damaged.
    """
    if not has_record(directory):
        return {}
    path = directory / f"{_RECORD}.json"
    state = read_state(directory / _RECORD)
    try:
        return _values(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateFormatError(
            f"this is not an optimizer state ({type(error).__name__}: {error})",
            path=path,
            hint="Restore the file or choose another checkpoint.",
        ) from error


def _values(state: object) -> dict[str, object]:
    fields = cast("dict[str, object]", state)
    found: dict[str, object] = {}
    for number, group in enumerate(cast("list[dict[str, object]]", fields["groups"])):
        params = [str(param) for param in cast("list[object]", group["params"])]
        for key, value in cast("dict[str, object]", group["options"]).items():
            found[f"param_groups.{number}.{key}"] = value
            found |= {f"param_groups.{param}.{key}": value for param in params}
        found[f"param_groups.{number}.params"] = params
    for param, values in cast("dict[str, dict[str, object]]", fields["values"]).items():
        found |= {f"state.{param}.{key}": value for key, value in values.items()}
    return found
