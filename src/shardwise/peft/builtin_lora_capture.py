"""LoRA modules that are part of a model's own code: their tensors in peft's format, as views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn as nn

from shardwise.peft.builtin_lora import (
    ExpertSite,
    LinearSite,
    Native,
    TrainedModule,
    find_sites,
    find_trained_modules,
)
from shardwise.peft.names import combined_sizes, text_config
from shardwise.peft.tensors import PEFT_PREFIX, AdapterEntry, axis_view, entry
from shardwise.stateful_wrappers.wrapping import bare_model


def capture_own(model: nn.Module, dim: int | None, v4_compatible: bool, legacy_layout: bool) -> list[AdapterEntry]:
    """The adapter tensors of one part.

    Args:
        model: A part, wrapped or not.
        dim: The configured rank.
        v4_compatible: Write experts one by one.
        legacy_layout: Write adapters of fused expert parameters as peft up to 0.19.0 does.

    Raises:
        AdapterError: A LoRA module cannot be described.
    """
    config = text_config(bare_model(model))
    sites = find_sites(model, dim, v4_compatible)
    out: list[AdapterEntry] = []
    for site in sites:
        if isinstance(site, LinearSite):
            out += _linear(site, config)
        elif site.fused:
            out += _fused(site, _depth(site, sites), legacy_layout)
        else:
            out += _per_expert(site)
    first: dict[int, str] = {}
    for module in find_trained_modules(model, sites):
        out += _trained(module, first)
    return out


def _linear(site: LinearSite, config: object | None) -> Iterator[AdapterEntry]:
    rows_at, rank_at = (1, 0) if site.transposed else (0, 1)
    a, b = site.a.tensor, site.b.tensor
    total = int(b.shape[rows_at])
    sizes = (total,) if len(site.targets) == 1 else combined_sizes(site.fqn, total, config)
    a_shape = (site.rank, int(a.shape[0 if site.transposed else 1]))
    a_view = axis_view([[n] for n in a.shape], (1, 0)) if site.transposed else None
    first = f"{PEFT_PREFIX}{site.targets[0]}.lora_A.weight"
    start = 0
    for target, size in zip(site.targets, sizes, strict=True):
        name = f"{PEFT_PREFIX}{target}.lora_A.weight"
        yield entry(name, site.a.fqn, a, a_view, a_shape, first if name != first else None)
        whole = size == total and not site.transposed
        b_view = None if whole else axis_view([[n] for n in b.shape], ((rows_at, start, size), rank_at))
        yield entry(f"{PEFT_PREFIX}{target}.lora_B.weight", site.b.fqn, b, b_view, (size, site.rank))
        if site.bias is not None:
            yield _rows(f"{PEFT_PREFIX}{target}.lora_B.bias", site.bias, start, size)
        if site.magnitude is not None:
            yield _rows(f"{PEFT_PREFIX}{target}.lora_magnitude_vector", site.magnitude, start, size)
        start += size


def _rows(name: str, native: Native, start: int, size: int) -> AdapterEntry:
    """Elements ``start .. start + size`` of a vector, which may be kept as a row or a column."""
    shape = tuple(int(n) for n in native.tensor.shape)
    if shape == (size,):
        return entry(name, native.fqn, native.tensor)
    long = max(range(len(shape)), key=lambda d: shape[d])
    fixed = tuple((d, 0) for d in range(len(shape)) if d != long)
    view = axis_view([[n] for n in shape], ((long, start, size),), fixed)
    return entry(name, native.fqn, native.tensor, view, (size,))


def _per_expert(site: ExpertSite) -> Iterator[AdapterEntry]:
    in_at, a_rank, rank_at, out_at = (1, 2, 1, 2) if site.transposed else (2, 1, 2, 1)
    a, b = site.a.tensor, site.b.tensor
    size = int(b.shape[out_at]) // len(site.projections)
    for expert in range(site.experts):
        first = f"{PEFT_PREFIX}{site.fqn}.{expert}.{site.projections[0]}.lora_A.weight"
        for index, projection in enumerate(site.projections):
            base = f"{PEFT_PREFIX}{site.fqn}.{expert}.{projection}"
            a_view = axis_view([[n] for n in a.shape], (a_rank, in_at), ((0, expert),))
            b_view = axis_view([[n] for n in b.shape], ((out_at, index * size, size), rank_at), ((0, expert),))
            shared = first if index else None
            yield entry(f"{base}.lora_A.weight", site.a.fqn, a, a_view, (site.rank, int(a.shape[in_at])), shared)
            yield entry(f"{base}.lora_B.weight", site.b.fqn, b, b_view, (size, site.rank))


def _depth(site: ExpertSite, sites: Sequence[object]) -> int:
    """How many of peft's wrappers lie around the one of this parameter: later parameters wrap earlier ones."""
    same = [s for s in sites if isinstance(s, ExpertSite) and s.fqn == site.fqn]
    return len(same) - 1 - same.index(site)


def _fused(site: ExpertSite, depth: int, legacy_layout: bool) -> Iterator[AdapterEntry]:
    """As peft's ParamWrapper: A is ``(experts * rank, in)``, expert-major; B is ``(out, rank * experts)``, rank-major.

    peft up to 0.19.0 read the parameter's ``(out, in)`` as ``(in, out)``, so that the factors change places.
    """
    in_at, a_rank, rank_at, out_at = (1, 2, 1, 2) if site.transposed else (2, 1, 2, 1)
    columns, rows = (site.a, in_at, a_rank), (site.b, out_at, rank_at)
    if legacy_layout:
        columns, rows = rows, columns
    base = f"{PEFT_PREFIX}{site.fqn}{'.base_layer' * depth}"
    native, long, rank = columns
    view = axis_view([[n] for n in native.tensor.shape], (0, rank, long))
    shape = (site.experts * site.rank, int(native.tensor.shape[long]))
    yield entry(f"{base}.lora_A.weight", native.fqn, native.tensor, view, shape)
    native, long, rank = rows
    view = axis_view([[n] for n in native.tensor.shape], (long, rank, 0))
    shape = (int(native.tensor.shape[long]), site.rank * site.experts)
    yield entry(f"{base}.lora_B.weight", native.fqn, native.tensor, view, shape)


def _trained(module: TrainedModule, first: dict[int, str]) -> Iterator[AdapterEntry]:
    """A trained module's tensors; ``first`` has the names under which tied ones were written before."""
    for native in module.state:
        name = f"{PEFT_PREFIX}{native.fqn}"
        known = first.setdefault(id(native.tensor), name)
        yield entry(name, native.fqn, native.tensor, alias_of=known if known != name else None)
