"""Merges an adapter into its base model, and writes the result as a model of its own: one process, bounded memory.

The model is built without memory and gets its adapter by peft's own code; what peft would make of each adapted module
is known before a byte of the base is read. Then one module after the other is read, merged by peft and written, and
every tensor that the adapter leaves alone is copied.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import nn

from shardwise.addons.files import as_text
from shardwise.addons.hf_config import CONFIG, CONFIG_V5
from shardwise.base.class_of_config import build_on_meta, named_classes
from shardwise.base.files import base_config, base_dtype, find_base, open_base_source, ties_head
from shardwise.base.initialise import Slot, slots_of
from shardwise.base.names import BaseWanted, match_base
from shardwise.base.source import BaseSource
from shardwise.checkpointing.adapters import merged_state
from shardwise.checkpointing.hub import HubNames, HubState
from shardwise.checkpointing.loading.models import expected_unused
from shardwise.checkpointing.saving.checks import check_described
from shardwise.comm import Group
from shardwise.disk.names import is_directory, is_file, is_there, names_in
from shardwise.disk.storage import Storage, current, local_path, using
from shardwise.dtypes import torch_dtype
from shardwise.engine.collector import without_collector
from shardwise.engine.load import LoadOptions, LoadSource, open_load
from shardwise.engine.sharing import PlannedReads
from shardwise.errors import (
    AdapterError,
    ConfigError,
    ConversionError,
    FormatError,
    MisuseError,
    ModuleStateError,
    ShardwiseError,
    StorageError,
    UnsafePickleError,
    some,
)
from shardwise.format.notes import DCP_METADATA_NAME
from shardwise.format.strict_json import JsonValue
from shardwise.ops.beside import side_files
from shardwise.ops.consolidate_input import refuse_damaged
from shardwise.ops.exporting import Piece, batches_of, publish, refuse_existing
from shardwise.ops.targets import find_targets, nothing_at
from shardwise.ops.tensors_to_write import LastFew, assembled
from shardwise.ops.verify import Progress, verify
from shardwise.peft.capture import base_tensors, capture_adapter, hold_adapter
from shardwise.peft.check import changed_base, is_legacy_layout
from shardwise.peft.config import read_adapter_config
from shardwise.peft.merge import merged_parts, require_merge
from shardwise.peft.tensors import ADAPTER_CONFIG_NAME, ADAPTER_EXTRA_NAME, ADAPTER_WEIGHTS_NAME
from shardwise.plan.deferred import bound
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.layout import MAX_FILE_BYTES, index_name, lay_out
from shardwise.sources.reader import Reader
from shardwise.sources.sources import open_source
from shardwise.sources.state_files import read_file
from shardwise.sources.tensor_bytes import byte_blocks
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.names import declared_ties
from shardwise.stateful_wrappers.replicas import MayDiffer
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.upstream.hugging_face import CLASS_NAME
from shardwise.upstream.peft import copy_class, forget_origin, model_class_of, tokens_class
from shardwise.upstream.torch_tensors import storage_key
from shardwise.upstream.transformers import kept_in_float32, legacy_renamings

__all__ = ["MergeReport", "merge_adapter"]

#: Files that say how the base was quantized, which the merged model is not; and what else its new config.json replaces.
_REPLACED = ("quantize_config.json", "quant_config.json", CONFIG_V5)
#: Files of an adapter's directory that are newer than the base's, since tokens may have been added.
_TOKENIZER = re.compile(r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|spiece|chat_template)[^/]*")
#: Tensors of the model that are kept in memory: of one that holds many of the files, these are written in turn.
_MOST_KEPT = 2


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was written.

    Attributes:
        path: The merged model's directory.
        files: Names of its tensor files.
        tensors: Number of tensors.
        merged: Names of those that the adapter changed.
        nbytes: Bytes of the tensor files.
        notes: What is worth knowing, one sentence each.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    merged: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...] = ()


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_file_bytes: int | None = None,
    progress: Progress | None = None,
    storage: Storage | None = None,
    verify_export: bool = True,
) -> MergeReport:
    """Merge an adapter into its base model.

    The tensors are byte for byte those that ``PeftModel.from_pretrained(base).merge_and_unload()`` makes of the base in
    the dtype of its ``config.json``, on the CPU and with as many threads. Nothing of either is changed.

    Args:
        base: The base model: a directory, a file, or a hub id in the cache. Quantized ones are dequantized.
        adapter: A directory that peft wrote, a checkpoint with an adapter, or a root of such (its newest).
        output: The directory to write; it must not exist.
        max_file_bytes: Largest file; by default the files of the base, or 5 GB where the base is quantized or has none.
        progress: Called with the bytes written and the bytes to write.
        storage: Where files are read and written.
        verify_export: Whether the class that ``config.json`` names has to load the result.

    Raises:
        CheckpointExistsError: The output is there already.
        CheckpointNotFoundError: There is no base model, or no adapter.
        AdapterError: The adapter does not belong to this base, or cannot be merged.
        IntegrityError, FormatError: A file is damaged.
        TensorError, QuantizationError: The base is not a model of the class that its configuration names.
        MisuseError: The base's configuration names no class of transformers'.

    Examples:
        >>> merge_adapter("org/base", "run/LATEST", "merged")  # doctest: +SKIP
    """
    target = Path(output).absolute()
    with using(storage or current()), without_collector():
        refuse_existing(target)
        found = find_merge(base, adapter)
        with closing(_Reading(found)) as reading:
            adapted = attach(found.model, found.adapter)
            take_extra(adapted, found.adapter)
            reading.match(adapted)
            (part,) = merged_parts([adapted])
            reading.alive.append(part)
            hub = merged_state(HubNames().capture(ModelState([part.model])), [adapted], [part], MayDiffer())
            merged = [spec for group in hub.groups for spec in group.computed.hub]
            specs = [*(tensor.spec for tensor in hub.held), *merged]
            if verify_export:
                why = check_described(found.config, specs, found.base / CONFIG)
                if why is not None:
                    found.notes.append(f"not compared with a model class: {why}")
            files = _files_of(reading.source, {spec.name for spec in specs}) if max_file_bytes is None else {}
            layout = lay_out(specs, base_files=files, max_file_bytes=max_file_bytes or MAX_FILE_BYTES)
            held = {tensor.spec.name: tensor for tensor in hub.held}
            added = {CONFIG: as_text(found.config).encode(), index_name("model"): layout.index}
            publish(
                layout,
                [
                    lambda: _computed(reading, hub),
                    *batches_of(layout, lambda name: assembled(held[name], held[name].spec, reading.whole), held),
                ],
                target,
                progress,
                plain=lambda _: {**found.plain, **added},
                aliases=hub.unwritten_aliases,
                notes={"source": "merged", "base": str(found.base), "adapter": str(found.adapter)},
            )
    changed, names = tuple(spec.name for spec in merged), tuple(file.name for file in layout.files)
    return MergeReport(target, names, len(specs), changed, layout.total_bytes, tuple(found.notes))


# --- what is merged: both are found, and what cannot be merged is refused before a byte of the base is read ----------


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
    described = base_config(place).items()
    config = cast("dict[str, JsonValue]", {k: v for k, v in described if k != "quantization_config"})
    model = _model(config, place, getattr(torch, dtype))
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    notes = []
    recorded = settings.get("base_model_name_or_path")
    # As far as names tell: paths differ between machines.
    last = {Path(name.partition("@")[0]).name for name in (str(recorded), os.fspath(base))}
    if isinstance(recorded, str) and recorded and len(last) > 1 and Path(recorded).name != place.name:
        notes.append(f"the adapter says that its base model is {recorded}, and it was merged into {place}")
    others = [name for name in names_in(directory) if is_file(directory / name / ADAPTER_CONFIG_NAME)]
    if others:
        notes.append(f"further adapters are there and were not merged: {', '.join(others)}; name the directory of one")
    beside = side_files(place if is_directory(place) else place.parent).items()
    files = {name: file for name, file in beside if name not in _REPLACED}
    files |= {name: file for name, file in side_files(directory).items() if _TOKENIZER.fullmatch(name)}
    plain = {name: read_file(file) for name, file in files.items()}
    return MergeInput(place, directory, config, model, plain, notes)


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
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = build_on_meta(classes[0], cast(Any, classes[0]).config_class.from_dict(deepcopy(dict(config))))
    finally:
        torch.set_default_dtype(before)
    for pattern in kept_in_float32(model, dtype):
        for name, parameter in model.named_parameters():
            if re.search(pattern, name):
                parameter.data = parameter.data.to(torch.float32)
    cast(Any, model).tie_weights()
    return model.eval()


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


# --- reading and writing ---------------------------------------------------------------------------------------------


class _Reading:
    """Reads tensors of the model, as it is without its adapter, from the base's files: a few at a time in memory."""

    def __init__(self, found: MergeInput) -> None:
        self.source: BaseSource = open_base_source(found.base, Group(None), base_config(found.base))
        self._ties = ties_head(found.config)
        self._notes = found.notes
        self._reader = Reader(current(), self.source.plain.files, threads=2)
        self.close = self._reader.close
        self._wanted: dict[int, list[HeldTensor]] = {}
        self._copied: dict[int, torch.Tensor] = {}
        #: Storages are told apart as long as what they are of lives.
        self.alive: list[object] = []
        self._kept = LastFew(_MOST_KEPT)
        self._lock = Lock()

    def match(self, adapted: nn.Module) -> None:
        """Find every tensor of the model in the base's files, and compare shapes and dtypes."""
        wanted: BaseWanted = match_base([adapted], list(self.source.names()), base_ties=self._ties)
        if wanted.groups:
            name = wanted.groups[0].computed.hub[0].name
            raise ConversionError(
                "tensors of the base's files have to be computed to be the model's",
                path=self.source.path,
                tensor=name,
                hint="Merge where the model is loaded: peft's merge_and_unload, or export_merged in a run.",
            )
        if wanted.steps:
            raise ModuleStateError(
                "a module of the model takes its state by a method of its own",
                path=self.source.path,
                hint="Merge where the model is loaded: peft's merge_and_unload, or export_merged in a run.",
            )
        specs = [tensor.spec for tensor in wanted.held]
        names = {spec.name for spec in specs}
        unused = self.source.unexpected([name for name in self.source.names() if name not in names], _OPTIONS)
        self.source.compare(specs, unused, _OPTIONS)
        known, ties = set(expected_unused([adapted], unused)), tuple(declared_ties([adapted]))
        left = [name for name in unused if name not in known and not name.endswith(ties)]
        if left:
            self._notes.append(f"not in the merged model, since the base's class does not load it: {some(left)}")
        for tensor in wanted.held:
            for key in {storage_key(fragment.data) for fragment in tensor.fragments}:
                self._wanted.setdefault(key, []).append(tensor)
        self._copied = {storage_key(second): first for first, second in wanted.copies}
        self.alive += wanted.tensors

    def whole(self, data: torch.Tensor) -> torch.Tensor:
        """The values behind a tensor without memory, or behind a view of one; of one with memory itself. Any thread."""
        origin = self._origin(data)
        if not origin.is_meta:
            return origin.detach()
        return bound(origin, self._kept.get(storage_key(origin), lambda: self._read(origin)))

    def fresh(self, data: torch.Tensor) -> torch.Tensor:
        """The same in memory of its own, which the caller may change. Any thread."""
        origin = self._origin(data)
        return bound(origin, self._read(origin)) if origin.is_meta else origin.detach().clone()

    def _origin(self, data: torch.Tensor) -> torch.Tensor:
        """What is read, or has memory, in the place of a tensor without memory that begins as a copy of another."""
        return self._copied.get(storage_key(data), data) if data.is_meta else data

    def _read(self, data: torch.Tensor) -> torch.Tensor:
        key = storage_key(data)
        if key not in self._wanted:
            raise AdapterError(
                "merging reads a tensor that neither the base model nor the adapter has",
                path=self.source.path,
                hint="Merge where the model is loaded: with peft's merge_and_unload, or export_merged in a run.",
            )
        with self._lock:
            flat = torch.empty(data.untyped_storage().nbytes() // data.element_size(), dtype=data.dtype)
            reads = PlannedReads()
            for tensor in self._wanted[key]:
                self.source.add(_onto(tensor, key, flat), reads, None)
            reads.execute(self._reader, Group(None))
        return flat


_OPTIONS = LoadOptions(allow_unexpected=True, allow_cast=True)


def _onto(tensor: HeldTensor, key: int, flat: torch.Tensor) -> HeldTensor:
    """The destination with memory in the place of what has none, where it is a part of one storage."""
    parts = []
    for part in tensor.parts:
        own = [fragment for fragment in part.fragments if storage_key(fragment.data) == key]
        made = tuple(Fragment(fragment.box, bound(fragment.data, flat)) for fragment in own)
        parts.append(part._replace(fragments=made))
    return tensor._replace(parts=tuple(parts))


def _computed(reading: _Reading, hub: HubState) -> Iterator[Piece]:
    """What is merged: one module at a time has memory."""
    for group in hub.groups:
        values = {native.spec.name: reading.fresh(native.fragments[0].data) for native in group.natives}
        made = group.computed.rule.forward(values)
        del values
        for spec in group.computed.hub:
            yield spec.name, byte_blocks(made.pop(spec.name), torch_dtype(spec.dtype))


def _files_of(source: BaseSource, names: set[str]) -> dict[str, str]:
    """The file of each tensor in the base, where its files have the names of an export and it is not quantized."""
    tensors = source.plain.tensors
    if source.behind or source.bins is not None or not names <= tensors.keys():
        return {}
    found = {name: source.plain.files[tensors[name].chunks[0].file].name for name in names}
    plain = all(len(tensors[name].chunks) == 1 for name in names)
    return found if plain and all(file.startswith("model") for file in found.values()) else {}
