"""Which tool and which rank wrote a file, as far as files say so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from shardwise.errors import ShardwiseError
from shardwise.format.json_file import read_json

#: File name -> entries that hold the release of the library that wrote it, by the library's name.
_RELEASES = {
    "config.json": {"transformers_version": "transformers", "_diffusers_version": "diffusers"},
    "model_index.json": {"_diffusers_version": "diffusers"},
}
#: As `shardwise.plan.layout.shard_name` and torch's Hugging Face writer name them; numbers count from 1.
_SHARD = re.compile(r"shard-(\d{5,})-.+")
#: As torch's FileSystemWriter names them: the rank, and a count.
_DCP_ITEM = re.compile(r"__(\d+)_\d+\.distcp")


def writer_of(path: str, world_size: int | None) -> str | None:
    """Who wrote a file, as its name says: ``rank 3``, or ``shard 4`` where nothing tells how many ranks there were.

    A rank whose pieces of one tensor do not touch puts the further ones into files that are numbered behind those of
    all ranks, so that a shard's rank is known only with their number. ``None`` where the name does not tell.
    """
    name = PurePosixPath(path).name
    item = _DCP_ITEM.fullmatch(name)
    if item is not None:
        return f"rank {int(item[1])}"
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return None
    number = int(shard[1])
    return f"shard {number}" if not world_size or not number else f"rank {(number - 1) % world_size}"


def tools_named(root: Path, listed: Iterable[str]) -> Iterator[str]:
    """The libraries that configurations say they were written by: ``transformers 5.13.0 (model/config.json)``.

    Each release once, with the first file that names it.
    """
    seen: set[tuple[str, str]] = set()
    for relative in listed:
        entries = _RELEASES.get(PurePosixPath(relative).name)
        if entries is None:
            continue
        try:
            found = read_json(root / relative)
        except ShardwiseError:
            continue  # a damaged configuration says nothing; what is wrong with it, `verify` tells
        for key, library in entries.items():
            release = found.get(key) if isinstance(found, dict) else None
            if isinstance(release, str) and (library, release) not in seen:
                seen.add((library, release))
                yield f"{library} {release} ({relative})"
