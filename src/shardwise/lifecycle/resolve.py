"""Which checkpoints there are, where each came from, and which one is meant; it only reads, so every rank may call it.

A run that was rolled back goes on beside the checkpoints that it left. Names do not show which of them belong to it:
step 60 of the abandoned line is not newer than step 45 of the present one. So each checkpoint has a small file that
says which one it is and which checkpoints of its root came before it. The *present line* is the newest checkpoint with
those. What is not on it was either abandoned (it came from a checkpoint of the line) or is another run's.

Order is never by time stamps: a clock that jumps, a copy or a restored backup must not change what is newest. What was
published later is newer; checkpoints without a lineage count as older than all others and are ordered by ``(epoch,
step)``. With a step that counts on through the epochs this is the order of the steps; with one that starts again in
every epoch, ordering by step alone would take the end of an old epoch for the newest and let retention delete the
newest instead. The one case that this order gets wrong, epoch numbers that run backwards after a change of the data, is
decided by ``LATEST``, which is set by publication and always comes first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import operator
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsIndex

from shardwise.disk.guarded import read_note
from shardwise.disk.names import exists, is_directory, is_file, is_link, is_there, names_in, real_path
from shardwise.disk.storage import current, storage_errors
from shardwise.errors import CheckpointNotFoundError, IncompleteCheckpointError, MisuseError, ShardwiseError
from shardwise.format.manifest import read_manifest
from shardwise.format.notes import DCP_METADATA_NAME
from shardwise.lifecycle.names import (
    LATEST,
    LINEAGE_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    foreign_numbers,
    is_doomed,
    is_temporary,
    parse_checkpoint_name,
)
from shardwise.lifecycle.pointers import announced, linked_checkpoint, read_pointer

_LINEAGE_LIMIT = 1 << 24
_LINEAGE_VERSION = 1


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
            "version": _LINEAGE_VERSION,
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
    data = read_note(directory, LINEAGE_NAME, _LINEAGE_LIMIT)
    if data is None:
        return None
    try:
        document = json.loads(data)
        if document["version"] != _LINEAGE_VERSION:
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


logger = logging.getLogger(__name__)

#: What ``save_pretrained`` writes.
_SAVE_PRETRAINED = frozenset({"config.json", "adapter_config.json"})
_METRICS_LIMIT = 1 << 20
_LISTED = 8


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A directory of the root that has a checkpoint's name, ``epoch_E_step_S``.

    Attributes:
        complete: It may be resumed from.
        verifiable: It has a manifest. A complete one without (another tool's) cannot be checked.
        metrics: Finite numbers of its ``losses.json``.
        measurable: Its ``losses.json`` is absent or what it should be; of a damaged one nobody knows what it said.
        lineage: Where it came from; ``None`` where it was saved without one, by another tool or an older release.
        linked: It is a link to a directory elsewhere.
    """

    name: str
    epoch: int
    step: int
    complete: bool
    path: Path
    verifiable: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    measurable: bool = True
    lineage: Lineage | None = None
    linked: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by name."""
        return self.epoch, self.step

    @property
    def sequence(self) -> int:
        """Number of its publication in its root, from 1; 0 where it has no lineage."""
        return 0 if self.lineage is None else self.lineage.sequence

    @property
    def tree(self) -> str:
        """What it has in common with all that have the same first ancestor."""
        return "" if self.lineage is None else self.lineage.tree


@dataclass(frozen=True, slots=True)
class ResolvedCheckpoint:
    """A complete checkpoint to resume from.

    Attributes:
        name: Last component of ``path``.
        epoch: From the name, also in the forms that other tools use, or of a copy with another name from its lineage or
            manifest; ``None`` where none of them says.
        step: Likewise.
        verifiable: It has a manifest.
        metrics: Finite numbers of its ``losses.json``.
    """

    path: Path
    name: str
    epoch: int | None
    step: int | None
    verifiable: bool
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)


def is_verifiable(directory: Path) -> bool:
    """Whether the directory holds a manifest, which is what a save writes last."""
    return is_file(directory / MANIFEST_NAME)


def is_complete(directory: Path) -> bool:
    """Whether the directory may be resumed from.

    It has a manifest, or is another tool's: a ``model/`` with something in it, or DCP's ``.metadata``, written last. A
    manifest that is a link to what is not there is one all the same: its content lies elsewhere (git-annex) and has to
    be fetched, and nothing says that the save was interrupted.
    """
    has_manifest = is_verifiable(directory) or is_link(directory / MANIFEST_NAME)
    if has_manifest or is_file(directory / DCP_METADATA_NAME):
        return True
    model = directory / "model"
    return is_directory(model) and bool(names_in(model))


def list_checkpoints(root: Path) -> tuple[CheckpointInfo, ...]:
    """Every directory of the root with a checkpoint's name, by epoch and step; a root that does not exist has none.

    Names are read, and the small files beside the tensors. A link to a directory elsewhere counts as the checkpoint
    that it is called (`linked_checkpoint`); any other link is a pointer, whatever it is called.
    """
    found = []
    with storage_errors(root):
        if not exists(root):
            return ()
        for entry in current().entries(root):
            numbers = parse_checkpoint_name(entry.name)
            directory = root / entry.name
            linked = linked_checkpoint(root, entry.name)
            if numbers is None or not (entry.kind == "directory" or linked):
                continue
            metrics, lineage = read_metrics(directory), read_lineage(directory)
            info = CheckpointInfo(
                entry.name,
                *numbers,
                complete=is_complete(directory),
                path=directory,
                verifiable=is_verifiable(directory),
                metrics=metrics or {},
                measurable=metrics is not None,
                lineage=lineage,
                linked=linked,
            )
            found.append(info)
    return tuple(sorted(found, key=lambda info: info.order))


def newest(checkpoints: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """The complete one that was published last."""
    complete = (info for info in checkpoints if info.complete)
    return max(complete, key=lambda info: (info.sequence, info.order), default=None)


def read_metrics(directory: Path) -> dict[str, float] | None:
    """The finite numbers at the top level of ``losses.json``; ``None`` where it is there and cannot be read."""
    path = directory / METRICS_NAME
    data = read_note(directory, METRICS_NAME, _METRICS_LIMIT)
    if data is None:
        return None if is_there(path) else {}
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        # Metrics choose what is best, they are not needed to resume; verify reports the damage.
        logger.warning("%s is not JSON and is left out of account: %s", path, error)
        return None
    if not isinstance(document, dict):
        return None
    numbers: dict[str, float] = {}
    for key, value in document.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                numbers[key] = float(value)
    return {key: number for key, number in numbers.items() if math.isfinite(number)}


def resolve(root: Path, restore_from: str | Path | int = LATEST) -> ResolvedCheckpoint | None:
    """Find the checkpoint that ``restore_from`` means: it is complete.

    ``restore_from`` is ``LATEST``, another pointer's name, the name of a directory in the root, a path (a `Path`, or
    text that names nothing in the root), or the number of a step. Returns ``None`` only for ``LATEST`` of a root in
    which no checkpoint was published. What is not there is a `CheckpointNotFoundError` that lists what there is, an
    interrupted save an `IncompleteCheckpointError`.
    """
    if not isinstance(restore_from, str | Path):
        if isinstance(restore_from, bool) or not isinstance(restore_from, SupportsIndex):
            raise MisuseError(
                f"restore_from is {restore_from!r}",
                hint=f"Pass {LATEST!r}, another pointer's or a checkpoint's name, a path, or the number of a step.",
            )
        return _of_step(root, operator.index(restore_from))
    with storage_errors(root):
        if isinstance(restore_from, Path):
            return _at_path(root, restore_from)
        if restore_from == LATEST:
            return _latest(root)
        return _named(root, restore_from)


def _of_step(root: Path, step: int) -> ResolvedCheckpoint:
    found = [info for info in list_checkpoints(root) if info.step == step]
    complete = [info for info in found if info.complete]
    if len(complete) > 1:
        raise MisuseError(
            f"there are several checkpoints of step {step}: {', '.join(info.name for info in complete)}",
            hint="Pass the name of the one that you mean.",
        )
    if not found:
        raise CheckpointNotFoundError(f"there is no checkpoint of step {step}", path=root, hint=_what_is_there(root))
    [chosen] = complete or found[:1]
    return _checked(root, chosen.path, chosen.name)


def _latest(root: Path) -> ResolvedCheckpoint | None:
    name = publication_begun(root)
    if name is not None:
        return _describe(root / name)
    problem = None
    try:
        name = read_pointer(root, LATEST)
        if name is None:
            # Copying tools that follow links leave a directory in the pointer's place: the copy is as good.
            name = LATEST if is_directory(root / LATEST) else None
        if name is not None:
            return _checked(root, root / name, f"{LATEST} leads to {name}, which")
    except (CheckpointNotFoundError, IncompleteCheckpointError) as error:
        problem = error
    checkpoints = list_checkpoints(root)
    fallback = newest(checkpoints)
    if fallback is not None:
        if problem is not None:
            logger.warning("%s Falling back to %s.", problem.message, fallback.name)
        return _describe(root / fallback.name)
    if problem is not None:
        # There was a checkpoint once. Starting afresh without a word would bury its loss.
        raise problem
    if checkpoints:
        logger.warning("%s holds interrupted saves only: %s", root, ", ".join(info.name for info in checkpoints))
    return None


def publication_begun(root: Path) -> str | None:
    """Name of the checkpoint that was published and is not ``LATEST`` yet: a crash came between the two."""
    name, known_as = announced(root) or ("", "")
    if not parse_checkpoint_name(name) or not is_complete(root / name):
        return None
    if known_as:  # another one may still be there under this name, which was to be replaced
        lineage = read_lineage(root / name)
        return name if lineage is not None and lineage.own.id == known_as else None
    return name


def _named(root: Path, text: str) -> ResolvedCheckpoint:
    name = text.rstrip(os.sep)
    if not text.strip():
        raise CheckpointNotFoundError("restore_from is empty", path=root, hint=_what_is_there(root))
    if name and os.sep not in name and name not in (".", ".."):
        target = None if linked_checkpoint(root, name) else read_pointer(root, name)
        if target is not None:
            return _checked(root, root / target, f"The pointer {name} leads to {target}, which")
        if is_there(root / name):
            return _checked(root, root / name, name)
    return _at_path(root, Path(text))


def _at_path(root: Path, path: Path) -> ResolvedCheckpoint:
    path = path.expanduser()
    if path.name and not is_there(path):
        target = read_pointer(path.parent, path.name)
        if target is not None:
            return _checked(path.parent, path.parent / target, f"The pointer {path.name} leads to {target}, which")
    try:
        real = real_path(path)
        real = real if exists(real) else path
    except (ValueError, OSError) as error:
        raise CheckpointNotFoundError(
            f"{str(path)!r} cannot be followed: {error}", path=path, hint=_what_is_there(root)
        ) from error
    return _checked(root, real, repr(str(path)))


def _checked(root: Path, directory: Path, label: str) -> ResolvedCheckpoint:
    kind: type[CheckpointNotFoundError | IncompleteCheckpointError] = CheckpointNotFoundError
    hint: str | None = None
    if is_temporary(directory.name) or is_doomed(directory.name):
        kind, what = IncompleteCheckpointError, "is an interrupted save"
    elif not is_there(directory):
        what = "does not exist"
    elif not is_directory(directory):
        what = "is not a directory"
    elif is_complete(directory):
        return _describe(directory)
    elif parse_checkpoint_name(directory.name) is None and not _SAVE_PRETRAINED.isdisjoint(names_in(directory)):
        what = "is a directory of a Hugging Face model or adapter, and no checkpoint of a run"
        hint = "There is nothing to resume in it: load its weights with load_base_model, or with load_model."
    else:
        kind = IncompleteCheckpointError
        what = f"has neither {MANIFEST_NAME} nor model/ nor .metadata: an interrupted save, or not a checkpoint"
    raise kind(f"{label} {what}", path=directory, hint=hint or _what_is_there(root))


def _describe(directory: Path) -> ResolvedCheckpoint:
    numbers: tuple[int | None, int | None] | None = parse_checkpoint_name(directory.name)
    verifiable = is_verifiable(directory)
    if numbers is None:  # a copy under another name, or another tool's
        lineage = read_lineage(directory)
        if lineage is not None:
            numbers = lineage.epoch, lineage.step
        else:
            numbers = _recorded_numbers(directory) if verifiable else foreign_numbers(directory.name)
    return ResolvedCheckpoint(directory, directory.name, *numbers, verifiable, read_metrics(directory) or {})


def _recorded_numbers(directory: Path) -> tuple[int | None, int | None]:
    """Epoch and step by the manifest, of a copy under another name that was saved before there were lineages."""
    try:
        info = read_manifest(directory / MANIFEST_NAME).info
    except ShardwiseError as error:
        logger.warning("%s does not tell the step: %s", directory, error)
        return None, None
    epoch, step = info.get("epoch"), info.get("step")
    return epoch if type(epoch) is int else None, step if type(step) is int else None


def _what_is_there(root: Path) -> str:
    names = [info.name for info in list_checkpoints(root) if info.complete] if is_directory(root) else []
    if not names:
        return f"{root} holds no complete checkpoint."
    shown = ", ".join(reversed(names[-_LISTED:])) + (", ..." if len(names) > _LISTED else "")
    return f"Complete checkpoints in {root}, newest first: {shown}."
