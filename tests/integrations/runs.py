"""Runs of a `ShardwiseTrainer` in processes of their own: small random Llamas on random tokens, on one or two ranks.

accelerate turns FSDP2 on only where there are accelerators. `OnCpu` takes its FSDP2 path on the CPU, with gloo; all
else is accelerate's, transformers' and shardwise's own code.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from tests.support.ranks import fresh
from torch.distributed.tensor import DTensor

SECONDS = 240
Row = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        directory: The ``output_dir``.
        steps: It ends after so many.
        world: Number of ranks.
        fsdp: Sharded with FSDP2; otherwise several ranks train with DistributedDataParallel.
        lora: An adapter is trained.
        is_async: Checkpoints are written in the background.
        batch: Samples of one rank in a step.
        accumulate: Batches in a step.
        workers: Processes that make batches; batches are then augmented.
        augment: Tokens are replaced at random when batches are made.
        replay: ``replay_batches``.
        save_every: Steps between checkpoints.
        limit: ``save_total_limit``.
        dropout: How much of it, in attention and in adapters.
        killed_in: Rank 0 dies when it opens a file of tensors for this checkpoint.
        options: Further ``TrainingArguments``.
    """

    directory: Path
    steps: int = 12
    world: int = 1
    fsdp: bool = False
    lora: bool = False
    is_async: bool = False
    batch: int = 4
    accumulate: int = 1
    workers: int = 0
    augment: bool = False
    replay: bool = True
    save_every: int = 3
    limit: int | None = 2
    dropout: float = 0.1
    killed_in: str = ""
    options: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Result:
    """What became of it, as rank 0 says.

    Attributes:
        losses: By step, of this run's steps.
        weights: Digest of everything that was trained.
        best: Name of the best checkpoint.
        started: The step that it went on from.
    """

    losses: dict[int, float]
    weights: str
    best: str
    started: int


def result(run: Run, tmp_path: Path) -> Result:
    """Train, and return what came of it."""
    codes = train(run, tmp_path)
    said = [(tmp_path / f"rank-{rank}").read_text() for rank in range(run.world)]
    assert codes == [0] * run.world, f"{codes}: " + errors_of(run.world, tmp_path)
    told = json.loads(said[0].splitlines()[-1])
    losses = {int(step): loss for step, loss in told["losses"].items() if int(step) > told["started"]}
    return Result(losses, told["weights"], told["best"], told["started"])


def train(run: Run, tmp_path: Path) -> list[int]:
    """Train, and return the ranks' exit codes."""
    return launch(_rank, run, run.world, tmp_path)


def launch(function: Callable[[Any, int, int], None], run: object, world: int, tmp_path: Path) -> list[int]:
    """Call ``function(run, rank, port)`` in a process for each rank, and return their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> int:
        return fresh(function, run, number, port, output=tmp_path / f"rank-{number}", seconds=SECONDS)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


def errors_of(world: int, tmp_path: Path) -> str:
    """The end of what the ranks have said before they failed."""
    return "\n".join((tmp_path / f"rank-{rank}.err").read_text()[-3000:] for rank in range(world))


def announce(rank: int, world: int, port: int) -> None:
    """Put into the environment what `torchrun` does."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def die_when_opening(part: str) -> None:
    """End this process by SIGKILL when it opens a file of tensors whose path has ``part`` in it."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and part in str(args[0]) and str(args[0]).endswith(".safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def rows(number: int, seed: int) -> list[Row]:
    """Random tokens."""
    ids = torch.randint(128, (number, 16), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def augmented(samples: Sequence[Row]) -> Row:
    """A batch in which some tokens are replaced, by draws of torch and of Python."""
    ids = torch.stack([sample["input_ids"] for sample in samples])
    ids = torch.where(torch.rand(ids.shape) < 0.2, random.randrange(128), ids)
    return {"input_ids": ids, "labels": ids}


def model(*, lora: bool = False, dropout: float = 0.1) -> torch.nn.Module:
    """A Llama with random values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": dropout}
    made = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    if not lora:
        return made
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="CAUSAL_LM")
    return cast(torch.nn.Module, get_peft_model(made, config))


