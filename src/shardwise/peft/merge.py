"""Models with their adapters merged into the base weights by peft's own code, one module at a time.

Each method computes a merged weight in its own way, in the dtypes that the module has. So every adapted module is
copied without memory, and peft merges a copy of that copy twice: on the meta device, which gives the shapes and dtypes
of the result, and with the module's whole tensors, when the merged weights are written.

A linear layer that bitsandbytes keeps quantized is a dense one in the copies, adapted or not, and is dequantized where
the whole tensors are.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy as shallow_copy
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn as nn

from shardwise.errors import AdapterError, QuantizationError
from shardwise.peft.builtin_lora import find_sites
from shardwise.peft.models import adapter_configs, is_peft_adapted, method_of
from shardwise.peft.tensors import named_modules
from shardwise.stateful_wrappers.memory import identity
from shardwise.stateful_wrappers.model_parts import config_of, has_quantized_parameters
from shardwise.stateful_wrappers.names import own_tensors
from shardwise.stateful_wrappers.units import has_foreign_hooks
from shardwise.stateful_wrappers.wrapping import adapted_model, bare_model, original_class, unwrap
from shardwise.upstream import peft as upstream
from shardwise.upstream.torch_modules import STORES, UNSAVED, own_parameters

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

    from peft import PeftConfig

_NO_MERGE = "Set export_merged to false; the adapter itself can be saved."


@dataclass(frozen=True, slots=True, eq=False)
class MergedGroup:
    """Adapted modules that are merged together: one, or several that share a base weight. Or a quantized module."""

    name: str  #: The first one's path in the model.
    #: Name -> tensor of the training model, of all that merging reads. Whole tensors are needed.
    sources: Mapping[str, torch.Tensor]
    results: tuple[torch.Tensor, ...]  #: What stands for the merged tensors in the merged model, without memory.
    _layers: tuple[nn.Module, ...]
    _tokens: Mapping[str, torch.Tensor]
    _quantized: Mapping[str, QuantizedWeight]

    def merge(self, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The merged tensors, one for each of ``results``, from whole ``sources``, which it may change. Any thread."""
        memory = {id(token): _like(token, self._whole(name, token, values)) for name, token in self._tokens.items()}
        copied = _Copier(lambda tensor: memory[id(tensor)])
        unloaded = _unload([copied.module(layer) for layer in self._layers])
        return [tensor.detach() for tensor in _tensors(unloaded)]

    def _whole(self, name: str, token: torch.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight = self._quantized.get(name)
        if weight is None:
            return values[name]
        return weight.dequantize({key: values[f"{name}/{key}"] for key in weight.sources}).to(token.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class MergedPart:
    """A part of a model as it is after ``merge_and_unload()``."""

    #: The model without peft's layers. Tensors that no adapter changes are those of the training model, shared and not
    #: copied; merged ones have no memory.
    model: nn.Module
    groups: tuple[MergedGroup, ...]  #: What the merged ones are computed from.


def merged_parts(parts: Sequence[nn.Module]) -> list[MergedPart]:
    """Describe a model, whose parts have memory, as peft would merge its active adapters. Local; nothing is computed.

    An adapter that cannot be merged raises `AdapterError`, base weights that cannot be dequantized `QuantizationError`.
    """
    if not is_peft_adapted(parts):
        if any(find_sites(part) for part in parts):
            raise AdapterError(
                "export_merged: the model has LoRA modules of its own, and only peft's code says how to merge",
                hint=f"Adapt the model with peft. {_NO_MERGE}",
            )
        return [MergedPart(bare_model(adapted_model(part)), ()) for part in parts]
    models = [adapted_model(part) for part in parts]
    # A stage may have no adapted module, and carry no settings.
    has_any = any(getattr(m, "peft_config", None) or any(map(_is_adapted, bare_model(m).modules())) for m in models)
    configs = adapter_configs(parts, None) if has_any else {}
    for name, config in configs.items():
        require_merge(name, config)
    for part in parts:
        base = bare_model(adapted_model(part))
        # So that the code below finds shards, not parameters that a forward pass left gathered.
        own_tensors(adapted_model(part))
        if has_quantized_parameters(module for module in base.modules() if quantized_weight(module) is None):
            raise QuantizationError(
                f"export_merged: weights of {original_class(base).__name__} are quantized in memory, and only whole "
                "linear layers of bitsandbytes can be dequantized to merge into them",
                hint=f"Load the base dequantized (dequantize_base_checkpoint=True). {_NO_MERGE}",
            )
    methods = ", ".join(sorted({method_of(config) for config in configs.values()}))
    return [_Part(part, methods).merged() for part in parts]


def require_merge(name: str, config: PeftConfig) -> None:
    """Refuse methods whose adapters cannot be merged into base weights, by the name of the adapter."""
    tuner = upstream.tuner_of(config.peft_type)
    reason = ""
    if config.is_prompt_learning or tuner is None or not issubclass(tuner, upstream.tuner_class()):
        reason = "does not live in layers"
    elif method_of(config) == "XLORA":
        reason = "mixes its experts anew for each token"
    elif getattr(config, "layer_replication", None):
        reason = "with layer_replication shares base weights between layers that would differ"
    if reason:
        raise _refused(name, method_of(config), reason)


def _refused(name: str, method: str, reason: str) -> AdapterError:
    return AdapterError(f"export_merged: {name!r} cannot be merged: {method} {reason}", hint=_NO_MERGE)


class _Copier:
    """Copies modules without wrappers and hooks, with other tensors in the place of theirs.

    Of peft's modules also what is in plain attributes is copied: settings that merging changes, modules that are tied.
    ``tensor`` is asked once for each tensor; ``modules`` has by id of a module what to put in its place.
    """

    def __init__(
        self, tensor: Callable[[torch.Tensor], torch.Tensor], modules: Mapping[int, nn.Module] | None = None
    ) -> None:
        self._tensor = tensor
        self._made: dict[int, tuple[object, object]] = {}
        self._modules = modules or {}

    def module(self, module: nn.Module) -> nn.Module:
        """A module's copy, the same at every call."""
        return cast("nn.Module", self._copied(module))

    def _copied(self, value: object) -> object:
        known = self._made.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, torch.Tensor):
            made = self._tensor(value)
            self._made[id(value)] = (value, made)
            return made
        if type(value) is dict:
            return {key: self._copied(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return cast(type, type(value))(self._copied(item) for item in cast("Sequence[object]", value))
        return set(value) if type(value) is set else value

    def _module(self, module: nn.Module) -> nn.Module:
        bare = unwrap(module)
        if id(bare) in self._modules:
            return self._modules[id(bare)]
        if id(bare) in self._made:
            return cast("nn.Module", self._made[id(bare)][1])
        cls = original_class(bare)
        out = cls.__new__(cls)
        self._note(module, bare, out)
        # Also of classes that others have derived: what merging notes must not reach the training model.
        is_pefts = any(base.__module__.partition(".")[0] == "peft" for base in cls.__mro__)
        own = {}
        for key, value in vars(bare).items():
            if key.endswith("_hooks"):
                kept = isinstance(value, dict) and "state_dict" in key and has_foreign_hooks(value.values())
                own[key] = type(value)(value) if kept else type(value)()
            elif key == UNSAVED:
                own[key] = set(value)
            else:
                own[key] = self._copied(value) if is_pefts or key in STORES else value
        out.__dict__.update(own)
        return out

    def _note(self, module: nn.Module, bare: nn.Module, made: nn.Module) -> None:
        self._made[id(bare)] = (bare, made)
        self._made[id(module)] = (module, made)


class _DenseCopier(_Copier):
    """Copies also quantized modules as what they are when they are dequantized, and peft's layers over them.

    ``weight`` says what to put in the place of a quantized weight; ``methods`` adapt the model, for errors.
    """

    def __init__(
        self,
        tensor: Callable[[torch.Tensor], torch.Tensor],
        weight: Callable[[QuantizedWeight], nn.Parameter],
        methods: str,
    ) -> None:
        super().__init__(tensor)
        self._weight, self._methods = weight, methods

    def _module(self, module: nn.Module) -> nn.Module:
        bare = unwrap(module)
        weight = None if id(bare) in self._made else quantized_weight(bare)
        if weight is None:
            out = super()._module(module)
            if any(c.__module__.startswith("peft.") and c.__module__.endswith(".bnb") for c in type(out).__mro__):
                self._make_dense(out)
            return out
        outputs, inputs = weight.shape
        dense = nn.Linear(inputs, outputs, bias=False, device="meta").train(bare.training)
        self._note(module, bare, dense)
        dense.weight = self._weight(weight)
        dense.register_parameter("bias", cast("nn.Parameter | None", self._copied(own_parameters(bare).get("bias"))))
        return dense

    def _make_dense(self, layer: nn.Module) -> None:
        """Make a copy of a LoRA layer over a quantized layer the one that peft puts around a dense one."""
        from peft.tuners import lora

        if type(layer) not in (lora.Linear4bit, lora.Linear8bitLt):  # of others that is unknown
            reason = f"over layers that bitsandbytes quantizes is unknown ({type(layer).__qualname__})"
            raise _refused(type(layer).__name__, self._methods, reason)
        layer.__class__ = lora.Linear
        layer.__dict__["is_target_conv_1d_layer"] = False


def _like(token: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(values, requires_grad=False) if isinstance(token, nn.Parameter) else values


def _tensors(modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    found = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return list({id(tensor): tensor for tensor in found}.values())


def _unload(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Merge layers one after the other, as peft's ``merge_and_unload()`` does, and return what they leave."""
    out: list[nn.Module] = []
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        for layer in layers:
            if hasattr(layer, "unload_and_optionally_merge_module"):
                unload = cast("Callable[..., nn.Module]", layer.unload_and_optionally_merge_module)
                out.append(unload(merge=True, safe_merge=False, adapter_names=None))
            elif not _is_adapted(layer):
                out.append(layer)
            else:
                cast("Callable[..., None]", layer.merge)(safe_merge=False, adapter_names=None)
                out.append(cast("Callable[[], nn.Module]", layer.get_base_layer)())
    return out


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, (upstream.layer_class(), upstream.copy_class()))


def _outermost_changed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost adapted or quantized modules, in the order in which peft merges them."""
    inside: list[str] = []
    for path, module in named_modules(model):
        is_changed = _is_adapted(module) or quantized_weight(unwrap(module)) is not None
        if is_changed and not any(path.startswith(f"{above}.") for above in inside):
            inside.append(path)
            yield path, module


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    """The result of merging, without memory."""

    modules: list[nn.Module]  #: One for each layer.
    #: id of a tensor of theirs -> the token whose place it has, for those that merging did not replace.
    origins: dict[int, torch.Tensor]


class _Part:
    """Describes one part after merging."""

    def __init__(self, part: nn.Module, methods: str) -> None:
        self._model = bare_model(adapted_model(part))
        self._methods = methods
        self._reals: dict[int, torch.Tensor] = {}
        self._quantized: dict[int, QuantizedWeight] = {}
        self._dtype = getattr(config_of(self._model), "dtype", None)
        self._blueprint = _DenseCopier(self._token, self._dense_token, methods)
        self._names: dict[int, str] = {}
        self._memory: dict[tuple[object, ...], set[int]] = {}
        for name, tensor in own_tensors(self._model).items():
            self._names.setdefault(id(tensor), name)
            self._memory.setdefault(identity(tensor), set()).add(id(tensor))

    def _token(self, tensor: torch.Tensor) -> torch.Tensor:
        """The placeholder of a training tensor in the copies that are not merged."""
        made = _like(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        self._reals[id(made)] = tensor
        return made

    def _dense_token(self, weight: QuantizedWeight) -> nn.Parameter:
        """The same for a quantized weight, as transformers' ``dequantize()`` would leave it."""
        dtype = self._dtype if isinstance(self._dtype, torch.dtype) else weight.dtype
        made = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device="meta"), requires_grad=False)
        self._reals[id(made)] = weight.parameter
        self._quantized[id(weight.parameter)] = weight
        return made

    def merged(self) -> MergedPart:
        """The part without adapters."""
        changed = _outermost_changed(self._model)
        layers = {path: (module, self._blueprint.module(module)) for path, module in changed}
        kept: dict[int, nn.Module] = {}
        outcomes: dict[str, _Outcome] = {}
        for path, (module, copy) in layers.items():
            if _is_copy(copy) and not any(quantized_weight(unwrap(each)) for each in module.modules()):
                [left] = _unload([_Copier(lambda tensor: tensor).module(copy)])
                kept[id(module)] = _Copier(lambda tensor: self._reals[id(tensor)]).module(left)
            else:
                outcomes[path] = self._try([path], [copy])
        groups: list[MergedGroup] = []
        placed: dict[int, torch.Tensor] = {}
        for paths in _sharing(outcomes):
            copies = [layers[path][1] for path in paths]
            outcome = outcomes[paths[0]] if len(paths) == 1 else self._try(paths, copies)
            groups.append(self._group(paths[0], copies, outcome))
            for path, module in zip(paths, outcome.modules, strict=True):
                kept[id(layers[path][0])] = module
            for tensor in groups[-1].results:
                token = outcome.origins.get(id(tensor))
                if token is not None:
                    real = self._reals[id(token)]
                    self._require_alone(real)
                    placed[id(real)] = tensor
        model = _Copier(lambda tensor: placed.get(id(tensor), tensor), kept).module(self._model)
        model.__dict__.pop("peft_config", None)
        if "_hf_peft_config_loaded" in vars(model):
            model.__dict__["_hf_peft_config_loaded"] = False
        if self._quantized and "config" in vars(model):
            # An export's config says that it is dequantized, the training model's still that it is not.
            model.__dict__["config"] = deepcopy(vars(model)["config"])
        return MergedPart(model, tuple(groups))

    def _require_alone(self, tensor: torch.Tensor) -> None:
        """Check that nothing else has the memory of a tensor that merging changes: peft may change both, or one."""
        own = self._memory.get(identity(tensor), set())
        others = [self._names[key] for key in own if key != id(tensor)]
        if others:
            names = ", ".join([self._names.get(id(tensor), "a base weight"), *others])
            raise AdapterError(
                f"export_merged: {names} are one memory and several parameters, and merging changes one of them",
                tensor=others[0],
                hint=f"Tie them as one parameter (model.tie_weights()). {_NO_MERGE}",
            )

    def _group(self, path: str, copies: Sequence[nn.Module], outcome: _Outcome) -> MergedGroup:
        tokens: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            tokens[id(tensor)] = tensor
            return tensor

        noting = _Copier(note)
        for copy in copies:
            noting.module(copy)
        reals = [self._reals[key] for key in tokens]
        names = [self._names.get(id(real), f"{path}.{number}") for number, real in enumerate(reals)]
        quantized = {
            name: self._quantized[id(r)] for name, r in zip(names, reals, strict=True) if id(r) in self._quantized
        }
        sources = {name: real for name, real in zip(names, reals, strict=True) if name not in quantized}
        for name, weight in quantized.items():
            sources |= {f"{name}/{key}": tensor for key, tensor in weight.sources.items()}
        return MergedGroup(
            path,
            sources,
            tuple(_tensors(outcome.modules)),
            tuple(copies),
            dict(zip(names, tokens.values(), strict=True)),
            quantized,
        )

    def _try(self, paths: Sequence[str], copies: Sequence[nn.Module]) -> _Outcome:
        """Merge layers without memory; of methods that look at values, with zeros for memory."""
        for device in ("meta", "cpu"):
            try:
                return self._dry(copies, device)
            except Exception as error:  # noqa: BLE001 - peft's own code, which may look at values
                failure = error
        reason = f"failed with {type(failure).__name__}: {failure}"
        raise _refused(", ".join(paths), self._methods, reason) from failure

    @staticmethod
    def _dry(copies: Sequence[nn.Module], device: str) -> _Outcome:
        origins: dict[int, torch.Tensor] = {}

        def fresh(token: torch.Tensor) -> torch.Tensor:
            made = _like(token, torch.zeros(token.shape, dtype=token.dtype, device=device))
            origins[id(made)] = token
            return made

        copied = _Copier(fresh)
        layers = [copied.module(copy) for copy in copies]
        left = _unload(layers)
        if any(_is_adapted(module) for each in left for module in each.modules()):
            raise NotImplementedError("merging leaves an adapter inside of the module")
        if device == "meta":
            return _Outcome(left, {id(t): origins[id(t)] for t in _tensors(left) if id(t) in origins})
        found: dict[int, torch.Tensor] = {}

        def bare(tensor: torch.Tensor) -> torch.Tensor:
            made = _like(tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
            if id(tensor) in origins:
                found[id(made)] = origins[id(tensor)]
            return made

        without = _Copier(bare)
        return _Outcome([without.module(module) for module in left], found)


def _is_copy(layer: nn.Module) -> bool:
    """Whether a layer only keeps a trained copy of a module, with nothing to compute."""
    from peft.utils.other import ModulesToSaveWrapper

    adapted = upstream.layer_class()
    return isinstance(layer, ModulesToSaveWrapper) and not any(isinstance(m, adapted) for m in layer.modules())


def _sharing(outcomes: Mapping[str, _Outcome]) -> list[list[str]]:
    """Paths of layers that change the same tensor, together; in peft's order."""
    groups: list[tuple[list[str], set[int]]] = []
    for path, outcome in outcomes.items():
        paths, tokens = [path], {id(token) for token in outcome.origins.values()}
        unrelated = []
        for theirs, own in groups:
            if own.isdisjoint(tokens):
                unrelated.append((theirs, own))
            else:
                paths, tokens = [*theirs, *paths], own | tokens
        groups = [*unrelated, (paths, tokens)]
    order = {path: number for number, path in enumerate(outcomes)}
    return sorted((sorted(paths, key=order.__getitem__) for paths, _ in groups), key=lambda paths: order[paths[0]])


# --- weights that bitsandbytes keeps quantized -----------------------------------------------------------------------


#: Of a 4-bit weight's state, and of the state that its scales are quantized with.
_TENSORS = ("absmax", "code", "offset")


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A linear layer's weight of bitsandbytes, that one process holds whole."""

    parameter: torch.Tensor  #: The weight as the module has it.
    shape: torch.Size  #: Shape of the dequantized weight: outputs, inputs.
    dtype: torch.dtype  #: The dtype that bitsandbytes dequantizes it to.
    sources: Mapping[str, torch.Tensor]  #: Name -> tensor, of all that dequantizing reads.
    _state: QuantState | None

    def dequantize(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The dequantized weight, as transformers and peft compute it, from a tensor for each name of ``sources``."""
        from bitsandbytes import functional

        if self._state is None:
            whole: torch.Tensor = functional.int8_vectorwise_dequant(values["weight"], values["SCB"])
            return whole
        state = _with_tensors(self._state, values)
        if self._state.state2 is not None:
            nested = {name.removeprefix("state2."): t for name, t in values.items() if name.startswith("state2.")}
            state.state2 = _with_tensors(self._state.state2, nested)
        four_bit: torch.Tensor = functional.dequantize_4bit(values["weight"], state)
        return four_bit


def _with_tensors(state: QuantState, values: Mapping[str, torch.Tensor]) -> QuantState:
    made = shallow_copy(state)
    for name in _TENSORS:
        if name in values:
            setattr(made, name, values[name])
    return made


def quantized_weight(module: nn.Module) -> QuantizedWeight | None:
    """The weight of a linear layer of bitsandbytes; ``None`` of others, and where the weight is in shards."""
    if "bitsandbytes" not in sys.modules:
        return None
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight = own_parameters(module).get("weight")
    if weight is None:
        return None
    if isinstance(module, Linear4bit) and isinstance(weight, Params4bit) and weight.quant_state is not None:
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise QuantizationError(
                f"export_merged: 4-bit weights of {original_class(module).__name__} are in the layout in which "
                "bitsandbytes computes on this processor in eval mode, and cannot be dequantized from it",
                hint="Call the model's state_dict() before the save, with which bitsandbytes undoes the layout.",
            )
        sources = {"weight": weight.data, **_tensors_of(state, "")}
        if state.state2 is not None:
            sources |= _tensors_of(state.state2, "state2.")
        return QuantizedWeight(weight, torch.Size(state.shape), state.dtype, sources, state)
    if isinstance(module, Linear8bitLt) and isinstance(weight, Int8Params) and weight.dtype == torch.int8:
        scales = weight.SCB if module.state.SCB is None else module.state.SCB
        if scales is not None:
            sources = {"weight": weight.data, "SCB": scales}
            return QuantizedWeight(weight, weight.shape, torch.float32, sources, None)
    return None


def _tensors_of(state: QuantState, prefix: str) -> dict[str, torch.Tensor]:
    found = {f"{prefix}{name}": getattr(state, name) for name in _TENSORS}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
