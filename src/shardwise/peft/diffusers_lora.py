"""diffusers' LoRA files: the adapter of one model of a pipeline, with its settings in the file's header.

``save_lora_weights`` of a pipeline writes each tensor under the name of the model in the pipeline (``unet``,
``transformer``), which is what ``load_lora_weights`` of a pipeline looks for, and ``load_lora_adapter`` of a model with
``prefix``. The settings, under the same prefix, are JSON in one entry of ``__metadata__``.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch.nn as nn

from shardwise.convert.mapping import rename
from shardwise.errors import AdapterError
from shardwise.format.header import read_header
from shardwise.geometry import TensorSpec
from shardwise.peft.check import changed_base
from shardwise.peft.models import adapter_configs, is_peft_adapted, method_of
from shardwise.peft.tensors import PEFT_PREFIX, AdapterFile, named_modules
from shardwise.stateful_wrappers.wrapping import adapted_model, bare_model, is_of, original_class

if TYPE_CHECKING:
    from peft import PeftConfig

_LOG = logging.getLogger(__name__)

#: Source: ``diffusers.loaders.lora_base`` (``LORA_WEIGHT_NAME_SAFE``, ``LORA_ADAPTER_METADATA_KEY``).
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_SETTINGS_KEY = "lora_adapter_metadata"

#: Models of a pipeline that have LoRA. Source: ``_lora_loadable_modules`` of diffusers' pipelines.
_COMPONENTS = frozenset(
    {
        "connectors", "text_conditioner", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer",
        "transformer_2", "transformer_ref", "unet",
    }
)  # fmt: skip

#: Names that other tools give. Sources: what diffusers' own converters look for.
_OTHER_TOOLS = re.compile(
    r"(lora_(unet|te\d?|transformer)_|diffusion_model\.).*|.*\.(lora_(down|up)\..*|dora_scale|alpha)"
)

#: Methods whose settings ``load_lora_adapter`` rebuilds. Source: ``PeftAdapterMixin.load_lora_adapter``.
_METHODS = ("LORA", "LOKR")


def component_of(parts: Sequence[nn.Module]) -> str | None:
    """The name of a model in the pipelines of diffusers that load its LoRA (``unet``, ``transformer``), or ``None``."""
    found = {_component(bare_model(part)) for part in parts}
    return found.pop() if len(found) == 1 else None


def _component(model: nn.Module) -> str | None:
    if not is_of(model, "diffusers.loaders.peft", "PeftAdapterMixin"):
        return None
    if is_of(model, "diffusers.loaders.unet", "UNet2DConditionLoadersMixin"):
        return "unet"
    homes = [cls.__module__ for cls in type(model).__mro__]
    denoiser = any(home.startswith("diffusers.models.transformers.") for home in homes)
    return "transformer" if denoiser or "diffusers.models.unets.uvit_2d" in homes else None


def require_component(parts: Sequence[nn.Module], peft_config: object | None = None) -> str:
    """As `component_of`, for a model that has to have one and to be adapted with peft."""
    component = component_of(parts)
    if component is None or not is_peft_adapted(parts, peft_config):
        classes = ", ".join(sorted({original_class(bare_model(part)).__name__ for part in parts}))
        raise AdapterError(
            f"diffusers_compatible is set, and no pipeline of diffusers loads a LoRA file of {classes}"
            if component is None
            else f"diffusers_compatible is set, and the LoRA modules of {classes} are not peft's",
            hint="Adapt a UNet or a transformer of diffusers with add_adapter, or leave diffusers_compatible out: then "
            "the adapter is saved as peft's adapter_model.safetensors.",
        )
    return component


def as_diffusers(file: AdapterFile, component: str) -> AdapterFile:
    """The adapter under the names that it has in diffusers' files."""
    names = [f"{component}.{item.spec.name.removeprefix(PEFT_PREFIX)}" for item in file.entries]
    pairs = zip(file.entries, names, strict=True)
    return replace(file, entries=tuple(replace(item, spec=item.spec._replace(name=name)) for item, name in pairs))


def as_peft(spec: TensorSpec, component: str) -> TensorSpec:
    """A tensor of such a file under the name that peft's files have for it."""
    return spec._replace(name=PEFT_PREFIX + spec.name.removeprefix(f"{component}."))


def check_opens(parts: Sequence[nn.Module], peft_config: object | None, file: AdapterFile, warned: set[str]) -> None:
    """Check that diffusers can open an adapter, before it is trained. Local.

    ``warned`` has the files that were warned about in this run.
    """
    config = adapter_configs(parts, peft_config)[file.adapter_name]
    reason = _why_not(config)
    if reason:
        raise AdapterError(
            f"diffusers does not open the adapter {file.adapter_name!r} from a LoRA file: {reason}",
            hint="Change that setting, or leave diffusers_compatible out: then the adapter is saved as peft's "
            "adapter_model.safetensors.",
        )
    plain = next((item.spec.name for item in file.entries if "lora" not in item.spec.name), None)
    if plain is not None and LORA_WEIGHTS_NAME not in warned:
        warned.add(LORA_WEIGHTS_NAME)
        _LOG.warning(
            "the adapter %r has tensors without 'lora' in their names (%s): the model's own load_lora_adapter opens "
            "its file, and load_lora_weights of most pipelines of diffusers refuses it",
            file.adapter_name,
            plain.removeprefix(PEFT_PREFIX),
        )


