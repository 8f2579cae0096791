"""Small models, bases in hub-cache layouts, and a storage that remembers what was read."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from tests.support.faults import NamedHandles, is_tensor_data
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shardwise.checkpointing import Checkpointer
from shardwise.config import CheckpointingConfig
from shardwise.disk.storage import Storage

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def llama_config(**settings: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(sizes | settings))


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**settings))


def on_meta(cls: type[PreTrainedModel], config: Any, dtype: torch.dtype | None = None) -> Any:
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    return model if dtype is None else model.to(dtype)


def two_by_two(model: Any) -> None:
    """Spread a language model over four ranks by HSDP: two replicas of two shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def checkpointer(tmp_path: Path, storage: Storage | None = None, **settings: Any) -> Checkpointer:
    config = CheckpointingConfig(enabled=True, checkpoint_dir=str(tmp_path / "checkpoints"), **settings)
    return Checkpointer(config, storage=storage)


def hub_cache(root: Path, repo_id: str, source: Path, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """Put a saved model where `huggingface_hub` would: blobs, a snapshot of links to them, a reference."""
    home = root / ("models--" + repo_id.replace("/", "--"))
    snapshot, blobs = home / "snapshots" / commit, home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = blobs / f"{commit[:8]}{number:04d}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    if ref is not None:
        (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return snapshot


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | values))


def assert_same(model: nn.Module, expected: nn.Module, *, but: tuple[str, ...] = ()) -> None:
    """Parameters, persistent and other buffers are equal, bit for bit."""
    have, want = model.state_dict(), expected.state_dict()
    assert have.keys() == want.keys()
    for name, value in want.items():
        if not name.startswith(but or ("\0",)):
            assert have[name].device.type != "meta"
            assert torch.equal(have[name], value.to(have[name].dtype)), name
    buffers = dict(model.named_buffers())
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name


class CountingStorage(NamedHandles):
    """Remembers every range of tensors' bytes that was read from every file."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[Path, int, int]] = []

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        got = super().read(handle, into, offset)
        if got and is_tensor_data(self.paths[handle], offset):
            self.ranges.append((self.paths[handle], offset, offset + got))
        return got

    def read_rows(
        self, handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int
    ) -> int:
        self.ranges.append((self.paths[handle], offset, offset + (rows - 1) * period + width))
        return super().read_rows(handle, into, rows, width, pitch, period, offset)

    def overlaps(self) -> list[tuple[Path, int, int]]:
        """Ranges that begin before an earlier one of the same file ends."""
        found, last = [], {}
        for path, begin, end in sorted(self.ranges):
            if begin < last.get(path, 0):
                found.append((path, begin, end))
            last[path] = max(end, last.get(path, 0))
        return found

    @property
    def nbytes(self) -> int:
        return sum(end - begin for _, begin, end in self.ranges)


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; every rank of its mesh calls."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor  # type: ignore[no-any-return]
