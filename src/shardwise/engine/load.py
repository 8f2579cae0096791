"""Filling held tensors: compare, plan byte ranges, read.

Every load goes this way. What a checkpoint and a base model differ in is in their `LoadSource`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, Self

import torch

from shardwise.comm import FirstFailure, Group
from shardwise.disk.names import exists, is_directory
from shardwise.disk.storage import Storage
from shardwise.engine.name_suggestions import listed, nearest
from shardwise.engine.progress import Progress
from shardwise.engine.sharing import PlannedReads, Replicas, find_replicas, finds_remote
from shardwise.engine.verify import load_manifest
from shardwise.errors import (
    CheckpointNotFoundError,
    DtypeMismatchError,
    MissingTensorError,
    ShapeMismatchError,
    ShardwiseError,
    UnexpectedTensorError,
)
from shardwise.format.manifest import Manifest
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.deferred import Buffers, split
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import SourceTensor, wanted_regions
from shardwise.sources.reader import ReadCounts, Reader
from shardwise.sources.sources import Source
from shardwise.stateful_wrappers.memory import require_own_elements
from shardwise.timing import count_bytes, phase

#: How many directories are looked through for a manifest: the one that is read, and those around it.
_MAX_LEVELS = 3


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
        sharing: Whether replicas read the same bytes once, see `find_replicas`.
        stage: The pipeline's, of this rank.
        ignored: Names in the checkpoint that nobody has to have; the same on every rank.
    """

    allow_missing: bool = False
    allow_unexpected: bool = False
    allow_cast: bool = False
    threads: int = 1
    exact: Mapping[str, str] = field(default_factory=dict)
    sharing: str = "never"
    stage: int = 0
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LoadReport:
    """What a load did: names that the checkpoint lacked, and that the model lacked, and bytes."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    counts: ReadCounts


@dataclass(frozen=True)
class LoadSource:
    """What a load reads from: the tensors of a checkpoint, or of any files of a model.

    Names, shapes and dtypes have to be the model's. A base model (`shardwise.base.source.BaseSource`) has tensors
    beside the stored ones, lets other differences pass, and has other words for its errors. Nothing here communicates
    or reads.
    """

    plain: Source  #: The stored tensors that byte ranges can read.

    def located(self, plain: Source) -> Self:
        """The same where more is known of the stored tensors' pieces."""
        return replace(self, plain=plain)

    def names(self) -> Collection[str]:
        """All names that a model may want; whether one is among them is known in constant time."""
        return self.plain.tensors.keys()

    def unexpected(self, unwanted: Sequence[str], options: LoadOptions) -> list[str]:
        """Those of the names that no rank wants that somebody has to have."""
        return [name for name in unwanted if name not in options.ignored]

    def compare(
        self, specs: Sequence[TensorSpec], unexpected: Sequence[str], options: LoadOptions, *, dtypes: bool = True
    ) -> None:
        """Compare what a rank wants, under its names in the files, with what there is.

        ``unexpected`` are names that no rank wants; without ``dtypes`` these are not compared, since tensors that
        conversion computes have their own.

        Raises:
            TensorError: Names, shapes or dtypes differ.
            QuantizationError: A base is quantized in a way that cannot be undone.
        """
        tensors = self.plain.tensors
        missing = [spec.name for spec in specs if spec.name not in tensors]
        if missing and not options.allow_missing:
            _refuse_names(MissingTensorError, missing, specs, unexpected, self.plain)
        if unexpected and not options.allow_unexpected:
            _refuse_names(UnexpectedTensorError, unexpected, specs, unexpected, self.plain)
        for spec in specs:
            saved = tensors.get(spec.name)
            if saved is not None and saved.spec != spec:
                _compare(spec, saved, self.plain, options, dtypes)

    def add(self, tensor: HeldTensor, reads: PlannedReads, replicas: Replicas | None) -> None:
        """Plan how a tensor that is there is filled, by this rank or by ``replicas`` that want the same.

        Raises `TensorError`: several elements of the tensor are one memory, or the source does not cover it.
        """
        for fragment in tensor.fragments:
            require_own_elements(tensor.spec.name, fragment.data)
        reads.add(self.plain.tensors[tensor.spec.name], tensor, replicas)


