"""Runs of torchtitan's own Trainer on the CPU, in processes of their own, with the configuration of the how-to.

torchtitan takes CUDA for granted: `on_cpu` puts the CPU in its place before torchtitan is imported, gives torch the
function ``set_timeout`` that torchtitan 0.3.0 calls and torch 2.13 lacks, and has FSDP2 reduce by sums, since gloo has
nothing else; `_fit` takes torchtitan's attention without masks, the only one that has a backward pass on the CPU. All
else is torchtitan's and shardwise's own code.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests.integrations.runs import SECONDS, die_when_opening
from tests.support.ranks import fresh
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        folder: Where the script, its assets and its output are.
        script: The script's name.
        steps: It ends after so many.
        world: Number of ranks.
        tp: So many are tensor-parallel; over the others FSDP2 shards.
        fused: Whether q, k and v are one tensor, as torchtitan has it.
        settings: Further settings of the checkpointer.
        killed_in: Rank 0 dies when it opens a file of tensors for this checkpoint.
    """

    folder: Path
    script: str = "new.py"
    steps: int = 6
    world: int = 1
    tp: int = 1
    fused: bool = True
    settings: tuple[tuple[str, object], ...] = ()
    killed_in: str = ""


def on_cpu() -> None:
    """Put the CPU in the place of CUDA."""
    import torchtitan.tools.utils as utils

    def nothing(*args: object, **options: object) -> None: ...

    utils.device_type = "cpu"
    utils.device_module = SimpleNamespace(
        set_device=nothing,
        synchronize=nothing,
        empty_cache=nothing,
        reset_peak_memory_stats=nothing,
        current_device=lambda: 0,
        get_device_name=lambda device: "cpu",
        get_device_properties=lambda device: SimpleNamespace(total_memory=2**30),
        memory_stats=lambda device: {},
    )
    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = nothing
    divide = FSDPModule.set_gradient_divide_factor

    def divide_apart(module: FSDPModule, factor: float) -> None:
        """Also the reduction is a sum, which gloo has; with 1.0 nothing is left to divide."""
        divide(module, factor)
        module.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = divide_apart  # type: ignore[method-assign]


def make_assets(directory: Path) -> None:
    """A tokenizer, the configuration that Hugging Face has for torchtitan's ``debugmodel``, and some text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig

    words = [f"w{number}" for number in range(100)]
    table = {word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (directory / "text").mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    rows = [{"text": " ".join(words[(n * 7 + place * (n % 5 + 1)) % 100] for place in range(50))} for n in range(100)]
    (directory / "text" / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    rope = {"rope_type": "llama3", "rope_theta": 500000, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=2048,
        rms_norm_eps=1e-5,
        rope_parameters=rope | {"original_max_position_embeddings": 8192},
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)


def train(run: Run) -> tuple[list[int], dict[int, float], str]:
    """Train; returns exit codes, the losses by step, and what was printed as an error."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> int:
        return fresh(_rank, run, number, port, output=run.folder / f"rank-{number}", seconds=SECONDS)

    with ThreadPoolExecutor(run.world) as pool:
        codes = list(pool.map(rank, range(run.world)))
    errors = "\n".join((run.folder / f"rank-{number}.err").read_text()[-3000:] for number in range(run.world))
    said = (run.folder / f"rank-{run.world - 1}").read_text().splitlines()  # the last stage of a pipeline
    losses = dict(json.loads(line) for line in said if line.startswith("["))
    return codes, losses, errors


def _rank(run: Run, rank: int, port: int) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.world, "LOCAL_WORLD_SIZE": run.world}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "HF_HOME": str(run.folder / f"home-{rank}")}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.chdir(run.folder)
    if run.killed_in and rank == 0:
        die_when_opening(f".saving-{run.killed_in}/model/")
    on_cpu()
    config = runpy.run_path(run.script)["my_llama"]()
    _fit(config, run)
    trainer = config.build()

    def log(step: int, loss: float, *others: object, **named: object) -> None:
        print(json.dumps([step, loss]), flush=True)

    trainer.metrics_processor.log = log
    trainer.train()
    if rank == 0 and run.world == 1:
        tokens = torch.arange(32).reshape(1, 32)
        with torch.no_grad():
            torch.save(trainer.model_parts[0](tokens), "logits.pt")
    trainer.close()
    torch.distributed.destroy_process_group()


def _fit(config: Any, run: Run) -> None:
    """What the CPU and the run need."""
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_gqa_config

    for layer in config.model_spec.model.layers:
        had = layer.attention
        layer.attention = make_gqa_config(
            dim=had.dim,
            n_heads=had.n_heads,
            n_kv_heads=had.n_kv_heads,
            wqkv_param_init={"weight": torch.nn.init.xavier_normal_},
            wo_param_init=had.wo.param_init,
            inner_attention=ScaledDotProductAttention.Config(),
            fuse_qkv=run.fused,
            rope=had.rope,
        )
    config.training.disable_cuda_graphs = True
    config.training.mixed_precision_param = "float32"
    config.training.steps = run.steps
    config.lr_scheduler.total_steps = 6
    config.training.global_batch_size = 4
    config.training.local_batch_size = 2
    config.parallelism.tensor_parallel_degree = run.tp
    config.parallelism.spmd_backend = "partial_dtensor"
    config.debug.seed = 0
    for name, value in run.settings:
        setattr(config.checkpoint, name, value)
