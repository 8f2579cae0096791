"""Filling held tensors from a source: compare, plan byte ranges, read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shardwise.comm import Group
from shardwise.engine.absent import absent_files_named
from shardwise.engine.near_names import listed, nearest
from shardwise.engine.sharing import NO_SHARING, PlannedReads, Sharing, find_replicas, finds_remote
from shardwise.errors import (
    DtypeMismatchError,
    MissingTensorError,
    ShapeMismatchError,
    UnexpectedTensorError,
)
from shardwise.io.reader import ReadCounts, Reader
from shardwise.io.sources import Source
from shardwise.io.storage import Storage
from shardwise.plan.collector import collector_paused
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.pieces import wanted_regions
from shardwise.plan.sharing import Replicas
from shardwise.stateful_wrappers.memory import require_own_elements
from shardwise.types import Box

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """What a load lets pass.

    Attributes:
        allow_missing: The checkpoint may lack tensors of the model, which then keep their values.
        allow_unexpected: The checkpoint may hold tensors that the model lacks.
        allow_cast: Dtypes may differ; values are cast to the model's.
        threads: Reads at once on each rank.
        exact: Name -> dtype that a tensor had in memory when it was saved in a wider one; reading it back into that
            dtype loses nothing and is always allowed.
        sharing: Whether replicas read the same bytes once.
        ignored: Names in the checkpoint that nobody has to have; the same on every rank.
    """

    allow_missing: bool = False
    allow_unexpected: bool = False
    allow_cast: bool = False
    threads: int = 1
    exact: Mapping[str, str] = field(default_factory=dict)
    sharing: Sharing = NO_SHARING
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LoadReport:
    """What a load did: names that the checkpoint lacked, names that the model lacked, and bytes."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    counts: ReadCounts


def load_tensors(
    held: Sequence[HeldTensor], source: Source, group: Group, storage: Storage, options: LoadOptions
) -> LoadReport:
    """Fill every fragment of ``held`` from ``source``. All ranks of the group call.

    Each rank reads the byte ranges that it needs and nothing more (but for small gaps between rows); with
    ``options.sharing`` replicas read each range once and pass it on. Nothing is written to the model before names,
    shapes and dtypes of all tensors agree on every rank.

    Raises:
        MissingTensorError: The model has a tensor that the source lacks; names the nearest.
        UnexpectedTensorError: The source has a tensor that no rank's model has; names the nearest.
        ShapeMismatchError: Shapes differ.
        DtypeMismatchError: Dtypes differ.
        IntegrityError: A file is shorter than its header promises.
    """
    return load_described(lambda: held, source, group, storage, options)


def load_described(
    describe: Callable[[], Sequence[HeldTensor]],
    source: Source,
    group: Group,
    storage: Storage,
    options: LoadOptions,
) -> LoadReport:
    """As `load_tensors`, for tensors that ``describe`` gives; what it fails with on one rank is raised on all."""
    started = time.monotonic()
    held, unclaimed, remote = _described(describe, source, group, storage, options)
    unexpected = [name for name in unclaimed if name not in options.ignored]
    source = source.located(lambda: _regions(held, source), group)
    replicas = None if source.apart else find_replicas(held, group, options.sharing, remote)
    reads = PlannedReads()
    missing: list[str] = []
    with group.together(f"comparing the model with {source.path}"), absent_files_named(source):
        reads, missing = plan_load(held, source, options, unexpected, replicas)
    reader = Reader(storage, source.files, options.threads)
    with group.together(f"reading {source.path}"):
        try:
            reads.execute(reader, group)
        finally:
            reader.close()
    if group.is_main:
        seconds = max(time.monotonic() - started, 1e-9)
        rate = reader.counts.read / 1e9 / seconds
        _LOG.info(
            "read %s: %.3f GB on rank 0 in %.2f s (%.2f GB/s)", source.path, reader.counts.read / 1e9, seconds, rate
        )
    return LoadReport(tuple(missing), tuple(unexpected), reader.counts)


@collector_paused()
def plan_load(
    held: Sequence[HeldTensor],
    source: Source,
    options: LoadOptions,
    unexpected: Sequence[str] = (),
    replicas: Replicas | None = None,
) -> tuple[PlannedReads, list[str]]:
    """Compare a model with a source and find this rank's reads. Local: no communication, and nothing is read.

    Args:
        held: What this rank holds.
        source: Where it is to come from.
        options: What may differ.
        unexpected: Names of the source that no rank wants.
        replicas: Ranks that want the same, where they share the reading.

    Returns:
        The reads, and the names that the source lacks.

    Raises:
        MissingTensorError: As for `load_tensors`, and so are the others.
        UnexpectedTensorError: The same.
        ShapeMismatchError: The same.
        DtypeMismatchError: The same.
        TensorError: Several elements of a tensor are one memory.
    """
    tensors = source.tensors
    missing = [tensor.spec.name for tensor in held if tensor.spec.name not in tensors]
    if missing and not options.allow_missing:
        raise _missing(missing, unexpected, source)
    if unexpected and not options.allow_unexpected:
        raise _unexpected_error(unexpected, [t.spec.name for t in held], source)
    reads = PlannedReads()
    for tensor in held:
        saved = tensors.get(tensor.spec.name)
        if saved is None:
            continue
        if saved.spec != tensor.spec:
            _compare(tensor, source, options)
        for fragment in tensor.fragments:
            require_own_elements(tensor.spec.name, fragment.data)
        reads.add(saved, tensor, replicas)
    return reads, missing


