"""Offline work: what 40,000 tensors cost one by one, and a gigabyte of bytes against a plain copy.

The directories can be made alone, to profile a command with: ``python -m bench.offline many DIRECTORY`` (40,000 tensors
of a Llama with its config.json, as ``torch.distributed.checkpoint`` writes it) or ``large DIRECTORY``.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint import FileSystemWriter

from bench.measure import MIB, Row, Samples, measure, tree_bytes
from bench.models import llama_like
from bench.ranks import Settings
from shardwise.ops.consolidate import consolidate
from shardwise.ops.convert import convert
from shardwise.ops.verify import verify

#: Layers of 9 tensors each, and 3 more: 40,008 tensors.
_LAYERS = 4445
_COPY_BLOCK = 8 * MIB


def many(directory: Path) -> Path:
    """A DCP directory of 40,008 small tensors, with the configuration of the Llama that they are of."""
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=_LAYERS,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    _save(state, directory)
    config.save_pretrained(directory)
    return directory


def large(directory: Path, gigabytes: float) -> Path:
    """A DCP directory of a Llama's shapes in bfloat16."""
    model = llama_like(gigabytes).to_empty(device="cpu")
    _save({name: tensor.detach() for name, tensor in model.state_dict().items()}, directory)
    return directory


#: The commands that write, each from a directory to another.
_WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "consolidate": consolidate,
    "convert --to dcp": lambda source, target: convert(source, target, "dcp"),
    "convert --to shards": lambda source, target: convert(source, target, "shards"),
}


def _save(state: dict[str, torch.Tensor], directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=FileSystemWriter(directory, sync_files=False), no_dist=True)


def _copy(source: Path, target: Path) -> None:
    """Copy the files' bytes through a buffer, as a program has to that looks at them, and sync them."""
    target.mkdir()
    buffer = memoryview(bytearray(_COPY_BLOCK))
    for path in source.iterdir():
        with path.open("rb", buffering=0) as read, (target / path.name).open("wb", buffering=0) as written:
            while got := read.readinto(buffer):
                written.write(buffer[:got])
            os.fsync(written.fileno())


def offline(settings: Settings) -> list[Row]:
    """``verify``, ``consolidate`` and ``convert`` in one process that may use all cores."""
    rows = []
    place, target = many(settings.directory / "many"), settings.directory / "made"
    count = 9 * _LAYERS + 3
    measure(lambda: verify(place))  # imports
    sample = measure(lambda: verify(place))
    rows.append(Row(f"verify, {count:,} tensors", sample.seconds, peak_mib=sample.peak, note="limit 5 s"))
    for name, write in _WRITERS.items():
        sample = measure(partial(write, place, target))
        rows.append(Row(f"{name}, {count:,} tensors", sample.seconds, peak_mib=sample.peak, note="limit 20 s"))
        shutil.rmtree(target)
    shutil.rmtree(place)
    place, raw = large(settings.directory / "large", settings.size), settings.directory / "raw"
    nbytes = tree_bytes(place)
    found = {name: Samples() for name in _WRITERS}
    for turn in range(settings.repeats + 1):
        for name, write in _WRITERS.items():
            reference = measure(lambda: _copy(place, raw), nbytes)
            shutil.rmtree(raw)
            sample = measure(partial(write, place, target), nbytes)
            shutil.rmtree(target)
            if turn:
                found[name].measured.append(sample)
                found[name].reference.append(reference)
            else:
                found[name].first = sample
    rows += [s.row(f"{name}, {settings.size:g} GB of DCP", "raw copy", 1.5, nbytes) for name, s in found.items()]
    return rows


if __name__ == "__main__":
    kind, where = sys.argv[1:]
    many(Path(where)) if kind == "many" else large(Path(where), 1.8)
