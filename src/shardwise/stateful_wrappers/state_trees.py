"""What an optimizer keeps of a parameter: tensors and how each relates to the parameter, and how they are nested.

An optimizer that computes with DTensors keeps DTensors, one that works on ``to_local()`` keeps plain tensors of its
shard, a preconditioner may be plain and the same on all ranks. Values alone do not show which; a state that is
restored as another kind makes the next step fail, or compute wrong values.

Nested state is split into plain containers and tensors, and put together again. A tree is a list; its first item names
its type: ``["tensor", key]``, ``["value", value]``, ``["dict", [[key, tree], ...]]``, ``["ordered", ...]``, ``["list",
[tree, ...]]``, ``["tuple", ...]``, ``["sharded", {region: tree}]`` for what each shard of a parameter has of its own,
and ``["subclass", module, class, context, shape, stride, [[name, tree], ...]]`` for a tensor that consists of others
(quantized ones). The tensors go where all others go, under their keys.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from shardwise.dtypes import dtype_code, torch_dtype
from shardwise.errors import MisuseError, ShardwiseError, StateFormatError
from shardwise.stateful_wrappers.memory import PLAIN as PLAIN_CLASSES
from shardwise.stateful_wrappers.memory import Wrapper
from shardwise.stateful_wrappers.tensors import MeshRegister
from shardwise.upstream.torch_tensors import PendingTensor, StridedShard, local_part

#: Kinds of state. `USUAL` is what nearly all optimizers keep: tensors of the parameter's shape and spread, and plain
#: scalars; older checkpoints have no other. `UNCLEAR`: plain, of the shape that both the shard and the whole of the
#: state may have.
USUAL, LIKE, PLAIN, LOCAL, UNCLEAR, SPREAD = "", "like", "plain", "local", "unclear", "spread"
_KINDS = frozenset({USUAL, LIKE, PLAIN, LOCAL, UNCLEAR, SPREAD})
#: Where a scalar was that could have been elsewhere.
_DEVICES = frozenset({"", "cpu", "parameter"})


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of a state tensor."""

    name: str = USUAL  #: One of this module's constants.
    #: Of a DTensor that is not spread as its parameter: ``R`` or ``S`` with the dimension, for each mesh dimension.
    placements: tuple[str, ...] = ()
    mesh: tuple[str, ...] = ()  #: The names of the mesh's dimensions, where it has names.
    device: str = ""  #: ``cpu`` or ``parameter``, where the parameter is on an accelerator.

    def to_state(self) -> dict[str, object]:
        """As plain containers."""
        lists: dict[str, object] = {"placements": list(self.placements), "mesh": list(self.mesh)}
        return {"kind": self.name, **{key: value for key, value in lists.items() if value}, "device": self.device}

    @staticmethod
    def from_state(state: Mapping[str, object]) -> Kind:
        """Check and take in what `to_state` gave; ``ValueError`` where it is something else."""
        name, device = str(state["kind"]), str(state.get("device", ""))
        placements = tuple(str(each) for each in cast(list[object], state.get("placements", [])))
        sound = all(each == "R" or (each[:1] == "S" and each[1:].isdecimal()) for each in placements)
        if name not in _KINDS or device not in _DEVICES or not sound:
            raise ValueError(f"a state tensor of kind {dict(state)}")
        return Kind(name, placements, tuple(str(each) for each in cast(list[object], state.get("mesh", []))), device)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """The description of a saved state tensor: enough to make one to load into."""

    dtype: str  #: Its dtype's code.
    shape: tuple[int, ...]  #: Its shape in the whole; of a `LOCAL` one, its parameter's.
    kind: Kind = Kind()  #: Its kind.

    def to_state(self) -> list[object]:
        """As plain containers."""
        row: list[object] = [self.dtype, list(self.shape)]
        return row if self.kind == Kind() else [*row, self.kind.to_state()]

    @staticmethod
    def from_state(row: list[object]) -> SavedTensor:
        """As `Kind.from_state`."""
        shape = tuple(int(cast(int, n)) for n in cast(list[object], row[1]))
        kind = Kind.from_state(cast(dict[str, object], row[2])) if len(row) > 2 else Kind()
        return SavedTensor(str(row[0]), shape, kind)


def describe(tensor: torch.Tensor, param: torch.Tensor | None, settled: str | None = None) -> SavedTensor:
    """Describe a state tensor; ``settled`` is the kind that ranks agreed on for a plain one of the shape of a shard."""
    dtype = dtype_code(tensor.dtype)
    kind = _kind(tensor, param, settled)
    shape = tuple(param.shape) if kind.name == LOCAL and param is not None else tuple(tensor.shape)
    return SavedTensor(dtype, shape, kind)


