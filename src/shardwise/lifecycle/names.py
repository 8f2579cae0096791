"""Names under a checkpoint root, and what may be resumed from.

A published checkpoint is ``epoch_E_step_S``. Everything that is being written or deleted has a hidden name that no
resolving accepts, so that a crash at any moment leaves either a whole checkpoint or something that nobody picks up.
"""

from __future__ import annotations

import re

from shardwise.errors import MisuseError

#: The newest checkpoint.
LATEST = "LATEST"
#: The best checkpoint by ``best_metric_key``; the name is the documented one even where higher is better.
BEST = "LOWEST_VAL"

MANIFEST_NAME = "manifest.json"
METRICS_NAME = "losses.json"
#: File with a checkpoint's identity and ancestors.
LINEAGE_NAME = "lineage.json"

#: Text file that names the checkpoint whose publication has begun and whose ``LATEST`` is not set yet.
ANNOUNCEMENT_NAME = ".publishing"

_SAVING = ".saving-"
_DOOMED = ".doomed-"
#: A link or small file is prepared under this prefix before it replaces the old one.
DRAFT = ".draft-"
#: The lock file that is held while a live process saves the checkpoint of the rest of its name.
OWNER = ".owner-"

# One spelling per checkpoint: no leading zeros, ASCII digits.
_CHECKPOINT = re.compile(r"epoch_(0|[1-9][0-9]*)_step_(0|[1-9][0-9]*)")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-]{0,200}")


def checkpoint_name(epoch: int, step: int) -> str:
    """Name of the checkpoint of ``step`` in ``epoch``; `MisuseError` where one is negative or not an int."""
    for label, value in (("epoch", epoch), ("step", step)):
        if type(value) is not int or value < 0:
            raise MisuseError(f"{label} is {value!r}", hint="Number epochs and steps with whole numbers from 0.")
    return f"epoch_{epoch}_step_{step}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """Epoch and step of a checkpoint's name; ``None`` for any other name."""
    found = _CHECKPOINT.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


#: How other tools call a checkpoint of a step: ``step-1000``, ``checkpoint-500``, ``epoch=3-step=1000``.
_STEP = re.compile(r"(?:^|[-_=])(?:global_?)?(?:step|checkpoint|iter)s?[-_=]?(\d+)$", re.IGNORECASE)
_EPOCH = re.compile(r"(?:^|[-_=])epoch[-_=](\d+)(?=[-_]|$)", re.IGNORECASE)


def foreign_numbers(name: str) -> tuple[int | None, int | None]:
    """Epoch and step as the name of another tool's checkpoint says them; ``None`` for what it does not say."""
    step, epoch = _STEP.search(name), _EPOCH.search(name)
    return None if epoch is None else int(epoch[1]), None if step is None else int(step[1])


def temporary_name(name: str) -> str:
    """Name under which the checkpoint ``name`` is written until it is published."""
    return _SAVING + name


def doomed_name(name: str) -> str:
    """Name under which the checkpoint ``name`` is deleted."""
    return _DOOMED + name


def leftover_of(name: str) -> str | None:
    """The checkpoint's name in the name of an unfinished save, deletion or claim; ``None`` for any other name."""
    for prefix in (_SAVING, _DOOMED, OWNER):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None


def is_temporary(name: str) -> bool:
    """Whether ``name`` is that of an unfinished save."""
    return name.startswith(_SAVING)


def is_doomed(name: str) -> bool:
    """Whether ``name`` is that of a checkpoint being deleted."""
    return name.startswith(_DOOMED)


def is_plain(name: str) -> bool:
    """Whether ``name`` is a single, visible path component without special characters."""
    return _PLAIN.fullmatch(name) is not None


def published_name(temporary: str) -> str:
    """The name that `temporary_name` was given; `MisuseError` for any other name."""
    if not temporary.startswith(_SAVING):
        raise MisuseError(
            f"{temporary!r} is not the name of an unfinished save", hint="Pass the path that reserve() returned."
        )
    return temporary.removeprefix(_SAVING)
