"""Filling held tensors from a source: compare, plan byte ranges, read."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from shardwise.comm import Group
from shardwise.disk.storage import Storage
from shardwise.engine.missing_files import missing_files_named
from shardwise.engine.name_suggestions import Shapes, listed, nearest
from shardwise.engine.sharing import NO_SHARING, PlannedReads, Sharing, find_replicas, finds_remote
from shardwise.errors import (
    DtypeMismatchError,
    MissingTensorError,
    ShapeMismatchError,
    UnexpectedTensorError,
)
from shardwise.geometry import Box
from shardwise.plan.deferred import Buffers, split
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.pieces import wanted_regions
from shardwise.plan.reads import SourceTensor, plan_reads
from shardwise.plan.sharing import Replicas
from shardwise.sources.reader import ReadCounts, Reader
from shardwise.sources.sources import Source
from shardwise.stateful_wrappers.memory import require_own_elements

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
    return open_described(describe, source, group, storage, options).read()


@dataclass(frozen=True, slots=True, eq=False)
class Later:
    """What there is for a module that takes its state itself.

    Attributes:
        owner: The module, as `shardwise.plan.deferred.Deferred` names it.
        tensors: What is saved, and which part of it is wanted.
    """

    owner: object
    tensors: list[tuple[SourceTensor, HeldTensor]]


@dataclass(frozen=True)
class OpenedLoad:
    """A load of which all is known to fit, on every rank, and nothing has been read.

    Attributes:
        source: Where it comes from.
        group: The ranks that load together.
        storage: Through what.
        options: What may differ.
        reads: What this rank reads into its memory.
        later: What goes to modules that take their state themselves: each owner with what there is for it.
        missing: Names that the source lacks.
        unexpected: Names of the source that no rank wants.
        asked: Whether any rank's answer to ``asks`` was yes.
    """

    source: Source
    group: Group
    storage: Storage
    options: LoadOptions
    reads: PlannedReads
    later: Mapping[int, Later]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    asked: bool

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[object], dict[str, torch.Tensor]]]:
        """Inside, what there is for a module that takes its state itself can be read, by its own names. Local."""
        reader = Reader(self.storage, self.source.files, self.options.threads)

        def values(owner: object) -> dict[str, torch.Tensor]:
            later = self.later.get(id(owner))
            buffers = Buffers()
            for saved, tensor in () if later is None else later.tensors:
                reader.execute(list(plan_reads(saved, buffers.behind(tensor))))
            return buffers.values()

        try:
            yield values
        finally:
            reader.close()

    def read(self) -> LoadReport:
        """Fill what was described. All ranks of the group call, once.

        Raises:
            IntegrityError: A file is shorter than its header promises.
        """
        source, group = self.source, self.group
        started = time.monotonic()
        reader = Reader(self.storage, source.files, self.options.threads)
        with group.together(f"reading {source.path}"):
            try:
                self.reads.execute(reader, group)
            finally:
                reader.close()
        if group.is_main:
            seconds = max(time.monotonic() - started, 1e-9)
            rate = reader.counts.read / 1e9 / seconds
            _LOG.info(
                "read %s: %.3f GB on rank 0 in %.2f s (%.2f GB/s)", source.path, reader.counts.read / 1e9, seconds, rate
            )
        return LoadReport(self.missing, self.unexpected, reader.counts)


def open_described(
    describe: Callable[[], Sequence[HeldTensor]],
    source: Source,
    group: Group,
    storage: Storage,
    options: LoadOptions,
    asks: Callable[[], bool] = bool,
) -> OpenedLoad:
    """Compare what ``describe`` gives with ``source``, and plan what to read. All ranks of the group call.

    Args:
        describe: Gives what this rank holds. Local.
        source: Where it comes from.
        group: The ranks that load together.
        storage: Through what.
        options: What may differ.
        asks: Something else to ask in the same exchange, once all is described. Local.

    Raises:
        TensorError: As `load_tensors`.
    """
    held, unclaimed, remote, asked = _described(describe, source, group, storage, options, asks)
    unexpected = [name for name in unclaimed if name not in options.ignored]
    source = source.located(lambda: _regions(held, source), group)
    replicas = find_replicas(held, group, options.sharing, remote)

    def plan() -> PlannedLoad:
        with missing_files_named(source):
            return plan_load(held, source, options, unexpected, replicas)

    reads, later, missing = group.attempt(plan, f"comparing the model with {source.path}")
    return OpenedLoad(source, group, storage, options, reads, later, tuple(missing), tuple(unexpected), asked)


class PlannedLoad(NamedTuple):
    """What a rank has to do; see `OpenedLoad`."""

    reads: PlannedReads
    later: dict[int, Later]
    missing: list[str]


def plan_load(
    held: Sequence[HeldTensor],
    source: Source,
    options: LoadOptions,
    unexpected: Sequence[str] = (),
    replicas: Replicas | None = None,
) -> PlannedLoad:
    """Compare a model with a source and find this rank's reads. Local: no communication, and nothing is read.

    Args:
        held: What this rank holds.
        source: Where it is to come from.
        options: What may differ.
        unexpected: Names of the source that no rank wants.
        replicas: Ranks that want the same, where they share the reading.

    Returns:
        The reads, what modules take themselves, and the names that the source lacks.

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
        raise _missing(missing, unexpected, source, _shapes(held))
    if unexpected and not options.allow_unexpected:
        raise _unexpected_error(unexpected, _shapes(held), source)
    reads = PlannedReads()
    later: dict[int, Later] = {}
    for tensor in held:
        saved = tensors.get(tensor.spec.name)
        if saved is None:
            continue
        if saved.spec != tensor.spec:
            _compare(tensor, source, options)
        direct, theirs = split(tensor)
        if direct is not None:
            for fragment in direct.fragments:
                require_own_elements(tensor.spec.name, fragment.data)
            reads.add(saved, direct, replicas)
        for owner, part in theirs:
            later.setdefault(id(owner), Later(owner, [])).tensors.append((saved, part))
    reads.rehearse()
    return PlannedLoad(reads, later, missing)


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
    asks: Callable[[], bool],
) -> tuple[Sequence[HeldTensor], list[str], bool, bool]:
    """What this rank holds; names that no rank wants; whether any rank's files are remote, and any asks.

    In one exchange.
    """
    names = sorted(source.tensors)
    held: Sequence[HeldTensor] = ()
    wants, remote, asked = [0] * len(names), False, False
    failure: Exception | None = None
    try:
        held = describe()
        own = {tensor.spec.name for tensor in held}
        wants = [int(name in own) for name in names]
        remote = finds_remote(source, group, storage, options.sharing)
        asked = asks()
    except Exception as error:  # noqa: BLE001 - raised on every rank by fold()
        failure = error
    _, (*wanted, remotes, asks_any) = group.fold([], [*wants, int(remote), int(asked)], "comparing names", failure)
    unclaimed = [name for name, count in zip(names, wanted, strict=True) if not count]
    return held, unclaimed, bool(remotes), bool(asks_any)


