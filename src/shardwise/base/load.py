"""Fills held tensors from a base model: compares them with the files, and reads in bounded memory.

A base model may be quantized, may be in another dtype, and may come as ``.bin`` files; otherwise this is what
`shardwise.engine.load` does for checkpoints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from shardwise.base.quantized import QuantSettings, dequantized_pieces, fitted, read_dequantized, unsupported
from shardwise.comm import Group
from shardwise.convert import HeldGroup
from shardwise.disk.storage import Storage
from shardwise.dtypes import FLOATS, torch_dtype
from shardwise.engine.name_suggestions import listed
from shardwise.engine.progress import Progress
from shardwise.engine.sharing import NO_SHARING, PlannedReads, Sharing, find_replicas, finds_remote
from shardwise.errors import DtypeMismatchError, MissingTensorError, ShapeMismatchError
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.deferred import Buffers, refuse_stand_ins, split
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part
from shardwise.plan.quantized import Quantized
from shardwise.plan.sharing import Replicas
from shardwise.sources.reader import ReadCounts, Reader
from shardwise.sources.sources import Source
from shardwise.sources.torch_files import BinSource, fill_loose
from shardwise.stateful_wrappers.memory import require_own_elements

_LOG = logging.getLogger(__name__)

#: Lets modules take their state; is given a function that reads what there is for one of them, by its own names.
Install: TypeAlias = Callable[[Callable[[object], dict[str, torch.Tensor]]], None]

#: Dtypes between which values are cast without asking.
_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@dataclass(frozen=True)
class BaseSource:
    """The tensors of a base model.

    Attributes:
        plain: Its stored tensors, as far as byte ranges read them.
        bins: The ``.bin`` files behind it, where there are any.
        quantized: Tensors that exist once values and scales are multiplied; empty where that is not wanted.
        behind: Names of the stored tensors from which ``quantized`` is computed.
        scaled: Names of stored values whose scales are at hand, whether or not they are to be multiplied.
        settings: What its config says about quantization.
    """

    plain: Source
    bins: BinSource | None = None
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    behind: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()
    settings: QuantSettings | None = None

    @property
    def path(self) -> Path:
        """What was opened."""
        return self.plain.path

    @property
    def loose(self) -> Mapping[str, tuple[TensorSpec, Path]]:
        """Tensors of ``.bin`` files that byte ranges cannot read."""
        return {} if self.bins is None else self.bins.loose

    def names(self) -> tuple[str, ...]:
        """All names that a model may want: those of stored tensors, and of dequantized ones."""
        stored = (*self.plain.tensors, *self.loose)
        return tuple(dict.fromkeys((*stored, *self.quantized)))

    def stored(self, name: str) -> TensorSpec | None:
        """What a stored tensor is, or ``None``."""
        found = self.plain.tensors.get(name)
        if found is not None:
            return found.spec
        return self.loose[name][0] if name in self.loose else None


@dataclass(frozen=True)
class BaseOptions:
    """How a base is loaded.

    Attributes:
        allow_missing: Tensors that the base lacks keep their values.
        threads: Reads at once on each rank.
        observe: Called with every byte range read, ``(file, offset, length)``.
        sharing: Whether replicas read the same bytes once.
    """

    allow_missing: bool = False
    threads: int = 1
    observe: Callable[[int, int, int], None] | None = None
    sharing: Sharing = NO_SHARING


@dataclass(frozen=True)
class BaseLoadReport:
    """What loading a base did.

    Attributes:
        path: The base.
        missing: Names in the files of tensors that the base lacks and that kept their values, on this rank.
        unexpected: Names of tensors of the base that no rank's model has; the same on every rank.
        dequantized: Number of tensors dequantized, at least in part, on this rank.
        cast: Number of tensors whose dtype was changed to the model's on this rank.
        counts: Bytes that this rank asked for and read.
        seconds: Time that reading took on this rank.
    """

    path: Path
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    dequantized: int = 0
    cast: int = 0
    counts: ReadCounts = field(default_factory=ReadCounts)
    seconds: float = 0.0


@dataclass
class _Plan:
    """The reads and conversions of one rank."""

    reads: PlannedReads = field(default_factory=PlannedReads)
    quantized: list[tuple[Quantized, HeldTensor]] = field(default_factory=list)
    loose: list[HeldTensor] = field(default_factory=list)
    cast: int = 0
    dequantized: int = 0

    @property
    def nbytes(self) -> int:
        """Stored bytes that are about to be read, scales aside."""
        whole = self.reads.nbytes
        for tensor, held in self.quantized:
            elements = sum(f.box.numel for f in held.fragments)
            whole += elements // 2 if tensor.packed else elements
        return whole


def check_base(
    held: Sequence[HeldTensor], groups: Sequence[HeldGroup], source: BaseSource, group: Group, options: BaseOptions
) -> BaseLoadReport:
    """Compare names, shapes and dtypes, before anything is allocated or read. All ranks of the group call.

    Returns:
        A report of what would be missing and unexpected.

    Raises:
        MissingTensorError: The base lacks tensors; each is named with the nearest name that the base has to offer.
        ShapeMismatchError: Shapes differ.
        DtypeMismatchError: Dtypes differ in a way that a cast between floating-point dtypes does not settle.
        QuantizationError: The base is quantized in a way that cannot be undone here.
    """
    wanted = [tensor.spec for tensor in held] + [spec for each in groups for spec in each.computed.hub]
    unexpected = _unexpected([spec.name for spec in wanted], source, group)
    missing: list[str] = []
    with group.together(f"comparing the model with {source.path}"):
        _refuse_unsupported(wanted, source)
        refuse_stand_ins(tensor for each in groups for tensor in each.natives)
        available = set(source.names())
        missing = [spec.name for spec in wanted if spec.name not in available]
        if missing and not options.allow_missing:
            raise _missing([spec for spec in wanted if spec.name not in available], unexpected, source)
        for spec in wanted:
            if spec.name in available:
                _compare(spec, source)
    return BaseLoadReport(source.path, tuple(missing), tuple(unexpected))


def load_base_tensors(
    held: Sequence[HeldTensor],
    groups: Sequence[HeldGroup],
    source: BaseSource,
    group: Group,
    storage: Storage,
    options: BaseOptions,
    install: Install | None = None,
) -> BaseLoadReport:
    """Fill every fragment of ``held`` and the natives of ``groups``. All ranks of the group call.

    What modules take themselves is left to ``install``, which is given a way to read what there is for one of them.

    Each rank reads the byte ranges, blocks and scales that it needs and nothing more, but for small gaps between rows.
    With ``options.sharing`` replicas read each range once and pass it on, computed tensors excepted.
    Values are cast to the dtype of the memory that they go to. Extra memory: the reader's buffers (4 MiB for each
    thread) and about 20 MiB while quantized tensors are read; for `groups`, the tensors of one group at a time.

    Raises:
        TensorError, QuantizationError: As `check_base`.
        IntegrityError: A file is shorter than its header promises.
    """
    checked = check_base(held, groups, source, group, options)
    plan = _Plan()
    later: dict[int, list[HeldTensor]] = {}
    progress: Progress | None = None
    started = time.monotonic()
    with group.together("looking where the files are") as remote:
        remote.flag = finds_remote(source.plain, group, storage, options.sharing)
    replicas = find_replicas(held, group, options.sharing, remote.any)
    with group.together(f"planning what to read of {source.path}"):
        available = set(source.names())
        for tensor in held:
            if tensor.spec.name in available:
                direct, theirs = split(tensor)
                if direct is not None:
                    _plan_one(direct, source, plan, replicas)
                for owner, part in theirs:
                    later.setdefault(id(owner), []).append(part)
        progress = Progress(f"loading {source.path.name}", plan.nbytes, group.is_main)
    assert progress is not None
    reader = Reader(storage, source.plain.files, options.threads, _both(progress.add, options.observe))
    dequantized = plan.dequantized
    with group.together(f"reading {source.path}"):
        try:
            _execute(plan, source, reader, group)
            for each in groups:
                dequantized += _fill_group(each, source, reader, available, group)
        finally:
            reader.close()
            progress.close()
    if install is not None:
        reader = Reader(storage, source.plain.files, options.threads, options.observe)
        try:
            install(lambda owner: _values(later.get(id(owner), ()), source, reader, group))
        finally:
            reader.close()
    return BaseLoadReport(
        source.path,
        checked.missing,
        checked.unexpected,
        dequantized,
        plan.cast,
        reader.counts,
        time.monotonic() - started,
    )


def _values(wanted: Iterable[HeldTensor], source: BaseSource, reader: Reader, group: Group) -> dict[str, torch.Tensor]:
    """Read what there is for a module that takes its state itself. Local."""
    buffers, plan = Buffers(), _Plan()
    for tensor in wanted:
        _plan_one(buffers.behind(tensor), source, plan, None)
    _execute(plan, source, reader, group)
    return buffers.values()


def _both(
    first: Callable[[int], None], second: Callable[[int, int, int], None] | None
) -> Callable[[int, int, int], None]:
    def both(file: int, offset: int, length: int) -> None:
        first(length)
        if second is not None:
            second(file, offset, length)

    return both


def _execute(plan: _Plan, source: BaseSource, reader: Reader, group: Group) -> None:
    plan.reads.execute(reader, group)
    for tensor, held in plan.quantized:
        read_dequantized(tensor, held, reader)
    if plan.loose and source.bins is not None:
        copied = fill_loose(source.bins, plan.loose)
        reader.counts.wanted += copied
        reader.counts.read += copied


def _plan_one(tensor: HeldTensor, source: BaseSource, plan: _Plan, replicas: Replicas | None) -> None:
    name = tensor.spec.name
    if name in source.quantized and tensor.spec.dtype in FLOATS:
        quantized = fitted(source.quantized[name], tensor.spec.shape, source.path)
        if any(fragment.box.numel for fragment in tensor.fragments):
            plan.dequantized += 1
            alone = plan.reads.add_made(tensor, replicas, partial(dequantized_pieces, quantized))
            if alone.parts:
                plan.quantized.append((quantized, alone))
        return
    for fragment in tensor.fragments:
        require_own_elements(name, fragment.data)
    stored = source.stored(name)
    if stored is not None and stored.dtype != tensor.spec.dtype:
        plan.cast += 1
    if name in source.plain.tensors:
        plan.reads.add(source.plain.tensors[name], tensor, replicas)
    else:
        plan.loose.append(tensor)


def _fill_group(each: HeldGroup, source: BaseSource, reader: Reader, available: set[str], group: Group) -> int:
    """Read a group's hub tensors whole, convert them, copy what this rank holds; returns how many were quantized."""
    if not each.natives or any(spec.name not in available for spec in each.computed.hub):
        return 0
    hub: dict[str, torch.Tensor] = {}
    plan = _Plan()
    for spec in each.computed.hub:
        memory = hub[spec.name] = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        part = HeldPart(Part(spec.shape), (), (Fragment(Box.whole(spec.shape), memory),))
        _plan_one(HeldTensor(spec, spec.shape, (part,)), source, plan, None)
    _execute(plan, source, reader, group)
    natives = each.computed.rule.backward(hub)
    with torch.no_grad():
        for tensor in each.natives:
            whole = natives[tensor.spec.name].reshape(tensor.grid)
            for fragment in tensor.fragments:
                box = fragment.box
                fragment.data.copy_(whole[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))])
    return plan.dequantized


