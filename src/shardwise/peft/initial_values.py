"""Initial values of adapters, the same on every topology.

Of a model that was built on the meta device and adapted with peft, peft decides. Some values follow from the base
weights (DoRA's magnitudes, PiSSA, OLoRA, trained tokens), others from the method alone (VeRA's projections, OFT's
indices, FourierFT's frequencies). So the base is loaded first, and then peft adapts a stand-in for the model: only the
adapted modules, without memory, each of which receives its base weights just before peft replaces it. The values are
copied into the model's shards and released, so that memory is bounded by the largest adapted module. Factors of LoRA
modules of a model's own are drawn here.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from shardwise.errors import AdapterError, MisuseError, ShardwiseError
from shardwise.peft.builtin_lora import LinearSite, find_sites
from shardwise.peft.capture import capture_adapter, hold_adapter
from shardwise.peft.check import changed_base
from shardwise.peft.models import adapter_configs, method_of
from shardwise.peft.tensors import join, named_modules, seed_of
from shardwise.plan.fragments import HeldTensor, copy_whole
from shardwise.stateful_wrappers.memory import PLAIN, has_mark, mark
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.stateful_wrappers.wrapping import adapted_model, bare_model, original_class, plain_path
from shardwise.upstream import peft as upstream
from shardwise.upstream.torch_modules import (
    BUFFERS,
    CHILDREN,
    PARAMETERS,
    STORES,
    own_buffers,
    own_children,
    own_parameters,
)
from shardwise.upstream.torch_tensors import local_part

if TYPE_CHECKING:
    from peft import PeftConfig

#: LoRA initialisations that use nothing but the factors. Source: peft's ``LoraLayer.update_layer``.
_LOOKS_AT_FACTORS = (True, False, None, "gaussian", "orthogonal", "eva")

#: LoRA's variants that may use the base weights. Source: the fields of ``LoraConfig``.
_VARIANTS = ("use_dora", "use_qalora", "arrow_config", "use_bdlora", "lora_ga_config", "velora_config")

#: Spellings of the initialisations.
_METHODS = {
    None: "kaiming",
    "kaiming": "kaiming",
    "kaiming_uniform": "kaiming",
    "xavier": "xavier",
    "xavier_normal": "xavier",
    "gaussian": "gaussian",
}


def adapter_tensors(part: nn.Module) -> list[torch.Tensor]:
    """Every tensor of a part's adapters and of peft's layers around them, without base weights."""
    return [tensor for _, tensor in _adapter_slots(part)]


def initialise_peft(parts: Sequence[nn.Module], *, seed: int = 0) -> None:
    """Give the adapters of models adapted with peft the values that peft would begin with, in place.

    Call when the parts have memory and their base weights. What follows from the configuration and the base weights is
    equal to peft's, bit for bit; random values follow from ``seed`` and the module's name, and are the same on every
    topology. Every rank that holds a part calls; base weights that are spread over ranks are gathered one module at a
    time, where the method looks at them. The generators' states are left as they were.

    Raises:
        AdapterError: peft cannot begin this method without the eager model, or a tensor would be left without values.
    """
    configs = adapter_configs(parts, None)
    check_can_begin(parts)
    for part in parts:
        slots = _adapter_slots(part)
        for _, tensor in slots:
            mark(tensor)
        quietly = warnings.catch_warnings(action="ignore")
        with torch.no_grad(), torch.random.fork_rng(devices=[]), quietly, torch.device("cpu"):
            for name, config in configs.items():
                if config.is_prompt_learning:
                    _begin_prompt(part, name, config, seed)
                elif method_of(config) == "ADAPTION_PROMPT":
                    _begin_attention(part, name, seed)
                else:
                    _begin(part, name, config, seed)
                _begin_beside(part, name, seed)
        unfilled = [name for name, tensor in slots if has_mark(tensor)]
        if unfilled:
            methods = ", ".join(sorted({_method(config) for config in configs.values()}))
            raise AdapterError(
                f"{methods}: {len(unfilled)} tensors of the adapter have no initial values: {', '.join(unfilled[:5])}",
                tensor=unfilled[0],
                hint="Build and adapt this model on a real device instead of the meta device.",
            )


def check_can_begin(parts: Sequence[nn.Module], peft_config: object | None = None) -> None:
    """Check that peft can give the parts' adapters their initial values after the model has been built.

    A method may keep its tensors outside of the adapted layers, or tie them by views.
    """
    for name, config in adapter_configs(parts, peft_config).items():
        reason = _why_not_on_meta(config)
        if reason:
            raise _cannot_begin(name, config, reason)


def check_method(parts: Sequence[nn.Module], method: str) -> None:
    """Check that LoRA factors may be initialised otherwise than their configuration says.

    A configured initialisation that also determines base weights or magnitudes has to stay.
    """
    for name, config in adapter_configs(parts, None).items():
        begin = getattr(config, "init_lora_weights", True)
        if begin not in (True, None, "gaussian"):
            raise AdapterError(
                f"the adapter {name!r} has init_lora_weights={begin!r}, and peft_init_method is {method!r}",
                hint="Leave one of them out.",
            )


def refuse_changed_base(parts: Sequence[nn.Module]) -> None:
    """Refuse to load base weights into an adapted model that has memory where its adapters began by changing these.

    PiSSA, OLoRA, CorDA, LoftQ and OSF keep a part of the base weights in the adapter.
    """
    for name, config in adapter_configs(parts, None).items():
        if changed_base(config.to_dict()) is not None or method_of(config) == "OSF":
            raise AdapterError(
                f"the adapter {name!r} began with {_method(config)}, which took a part of the base weights out of the "
                "model; loading the base over it would add that part once more",
                hint="Build and adapt the model on the meta device: then base weights and adapter begin together.",
            )


def _cannot_begin(name: str, config: PeftConfig, reason: str, at: str = "") -> AdapterError:
    return AdapterError(
        f"the adapter {name!r} cannot begin on the meta device: {_method(config)} {reason}",
        tensor=at or None,
        hint="Build and adapt this model on a real device, and restore with load_model.",
    )


def _why_not_on_meta(config: PeftConfig) -> str:
    method = method_of(config)
    tuner = upstream.tuner_of(config.peft_type)
    in_layers = tuner is not None and issubclass(tuner, upstream.tuner_class())
    if not (config.is_prompt_learning or method == "ADAPTION_PROMPT" or in_layers):
        return "does not live in layers"
    if method == "CPT":
        return "has a hook on a parameter, which masks its gradient and is lost when the parameter gets memory"
    if method == "SHIRA" and _mask_of(config) is None:
        return "has no mask_fn in its configuration, which says which weights are trained"
    if str(getattr(config, "init_lora_weights", None)).lower() == "lora_ga":
        return "looks at gradients that have to be measured before the model is adapted"
    if getattr(config, "target_modules_to_tie", None):
        return "with ensure_weight_tying ties factors by views, and memory of views is not kept on the meta device"
    return ""


def _mask_of(config: Any) -> Callable[..., torch.Tensor] | None:
    """SHiRA's choice of weights. On the meta device a model is built without one, since peft reads the result."""
    from peft.tuners.shira.mask_functions import random_mask

    return config.mask_fn or (random_mask if config.mask_type == "random" else None)


