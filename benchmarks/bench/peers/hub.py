"""transformers' own saving and loading of sharded models, gathered on rank 0 and distributed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from bench.models import shard
from bench.peers.peer import CannotError, Peer, State

_ROWS_ONLY = "its FSDP2 shards rows only"


class _Transformers(Peer):
    def _distributed(self, path: Path) -> nn.Module:
        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        size = dist.get_world_size()
        return LlamaForCausalLM.from_pretrained(
            path, dtype="bfloat16", distributed_config=DistributedConfig(fsdp_size=size)
        )

    def sharded_model(self, dim: int) -> nn.Module | None:
        if dim:
            raise CannotError(_ROWS_ONLY)
        return self._distributed(self.place.base)


class Gathered(_Transformers):
    """``save_pretrained`` of a sharded model as it is by default, and ``from_pretrained`` of all on every rank."""

    reasons = {  # noqa: RUF012 - never changed
        "sharded": "saves whole models only",
        "stall": "`save_pretrained` returns when all is written",
        "load": "saves whole models only",
        "state": "saves no optimizer this way",
    }

    def consolidated(self, model: nn.Module) -> Callable[[Path], Path]:
        def save(path: Path) -> Path:
            model.save_pretrained(path)
            return path

        return save

    def base(self) -> Callable[[Path], nn.Module]:
        from transformers import LlamaForCausalLM

        def load(path: Path) -> nn.Module:
            model = LlamaForCausalLM.from_pretrained(path, dtype="bfloat16")
            return shard(model, self.place.mesh)

        return load


class Distributed(_Transformers):
    """``save_pretrained(distributed_checkpoint=True)`` and ``from_pretrained(distributed_config=...)``."""

    reasons = {"stall": "`save_pretrained` returns when all is written"}  # noqa: RUF012 - never changed

    def consolidated(self, model: nn.Module) -> Callable[[Path], Path]:
        from transformers.distributed import consolidate_distributed_checkpoint

        def save(path: Path) -> Path:
            model.save_pretrained(path, distributed_checkpoint=True)
            if dist.get_rank() == 0:
                consolidate_distributed_checkpoint(path, path / "consolidated")
            dist.barrier()
            return path / "consolidated"

        return save

    def sharded(self, model: nn.Module) -> Callable[[Path], object]:
        return lambda path: model.save_pretrained(path, distributed_checkpoint=True)

    def load(self, model: nn.Module) -> Callable[[Path], nn.Module | None]:
        return self._distributed

    def base(self) -> Callable[[Path], nn.Module]:
        return self._distributed

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        from transformers.distributed import load_optimizer_distributed, save_optimizer_distributed

        def save(path: Path) -> None:
            model.save_pretrained(path / "model", distributed_checkpoint=True)
            save_optimizer_distributed(model, optimizer, str(path / "optimizer"))

        def load(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
            loaded = self._distributed(path / "model")
            fresh = torch.optim.AdamW(loaded.parameters())
            load_optimizer_distributed(loaded, fresh, str(path / "optimizer"))
            return loaded, fresh

        return State(save, load)
