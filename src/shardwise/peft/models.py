"""Models adapted with Hugging Face ``peft``: which tensors belong to an adapter, and under which names.

peft's own ``get_peft_model_state_dict`` decides. It is given placeholders instead of parameters, so that nothing is
gathered, and a stand-in for the model, so that wrappers' prefixes, a pipeline stage without a config and the look-up of
the base model on the hub do not matter.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn as nn

from shardwise.disk.names import exists
from shardwise.errors import AdapterError
from shardwise.peft.builtin_lora import find_sites
from shardwise.peft.tensors import PEFT_PREFIX, AdapterEntry, axis_view, entry, join, named_modules
from shardwise.sources.hub_cache import default_cache, find_snapshot
from shardwise.stateful_wrappers.names import own_tensors
from shardwise.stateful_wrappers.wrapping import adapted_model, bare_model, original_class
from shardwise.upstream import peft as upstream
from shardwise.upstream.torch_modules import own_buffers, own_children, own_parameters

if TYPE_CHECKING:
    from peft import PeftConfig

_FACTOR = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.")

#: Projections behind a fused expert parameter, in row order, for models whose v4 files hold experts one by one.
_FUSED_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def is_peft_adapted(parts: Sequence[nn.Module], peft_config: object | None = None) -> bool:
    """Whether the model is adapted with peft, by its layers or, for a stage that has none, by its configuration."""
    if not upstream.is_imported():
        return False
    from peft import PeftConfig

    if _has(parts, (upstream.layer_class(), upstream.copy_class())):
        return True
    given = list(peft_config.values()) if isinstance(peft_config, Mapping) else [peft_config]
    for part in parts:
        carried = getattr(adapted_model(part), "peft_config", None)
        given += list(carried.values()) if isinstance(carried, Mapping) else [carried]
    known = any(isinstance(config, PeftConfig) for config in given)
    return known and not any(find_sites(part) for part in parts)


def is_whole_with_adapter(parts: Sequence[nn.Module]) -> bool:
    """Whether peft's layers, or a ``PeftModel``, are in the model itself.

    A configuration alone is not enough: peft leaves it on a model whose adapters were merged and unloaded.
    """
    if not upstream.is_imported():
        return False
    from peft import PeftModel

    return _has(parts, (PeftModel, upstream.layer_class(), upstream.copy_class()))


def _has(parts: Sequence[nn.Module], kinds: tuple[type, ...]) -> bool:
    return any(isinstance(module, kinds) for part in parts for module in part.modules())


def method_of(config: PeftConfig) -> str:
    """The name of an adapter's method, as ``peft_type`` says it."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def adapter_configs(parts: Sequence[nn.Module], given: object | None) -> dict[str, PeftConfig]:
    """Each adapter's configuration, from the model, or ``given`` (one, or several by name) where it has none."""
    from peft import PeftConfig

    for part in parts:
        found = getattr(adapted_model(part), "peft_config", None)
        if isinstance(found, Mapping) and found:
            return {str(name): cast("PeftConfig", config) for name, config in found.items()}
    named = given if isinstance(given, Mapping) else {"default": given}
    configs = {str(name): config for name, config in named.items() if isinstance(config, PeftConfig)}
    if configs:
        return configs
    raise AdapterError(
        "the model has peft layers but no peft_config", hint="Pass the LoraConfig that the layers were made from."
    )


class _StandIn:
    """A model as peft's state-dict functions see it: its modules under clean names, and nothing that communicates."""

    def __init__(self, model: nn.Module, configs: Mapping[str, PeftConfig], is_stage: bool) -> None:
        self._model = model
        self._is_stage = is_stage
        self.peft_config = dict(configs)
        self.config: object | None = getattr(bare_model(model), "config", None)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return named_modules(self._model)

    def modules(self) -> Iterator[nn.Module]:
        return self._model.modules()

    def get_base_model(self) -> _StandIn:
        return _StandIn(bare_model(self._model), self.peft_config, self._is_stage)

    def get_input_embeddings(self) -> object | None:
        return self._embeddings("get_input_embeddings")

    def get_output_embeddings(self) -> object | None:
        found = self._embeddings("get_output_embeddings")
        if found is None and self._is_stage:
            # transformers says that what has no input embeddings has no output embeddings either.
            found = getattr(bare_model(self._model), "lm_head", None)
        return found

    def _embeddings(self, getter: str) -> object | None:
        get = getattr(bare_model(self._model), getter, None)
        try:
            return None if get is None else cast("object", get())
        except (AttributeError, NotImplementedError):  # a pipeline stage without the embeddings
            return None


