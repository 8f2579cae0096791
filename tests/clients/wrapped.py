"""Models in other modules, and what two ranks do with them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from tests.clients.training import keep_whole, locals_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise import Checkpointer, CheckpointingConfig


def llama(seed: int = 0, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings)).eval()


class RewardModel(nn.Module):
    """Shows the configuration of the model inside it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(16, 1)
        self.backbone = backbone

    @property
    def config(self) -> object:
        return self.backbone.config


class ValueHead(nn.Module):
    """Leaves its prefix out of its state, as TRL's value heads do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(16, 1)

    @property
    def config(self) -> object:
        return self.pretrained_model.config

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, object]:
        found = self.pretrained_model.state_dict(*args, **kwargs)
        return found | {f"v_head.{name}": value for name, value in self.v_head.state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: dict[str, torch.Tensor], strict: bool = True, assign: bool = False) -> object:
        own = {name.removeprefix("v_head."): v for name, v in state.items() if name.startswith("v_head.")}
        self.v_head.load_state_dict(own, strict, assign)
        rest = {name: value for name, value in state.items() if not name.startswith("v_head.")}
        return self.pretrained_model.load_state_dict(rest, strict, assign)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def averaged(model: nn.Module) -> nn.Module:
    made = AveragedModel(model)
    made.update_parameters(model)
    return made


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": averaged,
    "AveragedModel of a compiled model in DataParallel": lambda model: nn.DataParallel(averaged(compiled(model))),
    "a compiled model in DataParallel": lambda model: nn.DataParallel(compiled(model)),
    "a head around it": RewardModel,
    "a head around a compiled one, compiled": lambda model: compiled(RewardModel(compiled(model))),
    "a head that hides its prefix": ValueHead,
    "an average of a head around it": lambda model: averaged(RewardModel(model)),
}


def build_checkpointer(directory: Path, **settings: object) -> Checkpointer:
    rank = dist.get_rank() if dist.is_initialized() else 0
    kept = {"save_rng": False, "save_consolidated": "every", "collective_timeout_seconds": 60}
    return CheckpointingConfig(checkpoint_dir=directory, **{**kept, **settings}).build(rank, 0, 0)


def shard_units(model: nn.Module, *units: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def save_reward_model(root: str, base: str | None) -> bool:
    """Save a sharded model with a head around it; whether all came back."""
    directory = Path(root)

    def build(seed: int) -> nn.Module:
        inner = llama(seed, tie_word_embeddings=True)
        return shard_units(RewardModel(inner), inner.model.layers[0])

    model, again = build(1), build(2)
    keep_whole(model, directory / "whole.pt")
    with build_checkpointer(directory / "run", model_repo_id=base) as saver:
        saver.save(0, 1, model)
        saver.save(0, 2, model)
        saver.restore(again)
    pairs = zip(locals_of(model.parameters()), locals_of(again.parameters()), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def save_loose(root: str, is_equal: bool, settings: dict[str, object]) -> bool:
    """Save a model that is tied by its configuration, and in memory no more; whether all came back."""
    directory = Path(root)

    def build(seed: int) -> nn.Module:
        model = llama(seed, tie_word_embeddings=True)
        head = model.model.embed_tokens.weight.detach().clone()
        model.lm_head.weight = nn.Parameter(head if is_equal else head + 1)
        return shard_units(model, model.model.embed_tokens, model.lm_head)

    model, again = build(1), build(2)
    keep_whole(model, directory / "whole.pt")
    with build_checkpointer(directory / "run", **settings) as saver:
        saver.save(0, 1, model)
        saver.restore(again)
    pairs = zip(locals_of(model.parameters()), locals_of(again.parameters()), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