def _method(config: PeftConfig) -> str:
    begin = getattr(config, "init_lora_weights", None)
    return f"{method_of(config)} ({begin})" if isinstance(begin, str) else method_of(config)


def _adapter_slots(part: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors of peft's layers, without the modules that they wrap, and of the tuner itself."""
    kinds = (upstream.tuner_class(), upstream.layer_class(), *upstream.attention_classes())
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, module in named_modules(adapted_model(part)):
        if not (isinstance(module, kinds) or path == "prompt_encoder"):
            continue
        for leaf, tensor in _own_tensors(module):
            found.setdefault(id(tensor), (join(path, leaf), tensor))
    return list(found.values())


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a tuner or of a layer of peft's, but for what it wraps, under clean names."""
    wraps = ("base_layer.", "model.")
    owned = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    for name, tensor in chain(*owned):
        if not plain_path(name).startswith(wraps):
            yield plain_path(name), tensor


@dataclass(eq=False)
class _StandIn:
    """A model's adapted modules without memory, for peft to adapt."""

    root: nn.Module  #: What peft is given.
    real: dict[int, nn.Module] = field(default_factory=dict)  #: id of each stand-in -> the module that it stands for.
    held: list[nn.Module] = field(default_factory=list)  #: The stand-ins, kept alive so that the ids stay theirs.

    def of(self, module: nn.Module) -> nn.Module:
        """A stand-in for a module: of its class, with its settings, and with parameters that have no memory."""
        layer = upstream.layer_class()
        while isinstance(module, (layer, upstream.copy_class())):
            around = cast(Any, module)
            module = cast("nn.Module", around.get_base_layer() if isinstance(module, layer) else around.original_module)
        cls = original_class(module)
        out = cls.__new__(cls)
        own = {name: value for name, value in vars(module).items() if not name.startswith(upstream.ACCELERATES)}
        # Hooks are the real module's, FSDP2's among them.
        out.__dict__.update({**own, **{name: type(value)() for name, value in own.items() if name.endswith("_hooks")}})
        out.__dict__[PARAMETERS] = {
            leaf: None if p is None else nn.Parameter(_nothing(p), requires_grad=False)
            for leaf, p in own_parameters(module).items()
        }
        out.__dict__[BUFFERS] = {leaf: None if b is None else _nothing(b) for leaf, b in own_buffers(module).items()}
        out.__dict__[CHILDREN] = {
            leaf: None if child is None else self.of(child) for leaf, child in own_children(module).items()
        }
        self.real[id(out)] = module
        self.held.append(out)
        return out

    def give(self, module: nn.Module) -> list[tuple[str, torch.Tensor]]:
        """Give a stand-in the values of its module, gathered; returns its parameters that have them now."""
        real = self.real.get(id(module))
        given: list[tuple[str, torch.Tensor]] = []
        if real is None:
            return given
        for leaf, parameter in own_parameters(real).items():
            own = own_parameters(module).get(leaf)
            if parameter is None or own is None:
                continue
            whole = parameter.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            if type(whole) in PLAIN:
                own.data = whole.to("cpu", copy=True)
                given.append((leaf, own))
        for leaf, buffer in own_buffers(real).items():
            if buffer is not None and leaf in own_buffers(module):
                own_buffers(module)[leaf] = buffer.detach().to("cpu", copy=True)
        return given


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype that takes no memory; its values are not numbers."""
    local = local_part(tensor)
    if type(local) not in PLAIN and not isinstance(tensor, DTensor):
        return tensor.detach()  # a quantized weight: peft chooses the layer by its class
    value = float("nan") if tensor.dtype.is_floating_point else 0
    return torch.full((), value, dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def _stand_in(part: nn.Module) -> _StandIn:
    kinds = (upstream.layer_class(), upstream.copy_class())
    inner = bare_model(part)
    config = getattr(inner, "config", None)
    kind = getattr(config, "model_type", None) or "custom"
    root = nn.Module()
    root.config = {"model_type": kind, "tie_word_embeddings": False}  # type: ignore[assignment]
    out = _StandIn(root)
    taken: list[str] = []
    for path, module in named_modules(inner):
        if any(path.startswith(f"{name}.") for name in taken):
            continue
        if isinstance(module, kinds):
            parent = root
            *containers, leaf = path.split(".")
            for piece in containers:
                if piece not in own_children(parent):
                    parent.add_module(piece, nn.Module())
                parent = cast("nn.Module", own_children(parent)[piece])
            own_children(parent)[leaf] = out.of(module)
            taken.append(path)
    return out


def _begin(part: nn.Module, name: str, config: PeftConfig, seed: int) -> None:
    """Adapt a stand-in for a part with one adapter, and copy what that made into the part."""
    real_layers = dict(named_modules(bare_model(part)))
    if not any(upstream.has_adapter(module, name) for module in real_layers.values()):
        return
    stand_in = _stand_in(part)
    plain = copy.deepcopy(config)
    for setting in ("modules_to_save", "trainable_token_indices", "layer_replication", "modules_to_tie"):
        if hasattr(plain, setting):
            setattr(plain, setting, None)  # the layers are replicated already, and the others are done by themselves
    plain.inference_mode = False
    if method_of(config) == "SHIRA":
        setattr(plain, "mask_fn", _mask_of(config))  # noqa: B010 - a field of this method alone
    if hasattr(plain, "ensure_weight_tying"):
        plain.ensure_weight_tying = False
    tuner_class = cast("type[upstream.BaseTuner]", upstream.tuner_of(config.peft_type))
    copier = _Copier(stand_in, name, config, real_layers, seed)
    adapted = upstream.watched_tuner(tuner_class, copier.before, copier.after)
    torch.manual_seed(_seed(seed, name, ""))
    try:
        tuner = adapted(stand_in.root, plain, name)
    except ShardwiseError:
        raise
    except Exception as error:  # peft's own code, on whatever this method looks at
        where = f" at {copier.at!r}" if copier.at else ""
        raise _cannot_begin(name, config, f"failed{where}: {type(error).__name__}: {error}", copier.at) from error
    whole = getattr(adapted_model(part), "base_model", None)
    if isinstance(whole, nn.Module):
        copier.copy(tuner, whole, "")


def _seed(seed: int, name: str, path: str) -> int:
    return seed_of(f"{seed}/{name}/{path}")


@dataclass
class _Copier:
    """Gives each stand-in its base weights before peft replaces it, and copies the layer that peft made after that."""

    stand_in: _StandIn
    name: str
    config: PeftConfig
    layers: Mapping[str, nn.Module]
    seed: int
    given: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    at: str = ""  #: The module that peft is about to replace.

    def before(self, target: nn.Module, path: str) -> None:
        """Called before peft replaces ``target``."""
        self.at = path
        self.given = []
        if _needs_base(self.config):
            for module in target.modules():
                given = self.stand_in.give(module)
                self.given += [(module, leaf, own, own.data.clone()) for leaf, own in given]
        torch.manual_seed(_seed(self.seed, self.name, path))

    def after(self, target: nn.Module, made: nn.Module, path: str) -> None:
        """Called when peft has put ``made`` in the place of ``target``."""
        parameter = getattr(made, "parameter_name", None)
        # peft calls what it adapts by the parameter's name where that alone is adapted.
        real = self.layers.get(path.removesuffix(f".{parameter}") if parameter else path)
        # Several parameters of one module are adapted by wrappers around each other.
        while real is not None and getattr(real, "parameter_name", None) != parameter:
            real = own_children(real).get("base_layer")
        if real is None or not upstream.has_adapter(real, self.name):
            raise AdapterError(
                f"{_method(self.config)} adapts {path!r}, and the model's adapter does not",
                tensor=path,
                hint="Give the model the configuration that its layers were made from.",
            )
        self.copy(made, real, path)
        for module, leaf, own, before in self.given:
            now = own_parameters(module).get(leaf)
            if now is not own or not torch.equal(own.data, before):
                self._write_base(module, leaf, now, path)
            own.data = _nothing(own)
        self.given = []

    def _write_base(self, module: nn.Module, leaf: str, now: torch.Tensor | None, path: str) -> None:
        target = own_parameters(self.stand_in.real[id(module)]).get(leaf)
        if now is None or target is None or now.shape != target.shape:
            raise AdapterError(
                f"{_method(self.config)} replaces the base weight {leaf!r} of {path!r}, "
                "which has no place in the model",
                tensor=join(path, leaf),
                hint="Build and adapt this model on a real device.",
            )
        _write(join(path, leaf), target, now)

    def copy(self, made: nn.Module, real: nn.Module, path: str) -> None:
        """Copy what a fresh layer or tuner has into the model's, which has the same names."""
        own = dict(_own_tensors(real))
        for leaf, value in _own_tensors(made):
            target = own.get(leaf)
            if target is None or target.shape != value.shape:
                have = "lacks it" if target is None else f"has {tuple(target.shape)}"
                raise AdapterError(
                    f"{_method(self.config)} begins {join(path, leaf)!r} as {tuple(value.shape)}, and the model {have}",
                    tensor=join(path, leaf),
                    hint="Build and adapt this model on a real device.",
                )
            _write(join(path, leaf), target, value)
        modules = dict(named_modules(real))
        for inner_path, inner in made.named_modules():
            if inner_path in modules and not inner_path.startswith(("base_layer", "model")):
                _copy_attributes(inner, modules[inner_path])


def _copy_attributes(made: nn.Module, real: nn.Module) -> None:
    """Tensors that a module keeps in plain attributes, alone or in a dictionary (FourierFT's frequencies)."""
    for key, value in vars(made).items():
        current = vars(real).get(key)
        if key in STORES:
            continue
        if isinstance(value, torch.Tensor) and isinstance(current, torch.Tensor):
            setattr(real, key, value.to(current.device if current.device.type != "meta" else _device(real)))
        elif isinstance(value, dict) and isinstance(current, dict):
            for name, item in value.items():
                if isinstance(item, torch.Tensor):
                    current[name] = item.to(_device(real))


def _device(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))


