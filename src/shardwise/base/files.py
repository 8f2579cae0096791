"""Finds a base model on this machine and reads its configuration, dtype and tensors, and which file holds each."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from shardwise.base.source import BaseSource, find_quantized, quant_settings, quantization_config
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import exists, is_directory, is_file, real_path
from shardwise.dtypes import FLOATS
from shardwise.errors import CheckpointNotFoundError, FormatError
from shardwise.format.json_file import read_json
from shardwise.format.sniff import Kind, what_is_file
from shardwise.format.weight_files import TORCH, is_index
from shardwise.geometry import TensorSpec
from shardwise.settings import Settings
from shardwise.sources.directory_contents import (
    did_you_mean,
    found_instead,
    holds_model,
    holds_safetensors,
    holds_torch_files,
    how_to_open,
)
from shardwise.sources.hub_cache import Snapshot, default_cache, find_snapshot, snapshot_in
from shardwise.sources.sources import Source, open_source
from shardwise.sources.torch_files import open_bin

#: Files in which AutoGPTQ and AutoAWQ kept their settings before these had a place in ``config.json`` -> the method,
#: where the file does not name it.
_QUANTIZERS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

_LOG = logging.getLogger(__name__)

_STANDARD_BIN = re.compile(r"(?:(diffusion_pytorch_model)|pytorch_model|model)(-\d+-of-\d+)?\.bin")


def find_base(root_dir: str | Path | None, model_name: str, cache: str | Path | None = None) -> Path:
    """The directory or file of a base model; see `Search` and `find`. The network is never asked.

    ``root_dir`` is the hub cache, or a directory that models lie in; without it the hub cache is ``cache``, or the
    hub's own.
    """
    root = None if root_dir is None else Path(root_dir)
    return find(Search(model_name, root, (root or (default_cache() if cache is None else Path(cache)),)))


def base_config(path: Path) -> dict[str, object]:
    """The base's ``config.json``, empty where there is none.

    Tools older than ``quantization_config`` keep their quantization settings in a file of their own; its content
    becomes that entry where the config has none.
    """
    directory = path if is_directory(path) else path.parent
    config = _json_object(directory / "config.json")
    if quantization_config(config) is not None:
        return config
    for name, method in _QUANTIZERS_FILES.items():
        found = _json_object(directory / name)
        if found:
            return {**config, "quantization_config": {"quant_method": method, **found}}
    return config


def _json_object(file: Path) -> dict[str, object]:
    if not is_file(file):
        return {}
    found = read_json(file)
    return dict(found) if isinstance(found, dict) else {}


def ties_head(config: Mapping[str, object]) -> bool:
    """Whether the base may tie its head to the embedding: all but a config that says no."""
    key, places = "tie_word_embeddings", (config.get("text_config"), config)
    said = [place[key] for place in places if isinstance(place, dict) and key in place]
    return not said or any(bool(value) for value in said)


def base_dtype(model_name: str | Path, root_dir: str | Path | None = None) -> str:
    """The dtype that a base model was trained or published in, as torch names it: ``"bfloat16"``.

    Loading never changes the model's dtype; build the model in this one to have the base's values unchanged:
    ``torch.set_default_dtype(getattr(torch, base_dtype(...)))`` or ``from_config(config, dtype=...)``. Each rank calls
    for itself; headers are read, and nothing is downloaded.

    Args:
        model_name: A hub id (``org/name`` or ``org/name@revision``), a directory, or a file.
        root_dir: The hub cache, or a directory that base models lie in; ``None`` for the hub's own cache.

    Returns:
        What ``config.json`` says (``dtype``, ``torch_dtype``); otherwise the floating-point dtype of most of the
        weights' bytes; ``bfloat16`` for a quantized base that does not say.

    Raises:
        CheckpointNotFoundError: There is no such base.

    Examples:
        >>> checkpointer.save_model(model.bfloat16(), "weights")
        >>> base_dtype("weights/model")
        'bfloat16'
    """
    path = find_base(root_dir, str(model_name))
    config = base_config(path)
    for place in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            said = place.get(key) if isinstance(place, dict) else None
            if isinstance(said, str) and said.removeprefix("torch.") in FLOATS.values():
                return said.removeprefix("torch.")
    source = open_base_source(path, Group(None), config)
    sizes: dict[str, int] = {}
    for name in source.names():
        spec = source.stored(name)
        if spec is not None and spec.dtype in FLOATS and name not in source.behind:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    if source.behind or not sizes:
        return "bfloat16"
    return FLOATS[max(sizes, key=sizes.__getitem__)]


def open_base_source(
    path: Path,
    group: Group,
    config: Mapping[str, object],
    *,
    dequantize: bool | None = None,
    allow_legacy_pickle: bool = False,
) -> BaseSource:
    """Find the tensors of a base model (`find_base`, `base_config`). All ranks of the group call.

    ``dequantize`` says whether values and scales become floating point: ``None`` if the config says that the base is
    quantized, ``True`` wherever values have scales, ``False`` never. ``allow_legacy_pickle`` unpickles ``.bin`` files
    without restrictions.
    """
    if group.broadcast_result(lambda: is_torch_base(path), "looking at the base model's files"):
        bins = open_bin(path, group, allow_legacy_pickle)
        source = BaseSource(bins.source, bins)
    else:
        source = BaseSource(open_source(path, group))
    with group.together("looking for quantized tensors"):
        settings = quant_settings(config)
        block = settings.block if settings is not None and settings.supported else None
        found, behind = find_quantized(source.plain.tensors, block)
        wanted = dequantize is True or (dequantize is None and settings is not None and settings.supported)
        return replace(
            source,
            quantized=found if wanted else {},
            behind=behind if wanted else frozenset(),
            scaled=frozenset(found),
            settings=None if dequantize is False else settings,
        )


def is_torch_base(path: Path) -> bool:
    """Whether a base's weights are files of ``torch.save``, as they are where it has no others. Local."""
    if is_file(path):
        if is_index(path.name):
            return TORCH.index_stem(path.name) is not None
        found = what_is_file(path)
        if found is None:
            return path.suffix != ".safetensors" and TORCH.stem_of(path.name) is not None
        return found.kind is Kind.TORCH
    if exists(path / ".metadata") or holds_safetensors(path):
        return False
    return is_directory(path) and holds_torch_files(path)


