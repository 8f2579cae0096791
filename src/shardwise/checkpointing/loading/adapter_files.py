"""Where a model's adapters lie in a directory: as peft or diffusers saves them, by name or as the only one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.checkpointing.loading.models import renamed, retitled
from shardwise.checkpointing.session import Session
from shardwise.convert.mapping import rename
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.errors import AdapterError, AmbiguousFilesError, FormatError
from shardwise.peft.config import read_adapter_config
from shardwise.peft.diffusers_lora import LORA_WEIGHTS_NAME, read_lora
from shardwise.peft.load import check_shared_factors
from shardwise.peft.tensors import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, AdapterFile
from shardwise.sources.sources import Source, open_source
from shardwise.sources.torch_files import open_bin

_LOG = logging.getLogger(__name__)

#: Source: ``peft.utils.constants.WEIGHTS_NAME``: what peft wrote before 0.5, and still does without safetensors.
_BIN_NAME = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """One adapter of a checkpoint.

    Attributes:
        weights: Its file.
        settings: Its ``adapter_config.json``, or what the header of diffusers' LoRA file says, where there is one.
        names: Of diffusers' LoRA file: its tensors of this model, and the model's names for them.
    """

    weights: Path
    settings: Mapping[str, object] | None
    names: Mapping[str, str] | None = None


def find_saved(
    path: Path,
    files: Sequence[AdapterFile],
    component: str | None,
    key_mapping: Mapping[str, str] | None,
    *,
    allow_missing: bool = False,
) -> dict[str, SavedAdapter]:
    """The saved adapter for each of a model's. Local.

    The only adapter of a model takes the only one that there is, whatever it is called, as peft's own loading does.

    Args:
        path: A checkpoint's ``model`` directory, another adapter's directory, or an adapter's file.
        files: The model's adapters.
        component: The model's name in pipelines of diffusers, where it is a model of such.
        key_mapping: Regular expressions and replacements for the file's names; first match.
        allow_missing: Adapters that are not there keep their values, if any is there.

    Raises:
        AdapterError: The directory has adapters, and not those of the model.
    """
    there = dict(_there(path))
    found: dict[str, SavedAdapter] = {}
    lacking: list[str] = []
    for file in files:
        weights = there.get(file.directory)
        if weights is None and len(files) == len(there) == 1:
            weights = next(iter(there.values()))
        if weights is None and there:
            lacking.append(file.adapter_name)
            continue
        weights = weights or path / file.path
        found[file.adapter_name] = _saved(weights, component, key_mapping or {})
    names = ", ".join(repr(directory or "default") for directory in there)
    if lacking and not (allow_missing and found):
        raise AdapterError(
            f"the checkpoint has no adapter called {', '.join(map(repr, lacking))}; it has {names}",
            path=path,
            hint="Load it before the model gets that adapter, or pass allow_checkpoint_key_subset=True to load_model: "
            "then the adapter keeps its values.",
        )
    left = set(there.values()) - {saved.weights for saved in found.values()}
    if left:
        _LOG.warning("%s has adapters that the model lacks: %s", path, ", ".join(sorted(str(p.parent) for p in left)))
    return found


def _saved(weights: Path, component: str | None, key_mapping: Mapping[str, str]) -> SavedAdapter:
    if component is not None and is_file(weights) and not weights.name.endswith(".bin"):
        lora = read_lora(weights, component, key_mapping)
        if lora is not None:
            return SavedAdapter(weights, lora.settings, lora.names)
    has_config = is_file(weights.parent / ADAPTER_CONFIG_NAME)
    return SavedAdapter(weights, read_adapter_config(weights.parent) if has_config else None)


def _there(path: Path) -> Iterator[tuple[str, Path]]:
    """Directory below ``path`` (empty for itself) and file of each adapter."""
    if is_file(path):
        yield "", path
        return
    places = [path, *(p for name in names_in(path) if is_directory(p := path / name))] if is_directory(path) else []
    for place in places:
        names = [name for name in (ADAPTER_WEIGHTS_NAME, _BIN_NAME, LORA_WEIGHTS_NAME) if is_file(place / name)]
        if len(names) > 1 and names[-1] == LORA_WEIGHTS_NAME:
            raise AmbiguousFilesError(
                f"the directory holds adapters of peft and of diffusers: {', '.join(names)}",
                path=place,
                hint="Pass the path of the file that is meant.",
            )
        if names:
            yield "" if place == path else place.name, place / names[0]


def check_shared(file: AdapterFile, saved: SavedAdapter, key_mapping: Mapping[str, str] | None) -> None:
    """Check that what is one parameter in the model has one value in the file. One rank calls.

    Raises:
        AdapterError: It has several, or the file is no safetensors file, in which they cannot be compared.
    """
    if not any(item.alias_of is not None for item in file.entries):
        return
    if saved.weights.name == _BIN_NAME:
        raise AdapterError(
            "tensors that are one parameter of this model cannot be compared in a .bin file",
            path=saved.weights,
            hint="Save the adapter as safetensors once, with peft.",
        )
    check_shared_factors(file, saved.weights, lambda name: rename((name,), key_mapping or {})[0])


def open_saved(session: Session, saved: SavedAdapter, key_mapping: Mapping[str, str] | None) -> Source:
    """Open an adapter's file under the model's names. All ranks call.

    Raises:
        CheckpointNotFoundError: There is none.
        FormatError: The file is damaged, or a ``.bin`` file whose tensors no range of bytes holds.
    """
    if saved.weights.name.endswith(".bin"):
        opened = open_bin(saved.weights, session.group, session.config.allow_legacy_pickle_restore)
        if opened.loose:
            raise FormatError(
                "no range of bytes of this .bin file holds some of its tensors",
                path=saved.weights,
                tensor=next(iter(opened.loose)),
                hint="Save the adapter as safetensors once, with peft.",
            )
        source = opened.source
    else:
        source = open_source(saved.weights, session.group)
    if saved.names is not None:
        return retitled(source.without(source.tensors.keys() - saved.names.keys()), saved.names)
    return renamed(source, key_mapping) if key_mapping else source