# --- comparing ------------------------------------------------------------------------------------------------------


def _unexpected(own: Sequence[str], source: BaseSource, group: Group) -> list[str]:
    """Names of stored tensors that no rank wants, in themselves or dequantized; the same list on every rank."""
    names = sorted(source.names())
    mine = set(own)
    _, wanted = group.fold([], [int(name in mine) for name in names], "comparing names")
    used = {name for name, count in zip(names, wanted, strict=True) if count}
    return [name for name in names if name not in used and name not in source.behind]


def _refuse_unsupported(wanted: Sequence[TensorSpec], source: BaseSource) -> None:
    settings = source.settings
    if settings is None or settings.supported:
        return
    for spec in wanted:
        stored = source.stored(spec.name)
        if stored is None or (spec.dtype in FLOATS and stored.dtype not in FLOATS):
            raise unsupported(settings.method, source.path)


def _compare(spec: TensorSpec, source: BaseSource) -> None:
    if spec.name in source.quantized and spec.dtype in FLOATS:
        fitted(source.quantized[spec.name], spec.shape, source.path)
        return
    stored = source.stored(spec.name)
    if stored is None:
        raise DtypeMismatchError(
            f"the model's dtype is {spec.dtype}, and the base holds this tensor quantized",
            path=source.path,
            tensor=spec.name,
            hint="Build the model in a floating-point dtype.",
        )
    if stored.shape != spec.shape:
        raise ShapeMismatchError(
            f"the model's shape is {list(spec.shape)}, the base's {list(stored.shape)}",
            path=source.path,
            tensor=spec.name,
            hint="Build the model from the base's own config.json, or name a task head that is to keep its fresh "
            "values in skip_task_head_prefixes_for_base_model.",
        )
    if stored.dtype == spec.dtype or {stored.dtype, spec.dtype} <= FLOATS.keys():
        return
    if stored.dtype in _FP8 and spec.dtype in FLOATS and spec.name not in source.scaled:
        return
    scaled = spec.name in source.scaled
    raise DtypeMismatchError(
        f"the model's dtype is {spec.dtype}, the base's {stored.dtype}" + (" with scales beside it" if scaled else ""),
        path=source.path,
        tensor=spec.name,
        hint="Set dequantize_base_checkpoint=True." if scaled else "Build the model in the base's dtype.",
    )


def _missing(specs: Sequence[TensorSpec], unexpected: Sequence[str], source: BaseSource) -> MissingTensorError:
    """The error that lists what is missing, the first ones with the nearest name that nobody wants."""
    names = [spec.name for spec in specs]
    shapes = {spec.name: spec.shape for spec in specs}
    for name in unexpected:
        stored = source.stored(name)
        # Of a quantized tensor the stored shape may be that of packed values.
        if stored is not None and name not in source.quantized:
            shapes.setdefault(name, stored.shape)
    prefix = names[0].split(".")[0] + "."
    hint = "Map names with key_mapping, or build the model from the base's own config.json"
    if not any(name.startswith(prefix) for name in source.names()):
        # Whoever skips the prefix of a whole model trains one of random values.
        hint += (
            ", or, for a task head that is to keep its fresh values, set "
            f"skip_task_head_prefixes_for_base_model=[{prefix!r}]"
        )
    return MissingTensorError(
        f"the base model lacks {len(names)} of the model's tensors: "
        + listed(names, unexpected or source.names(), "the base has", shapes),
        path=source.path,
        tensor=names[0],
        hint=f"{hint}.",
    )
