"""Addons such as users write, and what the ranks do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Unpack

import torch.distributed as dist
from safetensors import safe_open
from tests.clients.families import build
from tests.clients.training import shard

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.addons import ConsolidatedHFAddon, SaveHookArgs
from shardwise.errors import ShardwiseError


class Recorder:
    """Notes when it is called, and what then stands in the model's directory."""

    def __init__(self) -> None:
        self.seen: list[list[object]] = []

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        self._note("pre_save", kwargs)

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        self._note("post_save", kwargs)

    def _note(self, hook: str, kwargs: SaveHookArgs) -> None:
        directory = Path(kwargs["model_path"])
        sums = 0.0
        files = sorted(directory.rglob("*.safetensors"))
        for path in files:
            with safe_open(path, framework="pt") as reader:
                sums += sum(float(reader.get_tensor(name).double().sum()) for name in reader.keys())  # noqa: SIM118
        published = any(p.name == "LATEST" for p in directory.parent.parent.iterdir())
        self.seen.append([hook, len(files), sums, published, kwargs["is_final_checkpoint"]])


class Broken:
    """Fails on one rank, in one hook, without a word to the others."""

    def __init__(self, hook: str, rank: int) -> None:
        self._where = hook, rank

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        self._fail("pre_save")

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        self._fail("post_save")

    def _fail(self, hook: str) -> None:
        if self._where == (hook, dist.get_rank()):
            raise KeyError("the user's own mistake")


def record(root: str, is_async: bool, mode: str) -> tuple[list[list[object]], float]:
    """What an addon saw on this rank, and the sum of the model's elements when `save` was called."""
    model, recorder = shard(build("llama")), Recorder()
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated=mode, is_async=is_async, save_rng=False)
    total = sum(float(p.full_tensor().double().sum()) for p in model.parameters())
    with Checkpointer(config, dist.get_rank(), 0, 0, addons=[ConsolidatedHFAddon(), recorder]) as saver:
        saver.save(0, 1, model, is_final_checkpoint=True)
        saver.maybe_wait_for_staging()
        for parameter in model.parameters():
            parameter.data.zero_()
        saver.async_wait()
    return recorder.seen, total


def fail(root: str, is_async: bool, hook: str, rank: int) -> None:
    """Save with an addon that fails."""
    model = shard(build("llama"))
    config = CheckpointingConfig(
        checkpoint_dir=root, save_consolidated="every", is_async=is_async, collective_timeout_seconds=60
    )
    with Checkpointer(config, dist.get_rank(), 0, 0, addons=[Broken(hook, rank), ConsolidatedHFAddon()]) as saver:
        saver.save(0, 1, model)


def fail_and_go_on(root: str) -> str:
    """After an addon's failure the same checkpointer saves the next step."""
    model = shard(build("llama"))
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every")
    broken = Broken("post_save", 0)
    with Checkpointer(config, dist.get_rank(), 0, 0, addons=[broken]) as saver:
        try:
            saver.save(0, 1, model)
        except ShardwiseError as error:
            text = str(error)
        saver.addons = [ConsolidatedHFAddon()]
        saver.save(0, 2, model)
    return json.dumps(text)