# --- the files of a model that is saved over it ----------------------------------------------------------------------


@dataclass(frozen=True)
class BaseModel:
    """The base model's headers."""

    directory: Path  #: Where it is.
    #: Tensor name -> name of the safetensors file; of ``.bin`` files the name that it would have. Empty where the base
    #: has no split that an export could follow.
    files: Mapping[str, str]
    specs: Mapping[str, TensorSpec]  #: Tensor name -> shape and dtype.
    source: Source  #: Its tensors, for reading; without those of ``.bin`` files that no range of bytes holds.

    def check_readable(self, names: Iterable[str]) -> None:
        """Check that bytes of tensors can be copied."""
        for name in names:
            if name not in self.source.tensors:
                raise FormatError(
                    "the base model ships this tensor in a .bin file of which no range of bytes holds it, so that it "
                    "cannot be carried over",
                    path=self.directory,
                    tensor=name,
                    hint="Save the base model as safetensors once, or set pass_through_unloaded=False.",
                )

    @property
    def numbers(self) -> dict[str, int]:
        """The files' numbers, from 1, in the order of their names."""
        return {name: number for number, name in enumerate(sorted(set(self.files.values())), start=1)}


def find_base_path(config: Settings) -> str | None:
    """The local path of the base model that the configuration names, or ``None`` where it names none. Local.

    Also ``None`` where the base is not found and ``allow_missing_base`` is set, or adapters are trained: their
    checkpoints hold only the name of the base.
    """
    search = configured(config)
    if search is None:
        return None
    try:
        return str(find(search))
    except CheckpointNotFoundError as error:
        if not (config.allow_missing_base or config.is_peft):
            raise
        _LOG.warning("saving without a base model's files: %s", error)
        return None


