"""The base model's files: which tensor stands in which file, and in which dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from shardwise.comm import Group, JsonValue
from shardwise.config import CheckpointingConfig
from shardwise.errors import CheckpointNotFoundError, FormatError
from shardwise.io.sources import Source, open_source
from shardwise.types import TensorSpec


@dataclass(frozen=True)
class BaseModel:
    """What the base model's headers say.

    Attributes:
        directory: Where it is.
        files: Tensor name -> file name.
        specs: Tensor name -> shape and dtype.
        source: Its tensors, for reading.
    """

    directory: Path
    files: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    source: Source

    @property
    def numbers(self) -> dict[str, int]:
        """The files' numbers, from 1, in the order of their names."""
        return {name: number for number, name in enumerate(sorted(set(self.files.values())), start=1)}


def find_base_path(config: CheckpointingConfig) -> str | None:
    """The base model as the configuration names it: a local path where there is one, else the hub id. Local."""
    name, root = config.model_repo_id, config.original_model_root_dir
    if root is not None:
        candidates = [Path(root) / name] if name else []
        for candidate in [*candidates, Path(root)]:
            if _has_weights(candidate):
                return str(candidate)
    if name is None:
        return None
    if Path(name).exists():
        return name
    snapshot = snapshot_directory(Path(config.model_cache_dir or "."), name)
    if snapshot is None and root is not None:
        snapshot = snapshot_directory(Path(root), name)
    return str(snapshot) if snapshot is not None else name


def _has_weights(directory: Path) -> bool:
    return directory.is_dir() and any(directory.glob("*.safetensors"))


def snapshot_directory(cache: Path, repo_id: str, revision: str = "main") -> Path | None:
    """The snapshot of a hub model in a cache directory (``models--org--name/snapshots/<commit>``), or ``None``.

    Source of the layout: huggingface_hub, "Understand caching".

    Args:
        cache: The cache, or the directory above its ``hub``.
        repo_id: ``org/name``.
        revision: A branch or tag (a file below ``refs``) or a commit. Where ``main`` was never fetched, the only
            snapshot stands for it, or the newest of several.

    Raises:
        FormatError: The file of a branch or tag is not text.
    """
    folder = "models--" + repo_id.replace("/", "--")
    home = next((h for h in (cache / folder, cache / "hub" / folder) if h.is_dir()), None)
    if home is None:
        return None
    reference = home / "refs" / revision
    if reference.is_file():
        commit = home / "snapshots" / _text(reference).strip()
        if commit.is_dir():
            return commit
    if revision != "main":
        commits = sorted(path for path in (home / "snapshots").glob(f"{revision}*") if path.is_dir())
        return commits[0] if len(commits) == 1 or (commits and commits[0].name == revision) else None
    snapshots = sorted(
        (path for path in (home / "snapshots").glob("*") if path.is_dir()), key=lambda p: (p.stat().st_mtime, p.name)
    )
    return snapshots[-1] if snapshots else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"not text: {error}", path=file, hint="Download the model again.") from error


def open_base(path: str | None, group: Group) -> BaseModel | None:
    """Read the base model's headers. All ranks of the group call.

    Args:
        path: The base model, which may lie elsewhere on each rank; rank 0's where this rank knows of none.
        group: The ranks that save together.

    Returns:
        ``None`` where rank 0 has no base model configured, or it has no safetensors files there.
    """

    def find() -> JsonValue:
        if path is None:
            return None
        place = Path(path)
        is_file = place.is_file() and place.suffix == ".safetensors"
        return [path, is_file] if is_file or _has_weights(place) else None

    told = group.tell(find, "looking for the base model")
    if told is None:
        return None
    theirs, is_file = cast(tuple[str, bool], told)
    path = path or theirs
    try:
        source = open_source(path, group)
    except CheckpointNotFoundError:
        return None
    files = {name: source.files[tensor.chunks[0].file].name for name, tensor in source.tensors.items() if tensor.chunks}
    specs = {name: tensor.spec for name, tensor in source.tensors.items()}
    return BaseModel(Path(path).parent if is_file else Path(path), files, specs, source)
