"""Finds a base model. Settings, `load_base_model` and the metadata all use this one search.

Places are looked at in this order, and the first that holds a model is taken:

1. the name below the root directory (``original_model_root_dir``, or ``root_dir`` of `load_base_model`),
2. the root directory itself, where the settings name it,
3. the name as a path, relative to the working directory,
4. the name as a hub id, with or without a revision behind an ``@``, in the cache (``model_cache_dir``, or the hub's
   own), and in the root directory as a cache.

A directory counts where it holds a model (`find`) or what describes one (`find_directory`); one that does not, such as
a stray folder of the model's name in the working directory, is passed over, and named in the error if nothing else is
found. Where two places hold a model the first is taken and both are logged. The network is never asked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardwise.disk.names import exists, is_directory, is_file, real_path
from shardwise.errors import CheckpointNotFoundError, FormatError
from shardwise.format.sniff import Kind, what_is_file
from shardwise.format.weight_files import TORCH, is_index
from shardwise.settings import Settings
from shardwise.sources.directory_contents import did_you_mean, found_instead, holds_model, how_to_open
from shardwise.sources.hub_cache import Snapshot, default_cache, find_snapshot, is_models_folder, snapshot_in

_LOG = logging.getLogger(__name__)

#: Every model's folder has at least one of these files.
_LANDMARKS = ("config.json", "model_index.json", "tokenizer_config.json", "generation_config.json")
_DOWNLOAD = "Download it first (hf download), or pass a directory or a file."
_SETTINGS = (
    "Correct model_repo_id, original_model_root_dir or model_cache_dir, download it (hf download), or, for a model "
    "that trains from scratch under this name, set allow_missing_base=True."
)


@dataclass(frozen=True, slots=True)
class Search:
    """A search for a base model."""

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

    def places(self) -> Iterator[Path]:
        """Paths to try, in order."""
        if self.root is not None and self.name is not None:
            yield self.root / self.name
        if self.root is not None and self.root_counts:
            yield self.root
        if self.name is not None:
            yield Path(self.name)


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

    Raises:
        CheckpointNotFoundError: No place holds a model; the message lists all that were looked at.
        FormatError: A file was named that is of another format, or a reference in a cache is damaged.
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
    looks = list(_looks(Search(name, None, (default_cache(),), counts=_describes_model)))
    found = [look.model for look in looks if look.model] or [look.empty for look in reversed(looks) if look.empty]
    return found[0] if found else None


def _describes_model(directory: Path) -> bool:
    return any(exists(directory / name) for name in _LANDMARKS) or holds_model(directory)


def _looks(search: Search) -> Iterator[_Look]:
    seen: set[Path] = set()
    for place in search.places():
        if place.absolute() not in seen:
            seen.add(place.absolute())
            yield _look(place.absolute(), search)
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
    snapshot = snapshot_in(place) if is_models_folder(place) else None
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