def _kind(tensor: torch.Tensor, param: torch.Tensor | None, settled: str | None) -> Kind:
    if isinstance(tensor, DTensor):
        if isinstance(param, DTensor) and is_spread_alike(tensor, param):
            return Kind(USUAL if param.ndim else LIKE)
        cuts = (f"S{p.dim}" if isinstance(p, (Shard, StridedShard)) else "R" for p in tensor.placements)
        return Kind(SPREAD, tuple(cuts), tuple(tensor.device_mesh.mesh_dim_names or ()))
    if param is None:
        return Kind(PLAIN, device="cpu" if tensor.device.type == "cpu" else "parameter")
    device = ""
    if tensor.ndim == 0 and local_part(param).device.type != "cpu":
        device = "cpu" if tensor.device.type == "cpu" else "parameter"
    if not isinstance(param, DTensor):
        return Kind(device=device)
    if tensor.ndim == 0:
        return Kind(USUAL if param.ndim else PLAIN, device=device)
    if tensor.shape == local_part(param).shape:
        return Kind(settled or UNCLEAR)
    return Kind(PLAIN)


def is_spread_alike(tensor: DTensor, param: DTensor) -> bool:
    """Whether a tensor has the parameter's shape, mesh and placements."""
    return (
        tensor.shape == param.shape
        and tensor.device_mesh == param.device_mesh
        and list(map(repr, tensor.placements)) == list(map(repr, param.placements))
    )


def is_sharded(param: torch.Tensor) -> bool:
    """Whether ranks hold different parts of a parameter."""
    return isinstance(param, DTensor) and not all(isinstance(each, Replicate) for each in param.placements)


def region_of(param: torch.Tensor) -> str:
    """Which part of a parameter this rank holds, as text: ``0:8,0:16``; empty for the whole of a plain tensor."""
    if not isinstance(param, DTensor):
        return ""
    spread = MeshRegister().spread("", param)
    boxes = [region.box for region in spread.part.regions(spread.coordinate)]
    return ";".join(",".join(f"{o}:{o + s}" for o, s in zip(b.offsets, b.sizes, strict=True)) for b in boxes) or "none"


