"""Fresh values for a model that was built on the meta device, by the model's own code.

First the model's own initialisation runs (``initialize_weights``, ``init_weights``, ``reset_parameters``). Memory is
marked before, so that what that code did not touch is known afterwards. Such tensors (rotary tables and other buffers
that are in no file, in most models) are computed by a module's constructor; so its class is called once more with the
arguments that the module keeps, or the whole model's with its config. Nothing here is specific to one model.

A buffer that is in no file is recomputed as well where it has memory already: after ``to_empty`` it holds whatever that
memory held.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from shardwise.errors import MisuseError
from shardwise.geometry import Box
from shardwise.peft.tensors import seed_of
from shardwise.plan.fragments import Fragment, copy_whole, part_in_box
from shardwise.sources.tensor_bytes import prefer_huge_pages
from shardwise.stateful_wrappers.memory import PLAIN, has_mark, is_untouched, mark, plain_memory, stands_for_memory
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.stateful_wrappers.wrapping import original_class, plain_name, unwrap
from shardwise.upstream.torch_dispatch import OpOverload, TorchDispatchMode, operation_name
from shardwise.upstream.torch_modules import (
    INITIALISERS,
    STORES,
    apply_to_tensors,
    own_buffers,
    own_parameters,
    unsaved_buffers,
)
from shardwise.upstream.torch_tensors import around, local_part, spread_of
from shardwise.upstream.transformers import forget_initialised, mark_initialised

_LOG = logging.getLogger(__name__)


def initialise(
    module: nn.Module,
    device: torch.device,
    seed: int,
    loaded: Collection[str] = (),
    slots: list[Slot] | None = None,
) -> None:
    """Give what is on the meta device memory and values; other tensors are moved and initialised anew as well.

    Random values are those of `SeededInit`: the same on every topology for one ``seed``, as far as the model's code
    draws them in place on its parameters. The seed is equal on all ranks that hold parts of the same tensors. The
    generators' states are left as they were. ``loaded`` names tensors that are about to be loaded: they get memory and
    no values. ``slots`` is what `slots_of` gave for the model a moment ago, where the caller has it.

    Raises:
        MisuseError: A tensor has no values, and no code that would give it any.
    """
    inner = unwrap(module)
    slots = slots_of(module) if slots is None else slots
    fresh = [slot for slot in slots if slot.tensor.device.type == "meta"]
    doubtful = _doubtful(slots)
    _materialise(module, slots, device)
    open_slots = [slot for slot in fresh if slot.name not in loaded]
    before = {slot.name: slot.tensor.clone() for slot in doubtful}
    marked = {slot.name: mark(slot.tensor) for slot in (*open_slots, *doubtful)}
    tensors = {slot.name: slot.tensor for slot in slots if slot.kind != "attribute"}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        seeded = SeededInit(inner, tensors, seed, loaded)
        with _flags(inner, tensors, loaded), _first_owners(slots), seeded:
            _run_own_code(inner, device)
        _tie(inner)
        left = [slot for slot in open_slots if not marked[slot.name] or is_untouched(slot.tensor)]
        left = rebuilt(inner, left)
        untold = [slot for slot in doubtful if not marked[slot.name] or is_untouched(slot.tensor)]
        for slot in rebuilt(inner, untold, with_weights=False):
            slot.tensor.copy_(before[slot.name])
    unknown = [slot for slot in left if marked[slot.name]]
    if unknown:
        raise MisuseError(
            f"{len(unknown)} tensors have no initial values and no code that gives them any: "
            + ", ".join(slot.name for slot in unknown[:5]),
            tensor=unknown[0].name,
            hint="Give the module that owns them reset_parameters(), or build the model on a real device.",
        )
    if left:
        _LOG.warning("could not recompute %s", ", ".join(slot.name for slot in left[:5]))


def recompute_buffers(module: nn.Module) -> None:
    """Compute buffers that are in no file once more, in a model that has memory; its other tensors are left alone.

    What no code recomputes keeps its values.
    """
    doubtful = _doubtful(slots_of(module))
    before = {slot.name: slot.tensor.clone() for slot in doubtful}
    with torch.no_grad():
        kept = {slot.name for slot in rebuilt(unwrap(module), doubtful, with_weights=False)}
    changed = [n for slot in doubtful if (n := slot.name) not in kept and not torch.equal(before[n], slot.tensor)]
    if changed:
        _LOG.debug("recomputed %d buffers that are in no file, %s among them", len(changed), changed[0])


def check_attributes(module: nn.Module) -> None:
    """Check that no module keeps a tensor without memory in a list or dictionary, where nothing would fill it."""
    for path, inner in unwrap(module).named_modules():
        for key, value in vars(inner).items():
            if key in STORES:
                continue
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if any(isinstance(item, torch.Tensor) and item.device.type == "meta" for item in items):
                name = f"{path}.{key}" if path else key
                raise MisuseError(
                    f"{name!r} holds tensors on the meta device, which no code fills",
                    tensor=name,
                    hint="Register them as buffers, or build the model on a real device.",
                )


def _doubtful(slots: Iterable[Slot]) -> list[Slot]:
    """Buffers that are in no file and have memory, whose content is undefined after ``to_empty``."""
    return [
        slot for slot in slots if slot.kind == "buffer" and not slot.persistent and slot.tensor.device.type != "meta"
    ]


def _materialise(module: nn.Module, slots: list[Slot], device: torch.device) -> None:
    made: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "meta":
            return tensor.to(device)
        if id(tensor) not in made:
            made[id(tensor)] = fresh = _empty(tensor, device)
            prefer_huge_pages(local_part(fresh).detach())
        return made[id(tensor)]

    attributes = [(slot, slot.tensor) for slot in slots if slot.kind == "attribute"]
    apply_to_tensors(module, move)
    for slot, old in attributes:
        new = torch.empty_like(old, device=device)
        for owner, leaf in slot.places:
            setattr(owner, leaf, new)
    for slot in slots:
        # Module._apply makes a parameter for each place; a tied one is one parameter again.
        first = slot.tensor
        for owner, leaf in slot.places[1:]:
            if leaf in own_buffers(owner):
                own_buffers(owner)[leaf] = first
            elif leaf in own_parameters(owner) and isinstance(first, nn.Parameter):
                own_parameters(owner)[leaf] = first


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As ``torch.empty_like``, which goes through a decomposition in Python for a tensor on the meta device."""
    if type(tensor) in (nn.Parameter, torch.Tensor) and tensor.is_contiguous():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, DTensor) and type(local_part(tensor)) is torch.Tensor:
        return around(_empty(local_part(tensor), device), spread_of(tensor))
    return torch.empty_like(tensor, device=device)


