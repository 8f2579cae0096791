"""Models in a Hugging Face hub cache: ``models--org--name/snapshots/<commit>``. The network is never asked.

huggingface_hub decides which names are hub ids and how a model's folder is called; its guide "Understand caching"
describes the layout. Order never comes from time stamps: where a branch was not fetched and several
snapshots are there, none is taken.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from shardwise.disk.guarded import read_whole
from shardwise.errors import FormatError
from shardwise.upstream.huggingface_hub import cache_folder, is_repo_id

_REVISION = re.compile(r"(?P<id>[^@]+)@(?P<revision>[\w./-]+)")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
DEFAULT_REVISION = "main"
_LONGEST_REFERENCE = 4096


@dataclass(frozen=True, slots=True)
class HubName:
    """A hub id (``org/name``), and the branch, tag or commit behind its ``@``; ``None`` where none was given."""

    repo_id: str
    revision: str | None = None

    @property
    def folder(self) -> str:
        """The name of its folder in a cache."""
        return cache_folder(self.repo_id)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Result of a search in a cache.

    Attributes:
        path: The snapshot's directory, or ``None``.
        said: Where the search looked and what it found, for a message.
    """

    path: Path | None
    said: str


def hub_name(name: str) -> HubName | None:
    """A name as a hub id with an optional revision, or ``None`` where huggingface_hub takes it for none."""
    found = _REVISION.fullmatch(name)
    repo_id, revision = (found["id"], found["revision"]) if found else (name, None)
    return HubName(repo_id, revision) if is_repo_id(repo_id) else None


def default_cache() -> Path:
    """The hub's own cache, as the environment says."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def find_snapshot(cache: Path, name: HubName) -> Snapshot:
    """Look a model up in a cache, or in the directory ``hub`` of one (as ``HF_HOME`` has).

    Without a revision it is that of ``main``, or, where ``main`` was never fetched, the only snapshot there is.

    Raises:
        FormatError: The file of a branch or tag is not text.
    """
    homes = [cache / name.folder, cache / "hub" / name.folder]
    home = next((each for each in homes if each.is_dir()), None)
    if home is None:
        return Snapshot(None, f"{homes[0]} (nothing is there)")
    return snapshot_in(home, name.revision)


def snapshot_in(home: Path, revision: str | None) -> Snapshot:
    """As `find_snapshot`, in the model's own folder of a cache (``models--org--name``)."""
    wanted = revision or DEFAULT_REVISION
    commit = _referenced(home, wanted)
    if commit is not None:
        found = home / "snapshots" / commit
        if found.is_dir():
            return Snapshot(found, str(found))
        return Snapshot(None, f"{home} ({wanted} is {commit[:40]}, of which there is no snapshot)")
    commits = sorted(path.name for path in (home / "snapshots").glob("*") if path.is_dir())
    if revision is None:
        near = commits
    else:
        near = [each for each in commits if each == revision or _COMMIT.fullmatch(revision)]
        near = [each for each in near if each.startswith(revision)]
    if len(near) == 1:
        return Snapshot(home / "snapshots" / near[0], str(home / "snapshots" / near[0]))
    there = [*_references(home), *commits]
    return Snapshot(None, f"{home} (no {wanted}; what was fetched: {', '.join(there[:6]) or 'nothing'})")


def _referenced(home: Path, revision: str) -> str | None:
    """The commit of a branch or tag."""
    file = home / "refs" / revision
    if ".." in file.parts or not file.is_file():
        return None
    try:
        text = read_whole(file, _LONGEST_REFERENCE, FormatError).decode().strip()
    except UnicodeDecodeError as error:
        raise FormatError(f"not text: {error}", path=file, hint="Download the model again.") from error
    return text if text and "/" not in text else None


def _references(home: Path) -> list[str]:
    root = home / "refs"
    return sorted(
        os.path.relpath(os.path.join(directory, file), root) for directory, _, files in os.walk(root) for file in files
    )