def adapters_prefixes(model: nn.Module) -> dict[str, str]:
    """Where peft's layers keep their adapters: beginning of the tensors' names -> the adapter's name.

    Known from the modules, since an adapter may be called as anything, a layer's number among them.
    """
    kinds = (upstream.tuner_class(), upstream.layer_class(), upstream.copy_class())
    out: dict[str, str] = {}
    for name, module in named_modules(model):
        if not isinstance(module, kinds):
            continue
        is_tuner = isinstance(module, upstream.tuner_class())
        known = set(cast("Mapping[str, object]", module.peft_config)) if is_tuner else None
        for leaf, child in module.named_children():
            if _is_dictionary(child):
                out |= _keyed(join(name, leaf), child, known)
    return out


def _is_dictionary(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.ModuleDict, nn.ParameterDict)) or type(module).__name__ == "BufferDict"


def _keyed(path: str, dictionary: nn.Module, known: Collection[str] | None) -> dict[str, str]:
    """Where a dictionary keeps each adapter's tensors.

    Tensors that all layers share may be keyed by kinds of layers first (FRoD), as a method's known adapters show.
    """
    out: dict[str, str] = {}
    children = own_children(dictionary)
    for key in {*children, *own_parameters(dictionary), *own_buffers(dictionary)}:
        below = children.get(key)
        if below is not None and known is not None and key not in known and _is_dictionary(below):
            out |= _keyed(join(path, key), below, known)
        else:
            out[join(path, key)] = key
    return out


