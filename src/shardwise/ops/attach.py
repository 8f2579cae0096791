"""A model without memory with an adapter from a directory on it, by peft's own code: the adapter's tensors are real.

What the adapter changes of the base, and in which way, is then seen before a byte of the base is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise.base.initialise import Slot, slots_of
from shardwise.comm import Group
from shardwise.disk.storage import current, local_path
from shardwise.engine.load import LoadOptions, open_described
from shardwise.errors import AdapterError, ConfigError, FormatError, ShardwiseError, StorageError, UnsafePickleError
from shardwise.peft.capture import capture_adapter, hold_adapter
from shardwise.peft.config import read_adapter_config
from shardwise.peft.load import changed_base, is_legacy_layout
from shardwise.peft.merge import require_merge
from shardwise.peft.tensors import ADAPTER_WEIGHTS_NAME
from shardwise.sources.sources import open_source
from shardwise.stateful_wrappers.tensors import MeshRegister
from shardwise.upstream.peft import copy_class, forget_origin, model_class_of, tokens_class
from shardwise.upstream.transformers_rules import legacy_renamings

_NAME = "default"
_WRONG_BASE = "Name the base model that the adapter was trained on; adapter_config.json says which that was."


def attach(model: nn.Module, directory: Path) -> nn.Module:
    """Put the adapter in a directory on a model whose tensors are all on the meta device. Local; the model is changed.

    Returns:
        peft's model, as ``PeftModel.from_pretrained`` gives it: tensors of the adapter with their values, in the dtypes
        in which peft merges them; all others without memory.

    Raises:
        AdapterError: peft cannot read the adapter, or it does not fit the model.
        CheckpointNotFoundError: There is no adapter.
    """
    settings = read_adapter_config(directory)
    begin = changed_base(settings) or ("kasa" if settings.get("kasa_config") else None)
    if begin is not None:
        raise AdapterError(
            f"the adapter began with a part of the base weights (init_lora_weights={begin!r}), and fits those that its "
            "own run made of them",
            path=directory,
            hint="Convert it with peft where it was trained (save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge there.",
        )
    place = local_path(directory)
    if place is None:
        raise StorageError(
            "peft reads adapters from this machine's disks alone", path=directory, hint="Copy the adapter here."
        )
    bases = {id(slot.tensor) for slot in slots_of(model)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _by_peft(model, place, directory, bases, legacy=bool(is_legacy_layout(settings)))
    except ShardwiseError:
        raise
    except Exception as error:
        raise _refused(error, directory) from error


def _by_peft(model: nn.Module, place: Path, directory: Path, bases: set[int], *, legacy: bool) -> nn.Module:
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(place))
    config.inference_mode = True
    require_merge(_NAME, config)
    weights = load_peft_weights(str(place), device="cpu", key_mapping=legacy_renamings(model) or None)
    # Without memory, since an adapter's layers go to where their base's are; filling it takes the dtypes of the layers.
    adapted: nn.Module = model_class_of(config.task_type)(model, config, _NAME, low_cpu_mem_usage=True)
    # The file may have weights of the base too: embeddings whose layer is adapted, or that were enlarged.
    named = adapted.state_dict(keep_vars=True)
    given = {id(named[name]) for name in weights if name in named}
    own = [slot for slot in slots_of(adapted) if id(slot.tensor) not in bases or id(slot.tensor) in given]
    for slot in own:
        if slot.tensor.is_meta:
            place_tensor(slot, torch.empty_like(slot.tensor, device="cpu"))
    for module in adapted.modules():
        forget_origin(module)
    if legacy:
        _read_legacy(adapted, directory)
        return adapted
    result: Any = set_peft_model_state_dict(adapted, weights, _NAME)
    _require_all(adapted, own, result, directory)
    return adapted


def _read_legacy(adapted: nn.Module, directory: Path) -> None:
    """Fill an adapter whose expert parameters are laid out as peft up to 0.19.0 did: later releases misread them."""
    captured = capture_adapter([adapted], None, v4_compatible=False, legacy_paramwrapper_layout=True)
    (file,) = captured.files
    source, group = open_source(directory / ADAPTER_WEIGHTS_NAME, Group(None)), Group(None)
    distinct = [entry for entry in file.entries if entry.alias_of is None]
    shared = frozenset(entry.spec.name for entry in file.entries if entry.alias_of is not None)
    options = LoadOptions(ignored=shared)
    open_described(lambda: list(hold_adapter(distinct, MeshRegister())), source, group, current(), options).read()


def place_tensor(slot: Slot, values: torch.Tensor) -> None:
    """Put a tensor where a model has another."""
    made = nn.Parameter(values, requires_grad=False) if slot.kind == "parameter" else values
    for module, leaf in slot.places:
        setattr(module, leaf, made)


def _require_all(adapted: nn.Module, own: Sequence[Slot], result: Any, directory: Path) -> None:
    if result.unexpected_keys:
        strange = list(result.unexpected_keys)
        raise AdapterError(
            f"the adapter has tensors that this base model has no place for: {', '.join(strange[:3])}",
            path=directory,
            tensor=strange[0],
            hint=_WRONG_BASE,
        )
    missing = set(result.missing_keys)
    filled = {id(t) for name, t in adapted.state_dict(keep_vars=True).items() if name not in missing}
    kinds = (copy_class(), tokens_class())
    copies = tuple(f"{name}." for name, module in adapted.named_modules() if isinstance(module, kinds))
    # What a copied module keeps in no file is in no merged model either; of tokens, what undoing a merge needs.
    spared = [s for s in own if not s.persistent and s.name.startswith(copies)]
    lost = [s.name for s in own if id(s.tensor) not in filled and s not in spared]
    if lost:
        raise AdapterError(
            f"{len(lost)} tensors of the adapter are not in its file, {lost[0]} among them",
            path=directory,
            tensor=lost[0],
            hint="Restore the file from a copy. A method that makes tensors anew at each start is merged where the "
            "model is loaded: with peft's merge_and_unload, or export_merged in a run.",
        )


def _refused(error: Exception, directory: Path) -> Exception:
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    if isinstance(error, ModuleNotFoundError) and error.name == "peft":
        return ConfigError("merging an adapter needs peft, which is not installed", hint="Install shardwise[peft].")
    if isinstance(error, UnpicklingError):
        return UnsafePickleError(
            f"the adapter's file does more than hold tensors: {error}",
            path=directory,
            hint="Save it as safetensors where it can be trusted.",
        )
    if isinstance(error, SafetensorError):
        return FormatError(f"the adapter's file is damaged: {error}", path=directory, hint="Restore it from a copy.")
    return AdapterError(
        f"peft cannot put the adapter on this base model: {type(error).__name__}: {str(error)[:500]}",
        path=directory,
        hint=_WRONG_BASE,
    )
