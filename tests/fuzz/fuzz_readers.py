"""A long run of a coverage-guided fuzzer on the readers; the suite has a short one, with hypothesis (tests/format).

    pip install atheris
    python tests/fuzz/fuzz_readers.py header corpus/ -max_total_time=3600

Readers: header, index, manifest, state. Anything but a typed error is a finding; the fuzzer keeps the input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import atheris

with atheris.instrument_imports():
    from shardwise.errors import ShardwiseError
    from shardwise.format.crc import crc32c
    from shardwise.format.header import parse_header
    from shardwise.format.index import parse_index
    from shardwise.format.manifest import parse_manifest
    from shardwise.format.state_json import decode_state


def header(data: bytes) -> object:
    return parse_header(data, len(data), "fuzz")


def index(data: bytes) -> object:
    return parse_index(data, "fuzz")


def manifest(data: bytes) -> object:
    # The right digest, or nothing behind it would ever be reached.
    return parse_manifest(data + b'"crc32c":"%08x"}\n' % crc32c(data), "fuzz")


def state(data: bytes) -> object:
    return decode_state(data, {})


READERS: dict[str, Callable[[bytes], object]] = {"header": header, "index": index, "manifest": manifest, "state": state}


def main() -> None:
    reader = READERS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        try:
            reader(data)
        except ShardwiseError:
            return

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
