"""The three runs whose checkpoints are kept in ``checkpoints/``: what they train, and what a restore has to give.

Every value is made from arithmetic that no release of torch changes: whole numbers, scaled. What a run's checkpoint
holds can so be computed anew, whichever machine and release wrote it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from shardwise import Checkpointer, CheckpointingConfig

STEP = 3


def numbered(tensor: torch.Tensor, start: int) -> torch.Tensor:
    """A tensor's shape and dtype with distinct values that are exact in bfloat16."""
    steps = torch.arange(start, start + tensor.numel()) % 127 - 63
    return (steps.to(torch.float32) / 64).to(tensor.dtype).reshape(tensor.shape)


def fill(model: nn.Module) -> None:
    """Give parameters known values, before anything is spread over ranks."""
    for index, tensor in enumerate(model.parameters()):
        tensor.data.copy_(numbered(tensor.data, index))


class Consumed:
    """What a loop counts: state of the run that is neither model nor optimizer."""

    def __init__(self, samples: int = 0) -> None:
        self.samples = samples

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples = state["samples"]


def llama() -> nn.Module:
    """A causal language model of transformers with tied embeddings, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def adapted() -> nn.Module:
    """The same model with LoRA, and a norm of the base unfrozen beside it."""
    import peft

    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


RUNS = {"export": llama, "shards": llama, "adapter": adapted}


def made(name: str, *, filled: bool) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Model, optimizer and scheduler of a run on this rank: as they were saved, or empty (zeros) for a restore."""
    model = RUNS[name]()
    if filled:
        fill(model)
    else:
        for tensor in model.parameters():
            tensor.data.zero_()
    whole = {key: value.detach().clone() for key, value in model.named_parameters()}
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        layers = (model.base_model.model if name == "adapter" else model).model.layers
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    if filled:
        _fill_state(model, optimizer, whole)
        for _ in range(STEP):
            scheduler.step()
    return model, optimizer, scheduler


def _fill_state(model: nn.Module, optimizer: torch.optim.Optimizer, whole: dict[str, torch.Tensor]) -> None:
    for index, (key, parameter) in enumerate(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        state = {"exp_avg": numbered(whole[key], index + 10), "exp_avg_sq": numbered(whole[key], index + 20).abs()}
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            state = {slot: distribute_tensor(value, mesh, placements) for slot, value in state.items()}
        optimizer.state[parameter] = {"step": torch.tensor(float(STEP)), **state}


def checkpointer(name: str, root: Path) -> Checkpointer:
    """The checkpointer of a run whose checkpoints are below ``root``."""
    settings = {
        "export": {"save_consolidated": "every"},
        "shards": {"save_consolidated": "false"},
        "adapter": {"is_peft": True, "allow_missing_base": True},
    }[name]
    rank = dist.get_rank() if dist.is_initialized() else 0
    config = CheckpointingConfig(checkpoint_dir=root / name, **settings)  # type: ignore[arg-type]
    return config.build(rank, 0, 0)


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of a model's parameters and optimizer, whole. A Llama's buffers are computed and not saved."""
    found = {key: value.detach() for key, value in model.named_parameters()}
    for key, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}.{slot}"] = value
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}
