"""Small denoisers with LoRA, the pipelines around them, and what the ranks do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from tests.clients.adapters_whole import checkpointer
from tests.clients.lora import step, values
from tests.peft.models import randomise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import peft

WEIGHTS = "pytorch_lora_weights.safetensors"
MODEL_WEIGHTS = "diffusion_pytorch_model.safetensors"


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def sd3() -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )


def prefix_of(model: nn.Module) -> str:
    """The model's name in a pipeline."""
    return "unet" if isinstance(inner(model), UNet2DConditionModel) else "transformer"


def inner(model: nn.Module) -> Any:
    """The model without a ``PeftModel`` around it."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def pipeline(model: nn.Module) -> Any:
    """A pipeline of nothing but the denoiser."""
    # Here, since ranks need none, and importing one takes longer than their tests.
    from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

    if isinstance(model, UNet2DConditionModel):
        others = ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
        return StableDiffusionPipeline(**dict.fromkeys(others), unet=model, requires_safety_checker=False)
    others = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    if isinstance(model, FluxTransformer2DModel):
        return FluxPipeline(**dict.fromkeys(others), transformer=model)
    others += ("text_encoder_3", "tokenizer_3")
    return StableDiffusion3Pipeline(**dict.fromkeys(others), transformer=model)


def denoised(model: nn.Module) -> torch.Tensor:
    """What the model makes of one input."""
    model.eval()
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        if isinstance(inner(model), UNet2DConditionModel):
            return model(noise(1, 4, 8, 8), 3, noise(1, 5, 8)).sample
        if isinstance(inner(model), SD3Transformer2DModel):
            return model(noise(1, 4, 8, 8), noise(1, 5, 16), noise(1, 16), torch.tensor([3])).sample
        return model(
            hidden_states=noise(1, 16, 4),
            encoder_hidden_states=noise(1, 5, 32),
            pooled_projections=noise(1, 32),
            timestep=torch.tensor([0.3]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k"], **settings})


#: Name -> the denoiser, and the settings of its adapter.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "conv": (unet, lambda: lora(target_modules=["conv1", "to_q", "ff.net.0.proj"])),
    "dora": (unet, lambda: lora(target_modules=["conv1", "to_k"], use_dora=True)),
    "patterns": (sd3, lambda: lora(rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 9}, use_rslora=True)),
    "flux": (flux, lambda: lora(target_modules=["to_q", "ff.net.0.proj", "proj_out"], init_lora_weights="gaussian")),
    "bias": (sd3, lambda: lora(target_modules=".*to_q", lora_bias=True, layers_to_transform=None)),
    "layers": (sd3, lambda: lora(layers_to_transform=[1], layers_pattern="transformer_blocks", lora_dropout=0.1)),
    "head": (sd3, lambda: lora(modules_to_save=["proj_out"])),
    "flux head": (flux, lambda: lora(modules_to_save=["proj_out"])),
    "biases": (sd3, lambda: lora(bias="lora_only")),
    "lokr": (sd3, lambda: peft.LoKrConfig(r=4, alpha=6, target_modules=["to_q", "to_k"])),
}
#: Of these, most pipelines refuse the file, and the model's own method opens it.
BY_THE_MODEL_ALONE = ("head", "biases", "lokr")


def adapted(kind: str, seed: int, *, whole: bool = False) -> Any:
    """A denoiser with an adapter: put into it by ``add_adapter``, or in a ``PeftModel`` around it."""
    build, config = KINDS[kind]
    model = build()
    if whole:
        model = peft.get_peft_model(model, config())
    else:
        model.requires_grad_(False)
        model.add_adapter(config())
    randomise(model, seed)
    return model


def save_as_diffusers(model: nn.Module, directory: Path, name: str = "default", *, metadata: bool = True) -> Path:
    """What diffusers' training scripts do; the file."""
    from diffusers.training_utils import _collate_lora_metadata

    prefix = prefix_of(model)
    layers = peft.get_peft_model_state_dict(model, adapter_name=name)
    noted = _collate_lora_metadata({prefix: model}) if metadata and name == "default" else {}
    if metadata and name != "default":
        noted = {f"{prefix}_lora_adapter_metadata": model.peft_config[name].to_dict()}  # type: ignore[union-attr,index,operator]
    pipeline(model).save_lora_weights(directory, **{f"{prefix}_lora_layers": layers}, **noted)
    return directory / WEIGHTS


def save_merged(model: Any, directory: Path) -> Any:
    """The denoiser that peft, or diffusers where there is no ``PeftModel``, merges the adapter into, as it saves it."""
    if isinstance(model, peft.PeftModel):
        model = model.merge_and_unload()
    else:
        model.fuse_lora()
        model.unload_lora()
    model.save_pretrained(directory)
    return model


def rewritten(tensors: dict[str, torch.Tensor], file: Path) -> Path:
    """A file with these tensors that says nothing else."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return file


def sharded(model: Any) -> Any:
    """Under FSDP2, block by block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = [*model.down_blocks, *model.up_blocks] if prefix_of(model) == "unet" else list(model.transformer_blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def save_evaluated(kind: str, root: str, is_async: bool) -> None:
    """A step, an evaluation, a save; then restore into another model that has been evaluated as well."""
    directory = Path(root)
    model = sharded(adapted(kind, 1))
    optimizer = step(model)
    before = denoised(model)
    with checkpointer(directory, is_async=is_async, diffusers_compatible=True) as saver:
        saver.save(0, 1, model, optimizer)
    _reshard(model)
    saved = values(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(saved, directory / "values.pt")
    other = sharded(adapted(kind, 9))
    fresh = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1.0)
    assert not torch.equal(denoised(other), before)
    with checkpointer(directory, diffusers_compatible=True) as loader:
        assert loader.restore(other, fresh) is not None
    assert torch.equal(denoised(other), before)
    _reshard(other)
    restored = values(other, fresh)
    assert saved.keys() == restored.keys()
    for name, tensors in saved.items():
        assert all(torch.equal(a, b) for a, b in zip(restored[name], tensors, strict=True)), name
