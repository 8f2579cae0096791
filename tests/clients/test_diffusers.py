"""``diffusers_compatible`` exports from two ranks, opened by diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.clients.training import build_unet, denoised, save_unet
from tests.support.ranks import run

from shardwise import CheckpointingConfig

diffusers = pytest.importorskip("diffusers")

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"


def test_diffusers_opens_every_split_and_none_leaves_anything_behind(tmp_path: Path) -> None:
    run(2, save_unet, str(tmp_path), [8_000, 5_000_000, 30_000])
    counts = []
    for number in range(3):
        directory = tmp_path / f"export_{number}"
        model, info = diffusers.UNet2DModel.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), info
        whole = torch.load(tmp_path / f"whole_{number}.pt")
        state = model.state_dict()
        assert set(state) == set(whole)
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())
        for parameter in model.parameters():
            # They lie as in the file, and some processors sum in another order where memory is less aligned.
            parameter.data = parameter.data.clone()
        reference = build_unet()
        reference.load_state_dict(whole)
        with torch.no_grad():
            assert torch.equal(denoised(model.eval()), denoised(reference))
        names = sorted(path.name for path in directory.iterdir())
        weights = [name for name in names if name.endswith(".safetensors")]
        counts.append(len(weights))
        assert all(name.startswith(STEM) for name in weights)
        assert set(names) - set(weights) <= {"config.json", INDEX}
        assert {name for name in weights if f"-of-{len(weights):05d}." not in name} <= {f"{STEM}.safetensors"}
    assert counts[1] == 1
    assert counts[0] > counts[2] > 1


def test_diffusers_finds_both_names_of_a_shared_parameter(tmp_path: Path) -> None:
    model = build_unet()
    first = model.down_blocks[0].resnets[0]
    first.conv2.weight = first.conv1.weight
    config = CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated=True, diffusers_compatible=True)
    path = config.build().save(0, 1, model)
    assert path is not None
    opened, info = diffusers.UNet2DModel.from_pretrained(path / "model" / "consolidated", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
