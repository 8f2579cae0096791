"""LoRA modules that are part of a model's own code: finding them, and their tensors in peft's format.

Two layouts are known, both recognised by parameters and not by class:

* a module with ``lora_A`` and ``lora_B``, each a parameter or a submodule with a ``weight`` (and, for ``lora_B``, maybe
  a ``bias``), and maybe a magnitude of DoRA called ``lora_magnitude``, ``lora_magnitude_vector`` or ``magnitude``.
  Matrices are ``(rank, in)`` and ``(out, rank)`` as in peft, or both transposed;
* a module of grouped experts with three-dimensional parameters ``lora_<projection>_A`` and ``lora_<projection>_B``:
  ``(experts, in, rank)`` and ``(experts, rank, out)``, or both with the last two dimensions swapped. The projection is
  ``gate_and_up`` (or ``gate_up``; the gate in the first half of the columns), ``gate``, ``up`` or ``down``.

Where shapes alone do not show which dimension is the rank, the configured ``dim`` decides, else the smaller one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeGuard

import torch.nn as nn

from shardwise.errors import AdapterError
from shardwise.peft.tensors import PEFT_PREFIX, AdapterEntry, axis_view, entry, join, named_modules, text_config
from shardwise.stateful_wrappers.names import NamedTensor
from shardwise.stateful_wrappers.units import saved_tensors
from shardwise.stateful_wrappers.wrapping import bare_model, original_class, plain_path
from shardwise.upstream.torch_modules import own_children, own_parameters

_LOG = logging.getLogger(__name__)

_GROUPED = re.compile(r"lora_(?P<token>.+)_A")
#: Projections that share one matrix, and the projections of the Hugging Face model that they stand for, in row order.
_COMBINED_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

#: Model types whose hub files name the experts' projections otherwise. Source: the models' files on the hub.
_EXPERT_NAMES: dict[str, dict[str, str]] = {
    "mixtral": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
}

_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude", "magnitude")


@dataclass(frozen=True, slots=True, eq=False)
class _Factors:
    """A pair of factors."""

    fqn: str  #: Name of the module that has them.
    a: NamedTensor  #: The factor with the input columns.
    b: NamedTensor  #: The factor with the output rows.
    rank: int  #: The LoRA rank.
    transposed: bool  #: Whether ``a`` ends with ``(in, rank)`` and ``b`` with ``(rank, out)``.
    scale: float | None  #: The factor on the product, where the module states it.

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """The dimensions of input and rank in ``a``, and of rank and output in ``b``."""
        last = self.a.tensor.dim() - 1
        return (last - 1, last, last - 1, last) if self.transposed else (last, last - 1, last, last - 1)


@dataclass(frozen=True, slots=True, eq=False)
class LinearSite(_Factors):
    """A module with a LoRA pair."""

    targets: tuple[str, ...]  #: The Hugging Face modules that it stands for; several for a combined projection.
    magnitude: NamedTensor | None  #: DoRA's magnitude.
    bias: NamedTensor | None  #: The bias of ``b``.


@dataclass(frozen=True, slots=True, eq=False)
class ExpertSite(_Factors):
    """A pair of grouped factors for all experts of a layer."""

    projections: tuple[str, ...]  #: Per-expert projections of the Hugging Face model that it stands for.
    parameter: str  #: The fused parameter of the Hugging Face model that it stands for.
    fused: bool  #: Whether the adapter is written for the fused parameter instead of single experts.

    @property
    def experts(self) -> int:
        """Number of experts, on all ranks together."""
        return int(self.a.tensor.shape[0])

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the adapted modules, one for each expert and projection."""
        return tuple(f"{join(self.fqn, str(e))}.{p}" for e in range(self.experts) for p in self.projections)


Site = LinearSite | ExpertSite


def is_fused(site: Site) -> TypeGuard[ExpertSite]:
    """Whether the adapter of a site is written for a fused parameter."""
    return isinstance(site, ExpertSite) and site.fused


def is_qwen3_moe(model: object) -> bool:
    """Whether ``model`` uses the state-dict adapter of Qwen3 MoE, or is such a model and has no adapter."""
    adapter = getattr(model, "state_dict_adapter", None)
    if adapter is not None:
        names = [cls.__name__.lower().replace("_", "") for cls in type(adapter).__mro__]
        return any(name.startswith("qwen3moe") for name in names)
    return model_type(model) == "qwen3_moe"