@contextlib.contextmanager
def _flags(module: nn.Module, tensors: Mapping[str, torch.Tensor], loaded: Collection[str]) -> Iterator[None]:
    """Mark for transformers' initialisation which tensors are loaded, and all others as not initialised."""
    for inner in module.modules():
        forget_initialised(inner)
    for name, tensor in tensors.items():
        forget_initialised(tensor)
        if name in loaded:
            mark_initialised(tensor)
    try:
        yield
    finally:
        for tensor in tensors.values():
            forget_initialised(tensor)


@contextlib.contextmanager
def _first_owners(slots: list[Slot]) -> Iterator[None]:
    """Let a tied parameter be initialised by its first owner alone: a head must not draw over an embedding."""
    tied = [(slot.tensor, place) for slot in slots if slot.kind == "parameter" for place in slot.places[1:]]
    for tensor, (owner, leaf) in tied:
        own_parameters(owner)[leaf] = nn.Parameter(
            torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), requires_grad=tensor.requires_grad
        )
    try:
        yield
    finally:
        for tensor, (owner, leaf) in tied:
            own_parameters(owner)[leaf] = tensor  # type: ignore[assignment]


def _run_own_code(module: nn.Module, device: torch.device) -> None:
    """The module's initialisation, or that of its children and then its own."""
    for name in ("initialize_weights", "init_weights"):
        method = getattr(module, name, None)
        if callable(method):
            # torchtitan's models take the device of their buffers.
            wanted = inspect.signature(method).parameters
            method(**{key: device for key in ("buffer_device", "device") if key in wanted})
            return
    for child in module.children():
        _run_own_code(child, device)
    for name in INITIALISERS:
        method = getattr(module, name, None)
        if callable(method):
            method()
            return


