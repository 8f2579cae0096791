"""Finds a base model and an adapter to merge, and refuses what cannot be merged, before anything is read of them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from shardwise.base.class_of_config import build_on_meta, named_classes
from shardwise.base.files import base_config, base_dtype, find_base
from shardwise.base.initialise import slots_of
from shardwise.comm import Group
from shardwise.disk.names import is_directory, is_file, is_there, names_in
from shardwise.disk.storage import current
from shardwise.engine.sharing import PlannedReads
from shardwise.errors import AdapterError, MisuseError
from shardwise.format.dcp_metadata import DCP_METADATA_NAME
from shardwise.format.strict_json import JsonValue
from shardwise.ops.attach import place_tensor
from shardwise.ops.consolidate_input import refuse_damaged
from shardwise.ops.side_content import side_files
from shardwise.ops.targets import find_targets, nothing_at
from shardwise.ops.verify import verify
from shardwise.peft.config import read_adapter_config
from shardwise.peft.extra import base_tensors
from shardwise.peft.tensors import ADAPTER_CONFIG_NAME, ADAPTER_EXTRA_NAME
from shardwise.sources.reader import Reader
from shardwise.sources.sources import open_source
from shardwise.sources.state_files import read_file
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.upstream.diffusers import CLASS_NAME
from shardwise.upstream.transformers import kept_in_float32

_QUANTIZATION = "quantization_config"
#: Files that say how the base was quantized, which the merged model is not.
_QUANTIZERS = ("quantize_config.json", "quant_config.json")
#: Files of an adapter's directory that are newer than the base's, since tokens may have been added.
_TOKENIZER = re.compile(r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|spiece|chat_template)[^/]*")


@dataclass(frozen=True)
class MergeInput:
    """What is to be merged.

    Attributes:
        base: The base model's directory or file.
        adapter: The adapter's directory.
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
    """Find both, and build the model.

    Raises:
        CheckpointNotFoundError, IntegrityError: One is not there, or damaged, as `verify` finds.
        MisuseError, AdapterError: The adapter is none, or the base's configuration names no class of transformers'.
    """
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


@contextlib.contextmanager
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
    reader = Reader(current(), source.files)
    try:
        reads.execute(reader, Group(None))
    finally:
        reader.close()
    for slot in slots_of(adapted):
        memory_of = placed.get(id(slot.tensor))
        if memory_of is not None:
            place_tensor(slot, memory_of)
