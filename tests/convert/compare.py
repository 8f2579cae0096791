"""Compare a derived conversion with what `save_pretrained` writes, whole and from simulated ranks."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from shardwise.convert.rules import Conversion, NativeSpec, to_hub
from shardwise.dtypes import dtype_code, torch_dtype
from shardwise.geometry import Box
from shardwise.plan.fragments import HeldTensor, Part, hold
from shardwise.plan.placement import MeshKey, Placement, Replicated, Sharded, Strided, regions

Tensors = dict[str, torch.Tensor]


def saved_state(model: torch.nn.Module) -> Tensors:
    """The model's state as `save_pretrained` takes it: what is tied only once."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return dict(remove_tied_weights_from_state_dict(model.state_dict(), model))


def specs_of(state: Tensors) -> list[NativeSpec]:
    return [NativeSpec(name, tuple(t.shape), dtype_code(t.dtype)) for name, t in state.items()]


def reference(model: torch.nn.Module) -> Tensors:
    """What `save_pretrained` writes."""
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        model.save_pretrained(folder)
        out: Tensors = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            out |= load_file(path)
    return {name: tensor.clone() for name, tensor in out.items()}


def whole(state: Tensors) -> list[HeldTensor]:
    """Every tensor as one rank without a mesh holds it."""
    return [hold(spec, Part(spec.shape), (), state[spec.name]) for spec in specs_of(state)]


def held_by(state: Tensors, mesh: MeshKey, placement: Placement, coordinate: tuple[int, ...]) -> list[HeldTensor]:
    """What the rank at ``coordinate`` holds of each tensor, packed in its local tensor as a DTensor's would be."""
    out = []
    for spec in specs_of(state):
        fitting = placement if isinstance(placement, Replicated) or placement.dim < len(spec.shape) else Replicated()
        held = regions(spec.shape, mesh.shape, (fitting,), coordinate)
        sizes = [0] * len(spec.shape)
        for region in held:
            sizes = [max(a, b + c) for a, b, c in zip(sizes, region.local, region.box.sizes, strict=True)]
        local = torch.empty(sizes, dtype=state[spec.name].dtype)
        for region in held:
            _at(local, Box(region.local, region.box.sizes)).copy_(_at(state[spec.name], region.box))
        out.append(hold(spec, Part(spec.shape, mesh, (fitting,)), coordinate, local))
    return out


def _at(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def assemble(ranks: Sequence[Sequence[HeldTensor]]) -> tuple[Tensors, dict[str, int]]:
    """Put the fragments of all ranks together; also count how often each element was given, at most, less at least.

    Returns:
        The tensors, and for each the largest number of times that one of its elements was written.
    """
    out: Tensors = {}
    counts: Tensors = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for held in itertools.chain.from_iterable(ranks):
        name = held.spec.name
        if name not in out:
            out[name] = torch.zeros(held.grid, dtype=torch_dtype(held.spec.dtype))
            counts[name] = torch.zeros(held.grid, dtype=torch.int32)
            shapes[name] = held.spec.shape
        assert out[name].shape == held.grid
        for fragment in held.fragments:
            _at(out[name], fragment.box).copy_(fragment.data)
            _at(counts[name], fragment.box).add_(1)
        for part in held.parts:
            assert part.part.boxes(part.coordinate) == tuple(fragment.box for fragment in part.fragments)
    for name, count in counts.items():
        assert count.numel() == 0 or count.min() >= 1, f"{name}: some elements are held by no rank"
    most = {name: int(count.max()) if count.numel() else 0 for name, count in counts.items()}
    return {name: tensor.reshape(shapes[name]) for name, tensor in out.items()}, most


def computed(conversion: Conversion, state: Tensors) -> Tensors:
    """The tensors of the groups that no view expresses; also checks that they come back."""
    out: Tensors = {}
    for group in conversion.computed:
        natives = {spec.name: state[spec.name].clone() for spec in group.natives}
        hub = group.rule.forward(natives)
        assert {name: tuple(t.shape) for name, t in hub.items()} == {spec.name: spec.shape for spec in group.hub}
        back = group.rule.backward({name: t.clone() for name, t in hub.items()})
        assert_same(back, {spec.name: state[spec.name] for spec in group.natives})
        out |= hub
    return out


def assert_same(found: Tensors, wanted: Tensors) -> None:
    """Names, dtypes, shapes and bytes."""
    lacking, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    assert not lacking, f"missing {lacking[:3]}, extra {extra[:3]}"
    assert not extra, f"extra {extra[:3]}"
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, f"{name}: {tuple(found[name].shape)} {tuple(tensor.shape)}"
        assert torch.equal(found[name], tensor), f"{name}: other values"


SPREADS: tuple[tuple[int, Placement], ...] = (
    (2, Sharded(0)),
    (3, Sharded(0)),
    (2, Sharded(1)),
    (3, Sharded(1)),
    (2, Strided(0, 2)),
    (3, Strided(1, 2)),
)


def check_whole(conversion: Conversion, state: Tensors, wanted: Tensors) -> None:
    """One rank that holds everything writes what `save_pretrained` writes, and loads it back through its views."""
    converted = to_hub(conversion, whole(state))
    found, most = assemble([converted.held])
    assert set(most.values()) <= {0, 1}
    assert_same(found | computed(conversion, state), wanted)
    blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for held in to_hub(conversion, whole(blank)).held:
        source = wanted[held.spec.name].reshape(held.grid)
        for fragment in held.fragments:
            fragment.data.copy_(_at(source, fragment.box))
    computed_names = {spec.name for group in conversion.computed for spec in group.natives}
    kept = set(state) - computed_names - set(conversion.ignored)
    assert_same({name: blank[name] for name in kept}, {name: state[name] for name in kept})


def check_sharded(conversion: Conversion, state: Tensors, wanted: Tensors, size: int, placement: Placement) -> None:
    """Ranks that hold a share each write, together, what `save_pretrained` writes."""
    state = touched(conversion, state)
    mesh = MeshKey(("dp",), (size,))
    ranks = [to_hub(conversion, held_by(state, mesh, placement, (index,))).held for index in range(size)]
    found, most = assemble(ranks)
    assert max(most.values(), default=1) <= size
    assert_same(found, {name: tensor for name, tensor in wanted.items() if name in found})
    assert set(found) == {tensor.name for name in state for tensor in conversion.by_native(name)}


def touched(conversion: Conversion, state: Tensors, others: int = 4) -> Tensors:
    """The native tensors that hub tensors are views of, with all others of their groups, and a few untouched ones."""
    converted = {p.native for t in conversion.hub if any(part.view for part in t.parts) for p in t.parts}
    rest = [name for name in state if name not in converted and conversion.by_native(name)]
    return {name: state[name] for name in [*converted, *rest[:others]]}
