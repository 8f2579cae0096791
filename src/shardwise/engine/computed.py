"""Tensors that no view converts: they are converted whole, one group at a time, on one of the ranks that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from zlib import crc32

import torch

from shardwise.comm import FirstFailure, Group
from shardwise.convert.rules import HeldGroup
from shardwise.disk.storage import Storage
from shardwise.dtypes import torch_dtype
from shardwise.engine.load import LoadOptions, LoadSource
from shardwise.engine.sharing import PlannedReads
from shardwise.errors import ConversionError
from shardwise.geometry import Box
from shardwise.plan.deferred import refuse_stand_ins, resolve
from shardwise.plan.fragments import Fragment, HeldTensor, copy_whole, part_in_box
from shardwise.plan.layout import Layout
from shardwise.plan.roster import Roster
from shardwise.plan.schedule import WriteRun
from shardwise.sources.reader import Reader
from shardwise.sources.tensor_bytes import flat_bytes, stored


@dataclass(frozen=True)
class ComputedPlan:
    """The groups of an export that have to be computed, and who holds their native tensors."""

    groups: tuple[HeldGroup, ...] = ()
    roster: Roster | None = None


def declared(groups: Sequence[HeldGroup]) -> list[HeldTensor]:
    """The groups' hub tensors, so that the layout has places for them; no fragments, since they are not yet made."""
    return [HeldTensor(spec, spec.shape, ()) for group in groups for spec in group.computed.hub]


def write_computed(
    plan: ComputedPlan,
    layout: Layout,
    group: Group,
    write: Callable[[WriteRun], None],
    failure: Exception | None = None,
) -> Exception | None:
    """Convert and write the groups, holding one at a time in memory. The ranks that hold natives of a group swap.

    A rank that has a ``failure`` already takes part and writes nothing. Returns what failed locally first; the
    remaining groups are still swapped, so that no peer waits. Raises `PeerError`: a peer left.
    """
    kept = FirstFailure(failure)
    if plan.roster is None:
        return failure
    # In one order and by one owner for all who hold a group, whatever other groups they hold.
    for held in sorted(plan.groups, key=_name):
        members = sorted(
            {
                rank
                for tensor in held.natives
                for part in tensor.parts
                for rank in plan.roster.shard_set(tensor.spec.name, part.part).members
            }
        )
        owner = members[crc32(_name(held).encode()) % len(members)]
        whole: dict[str, torch.Tensor] = {}
        for tensor in held.natives:
            with kept, group.keeping(kept.error):
                found = gather(tensor, plan.roster, group, owner)
                if found is not None:
                    whole[tensor.spec.name] = found
        if group.rank == owner and kept.error is None and len(whole) == len(held.natives):
            with kept:
                _write_group(held, whole, layout, write)
    return kept.error


def _name(held: HeldGroup) -> str:
    """The name that identifies a group, the same on every rank."""
    return held.computed.natives[0].name


def _write_group(
    held: HeldGroup, natives: dict[str, torch.Tensor], layout: Layout, write: Callable[[WriteRun], None]
) -> None:
    made = held.computed.rule.forward(natives)
    for spec in held.computed.hub:
        tensor = made.get(spec.name)
        if tensor is None or tuple(tensor.shape) != spec.shape:
            what = "the conversion did not give the tensor that it announced"
            hint = "Report the model type; its conversion depends on values."
            raise ConversionError(what, tensor=spec.name, hint=hint)
    if held.computed.has_inverse:
        _require_round_trip(held, natives, made)
    for spec in held.computed.hub:
        tensor = made[spec.name]
        if spec.nbytes:
            place = layout.places[spec.name]
            # The rule may compute in another dtype; the run casts to the file's.
            written = next(e.spec for e in layout.files[place.file].entries if e.spec.name == spec.name)
            write(WriteRun(place.file, place.offset, written, 0, tensor))


def _require_round_trip(held: HeldGroup, natives: dict[str, torch.Tensor], made: Mapping[str, torch.Tensor]) -> None:
    """Undo the conversion, and compare every byte: what cannot be loaded again must not be published."""
    hub = {spec.name: made[spec.name].detach().to(torch_dtype(spec.dtype), copy=True) for spec in held.computed.hub}
    back = held.computed.rule.backward(hub)
    for name, native in natives.items():
        found = back.get(name)
        if found is None or found.numel() != native.numel() or not _same_bytes(found.reshape(native.shape), native):
            effect = "lack it" if found is None else "give other values"
            raise ConversionError(
                f"the conversion of this tensor cannot be undone: loading it again would {effect}",
                tensor=name,
                hint="Correct the model's state_dict_adapter, or save without the export (save_consolidated='false'): "
                "shards hold tensors as they are in memory.",
            )


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(flat_bytes(stored(a.to(b.dtype))), flat_bytes(stored(b)))


