"""What the ranks do in these tests: shard a model, train it for a step, and save it through a `Checkpointer`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tests.clients.families import FAMILIES, build, tokenizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardwise import Checkpointer, CheckpointingConfig

EXPORT = Path("model/consolidated")


def shard(model: nn.Module) -> nn.Module:
    """FSDP2 over all ranks: each layer, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in (layer for each in lists for layer in each if not kinds or type(layer).__name__ in kinds):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def trained(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
    """Take one step, so that what is saved is not what was built."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    out = model(**inputs)
    logits = getattr(out, "logits", None)
    (out.last_hidden_state if logits is None else logits).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def keep_whole(model: nn.Module, path: Path) -> None:
    """Put the model's full weights aside, gathered by torch: what every client is compared with."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save({name: tensor.clone() for name, tensor in state.items()}, path)
    dist.barrier()


def checkpointer(directory: Path, base: str | Path | None = None, **settings: object) -> Checkpointer:
    """One for this rank, which exports with every save."""
    config = CheckpointingConfig(
        checkpoint_dir=directory,
        model_repo_id=None if base is None else str(base),
        **{"save_consolidated": "every", "save_rng": False, "collective_timeout_seconds": 60, **settings},
    )
    return config.build(dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0)


def locals_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank has of each."""
    return [getattr(t, "_local_tensor", t).detach().clone() for t in tensors]


def open_base(name: str, base: str) -> nn.Module:
    """The model as transformers loads it from a directory."""
    import transformers

    opener = getattr(transformers, FAMILIES[name].opener)
    model: nn.Module = opener.from_pretrained(base).eval()
    return model


def save_both_ways(name: str, root: str, base: str) -> bool:
    """`save_model` of a model without a base, and `save` and `restore` of one with a base; whether it came back."""
    directory, inputs = Path(root), FAMILIES[name].inputs()
    fresh = shard(build(name))
    trained(fresh, inputs)
    keep_whole(fresh, directory / "fresh.pt")
    with checkpointer(directory) as without:
        without.save_model(fresh, directory / "fresh", tokenizer=tokenizer())

    tuned = shard(open_base(name, base))
    optimizer = trained(tuned, inputs)
    keep_whole(tuned, directory / "tuned.pt")
    again = shard(build(name, seed=5))
    other = torch.optim.AdamW(again.parameters(), lr=1.0)
    with checkpointer(directory / "run", base) as with_base:
        with_base.save(0, 1, tuned, optimizer)
        with_base.restore(again, other)
    pairs = list(zip(locals_of(tuned.parameters()), locals_of(again.parameters()), strict=True))
    for old, new in zip(tuned.parameters(), again.parameters(), strict=True):
        if old in optimizer.state:
            pairs += zip(locals_of(optimizer.state[old].values()), locals_of(other.state[new].values()), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def save_custom(root: str, base: str) -> list[str]:
    """Train and save a model whose code came with its base; the names of its files' parameters."""
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    directory = Path(root)
    # Each process has a module cache of its own: two that fill one race.
    shared = dynamic_module_utils.HF_MODULES_CACHE
    dynamic_module_utils.HF_MODULES_CACHE = str(directory / f"modules_{dist.get_rank()}")
    try:
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    finally:
        dynamic_module_utils.HF_MODULES_CACHE = shared
    shard(model)
    optimizer = trained(model, FAMILIES["llama"].inputs())
    keep_whole(model, directory / "whole.pt")
    with checkpointer(directory / "run", base) as saver:
        saver.save(0, 1, model, optimizer, tokenizer=tokenizer())
    return sorted(name for name, _ in model.named_parameters())


def save_encoder(root: str, base: str) -> None:
    """Fine-tune a real encoder for a step and save it."""
    from transformers import AutoModel

    directory = Path(root)
    model = AutoModel.from_pretrained(base)
    shard(model)
    before = model.embeddings.LayerNorm.weight.full_tensor().clone()
    trained(model, FAMILIES["encoder"].inputs())
    assert not torch.equal(before, model.embeddings.LayerNorm.weight.full_tensor())
    keep_whole(model, directory / "whole.pt")
    with checkpointer(directory, base) as saver:
        saver.save_model(model, directory)


def build_unet() -> nn.Module:
    """A small real model of diffusers."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model: nn.Module = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model.eval()


def denoised(model: nn.Module) -> torch.Tensor:
    """What a diffusion model makes of one image."""
    return model(torch.linspace(-1, 1, 64).view(1, 1, 8, 8), 3).sample


def save_unet(root: str, splits: list[int]) -> None:
    """Train, and save one place several times, each time under another split."""
    directory = Path(root)
    model = build_unet()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for number, largest in enumerate(splits):
        denoised(model).square().mean().backward()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer.step()
        optimizer.zero_grad()
        keep_whole(model, directory / f"whole_{number}.pt")
        with checkpointer(directory, diffusers_compatible=True, max_file_bytes=largest) as saver:
            saver.save_model(model, directory / "saved")
        if dist.get_rank() == 0:
            shutil.copytree(directory / "saved" / EXPORT, directory / f"export_{number}")
        dist.barrier()


def save_for_v4(root: str, base: str | None, name: str) -> None:
    """Train and save for readers of the previous generation too."""
    directory = Path(root)
    model = shard(build(name) if base is None else open_base(name, base))
    trained(model, FAMILIES[name].inputs())
    keep_whole(model, directory / "whole.pt")
    with checkpointer(directory, base, v4_compatible=True) as saver:
        saver.save_model(model, directory, tokenizer=tokenizer())
