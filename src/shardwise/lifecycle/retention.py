"""Which checkpoints to keep: a pure decision, and a deletion that a crash cannot turn into a loss."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from shardwise.disk.names import is_directory, names_in
from shardwise.disk.storage import current, storage_errors
from shardwise.errors import ConfigError, StorageError
from shardwise.lifecycle.names import is_doomed, leftover_of, parse_checkpoint_name
from shardwise.lifecycle.pointers import announced, pointers
from shardwise.lifecycle.publish import remove_checkpoint
from shardwise.lifecycle.resolve import CheckpointInfo, branch_point, line_of, list_checkpoints, newest
from shardwise.settings import Settings


@dataclass(frozen=True, slots=True)
class Retention:
    """What to keep; a checkpoint stays if any rule wants it.

    Attributes:
        max_recent: The newest so many of the present line; ``None`` keeps everything, whatever the other rules say.
        every_k_steps: Those whose step is a multiple of this.
        best: So many with the best metric. Where no checkpoint has it, `prune` deletes none, since any may be the best;
            nor one whose metrics cannot be read.
        metric_mode: ``min`` where lower is better, ``max`` where higher is.
        metric_key: Key of the metric in ``losses.json``.
    """

    max_recent: int | None = None
    every_k_steps: int | None = None
    best: int | None = None
    metric_mode: str = "min"
    metric_key: str = "default"

    def __post_init__(self) -> None:
        for key, value in (("max_recent", self.max_recent), ("every_k_steps", self.every_k_steps), ("best", self.best)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{key} is {value!r}", hint="Use a whole number of at least 1, or leave it out.")
        if self.metric_mode not in ("min", "max"):
            raise ConfigError(f"metric_mode is {self.metric_mode!r}", hint="Use 'min' or 'max'.")

    @staticmethod
    def from_config(config: Settings) -> Retention:
        """The policy that a configuration asks for."""
        return Retention(
            config.max_recent_checkpoints,
            config.keep_every_k_steps,
            config.keep_best,
            config.best_metric_mode,
            config.best_metric_key,
        )


def rank_by_metric(checkpoints: Sequence[CheckpointInfo], policy: Retention) -> tuple[CheckpointInfo, ...]:
    """The complete checkpoints that have the metric, best first; of equals the newer comes first."""
    sign = 1 if policy.metric_mode == "min" else -1
    measured = [info for info in checkpoints if info.complete and policy.metric_key in info.metrics]
    by_age = sorted(measured, key=lambda info: info.order, reverse=True)
    return tuple(sorted(by_age, key=lambda info: sign * info.metrics[policy.metric_key]))


def present_line(checkpoints: Sequence[CheckpointInfo]) -> tuple[str, ...]:
    """Names of the complete checkpoints that the newest one came through, itself first."""
    last = newest(checkpoints)
    return () if last is None else line_of({info.name: info for info in checkpoints if info.complete}, last.name)


def best_checkpoint(checkpoints: Sequence[CheckpointInfo], policy: Retention) -> str | None:
    """Name of the checkpoint that the best-metric pointer should lead to: the best of the present line."""
    line = set(present_line(checkpoints))
    ranked = rank_by_metric([info for info in checkpoints if info.name in line], policy)
    return ranked[0].name if ranked else None


def select_doomed(
    checkpoints: Sequence[CheckpointInfo], pointed: AbstractSet[str], policy: Retention
) -> tuple[str, ...]:
    """Names to delete, oldest first. Pure.

    The rules count the present line: the newest checkpoint and those that it came from. What the run left behind when
    it was rolled back is kept as long as the checkpoint at which it left is among the newest of the line, and goes with
    it. A checkpoint that has nothing in common with the line is another run's, and stays.

    Never deleted: what a pointer names; the newest complete checkpoint; the newest complete one of the line that has a
    manifest (another tool's directory may be a save still under way); an incomplete directory (it is not known to be
    ours); one that is a link to a directory elsewhere, which takes no room here; with ``policy.best``, one whose
    metrics are damaged. That `lacks_metric` is for the caller to see to.
    """
    if policy.max_recent is None:
        return ()
    complete = sorted((info for info in checkpoints if info.complete), key=lambda info: (info.sequence, info.order))
    known = {info.name: info for info in complete}
    line = present_line(complete)
    present = [info for info in complete if info.name in set(line)]
    kept = {*line[: policy.max_recent], *pointed, *(info.name for info in complete if info.linked)}
    last_verifiable = newest([info for info in present if info.verifiable])
    if last_verifiable is not None:
        kept.add(last_verifiable.name)
    if policy.every_k_steps is not None:
        kept |= {info.name for info in present if info.step % policy.every_k_steps == 0}
    if policy.best is not None:
        kept |= {info.name for info in rank_by_metric(present, policy)[: policy.best]}
        kept |= {info.name for info in complete if not info.measurable}
    for info in complete:
        if info.name not in line:
            left_at = branch_point(info, line, known)
            if left_at is None or left_at < policy.max_recent:
                kept.add(info.name)
    return tuple(info.name for info in complete if info.name not in kept)


def lacks_metric(checkpoints: Sequence[CheckpointInfo], policy: Retention) -> bool:
    """Whether the best are to be kept and nobody can tell which they are: no checkpoint has the metric."""
    return policy.best is not None and not rank_by_metric(checkpoints, policy)


def prunable(root: Path, policy: Retention) -> tuple[str, ...]:
    """Names of the checkpoints that `prune` would delete now, oldest first. Any rank."""
    pointed = set(pointers(root).values())
    begun = announced(root)
    if begun is not None:
        pointed.add(begun[0])
    checkpoints = list_checkpoints(root)
    return () if lacks_metric(checkpoints, policy) else select_doomed(checkpoints, pointed, policy)


def prune(root: Path, policy: Retention) -> tuple[str, ...]:
    """Delete the checkpoints that the policy gives up; one rank calls, after the pointers are set.

    Each is first renamed to a name that nothing resolves, and that is made durable; what an interrupted call left is
    deleted by the next. Returns the names of the deleted. Everything is tried before the first refusal is raised.
    """
    refusals: list[StorageError] = []
    with storage_errors(root):
        # Of a component that stands alone the only copy may have such a name; its own next save sees to it.
        found = [name for name in names_in(root) if is_doomed(name)] if is_directory(root) else []
        leftovers = [root / name for name in found if parse_checkpoint_name(leftover_of(name) or "") is not None]
    for leftover in leftovers:
        try:
            with storage_errors(leftover):
                current().remove_tree(leftover)
        except StorageError as error:
            refusals.append(error)
    deleted: list[str] = []
    for name in prunable(root, policy):
        try:
            remove_checkpoint(root, name)
            deleted.append(name)
        except StorageError as error:
            error.path = error.path or str(root / name)
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return tuple(deleted)
