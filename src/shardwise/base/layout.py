"""The base model's files: which file holds each tensor, and in which dtype."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from shardwise.base.files import is_torch_base
from shardwise.base.finding import configured, find
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import exists, is_directory, is_file
from shardwise.errors import CheckpointNotFoundError, FormatError
from shardwise.geometry import TensorSpec
from shardwise.settings import Settings
from shardwise.sources.sources import Source, open_source
from shardwise.sources.torch_files import open_bin

_LOG = logging.getLogger(__name__)

_STANDARD_BIN = re.compile(r"(?:(diffusion_pytorch_model)|pytorch_model|model)(-\d+-of-\d+)?\.bin")


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