def _rank(run: Run, rank: int, port: int) -> None:
    if run.world > 1 or run.fsdp:
        announce(rank, run.world, port)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    faulthandler.dump_traceback_later(SECONDS - 20)  # says where a rank that is killed for its time was
    multiprocessing.current_process().daemon = False  # which may not have workers
    if run.killed_in and rank == 0:
        die_when_opening(f".saving-{run.killed_in}/model/")
    from transformers import TrainingArguments

    from shardwise import CheckpointingConfig
    from shardwise.integrations.transformers import ShardwiseTrainer, get_last_checkpoint

    class OnCpu(ShardwiseTrainer):
        replay_batches = run.replay

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if self.args.fsdp:
                from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

                state = self.accelerator.state
                state.distributed_type = DistributedType.FSDP
                state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
                self.is_fsdp_enabled = True

    args = TrainingArguments(
        output_dir=str(run.directory),
        learning_rate=2e-3,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulate,
        num_train_epochs=3,
        max_steps=run.steps,
        dataloader_num_workers=run.workers,
        save_steps=run.save_every,
        save_total_limit=run.limit,
        logging_steps=1,
        fsdp=run.fsdp,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **dict(run.options),
    )
    trainer = OnCpu(
        model=model(lora=run.lora, dropout=run.dropout),
        args=args,
        train_dataset=rows(40, 1),
        eval_dataset=rows(8, 2),
        data_collator=augmented if run.augment else None,
        checkpointing=CheckpointingConfig(is_async=run.is_async, save_consolidated="every"),
    )
    last = get_last_checkpoint(args.output_dir)
    started = 0 if last is None else int(last.rpartition("_")[2])
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    best = Path(trainer.state.best_model_checkpoint or "").name
    print(json.dumps({"losses": losses, "weights": digest(trainer.model), "best": best, "started": started}))
    if dist.is_initialized():
        dist.destroy_process_group()


def opens_adapter(directory: Path) -> None:
    """peft opens the adapter."""
    from peft.tuners.lora import LoraLayer

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model().to(torch.float32), directory)
    assert any(isinstance(module, LoraLayer) for module in adapted.modules())


def digest(module: torch.nn.Module) -> str:
    """One number for everything that is trained. All ranks call."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            hasher.update(name.encode() + whole.detach().numpy().tobytes())
    return hasher.hexdigest()


def run_pages_script(
    page: str, say: Callable[[Path, str], None], killed_in: str, tmp_path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a how-to's script as it was; then, below ``new``, as it is changed: killed in a save, and resumed.

    Args:
        page: The how-to; its change has at most 8 lines.
        say: Runs ``train.py`` in a directory, dies when it opens a file of tensors whose path has the second argument
            in it, and prints its result as JSON in the last line.
        killed_in: That part of a path, for the run that is killed.
        tmp_path: Where the scripts run.

    Returns:
        What the original and the resumed run printed.
    """
    old, new, lines = scripts(page)
    assert lines <= 8
    told: dict[str, dict[str, Any]] = {}
    for name, text, part, code in (("old", old, "", 0), ("new", new, killed_in, -signal.SIGKILL), ("new", new, "", 0)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "train.py").write_text(text)
        output = tmp_path / f"{name}.out"
        errors = output.with_name(output.name + ".err")
        assert fresh(say, tmp_path / name, part, output=output, seconds=200) == code, errors.read_text()[-3000:]
        if not part:
            told[name] = json.loads(output.read_text().splitlines()[-1])
    return told["old"], told["new"]


def scripts(page: str) -> tuple[str, str, int]:
    """A how-to's script as it was and as it is changed, and the number of lines in the change."""
    text = (Path(__file__).parents[2] / "docs" / "howto" / page).read_text()
    block = text.partition("```diff\n")[2].partition("```")[0].splitlines(keepends=True)
    old = "".join(line[1:] for line in block if line[0] in " -")
    new = "".join(line[1:] for line in block if line[0] in " +")
    return old, new, sum(line[0] in "+-" for line in block)