def model_type(model: object) -> str | None:
    """The model type that the configuration names."""
    value = getattr(getattr(model, "config", None), "model_type", None)
    return value if isinstance(value, str) else None


def has_hub_names(model: nn.Module) -> bool:
    """Whether the module names are those of the Hugging Face model: it is transformers' class or the hub's code."""
    return original_class(bare_model(model)).__module__.partition(".")[0] in ("transformers", "transformers_modules")


def named_targets(model: nn.Module) -> list[str]:
    """Modules of a part that are adapted by their children's names, combined projections expanded, sorted."""
    root = bare_model(model)
    expand = not has_hub_names(root)
    paths = (name.rpartition(".") for name, _ in named_modules(root))
    adapted = {parent for parent, _, child in paths if parent and "lora" in child and "lora" not in parent}
    return sorted({target for fqn in adapted for target in _expand_combined(fqn, expand)})


def hub_target_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Adapted modules' names as the model's state-dict adapter maps them, sorted; unchanged where it does not."""
    adapter = getattr(bare_model(model), "state_dict_adapter", None)
    rename = getattr(adapter, "map_peft_target_module_to_hf", None)
    return sorted({str(rename(name)) for name in names}) if callable(rename) else sorted(names)


def find_sites(
    model: nn.Module, dim: int | None = None, v4_compatible: bool = False, *, strict: bool = True
) -> list[Site]:
    """All LoRA modules of a part, wrapped or not, in the order of its modules.

    The configured rank, ``dim``, decides where shapes do not. With ``v4_compatible`` experts are always written one by
    one. A pair that no adapter file could hold (incomplete, or of shapes that do not fit) raises `AdapterError`;
    without ``strict`` it is left out.
    """
    root = bare_model(model)
    # Nearly every model has none, and is asked several times while it is loaded.
    if not any(name.startswith("lora_") for m in root.modules() for name in (*own_parameters(m), *own_children(m))):
        return []
    expand = not has_hub_names(root)
    fuse = is_qwen3_moe(root) and not v4_compatible
    sites: list[Site] = []
    for fqn, module in named_modules(root):
        sites += _expert_sites(fqn, module, dim, fuse, model_type(root))
        with contextlib.nullcontext() if strict else contextlib.suppress(AdapterError):
            site = _linear_site(fqn, module, dim, expand)
            sites += [] if site is None else [site]
    return sites


def _native(fqn: str, module: nn.Module, name: str, leaf: str = "weight") -> NamedTensor | None:
    parameter = own_parameters(module).get(name)
    if parameter is not None:
        return NamedTensor(join(fqn, name), parameter) if leaf == "weight" else None
    child = own_children(module).get(name)
    if child is None or isinstance(child, (nn.ModuleDict, nn.ParameterDict)):
        return None
    for inner_name, inner in named_modules(child):
        found = own_parameters(inner).get(leaf)
        if found is not None:
            return NamedTensor(join(fqn, name, inner_name, leaf), found)
    return None


def _linear_site(fqn: str, module: nn.Module, dim: int | None, expand: bool) -> LinearSite | None:
    a, b = _native(fqn, module, "lora_A"), _native(fqn, module, "lora_B")
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise _half(fqn, "lora_A" if a is None else "lora_B")
    rank, transposed = _orient(a, b, 2, dim)
    magnitude = next((m for name in _MAGNITUDES if (m := _native(fqn, module, name)) is not None), None)
    bias = _native(fqn, module, "lora_B", "bias")
    return LinearSite(fqn, a, b, rank, transposed, _scale(module), _expand_combined(fqn, expand), magnitude, bias)


def _expert_sites(fqn: str, module: nn.Module, dim: int | None, fuse: bool, kind: str | None) -> list[ExpertSite]:
    own = own_parameters(module)
    tokens = [m["token"] for name, p in own.items() if p is not None and (m := _GROUPED.fullmatch(name))]
    tokens = [t for t in tokens if own[f"lora_{t}_A"].dim() == 3]  # type: ignore[union-attr]
    # Separate gate and up factors cannot be views of one factor of the fused parameter.
    fused = fuse and all(_fused_parameter(t) in ("gate_up_proj", "down_proj") for t in tokens)
    sites: list[ExpertSite] = []
    for token in tokens:
        a, b = _native(fqn, module, f"lora_{token}_A"), _native(fqn, module, f"lora_{token}_B")
        if a is None or b is None:
            raise _half(fqn, f"lora_{token}_B")
        rank, transposed = _orient(a, b, 3, dim)
        projections = _expert_projections(token, kind)
        parameter = _fused_parameter(token)
        sites.append(ExpertSite(fqn, a, b, rank, transposed, _scale(module), projections, parameter, fused))
    # peft wraps a module's parameters in the order in which the Hugging Face model declares them: gate_up, then down.
    return sorted(sites, key=lambda site: site.parameter == "down_proj")


def _half(fqn: str, missing: str) -> AdapterError:
    return AdapterError(
        f"the LoRA module {fqn!r} has no {missing}",
        tensor=join(fqn, missing),
        hint="Give the module both factors, or remove the one it has.",
    )


def _orient(a: NamedTensor, b: NamedTensor, dims: int, dim: int | None) -> tuple[int, bool]:
    """The rank, and whether the factors are transposed with respect to peft's."""
    shape_a, shape_b = tuple(int(n) for n in a.tensor.shape), tuple(int(n) for n in b.tensor.shape)
    choices: list[tuple[int, bool]] = []
    if len(shape_a) == len(shape_b) == dims and shape_a[:-2] == shape_b[:-2] and 0 not in shape_a + shape_b:
        if shape_a[-2] == shape_b[-1]:
            choices.append((shape_a[-2], False))
        if shape_a[-1] == shape_b[-2]:
            choices.append((shape_a[-1], True))
    if not choices:
        raise AdapterError(
            f"the factors {a.name!r} {shape_a} and {b.name!r} {shape_b} do not fit together",
            tensor=b.name,
            hint="Factors are (rank, in) and (out, rank), or both transposed, with the experts in front if grouped.",
        )
    usual = dims == 3
    return min(choices, key=lambda choice: (choice[0] != dim, choice[0], choice[1] != usual))