def _regions(held: Sequence[HeldTensor], source: Source) -> dict[str, list[Box]]:
    """Regions that this rank wants of tensors with remote pieces; a mismatch of shapes is reported later."""
    wanted: dict[str, list[Box]] = {}
    for tensor in held:
        spec = tensor.spec
        saved = source.tensors.get(spec.name)
        if saved is None or saved.remote is None or saved.spec.shape != spec.shape:
            continue
        wanted.setdefault(spec.name, []).extend(wanted_regions(tensor))
    return wanted


def _compare(tensor: HeldTensor, source: Source, options: LoadOptions) -> None:
    saved = source.tensors[tensor.spec.name]
    file = saved.remote.file if saved.remote is not None else saved.chunks[0].file if saved.chunks else -1
    where = source.files[file] if file >= 0 else source.path
    if saved.spec.shape != tensor.spec.shape:
        pieces = saved.remote is not None or any(chunk.box.sizes != saved.spec.shape for chunk in saved.chunks)
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


def _shapes(held: Sequence[HeldTensor]) -> dict[str, tuple[int, ...]]:
    return {tensor.spec.name: tensor.spec.shape for tensor in held}


def _with_saved(name: str, own: Mapping[str, tuple[int, ...]], names: Sequence[str], source: Source) -> Shapes:
    """Shapes of one name and of those that it is compared with."""
    saved = {other: source.tensors[other].spec.shape for other in names if other in source.tensors}
    return {**own, **saved, **({name: own[name]} if name in own else {})}


def _missing(
    names: Sequence[str], unclaimed: Sequence[str], source: Source, own: Mapping[str, tuple[int, ...]]
) -> MissingTensorError:
    shapes = _with_saved(names[0], own, unclaimed, source) if unclaimed else None
    close = nearest(names[0], unclaimed or source.tensors, shapes)
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


def _unexpected_error(
    names: Sequence[str], own: Mapping[str, tuple[int, ...]], source: Source
) -> UnexpectedTensorError:
    shapes = _with_saved(names[0], own, names[:1], source)
    close = nearest(names[0], [name for name in own if name not in source.tensors], shapes)
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
