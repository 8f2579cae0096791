"""CRC-32C as the save takes it, by several packages, and beside the write: ``benchmarks/digests.py --help``.

One core, blocks of 512 KiB. Every package that is installed takes part; each has to find the digest of a known text
first. Nothing is asserted of times.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

Digest = Callable[[memoryview, int], int]
BLOCK = 512 * 1024
#: RFC 3720's check value.
_TEXT, _FOUND = b"123456789", 0xE3069283
#: Which instructions a package can use follows from these.
_FLAGS = ("sse4_2", "pclmulqdq", "avx2", "avx512f", "avx512vl", "vpclmulqdq")


def _of_rs(name: str) -> Callable[[], Digest]:
    def find() -> Digest:
        function = getattr(importlib.import_module("crc32c_rs"), name)
        function(_TEXT, 0)
        return function

    return find


def _awscrt() -> Digest:
    return importlib.import_module("awscrt.checksums").crc32c


def _icvisc() -> Digest:
    return importlib.import_module("crc32c").crc32c


def _google() -> Digest:
    extend = importlib.import_module("google_crc32c").extend
    return lambda block, crc: extend(crc, bytes(block))


def _anycrc() -> Digest:
    model = importlib.import_module("anycrc").Model("CRC32C")
    return model.calc


def _fastcrc() -> Digest:
    iscsi = importlib.import_module("fastcrc").crc32.iscsi
    return lambda block, crc: iscsi(bytes(block), crc)


PACKAGES: dict[str, Callable[[], Digest]] = {
    "awscrt": _awscrt,
    "crc32c (ICVisc)": _icvisc,
    "google-crc32c (copies each block)": _google,
    "anycrc": _anycrc,
    "fastcrc (copies each block)": _fastcrc,
    "crc32c-rs, its choice": _of_rs("crc32c"),
    "crc32c-rs, without AVX": _of_rs("crc32c_sse42_pclmulqdq_v1s3x3"),
}


def _blocks(data: memoryview) -> list[memoryview]:
    return [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]


def _digest(find: Digest, blocks: list[memoryview]) -> int:
    crc = 0
    for block in blocks:
        crc = find(block, crc)
    return crc


def _packages(data: memoryview, repeats: int) -> None:
    blocks, found, speeds = _blocks(data), dict[str, Digest](), dict[str, list[float]]()
    for name, make in PACKAGES.items():
        try:
            digest = make()
            if digest(memoryview(_TEXT), 0) != _FOUND:
                raise ValueError("it finds another digest")
            found[name] = digest
        except Exception as error:  # noqa: BLE001 - the others are still worth having
            print(f"{name:<36} not measured: {type(error).__name__}: {error}")
    for _ in range(repeats):
        for name, digest in found.items():
            started = time.perf_counter()
            _digest(digest, blocks)
            speeds.setdefault(name, []).append(len(data) / (time.perf_counter() - started) / 1e9)
    for name, each in speeds.items():
        print(f"{name:<36} {statistics.median(each):6.1f} GB/s  ({min(each):.1f}-{max(each):.1f})")


def _write(digest: Digest | None, blocks: list[memoryview], path: Path, pool: ThreadPoolExecutor | None) -> float:
    """Write a fresh file, digest each block after its write: here, or by the pool's thread beside the next write."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        started = time.perf_counter()
        before: Future[int] | None = None
        offset = crc = 0
        for block in blocks:
            os.pwrite(handle, block, offset)
            offset += len(block)
            if digest is None:
                continue
            if pool is None:
                crc = digest(block, crc)
            else:
                before = pool.submit(digest, block, before.result() if before else 0)
        if before:
            before.result()
        return time.perf_counter() - started
    finally:
        os.close(handle)
        path.unlink()


def _beside(data: memoryview, repeats: int, directory: Path) -> None:
    blocks, digest = _blocks(data), _awscrt()
    with tempfile.TemporaryDirectory(dir=directory) as place, ThreadPoolExecutor(1) as pool:
        path, ratios = Path(place) / "file", dict[str, list[float]]()
        for turn in range(repeats + 1):
            bare = _write(None, blocks, path, None)
            after, beside = _write(digest, blocks, path, None), _write(digest, blocks, path, pool)
            if turn:
                ratios.setdefault("after each block's write, as now", []).append(after / bare)
                ratios.setdefault("in another thread, beside the next", []).append(beside / bare)
    for name, each in ratios.items():
        print(f"awscrt {name:<40} {statistics.median(each):.2f} of the write alone  ({min(each):.2f}-{max(each):.2f})")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="MiB of memory (default 256)")
    parser.add_argument("--repeats", type=int, default=7, help="repeats, in turns (default 7)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where the file goes (default /dev/shm)")
    given = parser.parse_args()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    print(f"{facts.get('model name', '?')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f};", end=" ")
    print(", ".join(f"{flag} {'yes' if flag in flags else 'no'}" for flag in _FLAGS))
    data = memoryview(bytearray(os.urandom(2**20)) * given.mib)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    _packages(data, given.repeats)
    os.sched_setaffinity(0, cores)
    _beside(data, given.repeats, given.dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