def _scale(module: nn.Module) -> float | None:
    for name in ("scale", "scaling"):
        value: object = getattr(module, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def find_trained_modules(model: nn.Module, sites: Sequence[Site]) -> dict[str, list[NamedTensor]]:
    """Modules without LoRA whose parameters are trained while the rest of the model is frozen: peft's modules_to_save.

    Each, such as a new head, is trained as a whole, and comes with all of its state.
    Where nothing is frozen, the model was not prepared for adapter training: the adapter is then only the LoRA factors,
    and a warning says so. Parameters of a LoRA module or of the model itself cannot be such, and raise `AdapterError`.
    """
    root = bare_model(model)
    lora = {native.name for site in sites for native in natives(site)}
    rest = {plain_path(name): p for name, p in root.named_parameters() if plain_path(name) not in lora}
    trained = [name for name, p in rest.items() if p.requires_grad]
    if not trained or not sites:
        return {}
    if len(trained) == len(rest):
        _LOG.warning("the base model is not frozen; an adapter checkpoint holds the LoRA factors, not the base weights")
        return {}
    owners = {name.rpartition(".")[0] for name in trained}
    modules = dict(named_modules(root))
    top = sorted(o for o in owners if not any(o != other and f"{o}.".startswith(f"{other}.") for other in owners))
    for owner in top:
        inside = [s.fqn for s in sites if f"{s.fqn}.".startswith(f"{owner}.") or f"{owner}.".startswith(f"{s.fqn}.")]
        if not owner or inside:
            raise AdapterError(
                f"parameters of {owner or 'the model itself'!r} are trained beside LoRA, which an adapter cannot hold",
                tensor=next(name for name in trained if name.startswith(owner)),
                hint="Freeze them (requires_grad_(False)), or train the whole model without adapters.",
            )
    out = {owner: list(_state(owner, modules[owner])) for owner in top}
    # A head that is tied to a trained embedding is trained with it; peft's copies are not tied, so each has its values.
    ours = {id(native.tensor) for state in out.values() for native in state}
    for fqn, module in modules.items():
        tied = [p for p in own_parameters(module).values() if p is not None and id(p) in ours]
        if tied and not any(fqn == owner or fqn.startswith(f"{owner}.") for owner in top):
            out[fqn] = list(_state(fqn, module))
    return out


def natives(site: Site) -> list[NamedTensor]:
    """The parameters of a site."""
    beside = (site.magnitude, site.bias) if isinstance(site, LinearSite) else ()
    return [native for native in (site.a, site.b, *beside) if native is not None]


def _state(fqn: str, module: nn.Module) -> Iterator[NamedTensor]:
    for name, inner in named_modules(module):
        yield from (NamedTensor(join(fqn, name, leaf), tensor) for leaf, tensor in saved_tensors(inner))


# --- names of projections ---------------------------------------------------------------------------------------------


def _expert_projections(token: str, model_type: str | None) -> tuple[str, ...]:
    """The per-expert projections behind a grouped parameter called ``lora_<token>_A``.

    ``gate_and_up`` and ``gate_up`` stand for two projections, the gate in the first half of the output columns; any
    other token names its projection, with or without ``_proj`` or ``_projs`` at the end.
    """
    parameter = _fused_parameter(token)
    names = _COMBINED_PROJECTIONS.get(parameter, (parameter,))
    renamed = _EXPERT_NAMES.get(model_type or "", {})
    return tuple(renamed.get(name, name) for name in names)


def _fused_parameter(token: str) -> str:
    """Name of the fused parameter of the Hugging Face model behind ``lora_<token>_A``: gate_up_proj or down_proj."""
    stem = re.sub(r"_projs?$", "", token)
    return "gate_up_proj" if stem in ("gate_and_up", "gate_up") else f"{stem}_proj"


def _expand_combined(fqn: str, expand: bool) -> tuple[str, ...]:
    """The Hugging Face modules behind a module: several for a combined projection, else the module itself."""
    parent, _, leaf = fqn.rpartition(".")
    if not expand or leaf not in _COMBINED_PROJECTIONS:
        return (fqn,)
    return tuple(join(parent, name) for name in _COMBINED_PROJECTIONS[leaf])


def _combined_sizes(fqn: str, rows: int, config: object | None) -> tuple[int, ...]:
    """Output rows of each projection behind a combined one of so many rows.

    The language model's configuration has ``num_attention_heads``, ``num_key_value_heads`` (the number of heads if
    absent) and ``head_dim`` (``hidden_size / num_attention_heads`` if absent).
    """
    leaf = fqn.rpartition(".")[2]
    if leaf == "gate_up_proj":
        sizes: Iterable[int] = (rows // 2, rows - rows // 2)
        known = rows % 2 == 0
    else:
        named = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
        values = (getattr(config, name, None) for name in named)
        heads, groups, width, hidden = (v if isinstance(v, int) and not isinstance(v, bool) else 0 for v in values)
        groups, width = groups or heads, width or (hidden // heads if heads else 0)
        sizes = (heads * width, groups * width, groups * width)
        known = heads > 0 and sum(sizes) == rows
    if not known:
        raise AdapterError(
            f"the rows of {fqn!r} ({rows}) do not split into {', '.join(_COMBINED_PROJECTIONS[leaf])}",
            tensor=fqn,
            hint="Set num_attention_heads, num_key_value_heads and head_dim in the model's config.",
        )
    return tuple(sizes)


# --- their tensors in peft's format, as views ---------------------------------------------------------------------


def capture_own(model: nn.Module, dim: int | None, v4_compatible: bool, legacy_layout: bool) -> list[AdapterEntry]:
    """The adapter tensors of one part; the layouts are those of `shardwise.peft.capture.capture_adapter`."""
    config = text_config(bare_model(model))
    sites = find_sites(model, dim, v4_compatible)
    out: list[AdapterEntry] = []
    for site in sites:
        rows = int(site.b.tensor.shape[site.dims[-1]])
        if isinstance(site, LinearSite):
            single = len(site.targets) == 1
            out += _pairs(site, site.targets, (rows,) if single else _combined_sizes(site.fqn, rows, config))
        elif site.fused:
            # Later parameters' wrappers lie around those of earlier ones.
            same = [s for s in sites if is_fused(s) and s.fqn == site.fqn]
            out += _fused(site, len(same) - 1 - same.index(site), legacy_layout)
        else:
            sizes = [rows // len(site.projections)] * len(site.projections)
            for expert in range(site.experts):
                targets = [f"{site.fqn}.{expert}.{projection}" for projection in site.projections]
                out += _pairs(site, targets, sizes, ((0, expert),))
    first: dict[int, str] = {}  # of tensors that are tied
    for native in chain.from_iterable(find_trained_modules(model, sites).values()):
        name = f"{PEFT_PREFIX}{native.name}"
        known = first.setdefault(id(native.tensor), name)
        out.append(entry(name, native.name, native.tensor, alias_of=known if known != name else None))
    return out


def _pairs(
    site: Site, targets: Sequence[str], sizes: Sequence[int], fixed: tuple[tuple[int, int], ...] = ()
) -> Iterator[AdapterEntry]:
    """A pair for each target, which has so many rows; ``fixed`` is the expert's index, where there is one."""
    in_at, a_rank, rank_at, out_at = site.dims
    a, b = site.a.tensor, site.b.tensor
    a_view = axis_view([[n] for n in a.shape], (a_rank, in_at), fixed) if fixed or site.transposed else None
    first = f"{PEFT_PREFIX}{targets[0]}.lora_A.weight"
    start = 0
    for target, size in zip(targets, sizes, strict=True):
        name = f"{PEFT_PREFIX}{target}.lora_A.weight"
        shared = first if name != first else None
        yield entry(name, site.a.name, a, a_view, (site.rank, int(a.shape[in_at])), shared)
        whole = size == b.shape[out_at] and not (fixed or site.transposed)
        b_view = None if whole else axis_view([[n] for n in b.shape], ((out_at, start, size), rank_at), fixed)
        yield entry(f"{PEFT_PREFIX}{target}.lora_B.weight", site.b.name, b, b_view, (size, site.rank))
        if isinstance(site, LinearSite) and site.bias is not None:
            yield _rows(f"{PEFT_PREFIX}{target}.lora_B.bias", site.bias, start, size)
        if isinstance(site, LinearSite) and site.magnitude is not None:
            yield _rows(f"{PEFT_PREFIX}{target}.lora_magnitude_vector", site.magnitude, start, size)
        start += size


def _rows(name: str, native: NamedTensor, start: int, size: int) -> AdapterEntry:
    """Elements ``start .. start + size`` of a vector, which may be kept as a row or a column."""
    shape = tuple(int(n) for n in native.tensor.shape)
    if shape == (size,):
        return entry(name, native.name, native.tensor)
    long = max(range(len(shape)), key=lambda d: shape[d])
    fixed = tuple((d, 0) for d in range(len(shape)) if d != long)
    view = axis_view([[n] for n in shape], ((long, start, size),), fixed)
    return entry(name, native.name, native.tensor, view, (size,))


def _fused(site: ExpertSite, depth: int, legacy_layout: bool) -> Iterator[AdapterEntry]:
    """As peft's ParamWrapper: A is ``(experts * rank, in)``, expert-major; B is ``(out, rank * experts)``, rank-major.

    peft up to 0.19.0 read the parameter's ``(out, in)`` as ``(in, out)``, so that the factors change places.
    """
    in_at, a_rank, rank_at, out_at = site.dims
    factors = (site.a, in_at, a_rank), (site.b, out_at, rank_at)
    (a, a_long, a_rank), (b, b_long, b_rank) = factors[::-1] if legacy_layout else factors
    base = f"{PEFT_PREFIX}{site.fqn}{'.base_layer' * depth}"
    a_view = axis_view([[n] for n in a.tensor.shape], (0, a_rank, a_long))
    b_view = axis_view([[n] for n in b.tensor.shape], (b_long, b_rank, 0))
    a_shape = (site.experts * site.rank, int(a.tensor.shape[a_long]))
    b_shape = (int(b.tensor.shape[b_long]), site.rank * site.experts)
    yield entry(f"{base}.lora_A.weight", a.name, a.tensor, a_view, a_shape)
    yield entry(f"{base}.lora_B.weight", b.name, b.tensor, b_view, b_shape)
