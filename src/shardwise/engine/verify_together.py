"""Verifying a checkpoint before it is restored: all ranks share the work, and all of them learn of what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from shardwise.comm import Group
from shardwise.disk.storage import Storage
from shardwise.engine.verify import (
    Damage,
    Extent,
    VerifyLevel,
    check_extents,
    check_files,
    extents_of,
    files_below,
    manifest_bytes,
    tensors_by_file,
)
from shardwise.errors import CheckpointNotFoundError, IntegrityError, MisuseError
from shardwise.format.manifest import MANIFEST_NAME, parse_manifest

_LOG = logging.getLogger(__name__)


def check_checkpoint(
    path: Path,
    level: VerifyLevel,
    group: Group,
    storage: Storage,
    *,
    components: Collection[str] = (),
    threads: int = 1,
) -> bool:
    """Make sure that a checkpoint is what was saved, before anything is read from it. All ranks of the group call.

    The work is shared: every rank looks at some of the files, and reads about the same number of bytes.

    Args:
        path: The checkpoint's directory.
        level: ``sizes`` compares manifest, kinds and sizes; ``digests`` also reads every byte.
        group: The ranks that restore.
        storage: Through what bytes are read.
        components: Directories of the checkpoint that are to be restored (``model``, ``optim``); all where empty.
        threads: Reads at once on each rank.

    Returns:
        Whether the checkpoint could be checked: one without a manifest (another tool's) is let through, with a warning.

    Raises:
        IntegrityError: Something differs, on any rank; the same error on every rank, naming file and tensor.
        ManifestError: The manifest is damaged.
        MisuseError: There is no such level.
    """
    data = b""
    with group.together(f"reading the manifest of {path}"):
        if level not in ("sizes", "digests"):
            raise MisuseError(f"verify is {level!r}", hint="Use 'sizes' or 'digests'.")
        if group.is_main:
            try:
                data = manifest_bytes(path)
            except CheckpointNotFoundError:
                _LOG.warning("%s has no %s: it cannot be verified and is restored as it is", path, MANIFEST_NAME)
    data = group.broadcast_bytes(data, 0, f"sharing the manifest of {path}")
    if not data:
        return False
    with group.together(f"verifying {path}"):
        manifest = parse_manifest(data, str(path / MANIFEST_NAME))
        files = files_below(manifest, components)
        own = [file for number, file in enumerate(files) if number % group.world_size == group.rank]
        _raise(path, check_files(path, own, tensors_by_file(manifest)))
    if level == "digests":
        with group.together(f"verifying the digests of {path}"):
            extents = _share(extents_of(manifest, files), group.rank, group.world_size)
            _raise(path, check_extents(path, extents, storage, threads=threads))
    return True


def _share(extents: Sequence[Extent], rank: int, world_size: int) -> list[Extent]:
    """A rank's part: consecutive extents of about the same number of bytes as everyone else's."""
    total = sum(extent.nbytes + 1 for extent in extents)
    own, position = [], 0
    for extent in extents:
        if position * world_size // max(total, 1) == rank:
            own.append(extent)
        position += extent.nbytes + 1
    return own


def _raise(path: Path, damages: Sequence[Damage]) -> None:
    if not damages:
        return
    first = damages[0]
    more = f"; {len(damages) - 1} more are damaged" if len(damages) > 1 else ""
    raise IntegrityError(
        f"the checkpoint is damaged: {first.describe()}{more}",
        path=path / first.file,
        tensor=first.tensors[0] if first.tensors else None,
        hint="`shardwise verify` lists everything; restore the file from a copy, or resume from another checkpoint.",
    )