def is_below(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The adapter whose tensor has this name; ``None`` where it is no adapter's."""
    cut = len(name)
    while cut > 0:
        if (found := prefixes.get(name[:cut])) is not None:
            return found
        cut = name.rfind(".", 0, cut)
    return None


def capture_peft(
    part: nn.Module,
    configs: Mapping[str, PeftConfig],
    adapter_name: str,
    *,
    v4_compatible: bool,
    legacy_layout: bool,
    base: str | None,
    is_stage: bool,
) -> list[AdapterEntry]:
    """The tensors of one adapter that a part has, as peft itself would name them; `AdapterError` if it cannot.

    The base model is for an adapter that does not name it: its vocabulary tells whether embeddings were resized.
    """
    model = adapted_model(part)
    config = configs[adapter_name]
    owners = adapters_prefixes(model)
    # peft would look for the other adapters' names anywhere in a tensor's, where one may be a layer's number.
    state = {n: t for n, t in own_tensors(model).items() if is_below(n, owners) in (None, adapter_name)}
    if config.is_prompt_learning:
        return _prompt(adapter_name, config, state)
    placeholders = {name: torch.empty(0, device="meta") for name in state}
    names = {id(placeholder): name for name, placeholder in placeholders.items()}
    stand_in = _StandIn(model, {adapter_name: _for_placeholders(config, base)}, is_stage)
    found = _named_by_peft(stand_in, adapter_name, placeholders)
    # SHiRA's indices are in no state dict: peft takes them from its layers, and those tensors are saved and filled.
    kept = _kept_tensors(model)
    wrappers = _param_wrappers(model)
    out: list[AdapterEntry] = []
    for name, placeholder in found.items():
        fqn = names.get(id(placeholder))
        if fqn is None and id(placeholder) in kept:
            out.append(entry(_prefixed(name), kept[id(placeholder)], placeholder))
            continue
        if fqn is None:
            raise AdapterError(
                f"{method_of(config)}: peft computes {name!r} instead of naming a parameter, which a sharded "
                "model cannot do",
                tensor=name,
                hint="Use LoraConfig, or another method whose adapters live in the layers.",
            )
        out += _entries(_prefixed(name), fqn, state[fqn], wrappers, v4_compatible, legacy_layout)
    taken = {item.fqn for item in out}
    for name in state if method_of(config) == "LORA" else ():  # whatever peft's filters did
        if name not in taken and is_below(name, owners) == adapter_name and _FACTOR.search(name):
            raise AdapterError(
                f"peft leaves {name!r} out of the adapter {adapter_name!r}",
                tensor=name,
                hint="Give the adapter, or the module, another name.",
            )
    return out


def _named_by_peft(
    model: _StandIn, adapter_name: str, placeholders: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors that peft takes from a state dict, under the names that it writes."""
    from peft import get_peft_model_state_dict

    try:
        with warnings.catch_warnings(action="ignore"):
            found: dict[str, torch.Tensor] = get_peft_model_state_dict(
                cast("Any", model), state_dict=placeholders, adapter_name=adapter_name, save_embedding_layers="auto"
            )
    except Exception as error:  # peft's own code, on placeholders, of which it may look at values
        config = model.peft_config[adapter_name]
        raise AdapterError(
            f"peft cannot say which tensors the adapter {adapter_name!r} ({method_of(config)}) has without computing "
            f"on them: {type(error).__name__}: {error}",
            hint="Use LoraConfig, or another method whose adapters live in the layers.",
        ) from error
    return found


def _for_placeholders(config: PeftConfig, base: str | None) -> PeftConfig:
    """A copy with which peft only names tensors. What is computed with some settings, training could not go on from."""
    out = _with_local_base(config, base)
    if getattr(config, "save_only_topk_weights", False):
        raise AdapterError(
            f"{method_of(config)} with save_only_topk_weights saves a selection that training cannot resume from",
            hint="Set save_only_topk_weights=False; peft can make the selection from the saved adapter later.",
        )
    if method_of(config) == "ADAMSS" and getattr(config, "use_asa", False):
        raise AdapterError(
            "ADAMSS with use_asa keeps which subspaces it trains, and why, in no tensor that peft saves",
            hint="Set use_asa=False, since a resumed run would allocate subspaces otherwise than one that goes on.",
        )
    if method_of(config) == "ADALORA":
        # Pruned ranks are zero in lora_E: whole tensors mean the same, and training can resume from them.
        setattr(out, "rank_pattern", None)  # noqa: B010 - a field of this method alone
    return out


def _kept_tensors(model: nn.Module) -> dict[int, str]:
    """Tensors that peft's layers keep in plain dictionaries: id -> name."""
    layer = upstream.layer_class()
    out: dict[int, str] = {}
    for path, module in named_modules(model):
        if isinstance(module, layer):
            for key in cast("tuple[str, ...]", module.other_param_names):
                value = vars(module).get(key)
                items = value.items() if isinstance(value, dict) else ()
                out |= {id(item): join(path, key, name) for name, item in items if isinstance(item, torch.Tensor)}
    return out


def _prompt(adapter_name: str, config: PeftConfig, state: Mapping[str, torch.Tensor]) -> list[AdapterEntry]:
    """Virtual tokens that are parameters of a prompt encoder as they are, and what multitask tuning has beside them."""
    kind, encoder = method_of(config), f"prompt_encoder.{adapter_name}."
    saved = {"prompt_embeddings": "embedding.weight"}
    if kind == "MULTITASK_PROMPT_TUNING":
        saved |= {"prefix_task_cols": "prefix_task_cols", "prefix_task_rows": "prefix_task_rows"}
    plain = kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING") or (
        kind == "PREFIX_TUNING" and not getattr(config, "prefix_projection", False)
    )
    if not plain or any(encoder + leaf not in state for leaf in saved.values()):
        raise AdapterError(
            f"adapter {adapter_name!r} ({kind}): what peft saves of it is computed by a prompt encoder, and training "
            "could not go on from that",
            hint="Use prompt tuning, prefix tuning without prefix_projection, or a method that lives in the layers.",
        )
    return [entry(name, encoder + leaf, state[encoder + leaf]) for name, leaf in saved.items()]


def _prefixed(name: str) -> str:
    """Layers that were injected without a ``PeftModel`` are saved as if they had one; transformers does the same."""
    return name if name.startswith("base_model.") else f"{PEFT_PREFIX}{name}"


def _with_local_base(config: PeftConfig, named: str | None) -> PeftConfig:
    """A copy whose base model is a local directory or none: peft compares the vocabulary's size, and asks the hub."""
    out = copy.copy(config)
    base = out.base_model_name_or_path = config.base_model_name_or_path or named
    if base and not exists(Path(base) / "config.json"):
        snapshot = find_snapshot(default_cache(), base)
        directory = None if snapshot is None else snapshot.path
        described = directory is not None and exists(directory / "config.json")
        out.base_model_name_or_path = str(directory) if described else None
    return out


def _param_wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules through which peft adapts a parameter directly, by name."""
    kind = upstream.parameter_wrapper_class()
    return {name: module for name, module in named_modules(model) if isinstance(module, kind)}


def _entries(
    name: str,
    fqn: str,
    tensor: torch.Tensor,
    wrappers: Mapping[str, nn.Module],
    v4_compatible: bool,
    legacy_layout: bool,
) -> list[AdapterEntry]:
    for side in ("lora_A", "lora_B"):
        owner, found, _ = fqn.rpartition(f".{side}.")
        wrapper = wrappers.get(owner) if found else None
        # Only where the parameter is (experts, out, in) do the layouts differ, and only there has v4 single experts.
        if wrapper is None or not upstream.swaps_in_out(wrapper):
            continue
        experts = int(cast("int", wrapper.num_experts))
        if v4_compatible:
            return _single_experts(name, fqn, tensor, str(wrapper.parameter_name), side, experts)
        if legacy_layout:
            return [_legacy(name, fqn, tensor, side, experts)]
    return [entry(name, fqn, tensor)]


def _legacy(name: str, fqn: str, tensor: torch.Tensor, side: str, experts: int) -> AdapterEntry:
    """A factor for peft up to 0.19.0, which read the parameter's (out, in) as (in, out): A and B change places."""
    rows, columns = (int(n) for n in tensor.shape)
    is_a = side == "lora_A"
    factors = [[experts, rows // experts], [columns]] if is_a else [[rows], [columns // experts, experts]]
    other = "lora_B" if is_a else "lora_A"
    view = axis_view(factors, (2, 1, 0))
    return entry(name.replace(f".{side}.", f".{other}."), fqn, tensor, view, (columns, rows))


def _innermost(name: str) -> str:
    """A module's name without peft's wrappers inside each other."""
    return re.sub(r"(\.base_layer)+$", "", name)


def _single_experts(
    name: str, fqn: str, tensor: torch.Tensor, parameter: str, side: str, experts: int
) -> list[AdapterEntry]:
    projections = _FUSED_PROJECTIONS.get(parameter)
    if projections is None:
        raise AdapterError(
            f"the fused parameter {parameter!r} has no counterpart for single experts",
            tensor=name,
            hint="Save this adapter without v4_compatible.",
        )
    base = _innermost(name.partition(f".{side}.")[0])
    rows, columns = (int(n) for n in tensor.shape)
    out: list[AdapterEntry] = []
    for expert, (index, projection) in product(range(experts), enumerate(projections)):
        target = f"{base}.{expert}.{projection}.{side}.weight"
        if side == "lora_A":
            shape = (rows // experts, columns)
            view = axis_view([[experts, shape[0]], [columns]], (1, 2), ((0, expert),))
            shared = f"{base}.{expert}.{projections[0]}.lora_A.weight" if index else None
            out.append(entry(target, fqn, tensor, view, shape, shared))
        else:
            shape = (rows // len(projections), columns // experts)
            span = (0, index * shape[0], shape[0])
            view = axis_view([[rows], [shape[1], experts]], (span, 1), ((2, expert),))
            out.append(entry(target, fqn, tensor, view, shape))
    return out


def config_as_saved(
    model: nn.Module | None, config: PeftConfig, original_model_path: str | None = None
) -> dict[str, object]:
    """An adapter's settings as ``PeftModel.save_pretrained`` writes them; sets become sorted lists.

    ``model`` is the part that describes the base model; the path is for one that does not name it.
    """
    out: dict[str, object] = dict(config.to_dict())
    out["inference_mode"] = True
    if out.get("base_model_name_or_path") is None and model is not None:
        out["base_model_name_or_path"] = model.__dict__.get("name_or_path") or None
    if not out.get("base_model_name_or_path") and original_model_path:
        out["base_model_name_or_path"] = original_model_path
    if method_of(config) == "ADALORA":
        out["rank_pattern"] = None  # the tensors are whole: `_for_placeholders`
    if config.task_type is None and model is not None:
        out["auto_mapping"] = auto_mapping(model)
    return out


def auto_mapping(model: nn.Module) -> dict[str, str]:
    """The entry that peft records for a base model without a task type."""
    cls = original_class(model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def peft_target_modules(model: nn.Module) -> list[str]:
    """Names of the modules that peft's LoRA layers replace, without peft's prefix."""
    layer, wrapper = upstream.layer_class(), upstream.parameter_wrapper_class()
    return sorted(
        name.removeprefix(PEFT_PREFIX)
        for name, module in named_modules(adapted_model(model))
        if isinstance(module, layer) and not isinstance(module, wrapper)
    )


def peft_target_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that peft's LoRA adapts directly, without peft's prefix."""
    names = {
        join(name.removeprefix(PEFT_PREFIX).replace(".base_layer", ""), str(wrapper.parameter_name))
        for name, wrapper in _param_wrappers(adapted_model(model)).items()
    }
    return sorted(names)


class ExpertTargets(NamedTuple):
    """The single-expert modules that an adapter of a fused parameter, which a module has, stands for."""

    module: str
    projections: tuple[str, ...]
    experts: int
    rank: int
    alpha: float

    @property
    def names(self) -> list[str]:
        """Names of these modules."""
        return [f"{self.module}.{expert}.{p}" for p in self.projections for expert in range(self.experts)]


def expert_targets(parts: Sequence[nn.Module], adapter_name: str) -> list[ExpertTargets]:
    """The single-expert modules behind an adapter's fused parameters, for writing expert by expert."""
    out: list[ExpertTargets] = []
    for part in parts:
        for name, wrapper in _param_wrappers(adapted_model(part)).items():
            ranks, alphas = cast("dict[str, int]", wrapper.r), cast("dict[str, float]", wrapper.lora_alpha)
            if not upstream.swaps_in_out(wrapper) or adapter_name not in ranks:
                continue
            module = _innermost(name.removeprefix(PEFT_PREFIX))
            parameter = str(wrapper.parameter_name)
            projections = _FUSED_PROJECTIONS.get(parameter, (parameter,))
            experts = int(cast("int", wrapper.num_experts))
            out.append(ExpertTargets(module, projections, experts, ranks[adapter_name], alphas[adapter_name]))
    return out


def v4_config(config: Mapping[str, object], targets: Sequence[ExpertTargets]) -> dict[str, object]:
    """Rewrite settings with ``target_parameters`` for an adapter that is stored expert by expert."""
    out = dict(config)
    if not config.get("target_parameters") or not targets:
        return out
    modules = config.get("target_modules")
    if isinstance(modules, str):
        patterns = [rf"{t.module}\.\d+\.{p}" for t in targets for p in t.projections]
        out["target_modules"] = "|".join([f"(?:{modules})", *patterns])
    else:
        listed = modules if isinstance(modules, (list, tuple, set, frozenset)) else ()
        out["target_modules"] = sorted({*map(str, listed), *(name for t in targets for name in t.names)})
    for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        own = config.get(key)
        pattern: dict[str, object] = dict(own) if isinstance(own, Mapping) else {}
        for target in targets:
            value = target.rank if default == "r" else target.alpha
            if value != config.get(default):
                pattern.update({rf"{target.module}\.\d+\.{p}": value for p in target.projections})
        out[key] = pattern
    out["target_parameters"] = None
    return out
