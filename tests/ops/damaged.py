"""Checkpoints of several makers, small, and what becomes of files."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel


def gpt2(seed: int = 0, **changes: object) -> GPT2LMHeadModel:
    """A model of a few thousand parameters, its head tied to its embedding."""
    torch.manual_seed(seed)
    settings = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**{**settings, **ends, **changes})).eval()  # type: ignore[arg-type]


def describe(directory: Path, **changes: object) -> None:
    """Put the configuration of such a model there, which names its class."""
    config = gpt2(**changes).config  # type: ignore[arg-type]
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(directory)


def logits(model: nn.Module) -> torch.Tensor:
    """What a model makes of a few tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(8).view(1, 8)).logits
    return found


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has taken a step."""
    made = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return made


def save_dcp(state: dict[str, object], directory: Path) -> Path:
    """Save with DCP itself, by this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(directory))
    return directory


def shards_by_torch(directory: str, seed: int) -> None:
    """On every rank: save a GPT-2, cut along its first dimension, with torch's Hugging Face writer."""
    model = gpt2(seed)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    state = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in model.state_dict().items()}
    state.pop("lm_head.weight")
    writer = HuggingFaceStorageWriter(directory, save_distributed=True)
    dcp.save(state, storage_writer=writer)


def flip(path: Path, offset: int) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def cut(path: Path, nbytes: int) -> None:
    """Take bytes off the end."""
    os.truncate(path, path.stat().st_size - nbytes)


def command(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and what is printed, of the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "shardwise", *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def same_logits(directory: Path, model: PreTrainedModel) -> bool:
    """Whether transformers opens a directory as this model, with nothing missing and nothing left over."""
    opened, told = type(model).from_pretrained(directory, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return torch.equal(logits(opened.eval()), logits(model))