def _needs_base(config: PeftConfig) -> bool:
    """Whether the method may look at base weights; where that is not known, it may."""
    if method_of(config) != "LORA" or getattr(config, "init_lora_weights", True) not in _LOOKS_AT_FACTORS:
        return True
    variants = {f.name for f in fields(config) if f.metadata.get("is_lora_variant")}
    return any(getattr(config, name, None) for name in variants.union(_VARIANTS))


def _begin_prompt(part: nn.Module, name: str, config: PeftConfig, seed: int) -> None:
    """Virtual tokens, which may begin as those of the base: peft's own encoder is made once more, with memory."""
    model = cast(Any, adapted_model(part))
    real = cast("nn.Module", model.prompt_encoder[name])
    encoder = cast("Callable[..., nn.Module]", original_class(real))
    plain = copy.deepcopy(config)
    plain.inference_mode = False
    given: list[nn.Module] = []
    if "word_embeddings" in inspect.signature(encoder).parameters:
        stand_in = _StandIn(nn.Module())
        given.append(stand_in.of(model.word_embeddings))
        for module in given[0].modules():
            stand_in.give(module)
    torch.manual_seed(_seed(seed, name, ""))
    try:
        made = encoder(plain, *given)
    except Exception as error:  # peft's own code, which may ask for a tokenizer or a file
        raise _cannot_begin(name, config, f"failed: {type(error).__name__}: {error}") from error
    values = dict(_own_tensors(made))
    for leaf, target in _own_tensors(real):
        _write(join("prompt_encoder", name, leaf), target, values[leaf])
    count = getattr(config, "num_virtual_tokens", 0) * (getattr(config, "num_transformer_submodules", None) or 1)
    model.prompt_tokens[name] = torch.arange(count)