def as_shard_of(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """A plain tensor of this rank's shard as the part of the whole that it is; its memory is shared."""
    if not isinstance(param, DTensor):
        return tensor
    return DTensor.from_local(
        tensor, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a state tensor goes."""

    name: str  #: For messages.
    param: torch.Tensor  #: Its parameter, or any of its optimizer's for what belongs to none.
    #: What the optimizer has in its place; its kind counts more than what another topology had.
    have: torch.Tensor | None
    known: bool | None  #: Whether the state is known to be like its parameter (``True``), or not (``False``).
    is_torchs: bool  #: Whether torch's own class keeps it, which makes what is smaller by ``new_zeros`` of DTensors.
    on_device: bool  #: Whether scalars belong to the parameter's device.
    owned: bool = True  #: Whether it belongs to the parameter.
    fresh: bool = False  #: Whether memory that the optimizer has may not be used.


def make(saved: SavedTensor, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory of the kind that a state tensor had; the optimizer's own where it is of that kind.

    Returns what the optimizer gets, and the same memory as the part of the saved tensor that it is. Where nothing shows
    the kind on this topology, that is a `MisuseError`.
    """
    param, have, dtype = place.param, place.have, torch_dtype(saved.dtype)
    kind = _settled(saved, place)
    if have is not None and have.dtype == dtype and _fits(have, kind, saved, param):
        tensor = torch.empty_like(have) if place.fresh else have
    elif kind.name == LOCAL:
        tensor = torch.zeros_like(local_part(param).detach(), dtype=dtype, requires_grad=False)
    elif kind.name == LIKE:
        tensor = torch.zeros_like(param.detach(), dtype=dtype, requires_grad=False)
    elif kind.name == SPREAD and isinstance(param, DTensor):
        mesh = param.device_mesh
        placements = [_placement(each, len(saved.shape)) for each in _over(kind, mesh, param)]
        tensor = torch.distributed.tensor.zeros(saved.shape, dtype=dtype, device_mesh=mesh, placements=placements)
    else:
        at_param = kind.device == "parameter" or (not kind.device and (saved.shape != () or place.on_device))
        tensor = torch.zeros(saved.shape, dtype=dtype, device=local_part(param).device if at_param else "cpu")
    return tensor, as_shard_of(tensor, param) if kind.name == LOCAL else tensor


def _settled(saved: SavedTensor, place: Place) -> Kind:
    """The kind that a saved tensor has on this topology: like, plain, local or spread."""
    param, kind, is_param_shape = place.param, saved.kind, saved.shape == tuple(place.param.shape)
    if not place.owned:
        return kind if kind.name == SPREAD else Kind(PLAIN, device=kind.device or "cpu")
    if not isinstance(param, DTensor):
        if saved.shape == () and kind.name == USUAL:
            return Kind(LIKE if param.ndim == 0 and place.known and not kind.device else PLAIN, device=kind.device)
        return Kind(LIKE if is_param_shape and kind.name != PLAIN else PLAIN, device=kind.device)
    if kind.name in (LIKE, LOCAL, SPREAD, PLAIN):
        return kind
    if saved.shape == () and (param.ndim or not place.known):
        return Kind(PLAIN, device=kind.device)
    seen = _seen(saved, place)
    if seen is not None:
        return seen
    if kind.name == USUAL and is_param_shape:
        return Kind(LIKE)
    if kind.name == UNCLEAR and saved.shape == tuple(local_part(param).shape):
        return Kind(PLAIN)
    if kind.name == USUAL and place.is_torchs:
        return Kind(SPREAD, ("R",) * param.device_mesh.ndim)
    raise MisuseError(
        f"the saved state of shape {list(saved.shape)} was a plain tensor, and nothing shows whether the optimizer "
        f"keeps each rank's shard of it here, the whole, or a DTensor: the parameter is spread otherwise than when it "
        f"was saved ({list(param.shape)}, {list(local_part(param).shape)} on this rank)",
        tensor=place.name,
        hint="Let the optimizer take one step before restoring, which makes its state, or restore on the topology "
        "that saved.",
    )


def _seen(saved: SavedTensor, place: Place) -> Kind | None:
    """The kind of what the optimizer has in a tensor's place, if that is the same tensor."""
    have, param = place.have, place.param
    if have is None:
        return None
    if isinstance(have, DTensor):
        alike = isinstance(param, DTensor) and is_spread_alike(have, param)
        return (Kind(LIKE) if alike else _kind(have, param, None)) if tuple(have.shape) == saved.shape else None
    local = local_part(param).shape
    if have.shape == local and local != param.shape and saved.shape == tuple(param.shape):
        return Kind(LOCAL)
    return Kind(PLAIN) if tuple(have.shape) == saved.shape else None


def _fits(have: torch.Tensor, kind: Kind, saved: SavedTensor, param: torch.Tensor) -> bool:
    """Whether memory that an optimizer has is of the kind and shape that is wanted."""
    if kind.name == LOCAL:
        return not isinstance(have, DTensor) and have.shape == local_part(param).shape
    if tuple(have.shape) != saved.shape or type(local_part(have)) is not torch.Tensor:
        return False
    if kind.name == LIKE:
        alike = isinstance(have, DTensor) and isinstance(param, DTensor) and is_spread_alike(have, param)
        plain = not isinstance(have, DTensor) and not isinstance(param, DTensor)
        return (alike or plain) and local_part(have).device == local_part(param).device
    if kind.name == SPREAD and isinstance(param, DTensor):
        return isinstance(have, DTensor)
    return not isinstance(have, DTensor)


def _over(kind: Kind, mesh: DeviceMesh, param: DTensor) -> list[str]:
    """A saved tensor's placements over another mesh: by the names of its dimensions, by their number, or by what cuts.

    Where it lies changes no value; a mesh of another kind keeps what can be kept.
    """
    if len(kind.placements) == mesh.ndim:
        return list(kind.placements)
    names = tuple(mesh.mesh_dim_names or ())
    if names and set(names) & set(kind.mesh):
        known = dict(zip(kind.mesh, kind.placements, strict=False))
        return [known.get(name, "R") for name in names]
    cuts = sorted({each for each in kind.placements if each != "R"})
    one = cuts[0] if len(cuts) == 1 else "R"
    first = next((n for n, each in enumerate(param.placements) if isinstance(each, (Shard, StridedShard))), None)
    return [one if n == first else "R" for n in range(mesh.ndim)]


def _placement(letter: str, ndim: int) -> Placement:
    if letter == "R":
        return Replicate()
    dim = int(letter[1:])
    if dim >= ndim:
        raise StateFormatError(f"a state of {ndim} dimensions is cut along dimension {dim}", hint="Restore the file.")
    return Shard(dim)


# --- nested state -----------------------------------------------------------------------------------------------------


Tree = list[object]
_PLAIN = {*PLAIN_CLASSES, PendingTensor}


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
        """The value that `TreeWriter.split` split; what is no tree is a `StateFormatError`."""
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