def open_base(path: str | None, group: Group, allow_legacy_pickle: bool = False) -> BaseModel | None:
    """Read the base model's headers; ``None`` where rank 0 has no base model. All ranks of the group call.

    It may lie elsewhere on each rank, and is rank 0's where this rank knows of none. ``allow_legacy_pickle`` unpickles
    ``.bin`` files without restrictions.
    """

    def look() -> JsonValue:
        if path is None:
            return None
        place = Path(path)
        if is_directory(place) and exists(place / ".metadata"):
            raise FormatError(
                "the base model is a DCP checkpoint, which does not say how its Hugging Face files are",
                path=place,
                hint="Name the Hugging Face model that it was made from, or convert it (shardwise consolidate) and "
                "name that.",
            )
        return [path, is_file(place), is_torch_base(place)]

    seen = group.broadcast_result(look, "looking at the base model")
    if seen is None:
        return None
    theirs, is_single, is_torch = cast(tuple[str, bool, bool], seen)
    place = Path(path or theirs)
    directory = place.parent if is_single else place
    loose: Mapping[str, TensorSpec] = {}
    if is_torch:
        bins = open_bin(place, group, allow_legacy_pickle)
        source, loose = bins.source, {name: spec for name, (spec, _) in bins.loose.items()}
        files = _safetensors_names(source, bins.loose)
    else:
        source = open_source(place, group)
        files = {n: source.files[t.chunks[0].file].name for n, t in source.tensors.items() if t.chunks}
        if any(name.startswith("shard-") for name in files.values()):
            files = {}  # shards of tensors are no split that an export could follow
    specs = {name: tensor.spec for name, tensor in source.tensors.items()} | dict(loose)
    return BaseModel(directory, files, specs, source)


def _safetensors_names(source: Source, loose: Mapping[str, tuple[TensorSpec, Path]]) -> dict[str, str]:
    """Tensor name -> the file that would hold it if the same ``.bin`` files were safetensors; empty for odd names."""
    places = {name: source.files[tensor.chunks[0].file].name for name, tensor in source.tensors.items()}
    places |= {name: file.name for name, (_, file) in loose.items()}
    found: dict[str, str] = {}
    for name, file in places.items():
        match = _STANDARD_BIN.fullmatch(file)
        if match is None:
            return {}
        found[name] = f"{'diffusion_pytorch_model' if match[1] else 'model'}{match[2] or ''}.safetensors"
    return found


# --- the search ------------------------------------------------------------------------------------------------------


#: Every model's folder has at least one of these files.
_LANDMARKS = ("config.json", "model_index.json", "tokenizer_config.json", "generation_config.json")
_DOWNLOAD = "Download it first (hf download), or pass a directory or a file."
_SETTINGS = (
    "Correct model_repo_id, original_model_root_dir or model_cache_dir, download it (hf download), or, for a model "
    "that trains from scratch under this name, set allow_missing_base=True."
)


@dataclass(frozen=True, slots=True)
class Search:
    """A search for a base model. Settings, `load_base_model` and the metadata all use this one.

    Places are looked at in this order, and the first that holds a model is taken:

    1. the name below the root directory (``original_model_root_dir``, or ``root_dir`` of `load_base_model`),
    2. the root directory itself, where the settings name it,
    3. the name as a path, relative to the working directory,
    4. the name as a hub id, with or without a revision behind an ``@``, in the cache (``model_cache_dir``, or the hub's
       own), and in the root directory as a cache.

    A directory counts where it holds a model (`find`) or what describes one (`find_directory`); one that does not, such
    as a stray folder of the model's name in the working directory, is passed over, and named in the error if nothing
    else is found. Where two places hold a model the first is taken and both are logged.
    """

    name: str | None  #: A path, a name below ``root``, or a hub id; ``None`` where ``root`` is all that is known.
    root: Path | None = None  #: A directory that models lie in.
    caches: tuple[Path, ...] = ()  #: Hub caches.
    root_counts: bool = False  #: Whether ``root`` may be the model itself.
    counts: Callable[[Path], bool] = holds_model  #: Whether a directory is one that is looked for.
    hint: str = _DOWNLOAD  #: What to do where nothing is found.

    @property
    def label(self) -> str:
        """Description of the search, for messages."""
        return str(self.root) if self.name is None else self.name


@dataclass(frozen=True, slots=True)
class _Look:
    """What one path holds: a model, or what was found there instead."""

    said: str
    model: Path | None = None
    empty: Path | None = None
    wrong: FormatError | None = None


def configured(config: Settings) -> Search | None:
    """The search for the base model in the settings, or ``None`` where they name none."""
    name, root = config.model_repo_id, config.original_model_root_dir
    if name is None and root is None:
        return None
    cache = default_cache() if config.model_cache_dir is None else Path(config.model_cache_dir)
    place = None if root is None else Path(root)
    caches = (cache,) if place is None else (cache, place)
    return Search(name, place, caches, root_counts=True, hint=_SETTINGS)