def _begin_attention(part: nn.Module, name: str, seed: int) -> None:
    """Adaption prompts: normal tokens behind a gate of zero. Source: peft's ``AdaptedAttention``."""
    for path, module in named_modules(adapted_model(part)):
        if isinstance(module, upstream.attention_classes()):
            torch.manual_seed(_seed(seed, name, path))
            for leaf, target in _own_tensors(module):
                whole = torch.zeros(target.shape) if leaf == "adaption_gate" else torch.randn(target.shape)
                _write(join(path, leaf), target, whole)


def _begin_beside(part: nn.Module, name: str, seed: int) -> None:
    """Modules that are trained as copies, and tokens that are trained: both begin as the base's."""
    tokens, copies = upstream.tokens_class(), upstream.copy_class()
    for path, module in named_modules(bare_model(part)):
        if isinstance(module, tokens) and name in cast(Any, module).token_indices:
            _begin_tokens(path, module, name, seed)
        elif isinstance(module, copies) and (trained := _trained_copies(module).get(name)) is not None:
            first = dict(named_modules(cast("nn.Module", module.original_module)))
            for inner_path, inner in named_modules(trained):
                source = first[inner_path]
                for leaf, tensor in (*own_parameters(inner).items(), *own_buffers(inner).items()):
                    other = own_parameters(source).get(leaf, own_buffers(source).get(leaf))
                    if tensor is not None and other is not None and other is not tensor:
                        tensor.detach().copy_(other.detach())


