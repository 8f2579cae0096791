"""Train on two ranks, kill a save, resume on four ranks, open the result with transformers: the test to read first.

It uses shardwise as a training program does. Only `run`, which starts ranks, and `Killed` belong to tests.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from tests.support.ranks import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.ops.verify import verify

TOKENS = torch.arange(24).view(2, 12)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


class Killed(LocalStorage):
    """The local file system, on which this process dies at its fifth write: in the middle of a file's tensors."""

    writes = 0

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        self.writes += 1
        if self.writes == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(handle, data, offset)


def settings(root: Path) -> CheckpointingConfig:
    # "every": each checkpoint holds a Hugging Face model, which is also what a run resumes from.
    return CheckpointingConfig(checkpoint_dir=str(root), save_consolidated="every")


def build() -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """A small Llama, cut over however many ranks there are, and its optimizer. Nothing here is shardwise's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(checkpointer: Checkpointer, last: int) -> dict[str, torch.Tensor]:
    """The training loop: resume where there is something to resume from, and save after every step."""
    model, optimizer = build()
    resumed = checkpointer.restore(model, optimizer)  # in place; None in a new run
    for step in range(resumed.step + 1 if resumed else 1, last + 1):
        # Every rank sees the same data, so that the mean of the gradients is the same to the bit on 2 and on 4 ranks.
        model(input_ids=(TOKENS + step) % 64, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.save(step=step, model=model, optimizer=optimizer)
    return everything(model, optimizer)


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All that training has changed, gathered for the comparison, and what the model answers."""
    found = {"logits": model(input_ids=TOKENS).logits.detach()}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for kind, tensor in {"": parameter.detach(), **state}.items():
            found[f"{name} {kind}"] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def train_undisturbed(root: Path) -> dict[str, torch.Tensor]:
    with settings(root).build() as checkpointer:
        return train(checkpointer, last=4)


def train_two_steps(root: Path) -> None:
    with settings(root).build() as checkpointer:
        train(checkpointer, last=2)


def die_saving_step_three(root: Path) -> None:
    # `Checkpointer` is what `build()` makes; made by hand it takes another storage, here one that kills rank 0.
    storage = Killed() if torch.distributed.get_rank() == 0 else LocalStorage()
    train(Checkpointer(settings(root), storage=storage), last=3)


def test_save_kill_resume_on_other_ranks_and_open(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    wanted = run(2, train_undisturbed, whole)[0]  # four steps on two ranks: what the other run has to end with
    run(2, train_two_steps, broken)
    with pytest.raises(RuntimeError, match="rank 0 died"):  # no handler, no clean-up; the other rank is ended too
        run(2, die_saving_step_three, broken)

    # What was being written has a name of its own, from which nothing resumes. Step 2 is as it was.
    assert (broken / ".saving-epoch_0_step_3" / "model").is_dir()
    with settings(broken).build() as checkpointer:
        assert [info.step for info in checkpointer.checkpoints()] == [1, 2]
        assert checkpointer.latest_step() == 2
    assert verify(broken / "LATEST").status == "whole"  # every byte compared with the digests in the manifest

    # Four ranks go on from step 2: every parameter and every state of the optimizer ends as without the interruption.
    for found in run(4, train_undisturbed, broken):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    assert not (broken / ".saving-epoch_0_step_3").exists()  # the first save of the next run has removed it

    # The checkpoint is the model. transformers opens it as it is, and it answers as the one that was trained.
    opened = LlamaForCausalLM.from_pretrained(broken / "LATEST" / "model" / "consolidated")
    assert torch.equal(opened(input_ids=TOKENS).logits.detach(), wanted["logits"])
