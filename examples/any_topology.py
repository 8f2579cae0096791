"""Save on one topology, resume on another, and open the result with transformers.

torchrun --nproc-per-node 4 examples/any_topology.py /tmp/run fsdp
torchrun --nproc-per-node 2 examples/any_topology.py /tmp/run tp
python examples/any_topology.py /tmp/run single
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from shardwise import CheckpointingConfig


def spread(model: nn.Module, topology: str) -> nn.Module:
    """FSDP2 or tensor parallelism over all ranks; the engine is told of neither."""
    if topology == "single":
        return model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(topology,))
    for layer in model.model.layers:
        if topology == "tp":
            columns, rows = ColwiseParallel(), RowwiseParallel()
            plan = {"mlp.gate_proj": columns, "mlp.up_proj": columns, "mlp.down_proj": rows}
            parallelize_module(layer, mesh, plan)
        else:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh) if topology == "fsdp" else model


def main(directory: str, topology: str) -> None:
    """Resume if there is something to resume, train three steps, save."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    model = spread(Qwen3ForCausalLM(Qwen3Config(**small, num_attention_heads=4, num_key_value_heads=2)), topology)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    config = CheckpointingConfig(checkpoint_dir=directory, save_consolidated="every")
    rank = dist.get_rank() if dist.is_initialized() else 0
    with config.build() as checkpointer:
        resumed = checkpointer.restore(model, optimizer)
        first = (resumed.step or 0) if resumed else 0
        ids = torch.arange(32).view(2, 16)
        for step in range(first + 1, first + 4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                sys.stdout.write(f"{topology}: step {step}, loss {loss.item():.4f}\n")
        saved = checkpointer.save(step=first + 3, model=model, optimizer=optimizer)
    if rank == 0:
        opened = AutoModelForCausalLM.from_pretrained(saved / "model" / "consolidated")
        sys.stdout.write(f"transformers opens {saved.name}: loss {opened(input_ids=ids, labels=ids).loss.item():.4f}\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