@dataclass(frozen=True)
class OpenedLoad:
    """A load of which all is known to fit, on every rank, and nothing has been read.

    Attributes:
        reads: What this rank reads into its memory.
        later: The identity of a module that takes its state itself -> the tensors that there are for it.
        missing: Names that the source lacks.
        unexpected: Names of the source that no rank wants.
        asked: Whether any rank's answer to ``asks`` was yes.
    """

    source: LoadSource
    group: Group
    storage: Storage
    options: LoadOptions
    reads: PlannedReads
    later: Mapping[int, Sequence[HeldTensor]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    asked: bool

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[object], dict[str, torch.Tensor]]]:
        """Inside, what there is for a module that takes its state itself can be read, by its own names. Local."""
        with contextlib.closing(Reader(self.storage, self.source.plain.files, self.options.threads)) as reader:

            def values(owner: object) -> dict[str, torch.Tensor]:
                buffers, reads = Buffers(), PlannedReads()
                for tensor in self.later.get(id(owner), ()):
                    self.source.add(buffers.behind(tensor), reads, None)
                reads.execute(reader, self.group)
                return buffers.values()

            yield values

    @phase("read")
    def read(self) -> LoadReport:
        """Fill what was described. All ranks of the group call, once.

        Each rank reads the byte ranges that it needs and nothing more (but for small gaps between rows); values are
        cast to the dtype of the memory that they go to. Extra memory: the reader's buffers (4 MiB for each thread), and
        about 20 MiB while quantized tensors are read. Raises `IntegrityError`: a file is shorter than its header
        promises.
        """
        source, group = self.source.plain, self.group
        progress = Progress(f"loading {source.path.name}", self.reads.nbytes, group.is_main)
        observe = (lambda _file, _offset, length: progress.add(length)) if group.is_main else None
        reader = Reader(self.storage, source.files, self.options.threads, observe)
        with group.together(f"reading {source.path}"), progress, contextlib.closing(reader):
            self.reads.execute(reader, group)
        count_bytes(reader.counts.read)
        return LoadReport(self.missing, self.unexpected, reader.counts)


@phase("plan")
def open_load(
    describe: Callable[[], Sequence[HeldTensor]],
    source: LoadSource,
    group: Group,
    storage: Storage,
    options: LoadOptions,
    asks: Callable[[], bool] = bool,
) -> OpenedLoad:
    """Compare what ``describe`` gives with ``source``, and plan what to read. All ranks of the group call.

    ``asks``, local as ``describe`` is, is something else to ask in the same exchange, once all is described. Nothing is
    written to the model before names, shapes and dtypes of all tensors agree on every rank.

    Raises:
        MissingTensorError: The model has a tensor that the source lacks; names the nearest.
        UnexpectedTensorError: The source has a tensor that no rank's model has; names the nearest.
        ShapeMismatchError: Shapes differ.
        DtypeMismatchError: Dtypes differ.
    """
    held, unexpected, remote, asked = _described(describe, source, group, storage, options, asks)
    source = source.located(source.plain.located(lambda: _regions(held, source.plain), group))
    shared = [tensor for tensor in held if tensor.parts]
    replicas = find_replicas(shared, group, options.sharing, options.stage, remote)
    names = source.names()

    def plan() -> tuple[PlannedReads, dict[int, list[HeldTensor]]]:
        reads = PlannedReads()
        later: dict[int, list[HeldTensor]] = {}
        with missing_files_named(source.plain):
            source.compare([tensor.spec for tensor in held], unexpected, options)
            for tensor in held:
                if tensor.spec.name not in names or not tensor.parts:
                    continue
                direct, theirs = split(tensor)
                if direct is not None:
                    source.add(direct, reads, replicas)
                for owner, part in theirs:
                    later.setdefault(id(owner), []).append(part)
        reads.rehearse()
        return reads, later

    reads, later = group.attempt(plan, f"comparing the model with {source.plain.path}")
    missing = tuple(tensor.spec.name for tensor in held if tensor.spec.name not in names)
    return OpenedLoad(source, group, storage, options, reads, later, missing, tuple(unexpected), asked)


