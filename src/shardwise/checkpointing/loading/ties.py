"""A pipeline stage's own copy of a tied tensor.

One process has one tensor for embedding and head, and so have its files; two pipeline stages have one each. The last
stage may therefore find no tensor under its head's name in the files, and loads the embedding instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from shardwise.base.names import names_of_ties
from shardwise.comm import Group, JsonValue
from shardwise.convert import derive_for
from shardwise.disk.storage import Storage
from shardwise.errors import TensorError
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import SourceTensor
from shardwise.sources.reader import Reader, tensor_blocks
from shardwise.sources.sources import Source
from shardwise.stateful_wrappers.names import promised_ties
from shardwise.stateful_wrappers.wrapping import unwrap


def under_saved_names(
    parts: Sequence[nn.Module], held: Sequence[HeldTensor], available: Collection[str]
) -> list[HeldTensor]:
    """Give copies of tied tensors that the files lack the name of the tensor they are tied to. Local.

    Args:
        parts: This rank's parts.
        held: What it holds, under the names of files.
        available: Names in the files.
    """
    lacking = {tensor.spec.name for tensor in held if tensor.spec.name not in available}
    found: dict[str, str] = {}
    for part in parts if lacking else ():
        ties = promised_ties([part])
        own = {name: native for native in ties if (name := file_name(part, native)) in lacking}
        found |= names_of_ties(unwrap(part), own, ties, list(available))
    if not found:
        return list(held)
    return [t._replace(spec=t.spec._replace(name=found.get(t.spec.name, t.spec.name))) for t in held]


def file_name(part: nn.Module, name: str) -> str:
    """Name in the model's files of a tensor that conversion only renames."""
    made = derive_for(unwrap(part), (TensorSpec(name, (1,), "F32"),))
    return made.hub[0].name if len(made.hub) == 1 else name


def untied(source: Source, ties: Sequence[JsonValue], group: Group, storage: Storage) -> Source:
    """The source with each tensor that the model ties under one name: other tools write both, or the other one.

    All ranks of the group call. Where the source has both, they are compared, by one rank each.

    Args:
        source: What is to be loaded.
        ties: Every rank's ties: the name that is not kept -> the name that is.
        group: The ranks that load together.
        storage: Through what to read.

    Raises:
        TensorError: The two differ; one of them would be lost.
    """
    tensors = dict(source.tensors)
    pairs = {alias: str(name) for theirs in ties if isinstance(theirs, dict) for alias, name in theirs.items()}
    twice = sorted((alias, name) for alias, name in pairs.items() if alias in tensors and name in tensors)
    if twice:
        _compare(twice[group.rank :: group.world_size], source, group, storage)
    for alias, name in pairs.items():
        tensor = tensors.pop(alias, None)
        if tensor is not None:
            tensors.setdefault(name, tensor._replace(spec=tensor.spec._replace(name=name)))
    return replace(source, tensors=tensors)


def _compare(own: Sequence[tuple[str, str]], source: Source, group: Group, storage: Storage) -> None:
    """Compare pairs of tensors, each rank its own; all ranks call."""
    names = [name for pair in own for name in pair]
    known = source.located(lambda: {name: [Box.whole(source.tensors[name].spec.shape)] for name in names}, group)
    with group.together("comparing tied tensors"):
        reader = Reader(storage, source.files)
        try:
            for alias, name in own:
                if not _equal(known.tensors[alias], known.tensors[name], reader):
                    raise TensorError(
                        f"the checkpoint holds other values for it than for {name!r}, with which the model ties it",
                        path=source.path,
                        tensor=alias,
                        hint="Build the model untied (tie_word_embeddings=False, or modules that do not share the "
                        "parameter), so that both are kept.",
                    )
        finally:
            reader.close()


def _equal(a: SourceTensor, b: SourceTensor, reader: Reader) -> bool:
    if a.spec.shape != b.spec.shape or a.spec.dtype != b.spec.dtype:
        return False
    return all(x == y for x, y in zip(tensor_blocks(a, reader), tensor_blocks(b, reader), strict=True))