def _trained_copies(module: nn.Module) -> Mapping[str, nn.Module]:
    """A module's copies that are trained, by adapter."""
    copies = own_children(module).get("modules_to_save")
    return dict(copies.items()) if isinstance(copies, nn.ModuleDict) else {}


def _begin_tokens(path: str, layer: Any, name: str, seed: int) -> None:
    if layer.tied_adapter is not None:
        return
    weight = layer.get_base_layer().weight.detach()
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    rows = whole[torch.tensor(layer.token_indices[name], device=whole.device)]
    _write(join(path, "trainable_tokens_original", name), layer.trainable_tokens_original[name], rows)
    delta = layer.trainable_tokens_delta[name]
    if has_mark(delta):  # not where the method itself has begun it
        _write(join(path, "trainable_tokens_delta", name), delta, rows)


def _write(name: str, target: torch.Tensor, whole: torch.Tensor) -> None:
    copy_whole(whole.detach(), held_tensor(name, target, MeshRegister()))


# --- factors of LoRA, also of a model's own ---------------------------------------------------------------------------


def initialise_adapters(
    parts: Sequence[nn.Module], peft_config: object | None = None, peft_init_method: str | None = None, *, seed: int = 0
) -> None:
    """Give fresh LoRA factors their initial values, in place. Every rank with a part calls; no communication.

    The product of the factors is zero: A is random and B zero, for embeddings the other way round. The random values
    depend on the tensor's name and ``seed`` alone, so that they are the same on every topology and replicas agree;
    each whole factor is drawn once, one at a time. Only LoRA factors are touched: DoRA's magnitudes follow from the
    base weights (`initialise_magnitudes`), and modules_to_save begin as copies of base modules.

    The methods are ``kaiming`` (the default; uniform within ``1 / sqrt(in)``, as peft), ``xavier`` (normal, of standard
    deviation ``sqrt(2 / (in + rank))``) and ``gaussian`` (normal, ``1 / rank``). Another one is a `MisuseError`, as is
    a factor on the meta device.
    """
    method = _METHODS.get(peft_init_method)
    if method is None:
        raise MisuseError(
            f"peft_init_method {peft_init_method!r} is unknown",
            hint=f"Use one of {', '.join(sorted(name for name in _METHODS if name))}.",
        )
    captured = capture_adapter(parts, peft_config, v4_compatible=False, legacy_paramwrapper_layout=False)
    for file in captured.files:
        for item, held in zip(file.entries, hold_adapter(file.entries, MeshRegister()), strict=True):
            leaf = item.spec.name.rpartition(".lora_")[2]
            if item.alias_of is None and leaf in ("A.weight", "B.weight", "B.bias", "embedding_A", "embedding_B"):
                if item.tensor.device.type == "meta":
                    raise MisuseError(
                        "a LoRA factor is still on the meta device",
                        tensor=item.fqn,
                        hint="Materialise the model first (to_empty).",
                    )
                _fill(held, leaf, method, f"{seed}/{file.adapter_name}/{item.spec.name}")