def _tie(module: nn.Module) -> None:
    """Tie what the model ties, unless sharding has fixed which parameters there are (their ties were kept)."""
    tie = getattr(module, "tie_weights", None)
    sharded = any(isinstance(p, DTensor) for p in module.parameters())
    if callable(tie) and not sharded and not _hides_embedding(module):
        tie()


def _hides_embedding(module: nn.Module) -> bool:
    """Whether the embedding is adapted: then ties were made before, and the model's code would not find the weight."""
    embedding = getattr(module, "get_input_embeddings", None)
    try:
        found = embedding() if callable(embedding) else None
    except (AttributeError, NotImplementedError):  # a pipeline stage without one
        return False
    return isinstance(found, nn.Module) and "weight" not in own_parameters(found)


# --- the tensors of a model and where its modules keep them ----------------------------------------------------------


@dataclass(eq=False)
class Slot:
    """A tensor of the model: a parameter, a buffer, or a plain attribute of a module."""

    name: str  #: Plain name of its first occurrence.
    #: Modules and attributes that refer to this tensor.
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    kind: str = "parameter"  #: Where modules keep it.

    @property
    def persistent(self) -> bool:
        """Whether it is in the module's state."""
        return any(leaf not in unsaved_buffers(module) for module, leaf in self.places)

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor as it is now."""
        module, leaf = self.places[0]
        found = getattr(module, leaf)
        assert isinstance(found, torch.Tensor)
        return found


def has_meta(slots: Iterable[Slot]) -> bool:
    """Whether one of a model's tensors is on the meta device."""
    return any(slot.tensor.device.type == "meta" for slot in slots)


def names_of(slots: Iterable[Slot], tensors: Collection[torch.Tensor]) -> frozenset[str]:
    """The names under which `initialise` knows some of a model's tensors."""
    ids = {id(tensor) for tensor in tensors}
    return frozenset(slot.name for slot in slots if id(slot.tensor) in ids)


def slots_of(module: nn.Module) -> list[Slot]:
    """Every tensor of a model, each once."""
    found: dict[int, Slot] = {}
    for prefix, inner in unwrap(module).named_modules():
        entries: list[tuple[str, object, str]] = [(k, v, "parameter") for k, v in own_parameters(inner).items()]
        entries += [(k, v, "buffer") for k, v in own_buffers(inner).items()]
        entries += [(k, v, "attribute") for k, v in vars(inner).items()]
        for leaf, value, kind in entries:
            if not isinstance(value, torch.Tensor) or (kind == "attribute" and value.device.type != "meta"):
                continue
            name = plain_name(f"{prefix}.{leaf}" if prefix else leaf)
            slot = found.get(id(value))
            if slot is None:
                slot = found[id(value)] = Slot(name, kind=kind)
            slot.places.append((inner, leaf))
    return list(found.values())


# --- values from building a tensor's module once more ----------------------------------------------------------------


#: What a constructor may raise when it is called with arguments that turn out not to be its own.
_CONSTRUCTOR_ERRORS = (ArithmeticError, AttributeError, AssertionError, LookupError, NotImplementedError, RuntimeError,
                       TypeError, ValueError)  # fmt: skip

#: Attributes of every module: no constructor's arguments, though a ``ParameterDict`` takes some called ``parameters``.
_MODULES_OWN = frozenset(vars(nn.Module()))


