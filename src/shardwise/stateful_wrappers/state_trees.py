"""Nested state as plain containers: dictionaries, lists and tuples with tensors in them, split and put together again.

A tree is a list; its first item names its type: ``["tensor", key]``, ``["value", value]``, ``["dict", [[key, tree],
...]]``, ``["ordered", ...]``, ``["list", [tree, ...]]``, ``["tuple", ...]``, ``["sharded", {region: tree}]`` for what
each shard of a parameter has of its own, and ``["subclass", module, class, context, shape, stride, [[name, tree],
...]]`` for a tensor that consists of others (quantized ones). The tensors go where all others go, under their keys.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, cast

import torch
from torch.distributed.tensor import DTensor

from shardwise.errors import MisuseError, ShardwiseError, StateFormatError
from shardwise.stateful_wrappers.memory import PLAIN, Wrapper
from shardwise.stateful_wrappers.state_tensors import as_shard_of, is_sharded, is_spread_alike, region_of
from shardwise.upstream.torch_tensors import PendingTensor, local_part

Tree = list[object]
_PLAIN = {*PLAIN, PendingTensor}


def is_flat(state: Mapping[object, object]) -> bool:
    """Whether a state is what nearly all optimizers keep: names, with tensors or with values that hold none."""
    return all(
        type(key) is str and (_is_plain(value) if isinstance(value, torch.Tensor) else not _holds_tensors(value))
        for key, value in state.items()
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(local_part(tensor)) in _PLAIN


def _holds_tensors(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.keys())) or any(map(_holds_tensors, value.values()))
    return isinstance(value, (list, tuple, set, frozenset)) and any(map(_holds_tensors, value))


@dataclass
class TreeWriter:
    """Splits values into a tree and tensors.

    ``name`` is the owner's, for messages; ``param`` is ``None`` for what belongs to none; ``name_of`` gives the name of
    a parameter that is a key; ``own`` says of keys whether plain tensors differ from shard to shard.
    """

    name: str
    param: torch.Tensor | None
    name_of: Callable[[torch.Tensor], str]
    own: Callable[[str], bool] = lambda _: False
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def split(self, value: object, path: str = "") -> Tree:
        """The tree of a value; its tensors are in `tensors` afterwards."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if not _holds_tensors(value):
            return ["value", value]
        if type(value) in (dict, OrderedDict):
            rows = []
            for key, each in cast(dict[object, object], value).items():
                below = f"{path}.{self._text(key)}" if path else self._text(key)
                rows.append([self.key(key), self.split(each, below)])
            return ["dict" if type(value) is dict else "ordered", rows]
        if type(value) in (list, tuple):
            items = [self.split(x, f"{path}.{n}") for n, x in enumerate(cast(Sequence[object], value))]
            return ["list" if type(value) is list else "tuple", items]
        return self._refuse(path, f"is a {type(value).__name__} with tensors in it")

    def key(self, key: object) -> Tree:
        """A dictionary's key, which may be a parameter or a tuple with one in it."""
        if isinstance(key, torch.Tensor):
            return ["parameter", self.name_of(key)]
        if type(key) is tuple and _holds_tensors(key):
            return ["tuple", [self.key(each) for each in key]]
        return ["value", key]

    def _text(self, key: object) -> str:
        if isinstance(key, torch.Tensor):
            return self.name_of(key)
        return "-".join(map(self._text, key)) if isinstance(key, tuple) else str(key)

    def _refuse(self, path: str, what: str) -> NoReturn:
        raise MisuseError(
            f"the optimizer's state {path!r} {what}, which cannot be saved",
            tensor=self.name,
            hint="Keep state in plain tensors, DTensors, dictionaries, lists and tuples.",
        )

    def _tensor(self, tensor: torch.Tensor, path: str) -> Tree:
        if _is_plain(tensor):
            if not isinstance(tensor, DTensor) and self.own(path) and self.param is not None:
                region = region_of(self.param)
                return ["sharded", {region: ["tensor", self._add(f"{path}@{region}", tensor)]}]
            return ["tensor", self._add(path, tensor)]
        if isinstance(tensor, DTensor):
            param = self.param
            if not isinstance(param, DTensor) or not is_spread_alike(tensor, param):
                self._refuse(path, f"is a DTensor of {type(local_part(tensor)).__name__}s, spread in its own way")
            region = region_of(param)
            return ["sharded", {region: self._parts(local_part(tensor), path, f"@{region}")}]
        if self.param is not None and is_sharded(self.param):
            self._refuse(path, f"is a {type(tensor).__name__} beside a parameter that is sharded")
        return self._parts(tensor, path, "")

    def _parts(self, tensor: torch.Tensor, path: str, suffix: str) -> Tree:
        """A tensor that consists of others."""
        kind = type(tensor)
        if kind in _PLAIN:
            return ["tensor", self._add(path + suffix, tensor)]
        if not (hasattr(tensor, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")):
            self._refuse(path, f"is a {kind.__name__}, a tensor class with its own storage of values")
        names, context = cast(Wrapper, tensor).__tensor_flatten__()
        inner = [[name, self._parts(getattr(tensor, name), f"{path}.{name}", suffix)] for name in names]
        about = [kind.__module__, kind.__qualname__, context, list(tensor.shape), list(tensor.stride())]
        return ["subclass", *about, inner]

    def _add(self, path: str, tensor: torch.Tensor) -> str:
        key, number = path, 1
        while key in self.tensors:
            number += 1
            key = f"{path}#{number}"
        self.tensors[key] = tensor
        return key


@dataclass(frozen=True)
class TreeReader:
    """Puts values together; ``tensor`` gives that of a key, to be filled later, ``parameter`` that of a name."""

    name: str
    param: torch.Tensor | None
    tensor: Callable[[str], torch.Tensor]
    parameter: Callable[[str], torch.Tensor]

    def put_together(self, tree: object) -> object:
        """The value that `TreeWriter.split` split.

        A tensor's class may be absent, as may the state of this rank's shard (`MisuseError`); it may be no tree at all.
        """
        try:
            return self._read(tree)
        except ShardwiseError:
            raise
        except (TypeError, ValueError, LookupError, RecursionError) as error:
            raise self._no_tree(f"{type(error).__name__}: {error}") from error

    def _no_tree(self, why: str) -> StateFormatError:
        return StateFormatError(
            f"the optimizer's state holds what is no tree ({why})",
            tensor=self.name,
            hint="Restore the file or choose another checkpoint.",
        )

    def _read(self, tree: object) -> object:
        match tree:
            case ["value", value]:
                return value
            case ["tensor", str(key)]:
                return self.tensor(key)
            case ["dict", list(rows)]:
                return {self.key(key): self._read(each) for key, each in rows}
            case ["ordered", list(rows)]:
                return OrderedDict((self.key(key), self._read(each)) for key, each in rows)
            case ["list", list(items)]:
                return [self._read(each) for each in items]
            case ["tuple", list(items)]:
                return tuple(self._read(each) for each in items)
            case ["sharded", dict(regions)]:
                return self._sharded(cast(dict[str, object], regions))
            case ["subclass", str(module), str(kind), context, list(shape), list(stride), list(inner)]:
                return self._subclass(module, kind, context, torch.Size(shape), tuple(stride), inner)
        raise self._no_tree(repr(tree)[:60])

    def key(self, key: object) -> object:
        """The key that `TreeWriter.key` encoded."""
        match key:
            case ["value", value]:
                return value
            case ["parameter", str(name)]:
                return self.parameter(name)
            case ["tuple", list(items)]:
                return tuple(self.key(each) for each in items)
        raise self._no_tree(f"{key!r:.60} as a key")

    def _sharded(self, regions: Mapping[str, object]) -> object:
        region = "" if self.param is None else region_of(self.param)
        if region not in regions:
            raise MisuseError(
                f"each shard of this parameter has a state of its own (blocks of a quantized tensor, for one), which "
                f"was saved for the shards {', '.join(sorted(regions)[:8])}, and this rank's shard is "
                f"{region or 'the whole'}",
                tensor=self.name,
                hint="Restore on the number of ranks and the mesh that saved it, or without the optimizer.",
            )
        found = self._read(regions[region])
        is_tensor = isinstance(regions[region], list) and cast(Tree, regions[region])[0] == "tensor"
        if is_tensor or self.param is None:
            return found
        return as_shard_of(cast(torch.Tensor, found), self.param)

    def _subclass(
        self, module: str, kind: str, context: object, shape: torch.Size, stride: tuple[int, ...], inner: list[object]
    ) -> torch.Tensor:
        # Looked up and never imported: what a file names does not decide what code is run.
        found: object = sys.modules.get(module)
        for part in kind.split("."):
            found = getattr(found, part, None)
        if not (isinstance(found, type) and issubclass(found, torch.Tensor) and hasattr(found, "__tensor_unflatten__")):
            raise MisuseError(
                f"the saved state is a {kind} of {module}, which this process has not imported",
                tensor=self.name,
                hint=f"Import {module} (it comes with the optimizer that was saved), then restore.",
            )
        unflatten = cast(
            "Callable[[dict[str, object], object, torch.Size, tuple[int, ...]], torch.Tensor]",
            found.__tensor_unflatten__,
        )
        parts = {str(name): self._read(each) for name, each in cast(list[tuple[object, object]], inner)}
        return unflatten(parts, context, shape, stride)


def values_in(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The values in a tree that are no tensors and no shard's own, and where they are."""
    match tree:
        case ["value", value]:
            yield path, value
        case ["dict" | "ordered", list(rows)]:
            for key, each in rows:
                yield from values_in(each, f"{path}.{key[-1]}" if path else str(key[-1]))
        case ["list" | "tuple", list(items)]:
            for number, each in enumerate(items):
                yield from values_in(each, f"{path}.{number}")


def merged(a: object, b: object) -> object:
    """Trees of one state by two ranks as one: what each shard has of its own is put together, else the first's."""
    if not (isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and a and a[0] == b[0]):
        return a
    if a[0] == "sharded":
        return ["sharded", {**a[1], **b[1]}]
    if a[0] in ("list", "tuple") and len(a[1]) == len(b[1]):
        return [a[0], [merged(x, y) for x, y in zip(a[1], b[1], strict=True)]]
    if a[0] in ("dict", "ordered") and [row[0] for row in a[1]] == [row[0] for row in b[1]]:
        return [a[0], [[x[0], merged(x[1], y[1])] for x, y in zip(a[1], b[1], strict=True)]]
    return a


def equal(a: object, b: object) -> bool:
    """Whether two options, or two dictionaries of them, are the same."""
    return alike(a, b, torch.equal, lambda x, y: bool(x == y))


def alike(
    a: object,
    b: object,
    tensors: Callable[[torch.Tensor, torch.Tensor], bool],
    values: Callable[[object, object], bool],
) -> bool:
    """Whether containers have the same structure, and tensors and other values that are the same by two criteria."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and tensors(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(alike(a[key], b[key], tensors, values) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y, tensors, values) for x, y in zip(a, b, strict=True))
    return values(a, b)