def _fill(held: HeldTensor, leaf: str, method: str, key: str) -> None:
    with torch.no_grad():
        if leaf in ("B.weight", "B.bias", "embedding_A"):
            for fragment in held.fragments:
                fragment.data.zero_()
        elif held.fragments:
            whole = _draw(held.spec.shape, "normal" if leaf == "embedding_B" else method, key).reshape(held.grid)
            copy_whole(whole, held)


def _draw(shape: tuple[int, ...], method: str, key: str) -> torch.Tensor:
    """A random float32 tensor that ``key`` determines. Source of the formulas: torch.nn.init, peft's LoraLayer."""
    generator = torch.Generator().manual_seed(seed_of(key))
    out = torch.empty(shape)
    rank, fan_in = shape[0], shape[1] if len(shape) > 1 else 1
    if method == "kaiming":
        bound = 1 / math.sqrt(fan_in)
        return out.uniform_(-bound, bound, generator=generator)
    deviation = {"xavier": math.sqrt(2 / (fan_in + rank)), "gaussian": 1 / rank}.get(method, 1.0)
    return out.normal_(0.0, deviation, generator=generator)


def initialise_magnitudes(parts: Sequence[nn.Module]) -> None:
    """Set DoRA's magnitudes in a model's own LoRA modules to the norms of the base weights' rows, in place.

    Call when the base weights are loaded and the factors' product is zero. Every rank that holds a part calls: norms of
    rows that are spread over ranks are summed by DTensor.
    """
    for part in parts:
        modules = dict(named_modules(bare_model(part)))
        for site in find_sites(part):
            if not isinstance(site, LinearSite) or site.magnitude is None:
                continue
            weight = own_parameters(modules[site.fqn]).get("weight")
            magnitude = site.magnitude.tensor
            if weight is None or weight.shape[0] != magnitude.numel():
                raise AdapterError(
                    "a module with a magnitude has no weight that fits it",
                    tensor=join(site.fqn, "weight"),
                    hint="Set the magnitude in the model's own code.",
                )
            with torch.no_grad():
                norms = torch.linalg.vector_norm(weight.detach(), dim=1).reshape(magnitude.shape)
                if isinstance(norms, DTensor) and isinstance(magnitude, DTensor):
                    norms = norms.redistribute(magnitude.device_mesh, magnitude.placements)
                magnitude.copy_(norms)
