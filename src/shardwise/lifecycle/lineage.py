"""Which checkpoint a run came from: the line of checkpoints that leads to the newest one.

A run that was rolled back goes on beside the checkpoints that it left. Names do not show which of them belong to it:
step 60 of the abandoned line is not newer than step 45 of the present one. So each checkpoint has a small file that
says which one it is and which checkpoints of its root came before it. The *present line* is the newest checkpoint with
those. What is not on it was either abandoned (it came from a checkpoint of the line) or is another run's.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.disk.guarded import read_note
from shardwise.disk.names import real_path
from shardwise.lifecycle.names import LINEAGE_NAME

if TYPE_CHECKING:
    from shardwise.lifecycle.resolve import CheckpointInfo

_LIMIT = 1 << 24
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Origin:
    """A checkpoint's name when it was published, and an id that tells it from an earlier one of the same name.

    The id is empty for one that was saved without a lineage.
    """

    name: str
    id: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """A checkpoint's identity and ancestors.

    Attributes:
        sequence: How many publications the root had seen when it was saved; a later one has a higher number.
        ancestors: The checkpoints of its root that its run came through, the nearest first.
        tree: What all checkpoints that have one first ancestor have in common, also when that is deleted; empty for
            those that come from one without a lineage.
    """

    own: Origin
    epoch: int
    step: int
    sequence: int
    ancestors: tuple[Origin, ...] = ()
    tree: str = ""

    def encode(self) -> bytes:
        """As the content of ``lineage.json``."""
        document = {
            "version": _VERSION,
            "name": self.own.name,
            "id": self.own.id,
            "epoch": self.epoch,
            "step": self.step,
            "sequence": self.sequence,
            "tree": self.tree,
            "ancestors": [[origin.name, origin.id] for origin in self.ancestors],
        }
        return (json.dumps(document, indent=1) + "\n").encode()


def read_lineage(directory: Path) -> Lineage | None:
    """The lineage of a checkpoint; ``None`` where it has none that can be read, as that of another tool.

    A damaged one is no reason not to resume; `verify` reports it.
    """
    data = read_note(directory, LINEAGE_NAME, _LIMIT)
    if data is None:
        return None
    try:
        document = json.loads(data)
        if document["version"] != _VERSION:
            return None
        ancestors = tuple(Origin(str(name), str(known)) for name, known in document["ancestors"])
        epoch, step, sequence = (int(document[key]) for key in ("epoch", "step", "sequence"))
        own = Origin(str(document["name"]), str(document["id"]))
        return Lineage(own, epoch, step, sequence, ancestors, str(document["tree"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


@dataclass(frozen=True, slots=True)
class Start:
    """The checkpoint that a run goes on from, as it was when the run restored or saved it.

    Later, another checkpoint or none may have its name. Its lineage is ``None`` where it has none.
    """

    path: Path
    lineage: Lineage | None

    @staticmethod
    def at(path: Path) -> Start:
        """The checkpoint that is there now."""
        return Start(path, read_lineage(path))


def next_lineage(
    root: Path, checkpoints: Sequence[CheckpointInfo], name: str, epoch: int, step: int, start: Start | None
) -> Lineage:
    """The lineage of the checkpoint ``name`` that is about to be published in a root, which holds ``checkpoints``.

    ``start`` is the checkpoint that the run was restored from or saved last; where that is not known, the one before it
    in the order of steps is taken for it.
    """
    known = {info.name: info for info in checkpoints if info.complete and info.name != name}
    before: CheckpointInfo | None = None
    if start is None:
        earlier = (info for info in known.values() if info.order < (epoch, step))
        before = max(earlier, key=lambda info: info.order, default=None)
    elif start.lineage is None and real_path(start.path.parent) == real_path(root):
        before = known.get(start.path.name)
    ancestors: tuple[Origin, ...] = ()
    tree = uuid.uuid4().hex
    if start is not None and start.lineage is not None:
        theirs = start.lineage
        ancestors = tuple(each for each in (theirs.own, *theirs.ancestors) if _is_there(each, known))
        tree = theirs.tree
    elif before is not None:
        ancestors = tuple(_origin(known[each]) for each in line_of(known, before.name))
        tree = before.tree
    sequence = 1 + max((info.sequence for info in checkpoints), default=0)
    return Lineage(Origin(name, uuid.uuid4().hex), epoch, step, sequence, ancestors, tree)


def line_of(checkpoints: Mapping[str, CheckpointInfo], tip: str) -> tuple[str, ...]:
    """Names of the complete checkpoints on the line that ends with ``tip``, newest first; empty where there is no tip.

    One that was saved without a lineage is taken to come from all such that precede it in the order of steps.
    """
    last = checkpoints.get(tip)
    if last is None:
        return ()
    if last.lineage is None:
        alike = (info for info in checkpoints.values() if info.complete and info.lineage is None)
        earlier = sorted((info for info in alike if info.order < last.order), key=lambda info: info.order, reverse=True)
        return (tip, *(info.name for info in earlier))
    return (tip, *(origin.name for origin in last.lineage.ancestors if _is_there(origin, checkpoints)))


def branch_point(info: CheckpointInfo, line: Sequence[str], checkpoints: Mapping[str, CheckpointInfo]) -> int | None:
    """Where a checkpoint left a line: the position in ``line`` of the nearest checkpoint that both come from.

    The length of the line where that is deleted; ``None`` where they have nothing in common.
    """
    position = {name: number for number, name in enumerate(line)}
    shared = (position[name] for name in line_of(checkpoints, info.name) if name in position)
    alike = bool(line) and checkpoints[line[0]].tree == info.tree
    return next(shared, len(line) if alike else None)


def _is_there(origin: Origin, checkpoints: Mapping[str, CheckpointInfo]) -> bool:
    found = checkpoints.get(origin.name)
    return found is not None and found.complete and _origin(found).id == origin.id


def _origin(info: CheckpointInfo) -> Origin:
    return Origin(info.name, "" if info.lineage is None else info.lineage.own.id)
