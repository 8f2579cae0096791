"""Checks that all ranks write into the same directory, before anything is published.

A time stamp in ``checkpoint_dir`` or node-local disks give every rank another directory, in which all of its
writing succeeds. Two checks find this without another collective:

1. every other rank sees, beside the unfinished save, the claim of rank 0 with the run's token;
2. rank 0 sees every file that any rank wrote, with its size.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shardwise.comm import Group
from shardwise.disk.names import real_path, status
from shardwise.engine.records import ComponentRecord
from shardwise.errors import ConfigError, StorageError
from shardwise.lifecycle import claimed_by

_HINT = (
    "Give every rank the same checkpoint_dir on a file system that all of them share: no time stamp or rank in its "
    "name, no disk of one node's own."
)


class RootLocation(NamedTuple):
    """The location of a rank's root directory.

    Attributes:
        path: The resolved path on that machine.
        identity: Device and number of the directory, as that machine counts them; ``None`` where it does not exist.
    """

    host: str
    path: str
    identity: Sequence[int] | None

    @staticmethod
    def own(root: Path) -> RootLocation:
        """The location on this rank."""
        path = real_path(root)
        found = status(path)
        identity = None if found is None or found.identity is None else list(found.identity)
        return RootLocation(socket.gethostname(), str(path), identity)

    def is_another(self, other: RootLocation) -> bool:
        """Whether the two are certainly different directories; unknown (false) on different machines."""
        if self.path == other.path or self.host != other.host:
            return False
        return self.identity is None or self.identity != other.identity

    def __str__(self) -> str:
        return f"{self.path} on {self.host}"


def check_same_root(locations: Sequence[RootLocation]) -> None:
    """Raise `ConfigError` if two ranks of one machine use different root directories."""
    for rank, location in enumerate(locations):
        first = next(number for number, other in enumerate(locations) if other.host == location.host)
        if locations[first].is_another(location):
            raise ConfigError(
                f"checkpoint_dir is {locations[first].path} on rank {first} and {location.path} on rank {rank}",
                hint=_HINT,
            )


def check_claim(directory: Path, name: str, token: str, group: Group, locations: Sequence[RootLocation]) -> None:
    """Raise `StorageError` unless this rank sees rank 0's claim of the save. Local.

    ``name`` is saved in ``directory``; ``token`` is this run's, ``locations`` are the roots of all ranks.
    """
    found = claimed_by(directory, name)
    if found != token:
        seen = "another run is saving there" if found else "rank 0's save is not visible there"
        raise StorageError(
            f"rank {group.global_rank} writes {name} into {directory}, below {locations[group.rank]}, and {seen}; "
            f"rank 0 writes below {locations[0]}",
            path=directory,
            hint=_HINT,
        )


def check_files_visible(directory: Path, records: Sequence[ComponentRecord], locations: Sequence[RootLocation]) -> None:
    """Raise `StorageError` unless rank 0 sees every written file with its size. Rank 0 calls.

    ``records`` say what each rank wrote, ``locations`` where its root is.
    """
    # A file in several records was written by the last of these ranks; rank 0 would see its own.
    writers = {file.path: (rank, file) for rank, record in enumerate(records) for file in record.files}
    for rank, file in writers.values():
        path = directory / file.path
        found = status(path)
        size = None if found is None else found.size
        if size != file.size:
            sees = "does not see it" if size is None else f"sees {size:,} bytes"
            raise StorageError(
                f"rank {rank} wrote below {locations[rank]} {file.size:,} bytes of {file.path}, and rank 0, below "
                f"{locations[0]}, {sees}",
                path=path,
                rank=rank,
                hint=_HINT,
            )