def find(search: Search) -> Path:
    """The directory or file of a base model. Local.

    `CheckpointNotFoundError` lists all places that were looked at; a named file of another format, and a damaged
    reference in a cache, are a `FormatError`.
    """
    looks = list(_looks(search))
    found = {real_path(look.model): look.model for look in reversed(looks) if look.model is not None}
    models = list(reversed(found.values()))
    if not models:
        raise _not_found(search, looks)
    if len(models) > 1:
        _LOG.warning("the base model %s is at %s, which is taken, and also at %s", search.label, *models[:2])
    return models[0].absolute()


def find_directory(name: str | None) -> Path | None:
    """The directory that describes a base model by its configuration, tokenizer or code, or ``None``. Local.

    The name is a directory, or a hub id in the hub's own cache; a single file has no directory of its own. The first
    place that has files of a model is taken; where none has any, the last one that is there at all.
    """
    if not name or is_file(Path(name)):
        return None

    def describes_model(directory: Path) -> bool:
        return any(exists(directory / landmark) for landmark in _LANDMARKS) or holds_model(directory)

    looks = list(_looks(Search(name, None, (default_cache(),), counts=describes_model)))
    found = [look.model for look in looks if look.model] or [look.empty for look in reversed(looks) if look.empty]
    return found[0] if found else None


def _looks(search: Search) -> Iterator[_Look]:
    places = [search.root / search.name] if search.root is not None and search.name is not None else []
    places += [search.root] if search.root is not None and search.root_counts else []
    places += [Path(search.name)] if search.name is not None else []
    for place in dict.fromkeys(place.absolute() for place in places):
        yield _look(place, search)
    if search.name is None or os.path.isabs(search.name):
        return
    for cache in dict.fromkeys(cache.absolute() for cache in search.caches):
        snapshot = find_snapshot(cache, search.name)
        if snapshot is not None:
            yield _look_into(snapshot, search)


def _look(place: Path, search: Search) -> _Look:
    if not exists(place):
        return _Look(f"{place} (nothing is there)")
    if not is_directory(place):
        return _look_at_file(place)
    snapshot = snapshot_in(place)
    if snapshot is not None:
        return _look_into(snapshot, search)
    if search.counts(place):
        return _Look(str(place), place)
    return _Look(f"{place} (a directory that holds no model)", empty=place)


def _look_into(snapshot: Snapshot, search: Search) -> _Look:
    if snapshot.path is None:
        return _Look(snapshot.said)
    if search.counts(snapshot.path):
        return _Look(snapshot.said, snapshot.path)
    return _Look(f"{snapshot.path} (a snapshot without weights)", empty=snapshot.path)


def _look_at_file(file: Path) -> _Look:
    found = what_is_file(file)
    weights = file.suffix == ".safetensors" or (TORCH.stem_of(file.name) is not None and file.suffix != ".ckpt")
    if is_index(file.name) or (found is not None and found.kind in (Kind.SAFETENSORS, Kind.TORCH)):
        return _Look(str(file), file)
    if found is None:
        # What begins as nothing known does may be damaged: opening it says how, if its name promises weights.
        return _Look(str(file), file) if weights else _Look(f"{file} (a file that is none of weights)")
    wrong = FormatError(
        f"the base model's file is {found.name}, and no safetensors or torch file", path=file, hint=found.hint
    )
    return _Look(f"{file} ({found.name})", wrong=wrong)


def _not_found(search: Search, looks: list[_Look]) -> CheckpointNotFoundError | FormatError:
    wrong = next((look.wrong for look in looks if look.wrong is not None), None)
    if wrong is not None:
        return wrong
    empty = next((look.empty for look in looks if look.empty is not None), None)
    looked = "; ".join(look.said for look in looks)
    if empty is None:
        first = search.root or next(iter(search.caches), None)
        return CheckpointNotFoundError(
            f"the base model {search.label} is not there; looked at: {looked}", path=first, hint=search.hint
        )
    there = found_instead(empty)
    text = f"the base model {search.label} has no safetensors and no .bin weights" + (f", {there}" if there else "")
    better = did_you_mean(empty) or how_to_open(empty)
    return CheckpointNotFoundError(
        f"{text}; looked at: {looked}", path=empty, hint=" ".join(filter(None, [better, search.hint]))
    )
