"""Models in a Hugging Face hub cache. huggingface_hub says which snapshot is meant; the network is never asked.

``snapshot_download`` with ``local_files_only`` knows the snapshot of a branch, a tag or a whole commit. Only the names
of one model's commits and branches are listed here, in the layout that the guide "Understand caching" describes
(``models--org--name/snapshots/<commit>``, ``refs/<branch>``): ``scan_cache_dir`` would look at every file of every
model in the cache, and leaves out a model of which one file is absent. Order never comes from time stamps: where
``main`` was not fetched and several snapshots are there, none is taken.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from shardwise.disk.names import is_directory, is_file
from shardwise.errors import FormatError
from shardwise.upstream.hugging_face import cache_folder

_REVISION = re.compile(r"(?P<id>[^@]+)@(?P<revision>[\w./-]+)")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_FOLDER = "models--"
_DEFAULT_REVISION = "main"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Result of a search: the snapshot's directory or ``None``, and where was looked, for a message."""

    path: Path | None
    said: str


def default_cache() -> Path:
    """The hub's own cache, as the environment says."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot_in(home: Path) -> Snapshot | None:
    """As `find_snapshot`, where a directory is a model's own folder in a cache (``models--org--name``)."""
    if not home.name.startswith(_FOLDER) or not is_directory(home / "snapshots"):
        return None
    return find_snapshot(home.parent, home.name.removeprefix(_FOLDER).replace("--", "/"))


def find_snapshot(cache: Path, name: str) -> Snapshot | None:
    """Look a model up in a cache, or in the directory ``hub`` of one (as ``HF_HOME`` has).

    The name is a hub id (``org/name``), with or without a branch, a tag or a commit behind an ``@``; of a commit the
    first seven digits are enough. Without a revision it is that of ``main``, or, where ``main`` was never fetched, the
    only snapshot there is. ``None`` where the name is none that a model on the hub may have.
    """
    from huggingface_hub.errors import HFValidationError

    split = _REVISION.fullmatch(name)
    repo_id, revision = (split["id"], split["revision"]) if split else (name, None)
    wanted = revision or _DEFAULT_REVISION
    try:
        homes = [place / cache_folder(repo_id) for place in (cache, cache / "hub")]
        home = next((each for each in homes if is_directory(each)), homes[0])
        found = _fetched(home, repo_id, wanted)
    except HFValidationError:
        return None
    if found is not None:
        return Snapshot(found, str(found))
    if not is_directory(home):
        return Snapshot(None, f"{home} (nothing is there)")
    references = home / "refs"
    branches = sorted(path.relative_to(references).as_posix() for path in references.rglob("*") if is_file(path))
    if wanted in branches:
        return Snapshot(None, f"{home} (there is no snapshot of the commit that {wanted} is)")
    commits = sorted(path.name for path in (home / "snapshots").glob("*") if is_directory(path))
    near = [c for c in commits if revision is None or (_COMMIT.fullmatch(revision) and c.startswith(revision))]
    if len(near) == 1:
        found = home / "snapshots" / near[0]
        return Snapshot(found, str(found))
    there = ", ".join([*branches, *commits][:6])
    return Snapshot(None, f"{home} (no {wanted}; what was fetched: {there or 'nothing'})")


def _fetched(home: Path, repo_id: str, revision: str) -> Path | None:
    """The snapshot of a branch, a tag or a whole commit, whichever of its files are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if ".." in revision.split("/"):
        return None
    try:
        # No file is asked for: which of them a model needs is for whoever opens it to say.
        found = snapshot_download(
            repo_id, revision=revision, cache_dir=home.parent, local_files_only=True, ignore_patterns="*"
        )
    except (LocalEntryNotFoundError, IsADirectoryError):  # the latter for a part of a branch's name, as refs/pr
        return None
    except UnicodeDecodeError as error:
        reference = home / "refs" / revision
        raise FormatError(f"not text: {error}", path=reference, hint="Download the model again.") from error
    # Wherever a damaged reference leads, it is a snapshot of this model or none.
    place = Path(os.path.normpath(found))
    return home / "snapshots" / place.name if place.parent == Path(os.path.normpath(home / "snapshots")) else None