def gather(tensor: HeldTensor, roster: Roster, group: Group, owner: int) -> torch.Tensor | None:
    """Assemble one tensor on rank ``owner``, ``None`` elsewhere and where a holder has failed. Its holders call.

    Raises:
        PeerError: A peer left.
        Exception: This rank found no memory, or could not read its tensors; its peers know, and do not wait.
    """
    pieces = _pieces(tensor, roster, owner)
    sources = sorted({source for source, _ in pieces} - {owner})
    partners = sources if group.rank == owner else [owner] if group.rank in sources else []
    sends: list[tuple[int, torch.Tensor]] = []
    receives: list[tuple[int, torch.Tensor, Box]] = []
    whole: torch.Tensor | None = None
    kept = FirstFailure()
    with kept:
        sends, receives, whole = _prepare(tensor, pieces, group.rank, owner)
    mine = torch.tensor([kept.error is None], dtype=torch.uint8)
    theirs = {partner: torch.zeros(1, dtype=torch.uint8) for partner in partners}
    what = f"gathering {tensor.spec.name}"
    group.swap([(partner, mine) for partner in partners], list(theirs.items()), what)
    if kept.error is not None:
        raise kept.error
    ready = {partner for partner, flag in theirs.items() if flag.item()}
    group.swap(
        [(rank, flat_bytes(t)) for rank, t in sends if rank in ready],
        [(rank, flat_bytes(t)) for rank, t, _ in receives if rank in ready],
        what,
    )
    if whole is None or len(ready) < len(partners):
        return None
    for _, buffer, box in receives:
        part_in_box(whole, box).copy_(buffer)
    return whole


def _pieces(tensor: HeldTensor, roster: Roster, owner: int) -> list[tuple[int, Box]]:
    """The rank that each piece comes from: ``owner`` where it holds it."""
    found: list[tuple[int, Box]] = []
    for held in tensor.parts:
        mesh = held.part.mesh
        for ranks in roster.shard_set(tensor.spec.name, held.part).replicas.values():
            source = owner if owner in ranks and not held.part.may_differ else ranks[0]
            boxes = held.part.boxes(() if mesh is None else roster.coordinates[source][mesh])
            found += [(source, box) for box in boxes]
    return found


def _prepare(
    tensor: HeldTensor, pieces: Sequence[tuple[int, Box]], rank: int, owner: int
) -> tuple[list[tuple[int, torch.Tensor]], list[tuple[int, torch.Tensor, Box]], torch.Tensor | None]:
    """What one rank sends and receives to assemble a tensor, and on its owner the tensor with the rank's own pieces."""
    own = {fragment.box: fragment.data for fragment in tensor.fragments}
    dtype = next((data.dtype for data in own.values()), torch_dtype(tensor.spec.dtype))
    if rank != owner:
        sends = [(owner, stored(resolve(own[box]).to("cpu"))) for source, box in pieces if source == rank]
        return sends, [], None
    whole = torch.empty(tensor.grid, dtype=dtype)
    receives: list[tuple[int, torch.Tensor, Box]] = []
    for source, box in pieces:
        if source == owner:
            part_in_box(whole, box).copy_(resolve(own[box]).detach())
        else:
            receives.append((source, torch.empty(box.sizes, dtype=dtype), box))
    return [], receives, whole


@dataclass(frozen=True)
class OpenedComputed:
    """Groups with all their tensors in the source, checked on every rank; nothing has been read."""

    groups: Sequence[HeldGroup]
    source: LoadSource
    group: Group
    options: LoadOptions

    def read(self, storage: Storage) -> None:
        """Read, convert and install, one group at a time. All ranks of the group call."""
        reader = Reader(storage, self.source.plain.files, self.options.threads)
        with self.group.together(f"converting tensors of {self.source.plain.path}"), closing(reader):
            for held in self.groups:
                self._load(held, reader)

    def _load(self, held: HeldGroup, reader: Reader) -> None:
        reads, hub = PlannedReads(), {}
        for spec in held.computed.hub:
            hub[spec.name] = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
            wanted = HeldTensor.alone(spec, [Fragment(Box.whole(spec.shape), hub[spec.name])])
            self.source.add(wanted, reads, None)
        reads.execute(reader, self.group)
        natives = held.computed.rule.backward(hub)
        with torch.no_grad():
            for tensor in held.natives:
                copy_whole(natives[tensor.spec.name].reshape(tensor.grid), tensor)


def open_computed(
    groups: Sequence[HeldGroup], source: LoadSource, group: Group, options: LoadOptions
) -> OpenedComputed:
    """Look for the hub tensors of groups, before anything is read. All ranks of the group call.

    Raises:
        MissingTensorError: One is absent.
        ShapeMismatchError: One has another shape.
    """
    wanted = [held for held in groups if held.natives]

    def wholes() -> dict[str, list[Box]]:
        tensors = source.plain.tensors
        specs = [spec for held in wanted for spec in held.computed.hub if spec.name in tensors]
        return {s.name: [Box.whole(s.shape)] for s in specs if tensors[s.name].spec.shape == s.shape}

    source = source.located(source.plain.located(wholes, group))
    found: list[HeldGroup] = []
    with group.together(f"comparing tensors that have to be computed with {source.plain.path}"):
        names = source.names()
        for held in wanted:
            source.compare(held.computed.hub, (), options, dtypes=False)
            if all(spec.name in names for spec in held.computed.hub):
                found.append(held)
        refuse_stand_ins(tensor for held in found for tensor in held.natives)
    return OpenedComputed(found, source, group, options)
