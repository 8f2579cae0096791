"""Several ranks in one process: what each would hold of given tensors, by torch's own way of splitting them."""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import torch
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from shardwise.comm import Group
from shardwise.dtypes import torch_dtype
from shardwise.engine.agreement import coordinates_of
from shardwise.geometry import TensorSpec
from shardwise.plan.fragments import HeldTensor, Part, hold
from shardwise.plan.placement import MeshKey, Placement, Replicated, Sharded, Strided
from shardwise.plan.roster import Declaration, Roster

T = TypeVar("T")
DTYPES = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "F64", "C64")


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8).numpy().tobytes()


def values(spec: TensorSpec, seed: int = 0) -> torch.Tensor:
    """A tensor of random bits (NaN included, which must survive like any other)."""
    generator = torch.Generator().manual_seed(seed)
    if spec.dtype == "BOOL":
        return torch.randint(0, 2, spec.shape, generator=generator).bool()
    bits = torch.randint(0, 256, (spec.nbytes,), generator=generator, dtype=torch.uint8)
    return bits.view(torch_dtype(spec.dtype)).reshape(spec.shape)


def split(tensor: torch.Tensor, placement: Placement, parts: int, index: int) -> torch.Tensor:
    """Piece ``index`` of ``parts`` as torch cuts it."""
    match placement:
        case Replicated():
            return tensor
        case Strided(dim, factor):
            theirs: Shard = cast(Shard, _StridedShard(dim, split_factor=factor))
        case Sharded(dim):
            theirs = Shard(dim)
    pieces, _ = theirs._split_tensor(tensor, parts, with_padding=False, contiguous=False)
    return pieces[index]


def local_tensor(
    whole: torch.Tensor, mesh: tuple[int, ...], placements: Sequence[Placement], coordinate: tuple[int, ...]
) -> torch.Tensor:
    """What the rank at ``coordinate`` has in memory."""
    local = whole
    last = []
    for at, (placement, parts, index) in enumerate(zip(placements, mesh, coordinate, strict=True)):
        if isinstance(placement, Strided) and _is_fsdp_over(placement, mesh[at + 1 :], placements[at + 1 :]):
            last.append((Sharded(placement.dim), parts, index))
        else:
            local = split(local, placement, parts, index)
    for how, parts, index in reversed(last):
        local = split(local, how, parts, index)
    return local.clone()


def _is_fsdp_over(placement: Strided, mesh: tuple[int, ...], later: Sequence[Placement]) -> bool:
    """Whether FSDP2 made this placement, cutting what later mesh dimensions had left of the same tensor dimension."""
    pieces = [n for n, p in zip(mesh, later, strict=True) if not isinstance(p, Replicated) and p.dim == placement.dim]
    return bool(pieces) and math.prod(pieces) == placement.split_factor


@dataclass(frozen=True)
class Spread:
    """A tensor and how it is spread: ``None`` for one that every rank holds whole."""

    spec: TensorSpec
    placements: tuple[Placement, ...] | None
    may_differ: bool = False


@dataclass(frozen=True)
class Simulation:
    """Ranks of one mesh and the tensors that they hold."""

    mesh: tuple[int, ...]
    tensors: tuple[Spread, ...]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return math.prod(self.mesh)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where a rank is in the mesh."""
        return list(itertools.product(*(range(n) for n in self.mesh)))[rank]

    @cached_property
    def wholes(self) -> list[torch.Tensor]:
        """The tensors."""
        return [values(t.spec, seed) for seed, t in enumerate(self.tensors)]

    def held(self, rank: int, *, empty: bool = False) -> list[HeldTensor]:
        """What a rank holds; zeros if ``empty``, to be loaded into."""
        key = MeshKey(("",) * len(self.mesh), self.mesh)
        out = []
        for tensor, whole in zip(self.tensors, self.wholes, strict=True):
            source = torch.zeros_like(whole) if empty else whole
            if tensor.placements is None:
                part = Part(tensor.spec.shape, may_differ=tensor.may_differ)
                out.append(hold(tensor.spec, part, (), source.clone()))
                continue
            where = self.coordinate(rank)
            part = Part(tensor.spec.shape, key, tensor.placements, may_differ=tensor.may_differ)
            out.append(hold(tensor.spec, part, where, local_tensor(source, self.mesh, tensor.placements, where)))
        return out

    @cached_property
    def everyone(self) -> list[list[HeldTensor]]:
        """What each rank holds."""
        return [self.held(rank) for rank in range(self.world)]

    @cached_property
    def roster(self) -> Roster:
        """Who holds what."""
        declarations = [Declaration.of(held) for held in self.everyone]
        return Roster(
            {d.digest: d for d in declarations},
            tuple(d.digest for d in declarations),
            tuple(coordinates_of(held) for held in self.everyone),
        )


@st.composite
def placements(draw: st.DrawFn, dims: int, mesh: tuple[int, ...], strided: bool = True) -> tuple[Placement, ...]:
    """One placement for each mesh dimension."""
    kinds: list[st.SearchStrategy[Placement]] = [st.just(Replicated())]
    if dims:
        kinds.append(st.integers(0, dims - 1).map(Sharded))
        if strided:
            kinds.append(st.builds(Strided, st.integers(0, dims - 1), st.integers(1, 4)))
    return tuple(draw(st.lists(st.one_of(kinds), min_size=len(mesh), max_size=len(mesh))))


meshes = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def simulations(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] = shapes,
    dtypes: Sequence[str] = DTYPES,
    most: int = 5,
    strided: bool = True,
) -> Simulation:
    """Ranks and tensors, some of them held whole by every rank."""
    mesh = draw(meshes)
    tensors = []
    for number in range(draw(st.integers(1, most))):
        spec = TensorSpec(f"t{number}", draw(shape), draw(st.sampled_from(dtypes)))
        plain = draw(st.booleans()) and draw(st.booleans())
        kinds = None if plain else draw(placements(len(spec.shape), mesh, strided))
        tensors.append(Spread(spec, kinds, draw(st.booleans())))
    return Simulation(mesh, tuple(tensors))


class ThreadGroup(Group):
    """Ranks that are threads: `swap` only."""

    def __init__(self, rank: int, world: int, boxes: dict[tuple[int, int], queue.Queue[torch.Tensor]]) -> None:
        super().__init__(None)
        self.rank, self.world_size = rank, world
        self._boxes = boxes

    def swap(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]], what: str
    ) -> None:
        """See `Group.swap`."""
        for peer, tensor in sends:
            self._boxes[self.rank, peer].put(tensor.clone())
        for peer, tensor in receives:
            got = self._boxes[peer, self.rank].get(timeout=20)
            assert got.shape == tensor.shape, what
            tensor.copy_(got)


def in_threads(world: int, function: Callable[[ThreadGroup], T]) -> list[T]:
    """Run ``function`` on ``world`` ranks that are threads."""
    boxes: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
        (a, b): queue.Queue() for a in range(world) for b in range(world)
    }
    barrier = threading.Barrier(world)

    def one(rank: int) -> T:
        barrier.wait()
        return function(ThreadGroup(rank, world, boxes))

    with ThreadPoolExecutor(world) as pool:
        found = list(pool.map(one, range(world)))
    assert all(box.empty() for box in boxes.values()), "messages that nobody received"
    return found