def compare_load(
    describe: Callable[[], Sequence[HeldTensor]],
    source: LoadSource,
    group: Group,
    storage: Storage,
    options: LoadOptions,
) -> None:
    """As `open_load`, for a model that may have no memory yet: nothing is planned. All ranks of the group call.

    Raises `TensorError`, `QuantizationError`: model and source do not fit.
    """
    held, unexpected, _, _ = _described(describe, source, group, storage, options, bool)

    def compare() -> None:
        with missing_files_named(source.plain):
            source.compare([tensor.spec for tensor in held], unexpected, options)

    group.attempt(compare, f"comparing the model with {source.plain.path}")


def listed_anywhere(own: Sequence[str], source: Source, group: Group) -> frozenset[str]:
    """The names of the source that one rank at least lists. All ranks call; what travels is a number for each name.

    The source has to be the same on every rank: what one of them alone leaves out belongs into this list instead.
    """
    mine, names = frozenset(own), sorted(source.tensors)
    _, counts = group.fold([], [int(name in mine) for name in names], "comparing what is wanted otherwise")
    return frozenset(name for name, count in zip(names, counts, strict=True) if count)


def _described(
    describe: Callable[[], Sequence[HeldTensor]],
    source: LoadSource,
    group: Group,
    storage: Storage,
    options: LoadOptions,
    asks: Callable[[], bool],
) -> tuple[Sequence[HeldTensor], list[str], bool, bool]:
    """What this rank holds; unexpected names; whether any rank's files are remote, and any asks: in one exchange."""
    names = sorted(source.names())
    held: Sequence[HeldTensor] = ()
    wants, remote, asked = [0] * len(names), False, False
    kept = FirstFailure()
    with kept:
        held = describe()
        own = {tensor.spec.name for tensor in held}
        wants = [int(name in own) for name in names]
        remote = finds_remote(source.plain, group, storage, options.sharing)
        asked = asks()
    _, (*wanted, remotes, asks_any) = group.fold([], [*wants, int(remote), int(asked)], "comparing names", kept.error)
    unwanted = [name for name, count in zip(names, wanted, strict=True) if not count]
    return held, source.unexpected(unwanted, options), bool(remotes), bool(asks_any)


def _regions(held: Sequence[HeldTensor], source: Source) -> dict[str, list[Box]]:
    """Regions that this rank wants of tensors with remote pieces; a mismatch of shapes is reported later."""
    wanted: dict[str, list[Box]] = {}
    for tensor in held:
        saved = source.tensors.get(tensor.spec.name)
        if saved is not None and saved.remote is not None and saved.spec.shape == tensor.spec.shape:
            wanted.setdefault(tensor.spec.name, []).extend(wanted_regions(tensor))
    return wanted


def _compare(spec: TensorSpec, saved: SourceTensor, source: Source, options: LoadOptions, dtypes: bool) -> None:
    file = saved.remote.file if saved.remote is not None else saved.chunks[0].file if saved.chunks else -1
    where = source.files[file] if file >= 0 else source.path
    if saved.spec.shape != spec.shape:
        pieces = saved.remote is not None or any(chunk.box.sizes != saved.spec.shape for chunk in saved.chunks)
        pieces = pieces or where.name.startswith("shard-")
        what = f"the model's shape is {list(spec.shape)}, the checkpoint's {list(saved.spec.shape)}"
        build = "A file of the checkpoint's shards may be missing; otherwise build" if pieces else "Build"
        hint = f"{build} the model from the checkpoint's own config.json."
        raise ShapeMismatchError(what, path=where, tensor=spec.name, hint=hint)
    exact = options.exact.get(spec.name) == spec.dtype
    if dtypes and saved.spec.dtype != spec.dtype and not options.allow_cast and not exact:
        what = f"the model's dtype is {spec.dtype}, the checkpoint's {saved.spec.dtype}"
        hint = "Build the model in the checkpoint's dtype, or load it as a base model, which casts."
        raise DtypeMismatchError(what, path=where, tensor=spec.name, hint=hint)


