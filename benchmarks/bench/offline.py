"""Offline work: what 40,000 tensors cost one by one, and a gigabyte of bytes against a plain copy.

The directories can be made alone, to profile a command with: ``python -m bench.offline many DIRECTORY`` (40,000 tensors
of a Llama with its config.json, as ``torch.distributed.checkpoint`` writes it) or ``large DIRECTORY``.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint import FileSystemWriter

from bench.measure import MIB, Row, Samples, measure, tree_bytes
from bench.models import llama_like
from bench.ranks import Settings
from shardwise.ops.consolidate import consolidate
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
    """``verify`` and ``consolidate`` in one process that may use all cores."""
    rows = []
    place = many(settings.directory / "many")
    count = 9 * _LAYERS + 3
    for name, work in (
        ("verify", lambda: verify(place)),
        ("consolidate", lambda: consolidate(place, settings.directory / "export")),
    ):
        measure(lambda: verify(place))  # imports
        sample = measure(work)
        limit = 5 if name == "verify" else 20
        rows.append(Row(f"{name}, {count:,} tensors", sample.seconds, peak_mib=sample.peak, note=f"limit {limit} s"))
    shutil.rmtree(settings.directory / "export")
    shutil.rmtree(place)
    place = large(settings.directory / "large", settings.size)
    target, raw, samples = settings.directory / "export", settings.directory / "raw", Samples()
    nbytes = tree_bytes(place)
    for turn in range(settings.repeats + 1):
        reference = measure(lambda: _copy(place, raw), nbytes)
        shutil.rmtree(raw)
        sample = measure(lambda: consolidate(place, target), nbytes)
        shutil.rmtree(target)
        if turn:
            samples.measured.append(sample)
            samples.reference.append(reference)
        else:
            samples.first = sample
    rows.append(samples.row(f"consolidate, {settings.size:g} GB of DCP", "raw copy", 1.5, nbytes))
    return rows


if __name__ == "__main__":
    kind, where = sys.argv[1:]
    many(Path(where)) if kind == "many" else large(Path(where), 1.8)