class _EmptyOnMeta(TorchFunctionMode):
    """Puts uninitialised memory, of which layers make their weights, on the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def rebuilt(model: nn.Module, left: list[Slot], *, with_weights: bool = True) -> list[Slot]:
    """Fill tensors from modules built anew; returns those that this did not fill.

    ``with_weights`` says whether a module may be given memory for its weights if it cannot be built without.
    """
    if not left:
        return left
    config = getattr(model, "config", None)
    built: dict[int, nn.Module | None] = {}
    for real in (False, True) if with_weights else (False,):
        rest = []
        for slot in left:
            owner, leaf = slot.places[0]
            if real or id(owner) not in built:
                built[id(owner)] = _again(owner, config, real)
            if not _fill(slot, built[id(owner)], leaf):
                rest.append(slot)
        left = rest
        if not left:
            return left
    whole = _again(model, config, False, strict=False)
    return [slot for slot in left if not _fill(slot, whole, slot.name)]


def _again(module: nn.Module, config: object, real: bool, *, strict: bool = True) -> nn.Module | None:
    """The module built once more on the CPU, or ``None`` where its arguments are not known.

    The configuration is for a module that takes one and does not keep it; with ``real`` weights get memory. If
    ``strict``, arguments that have defaults must be known too: a default that was not the argument would give values
    that are wrong without a sign.
    """
    cls = original_class(module)
    arguments = _arguments(module, cls, config, strict)
    if arguments is None:
        return None
    mode = contextlib.nullcontext() if real else _EmptyOnMeta()
    try:
        with torch.device("cpu"), mode:
            return cls(**arguments)
    except _CONSTRUCTOR_ERRORS as error:
        _LOG.debug("building %s once more failed: %s", cls.__name__, error)
        return None


def _arguments(module: nn.Module, cls: type[nn.Module], config: object, strict: bool) -> dict[str, object] | None:
    found: dict[str, object] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in ("device", "dtype"):
            continue
        kept = (key for key in (name, f"_{name}") if key in vars(module) and key not in _MODULES_OWN)
        value = next((vars(module)[key] for key in kept), parameter.empty)
        if value is parameter.empty and name == "config" and config is not None:
            value = config
        known = value is not parameter.empty and not isinstance(value, torch.Tensor)
        if known and parameter.kind is not parameter.POSITIONAL_ONLY:
            found[name] = value
        elif strict or parameter.default is parameter.empty:
            return None
    return found


def _fill(slot: Slot, built: nn.Module | None, path: str) -> bool:
    value: object = built
    for piece in path.split("."):
        value = getattr(value, piece, None)
    if not isinstance(value, torch.Tensor) or value.device.type == "meta" or value.shape != slot.tensor.shape:
        return False
    whole = value.detach()
    if has_mark(whole):  # it holds what was to be filled, or memory that nobody has filled
        return False
    copy_whole(whole, held_tensor(slot.name, slot.tensor, MeshRegister()))
    return True


# --- random values that depend on the seed and the tensor's name, and not on how the tensor is spread -----------------


_RANDOM = frozenset({"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "log_normal_"})
#: Elements drawn at a time; a rank draws only the blocks that contain its own rows of a tensor.
BLOCK_ELEMENTS = 2**20


class SeededInit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, in-place random functions on known tensors draw the same values on every topology.

    Each draw is cut into blocks of rows of the whole tensor, and each block has a generator seeded from the seed, the
    tensor's name, how often it has been drawn, and the block's number. Draws are made on the CPU, so devices agree too.
    Tensors whose names are to be kept are left as they are: what is about to be loaded.
    """

    def __init__(
        self, module: nn.Module, tensors: Mapping[str, torch.Tensor], seed: int, keep: Collection[str]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._keep = frozenset(keep)
        self._names = {place: name for name, tensor in tensors.items() if (place := _place(tensor)) is not None}
        self._drawn: dict[str, int] = {}
        #: Padding rows of embeddings that are spread over ranks: they are zeroed in place too.
        self._padding: dict[int, int] = {}
        for inner in module.modules():
            index = getattr(inner, "padding_idx", None)
            if isinstance(inner, nn.Embedding) and isinstance(index, int) and isinstance(inner.weight, DTensor):
                self._padding[id(local_part(inner.weight))] = index

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tensor = args[0] if args else None
        if not isinstance(tensor, torch.Tensor):
            return func(*args, **kwargs)
        operation = operation_name(func)
        if operation in _RANDOM and kwargs.get("generator") is None:
            name = self._names.get(_place(tensor) or ("", 0))
            if name is not None:
                if name not in self._keep:
                    self._draw(name, tensor, func, args[1:], kwargs)
                return tensor
        if operation == "select" and isinstance(tensor, DTensor) and args[1] == 0:
            index = self._padding.get(id(local_part(tensor)))
            if index is not None and args[2] == index:
                return _own_row(tensor, index)
        return func(*args, **kwargs)

    def _draw(
        self, name: str, tensor: torch.Tensor, func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        count = self._drawn[name] = self._drawn.get(name, 0) + 1
        where = "" if isinstance(tensor, DTensor) else f"{tensor.storage_offset()}"
        key = f"{self._seed}/{name}/{where if where != '0' else ''}/{count}"
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        rest = {k: v for k, v in kwargs.items() if k != "generator"}
        for fragment in held_tensor(name, tensor, MeshRegister()).fragments:
            for block_key, shape, part in _blocks(key, tuple(tensor.shape), fragment):
                drawn = torch.empty(shape, dtype=dtype)
                func(drawn, *args, **rest, generator=torch.Generator().manual_seed(seed_of(block_key)))
                part.data.copy_(part_in_box(drawn, part.box))


def _place(tensor: torch.Tensor) -> tuple[str, int] | None:
    """Where a tensor's storage is; ``None`` for one without memory."""
    local = local_part(tensor)
    if local.numel() == 0 or local.device.type == "meta":
        return None
    if type(local) not in PLAIN:  # a wrapper's own storage is nowhere
        if not stands_for_memory(local):
            return None
        local = plain_memory("", local)
    return (str(local.device), local.untyped_storage().data_ptr())


def _blocks(key: str, shape: tuple[int, ...], part: Fragment) -> Iterator[tuple[str, tuple[int, ...], Fragment]]:
    """Cut a fragment at the borders of blocks: key and shape of each block, and the part of the fragment in it."""
    if part.box.numel == 0:
        return
    if not shape:
        yield key, shape, part
        return
    low, high = part.box.offsets[0], part.box.ends[0]
    row = math.prod(shape[1:])
    if row > BLOCK_ELEMENTS and len(shape) > 2:
        for index in range(low, high):
            inner = Box(part.box.offsets[1:], part.box.sizes[1:])
            yield from _blocks(f"{key}/{index}", shape[1:], Fragment(inner, part.data[index - low]))
        return
    rows = max(1, BLOCK_ELEMENTS // max(row, 1))
    for first in range(low // rows * rows, high, rows):
        begin, end = max(low, first), min(high, first + rows)
        box = Box((begin - first, *part.box.offsets[1:]), (end - begin, *part.box.sizes[1:]))
        size = min(rows, shape[0] - first)
        yield f"{key}:{first}", (size, *shape[1:]), Fragment(box, part.data[begin - low : end - low])


def _own_row(tensor: DTensor, index: int) -> torch.Tensor:
    """This rank's part of a row, in place; where the row is another rank's, memory that nobody reads."""
    for fragment in held_tensor("row", tensor, MeshRegister()).fragments:
        low = fragment.box.offsets[0]
        if low <= index < fragment.box.ends[0]:
            return fragment.data[index - low]
    return local_part(tensor).new_empty(tensor.shape[1:])