def _refuse_names(
    kind: type[MissingTensorError | UnexpectedTensorError],
    names: Sequence[str],
    own: Iterable[TensorSpec],
    unexpected: Sequence[str],
    source: Source,
) -> NoReturn:
    """Refuse names that the checkpoint lacks, or that the model does; names the nearest on the other side."""
    shapes = {spec.name: spec.shape for spec in own}
    if kind is MissingTensorError:
        what, there, here = f"the checkpoint lacks {len(names)} of the model's tensors", "checkpoint", "model"
        hint = "Build the model from the checkpoint's own config.json, or allow a subset of the keys."
        candidates = unexpected
    else:
        what, there, here = f"the checkpoint holds {len(names)} tensors that the model lacks", "model", "checkpoint"
        hint = "Build the model from the checkpoint's own config.json."
        candidates = [name for name in shapes if name not in source.tensors]
    shared = [name for name in shapes if name in source.tensors]
    saved = {name: source.tensors[name].spec.shape for name in unexpected if name in source.tensors}
    if (close := nearest(names[0], candidates, shapes | saved)) is not None:
        hint = f"The {there} has {close!r}; is it the same tensor under another name (key_mapping)?"
    elif (close := nearest(names[0], shared)) is not None:
        hint = f"The nearest name in the {there} is {close!r}, which the {here} has too. {hint}"
    raise kind(f"{what}: {listed(names)}", path=source.path, tensor=names[0], hint=hint)


@contextlib.contextmanager
def missing_files_named(source: Source) -> Iterator[None]:
    """Give errors about tensors their path, and name the absent file where a manifest lists one.

    Raises `CheckpointNotFoundError`: a tensor file that belongs to what is loaded is absent, in place of the error
    about the tensor that it leaves incomplete.
    """
    try:
        yield
    except (MissingTensorError, ShapeMismatchError) as error:
        if error.path is None:
            error.path = str(source.path)
        absent = _missing_file(source.path)
        if absent is None:
            raise
        what = "this file of the checkpoint, which its manifest lists, is absent"
        hint = "Restore it from a copy, or choose another checkpoint; `shardwise verify` lists all that is missing."
        raise CheckpointNotFoundError(what, path=absent, tensor=error.tensor, hint=hint) from error


def saved_aliases(source: Source) -> dict[str, str]:
    """Aliases of the model's tensors -> the names that they are saved under, by the nearest manifest.

    Local. Empty where no manifest lists a file of the source, or where it cannot be read: the error about the tensor
    that is then missing says more.
    """
    with contextlib.suppress(OSError, ShardwiseError):
        for directory, manifest in _manifests(source.path):
            if not {directory / file.path for file in manifest.files}.isdisjoint(source.files):
                return {name: kept for of, name, kept in manifest.aliases if of == "model"}
    return {}


def _missing_file(path: Path) -> Path | None:
    """A tensor file at or below ``path`` that the nearest manifest lists and that does not exist."""
    # The error about the tensor says more than one about the manifest.
    with contextlib.suppress(OSError, ShardwiseError):
        for directory, manifest in _manifests(path):
            for file in manifest.files:
                found = directory / file.path
                if found.suffix == ".safetensors" and found.is_relative_to(path) and not exists(found):
                    return found
    return None


def _manifests(path: Path) -> Iterator[tuple[Path, Manifest]]:
    """The manifests of a directory and of those around it, the nearest first."""
    for directory in [path, *path.parents][:_MAX_LEVELS]:
        manifest = load_manifest(directory) if is_directory(directory) else None
        if manifest is not None:
            yield directory, manifest