def listed_anywhere(own: Sequence[str], source: Source, group: Group) -> frozenset[str]:
    """The names of the source that one rank at least lists. All ranks call; what travels is a number for each name.

    The source has to be the same on every rank: what one of them alone leaves out belongs into this list instead.
    """
    mine, names = frozenset(own), sorted(source.tensors)
    _, counts = group.fold([], [int(name in mine) for name in names], "comparing what is wanted otherwise")
    return frozenset(name for name, count in zip(names, counts, strict=True) if count)


def _described(
    describe: Callable[[], Sequence[HeldTensor]],
    source: Source,
    group: Group,
    storage: Storage,
    options: LoadOptions,
) -> tuple[Sequence[HeldTensor], list[str], bool]:
    """What this rank holds; names that no rank wants; whether any rank's files are remote. In one exchange."""
    names = [] if source.apart else sorted(source.tensors)  # of what is apart there is nothing but what is wanted
    held: Sequence[HeldTensor] = ()
    wants, remote = [0] * len(names), False
    failure: Exception | None = None
    try:
        held = describe()
        own = {tensor.spec.name for tensor in held} if names else set()
        wants = [int(name in own) for name in names]
        remote = finds_remote(source, group, storage, options.sharing)
    except Exception as error:  # noqa: BLE001 - raised on every rank by fold()
        failure = error
    _, (*wanted, remotes) = group.fold([], [*wants, int(remote)], "comparing names", failure)
    return held, [name for name, count in zip(names, wanted, strict=True) if not count], bool(remotes)


def _regions(held: Sequence[HeldTensor], source: Source) -> dict[str, list[Box]]:
    """Regions that this rank wants of scattered tensors; what does not fit is no question yet."""
    wanted: dict[str, list[Box]] = {}
    for tensor in held:
        spec = tensor.spec
        saved = source.tensors.get(spec.name)
        if saved is None or saved.scattered is None or saved.spec.shape != spec.shape:
            continue
        wanted.setdefault(spec.name, []).extend(wanted_regions(tensor))
    return wanted


def _compare(tensor: HeldTensor, source: Source, options: LoadOptions) -> None:
    saved = source.tensors[tensor.spec.name]
    file = saved.scattered.file if saved.scattered is not None else saved.chunks[0].file if saved.chunks else -1
    where = source.files[file] if file >= 0 else source.path
    if saved.spec.shape != tensor.spec.shape:
        pieces = saved.scattered is not None or any(chunk.box.sizes != saved.spec.shape for chunk in saved.chunks)
        pieces = pieces or where.name.startswith("shard-")
        raise ShapeMismatchError(
            f"the model's shape is {list(tensor.spec.shape)}, the checkpoint's {list(saved.spec.shape)}",
            path=where,
            tensor=tensor.spec.name,
            hint=("A file of the checkpoint's shards may be missing; otherwise build" if pieces else "Build")
            + " the model from the checkpoint's own config.json.",
        )
    exact = options.exact.get(tensor.spec.name) == tensor.spec.dtype
    if saved.spec.dtype != tensor.spec.dtype and not options.allow_cast and not exact:
        raise DtypeMismatchError(
            f"the model's dtype is {tensor.spec.dtype}, the checkpoint's {saved.spec.dtype}",
            path=where,
            tensor=tensor.spec.name,
            hint="Build the model in the checkpoint's dtype, or load it as a base model, which casts.",
        )


def _missing(names: Sequence[str], unclaimed: Sequence[str], source: Source) -> MissingTensorError:
    close = nearest(names[0], unclaimed or source.tensors)
    hint = "Build the model from the checkpoint's own config.json, or allow a subset of the keys."
    if close is not None and unclaimed:
        hint = f"The checkpoint has {close!r}; is it the same tensor under another name (key_mapping)?"
    elif close is not None:
        hint = f"The nearest name there is {close!r}, which the model has too. {hint}"
    return MissingTensorError(
        f"the checkpoint lacks {len(names)} of the model's tensors: {listed(names)}",
        path=source.path,
        tensor=names[0],
        hint=hint,
    )


def _unexpected_error(names: Sequence[str], own: Sequence[str], source: Source) -> UnexpectedTensorError:
    close = nearest(names[0], [name for name in own if name not in source.tensors])
    hint = "Build the model from the checkpoint's own config.json."
    if close is not None:
        hint = f"The model has {close!r}; is it the same tensor under another name (key_mapping)?"
    elif (close := nearest(names[0], own)) is not None:
        hint = f"The nearest name in the model is {close!r}, which the checkpoint has too. {hint}"
    return UnexpectedTensorError(
        f"the checkpoint holds {len(names)} tensors that the model lacks: {listed(names)}",
        path=source.path,
        tensor=names[0],
        hint=hint,
    )
