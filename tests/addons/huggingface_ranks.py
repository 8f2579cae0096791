"""What each rank of the two-rank tests of the metadata hooks does. Run by `test_huggingface_ranks`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM, dynamic_module_utils

from shardwise.addons import ConsolidatedHFAddon, _iter_custom_code_classes
from shardwise.comm import Group
from shardwise.errors import ShardwiseError

WORLD = 2


@dataclass
class Parts:
    model: list[nn.Module]


class FSDPNamedByItsAuthor(LlamaForCausalLM):
    pass


class Broken:
    def __init__(self, root: Path) -> None:
        self.root = root

    def save_pretrained(self, save_directory: str) -> None:
        (self.root / f"tried_{dist.get_rank()}").touch()
        raise ValueError("cannot serialise")


def build(scenario: str, top: Path) -> nn.Module:
    if scenario == "custom":
        config = AutoConfig.from_pretrained(top / "base", trust_remote_code=True)
        return AutoModel.from_config(config, trust_remote_code=True)
    if scenario == "diffusers":
        from diffusers import AutoencoderKL

        return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**sizes, vocab_size=40)
    config.quantization_config = {"quant_method": "fp8"}
    return (FSDPNamedByItsAuthor if scenario == "prefix" else LlamaForCausalLM)(config)


def play(scenario: str, top: Path, mesh: DeviceMesh) -> None:
    rank = dist.get_rank()
    root = top / scenario
    root.mkdir(exist_ok=True)
    model = build(scenario, top).to(torch.bfloat16)
    if scenario == "stages":
        # Rank 1's stage is quantized, rank 0's is not.
        if rank == 1:
            packed = torch.zeros(40, 16).to(torch.float8_e4m3fn)
            model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
    else:
        fully_shard(model, mesh=mesh)

    kwargs = {
        "model_state": Parts([model]),
        "hf_metadata_dir": str(root / "model" / ".hf_metadata"),
        "consolidated_path": str(root / "model" / "consolidated"),
        "tokenizer": Broken(root) if scenario == "broken" else None,
        "diffusers_compatible": scenario == "diffusers",
        "group": Group.current() if scenario == "plain" else None,
    }
    noted = dict(model.config) if scenario == "diffusers" else None
    classes = [found.__name__ for found in _iter_custom_code_classes(model)]
    seen: dict[str, object] = {"rank": rank, "error": None, "classes": classes}
    try:
        addon = ConsolidatedHFAddon()
        addon.pre_save(**kwargs)
        seen["written_when_left"] = (root / "model" / ".hf_metadata" / "config.json").is_file()
        addon.post_save(**kwargs)
        seen["config_is_unchanged"] = noted is None or dict(model.config) == noted
        seen["copied_when_left"] = (root / "model" / "consolidated" / "config.json").is_file()
    except ShardwiseError as error:
        seen["error"] = [type(error).__name__, str(error), error.rank]
    (root / f"seen_{rank}.json").write_text(json.dumps(seen))


def be(rank: int, top: Path, scenarios: Sequence[str]) -> None:
    """One rank."""
    store = dist.FileStore(str(top / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    # Each process has a module cache of its own: two that fill one race.
    dynamic_module_utils.HF_MODULES_CACHE = str(top / f"modules_{rank}")
    mesh = init_device_mesh("cpu", (WORLD,))
    for scenario in scenarios:
        play(scenario, top, mesh)
    dist.barrier()


def main(top: Path, scenarios: Sequence[str]) -> None:
    """Run the scenarios on two ranks, which are forked once everything is imported: that is what takes long."""
    import diffusers

    assert diffusers.AutoencoderKL is not None
    torch.set_num_threads(1)
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            be(rank, top, scenarios)
            code = 0
        except BaseException:  # noqa: BLE001 - shown by the parent's parent
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            # Now and then gloo aborts while the interpreter shuts down; what is tested is over by now.
            os._exit(code)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) != 0)