def _why_not(config: PeftConfig) -> str:
    """Why diffusers could not open an adapter with these settings; empty where it can."""
    method = method_of(config)
    values: dict[str, object] = dict(config.to_dict())
    if method not in _METHODS:
        return f"its method is {method}, and such files hold {' or '.join(_METHODS)}"
    if values.get("target_parameters"):
        return f"target_parameters is {values['target_parameters']!r}"
    if changed_base(values) is not None:
        return f"init_lora_weights is {values['init_lora_weights']!r}, which changes the base weights"
    # diffusers passes the header's entries to the settings' class unchanged.
    try:
        with warnings.catch_warnings(action="ignore"):
            written = _settings_text(values)
            again = _settings_text(type(config)(**json.loads(written)).to_dict())
    except Exception as error:  # noqa: BLE001 - the class's own code, on what JSON made of its settings
        return f"its settings cannot be made again from JSON: {type(error).__name__}: {error}"
    return "" if again == written else "its settings are others when they are made again from JSON"


def _settings_text(values: Mapping[str, object]) -> str:
    def plain(value: object) -> object:
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        raise TypeError(f"JSON has no {type(value).__name__}")

    return json.dumps(values, indent=2, sort_keys=True, default=plain)


def header_metadata(settings: Mapping[str, object], component: str) -> dict[str, str]:
    """``__metadata__`` of an adapter's file, as a pipeline's ``save_lora_weights`` writes it.

    Sets are sorted, where diffusers has them in the order of a hash table.
    """
    packed = {f"{component}.{key}": value for key, value in settings.items()}
    return {"format": "pt", _SETTINGS_KEY: _settings_text(packed)}


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file of diffusers."""

    names: Mapping[str, str]  #: The model's adapter's tensors: name in the file -> peft's.
    settings: Mapping[str, object] | None  #: The adapter's settings; ``None`` in files of releases that recorded none.


def read_lora(path: Path, component: str, key_mapping: Mapping[str, str]) -> LoraFile | None:
    """Read the header of an adapter's safetensors file. Local; ``None`` where the names are those of peft's files.

    The file's names are mapped by ``key_mapping`` first. Names of another tool, or of no model of a pipeline, and
    settings that are no JSON raise `AdapterError`.
    """
    header = read_header(path)
    taken = dict(zip(header.names, rename(header.names, key_mapping), strict=True))
    if any(name.startswith(PEFT_PREFIX) for name in taken.values()):
        return None
    theirs = next((name for name in taken.values() if _OTHER_TOOLS.fullmatch(name)), None)
    if theirs is not None:
        raise AdapterError(
            f"{theirs!r} is a name that other tools give (kohya's, ComfyUI's), with scales of their own",
            path=path,
            tensor=theirs,
            hint="Open the file with load_lora_weights of a pipeline of diffusers, which converts it, and save it "
            "with save_lora_weights.",
        )
    own = {name: new for name, new in taken.items() if new.startswith(f"{component}.")}
    others = sorted({new.partition(".")[0] for name, new in taken.items() if name not in own})
    if own and not _COMPONENTS.issuperset(others):
        stray = next(new for new in taken.values() if new.partition(".")[0] not in (component, *_COMPONENTS))
        raise AdapterError(
            f"the file has tensors of {component!r}, and {stray!r}, which is of no model that a pipeline has LoRA of",
            path=path,
            tensor=stray,
            hint="Save it again with save_lora_weights of a pipeline, or rename the tensors with key_mapping.",
        )
    if not own and others and _COMPONENTS.issuperset(others):
        raise AdapterError(
            f"the file has LoRA of {', '.join(others)}, and none of {component}",
            path=path,
            hint="Load it into that model, or rename the tensors with key_mapping.",
        )
    if own and others:
        _LOG.warning("%s also has LoRA of %s, which this model does not take", path, ", ".join(others))
    # Without a prefix it is a file of ``save_lora_adapter``, which is of one model.
    prefix = f"{component}." if own else ""
    names = {name: PEFT_PREFIX + _current_name(new.removeprefix(prefix)) for name, new in (own or taken).items()}
    return LoraFile(names, _settings(header.metadata, prefix, path))


def _current_name(name: str) -> str:
    """A tensor's current name in diffusers, from that of an older release (``to_q.lora.down.weight``)."""
    if "lora_A" in name or "lora_B" in name:
        return name
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    return str(next(iter(convert_unet_state_dict_to_peft({name: None}))))


def _settings(metadata: Mapping[str, str], prefix: str, path: Path) -> Mapping[str, object] | None:
    text = metadata.get(_SETTINGS_KEY)
    if not text:
        return None
    try:
        values: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{_SETTINGS_KEY} in the header is not JSON: {error}", path=path) from error
    if not isinstance(values, dict):
        raise AdapterError(f"{_SETTINGS_KEY} in the header is not a JSON object", path=path)
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)} or None


def check_scales(parts: Sequence[nn.Module], adapter_name: str, path: Path) -> None:
    """Check that an adapter's layers add what diffusers adds for a file without settings: the product, scaled by 1."""
    for part in parts:
        for name, module in named_modules(adapted_model(part)):
            scaling = getattr(module, "scaling", None)
            scale = scaling.get(adapter_name) if isinstance(scaling, Mapping) else None
            if scale is not None and not math.isclose(cast("float", scale), 1.0, rel_tol=1e-6):
                raise AdapterError(
                    "the file has no settings of the adapter, and diffusers then takes its factors with scale 1; "
                    f"the layer {name.removeprefix(PEFT_PREFIX)!r} has scale {scale:g}",
                    path=path,
                    hint="Build the model with lora_alpha equal to r (and alpha_pattern to rank_pattern).",
                )
