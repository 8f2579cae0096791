"""Finds a base model and an adapter to merge, and refuses what cannot be merged, before a byte of the base is read.

The model is built without memory and the adapter put on it, so that what it changes, and in which way, is seen first.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from shardwise.base.class_of_config import build_on_meta, named_classes
from shardwise.base.files import base_config, base_dtype, find_base
from shardwise.base.initialise import Slot, slots_of
from shardwise.comm import Group
from shardwise.disk.names import is_directory, is_file, is_there, names_in
from shardwise.disk.storage import current, local_path
from shardwise.engine.load import LoadOptions, LoadSource, open_load
from shardwise.engine.sharing import PlannedReads
from shardwise.errors import (
    AdapterError,
    ConfigError,
    FormatError,
    MisuseError,
    ShardwiseError,
    StorageError,
    UnsafePickleError,
)
from shardwise.format.notes import DCP_METADATA_NAME
from shardwise.format.strict_json import JsonValue
from shardwise.ops.consolidate_input import refuse_damaged
from shardwise.ops.side_content import side_files
from shardwise.ops.targets import find_targets, nothing_at
from shardwise.ops.verify import verify
from shardwise.peft.capture import capture_adapter, hold_adapter
from shardwise.peft.config import read_adapter_config
from shardwise.peft.extra import base_tensors
from shardwise.peft.load import changed_base, is_legacy_layout
from shardwise.peft.merge import require_merge
from shardwise.peft.tensors import ADAPTER_CONFIG_NAME, ADAPTER_EXTRA_NAME, ADAPTER_WEIGHTS_NAME
from shardwise.sources.reader import Reader
from shardwise.sources.sources import open_source
from shardwise.sources.state_files import read_file
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.upstream.diffusers import CLASS_NAME
from shardwise.upstream.peft import copy_class, forget_origin, model_class_of, tokens_class
from shardwise.upstream.transformers import kept_in_float32
from shardwise.upstream.transformers_rules import legacy_renamings

_QUANTIZATION = "quantization_config"
#: Files that say how the base was quantized, which the merged model is not.
_QUANTIZERS = ("quantize_config.json", "quant_config.json")
#: Files of an adapter's directory that are newer than the base's, since tokens may have been added.
_TOKENIZER = re.compile(r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|spiece|chat_template)[^/]*")


@dataclass(frozen=True)
class MergeInput:
    """What is to be merged.

    Attributes:
        base: Its directory or file.
        config: The content of the merged model's ``config.json``.
        model: The base model, without memory, in the dtypes in which transformers loads it.
        plain: The files beside the weights, by relative path.
        notes: Notes for the report, one sentence each.
    """

    base: Path
    adapter: Path
    config: Mapping[str, JsonValue]
    model: nn.Module
    plain: Mapping[str, bytes]
    notes: list[str] = field(default_factory=list)


def find_merge(base: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> MergeInput:
    """Find both, check that they are whole as far as digests tell, and build the model."""
    if Path(base).is_absolute() and not is_there(Path(base)):  # a hub id is not
        raise nothing_at(Path(base))
    directory = _adapter_directory(Path(adapter).absolute())
    place = find_base(None, os.fspath(base))
    settings = read_adapter_config(directory)
    _require_whole(directory)
    _require_whole(place)
    dtype = base_dtype(place)
    model = _model(base_config(place), place, getattr(torch, dtype))
    config = cast("dict[str, JsonValue]", {k: v for k, v in base_config(place).items() if k != _QUANTIZATION})
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    notes = []
    recorded = settings.get("base_model_name_or_path")
    if isinstance(recorded, str) and recorded and not _same_base(recorded, os.fspath(base), place):
        notes.append(f"the adapter says that its base model is {recorded}, and it was merged into {place}")
    others = [name for name in names_in(directory) if is_file(directory / name / ADAPTER_CONFIG_NAME)]
    if others:
        notes.append(f"further adapters are there and were not merged: {', '.join(others)}; name the directory of one")
    return MergeInput(place, directory, config, model, _plain(place, directory), notes)


def _adapter_directory(path: Path) -> Path:
    if is_file(path / ADAPTER_CONFIG_NAME):
        return path
    places = [path]
    if not is_file(path):
        places += [target.directory / target.under for target in find_targets(path)]
    for place in places:
        for directory in (place, place / "model"):
            if is_file(directory / ADAPTER_CONFIG_NAME):
                return directory
    read_adapter_config(path)  # says what is not there
    raise AssertionError("unreachable")


def _require_whole(path: Path) -> None:
    """Compare digests where a manifest has them, of DCP extents; of others the headers, when they are opened."""
    if find_targets(path)[0].has_manifest or is_file(path / DCP_METADATA_NAME):
        report = verify(path)
        refuse_damaged(report, report.path)


def _model(config: Mapping[str, object], path: Path, dtype: torch.dtype) -> nn.Module:
    """The base model without memory, as transformers would load it in a dtype."""
    classes = [] if CLASS_NAME in config or config.get("auto_map") else named_classes(config)
    if not classes:
        raise MisuseError(
            "the base's config.json names no class of transformers' (or code of its own, which is not run)",
            path=path,
            hint="Merge where the model is loaded: with peft's merge_and_unload, or fuse_lora of a diffusers pipeline.",
        )
    entries = {key: value for key, value in config.items() if key != _QUANTIZATION}
    with _default_dtype(dtype):
        model = build_on_meta(classes[0], cast(Any, classes[0]).config_class.from_dict(entries))
    for pattern in kept_in_float32(model, dtype):
        for name, parameter in model.named_parameters():
            if re.search(pattern, name):
                parameter.data = parameter.data.to(torch.float32)
    cast(Any, model).tie_weights()
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _same_base(recorded: str, given: str, place: Path) -> bool:
    """Whether two names of a base model are of one, as far as names tell: paths differ between machines."""
    last = {Path(name.partition("@")[0]).name for name in (recorded, given)}
    return len(last) == 1 or Path(recorded).name == place.name


def _plain(base: Path, adapter: Path) -> dict[str, bytes]:
    directory = base if is_directory(base) else base.parent
    places = {name: place for name, place in side_files(directory).items() if name not in _QUANTIZERS}
    places |= {name: place for name, place in side_files(adapter).items() if _TOKENIZER.fullmatch(name)}
    return {name: read_file(place) for name, place in places.items()}


def take_extra(adapted: nn.Module, directory: Path) -> None:
    """Give tensors of the base that were trained beside the adapter the values that a save of ours noted."""
    # One file for the model: beside the directories of adapters that have names.
    places = [place / ADAPTER_EXTRA_NAME for place in (directory, directory.parent)]
    file = next((place for place in places if is_file(place)), None)
    if file is None:
        return
    source = open_source(file, Group(None))
    reads, placed, left = PlannedReads(), {}, dict(source.tensors)
    for names, tensor in base_tensors([adapted]):
        for name in names:
            saved = left.pop(name, None)
            if saved is not None and saved.spec.shape == tuple(tensor.shape):
                placed[id(tensor)] = memory = torch.empty(tensor.shape, dtype=tensor.dtype)
                reads.add(saved, held_tensor(name, memory, MeshRegister()), None)
            elif saved is not None:
                left[name] = saved
    if left:
        raise AdapterError(
            f"the model has no place for {len(left)} tensors that were trained beside the adapter",
            path=file,
            tensor=next(iter(left)),
            hint="Name the base model that the adapter was trained on.",
        )
    with closing(Reader(current(), source.files)) as reader:
        reads.execute(reader, Group(None))
    for slot in slots_of(adapted):
        memory_of = placed.get(id(slot.tensor))
        if memory_of is not None:
            place_tensor(slot, memory_of)


# --- the adapter on the model, by peft's own code: its tensors are real, all others without memory -------------------


_NAME = "default"
_WRONG_BASE = "Name the base model that the adapter was trained on; adapter_config.json says which that was."


def attach(model: nn.Module, directory: Path) -> nn.Module:
    """Put the adapter in a directory on a model whose tensors are all on the meta device. Local; the model is changed.

    Returns:
        peft's model, as ``PeftModel.from_pretrained`` gives it: tensors of the adapter with their values, in the dtypes
        in which peft merges them; all others without memory.
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
    open_load(lambda: hold_adapter(distinct, MeshRegister()), LoadSource(source), group, current(), options).read()


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
