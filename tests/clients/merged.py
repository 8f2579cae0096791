"""What the ranks do with adapters that are merged on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from tests.clients.lora import EXPERTS, LINEAR, spread, step, values
from tests.peft.models import causal, randomise
from tests.support.faults import FaultyStorage
from tests.support.peak import peak, reset_peak
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import Buffer, LocalStorage

#: Name -> family, and settings of LoRA or another method's configuration (class, settings).
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}),
    "rslora in bf16": ("qwen3-bf16", "LoraConfig", {"r": 4, "target_modules": LINEAR, "use_rslora": True}),
    "dora": ("qwen3", "LoraConfig", {"r": 4, "target_modules": [*LINEAR, "embed_tokens"], "use_dora": True}),
    "dora in bf16": ("llama-bf16", "LoraConfig", {"r": 4, "target_modules": LINEAR, "use_dora": True}),
    "experts": ("qwen3_moe", "LoraConfig", {"r": 4, "target_modules": LINEAR, "target_parameters": EXPERTS}),
    "columns": (
        "gpt2",
        "LoraConfig",
        {"r": 4, "target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "bias": ("qwen2", "LoraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "copies": ("llama", "LoraConfig", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "copies, tied": (
        "llama-tied",
        "LoraConfig",
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tied": ("llama-tied", "LoraConfig", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "both ends of a tie": ("llama-tied", "LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "tied factors": (
        "llama-tied",
        "LoraConfig",
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "tokens": ("llama-tied", "LoraConfig", {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
    "more": ("llama", "LoraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "AdaLoRA": ("llama", "AdaLoraConfig", {"init_r": 4, "total_step": 10, "target_modules": ["q_proj"]}),
    "BOFT": ("llama", "BOFTConfig", {"boft_block_size": 4, "target_modules": ["q_proj"]}),
    "FourierFT": ("llama", "FourierFTConfig", {"n_frequency": 10, "target_modules": ["q_proj"]}),
    "HRA": ("llama", "HRAConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "IA3": ("llama", "IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LN tuning": ("llama", "LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "LoHa": ("llama", "LoHaConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "LoKr": ("llama", "LoKrConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "OFT": ("llama", "OFTConfig", {"oft_block_size": 4, "target_modules": ["q_proj"]}),
    "RandLoRA": ("llama", "RandLoraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "SHiRA": ("llama", "ShiraConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "VBLoRA": (
        "llama",
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 4, "vector_length": 4, "target_modules": ["q_proj"]},
    ),
    "VeRA": ("llama", "VeraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
}


def adapted(name: str, seed: int = 1, base: nn.Module | None = None) -> nn.Module:
    """A model with an adapter that has been trained, the same in every process."""
    import peft

    family, method, settings = ADAPTERS[name]
    made: nn.Module = peft.get_peft_model(base or causal(family), getattr(peft, method)(**settings))
    if name == "more":
        for key, parameter in made.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in key)
    randomise(made, seed)
    return made


def checkpointer(root: Path, stage: int | None = None, **settings: object) -> Checkpointer:
    """One that merges with every save."""
    config = {"save_consolidated": "every", "export_merged": True, "collective_timeout_seconds": 60, **settings}
    return CheckpointingConfig(checkpoint_dir=root, is_peft=True, **config).build(pp_rank=stage)


def placed(model: nn.Module, how: str) -> nn.Module:
    """The model as this rank has it."""
    return DistributedDataParallel(model) if how == "ddp" else spread(model, how)


def save(name: str, how: str, root: str, settings: dict[str, object]) -> None:
    """A step and a save; what was trained is put aside, and restored into another model."""
    directory, rank = Path(root), dist.get_rank()
    stage = rank if how == "pipeline" else None
    model = placed(adapted(name), how)
    optimizer = step(model)
    saved = values(model, optimizer)
    torch.save(saved, directory / f"saved_{rank}.pt")
    with checkpointer(directory / "run", stage, **settings) as saver:
        saver.save(0, 1, [model], optimizer)
    assert all(torch.equal(a, b) for a, b in _pairs(values(model, optimizer), saved))
    other = placed(adapted(name, seed=9), how)
    fresh = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1.0)
    with checkpointer(directory / "run", stage, **settings) as loader:
        assert loader.restore([other], fresh) is not None
    assert all(torch.equal(a, b) for a, b in _pairs(values(other, fresh), saved))


def _pairs(ours: dict[str, list[torch.Tensor]], theirs: dict[str, list[torch.Tensor]]) -> list[tuple[Any, Any]]:
    assert ours.keys() == theirs.keys()
    return [pair for name in ours for pair in zip(ours[name], theirs[name], strict=True)]


#: Quantized bases by what they are quantized to -> settings of the LoRA over them.
OVER_QUANTIZED: dict[str, dict[str, Any]] = {
    "mxfp4": {"r": 4, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "fp8": {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"]},
}


def save_over_quantized(kind: str, root: str) -> None:
    """An adapter over a quantized base, which is dequantized as it is loaded onto the shards."""
    from tests.base.support import on_meta
    from transformers import AutoConfig, GptOssForCausalLM, LlamaForCausalLM

    import peft

    directory = Path(root)
    config = AutoConfig.from_pretrained(directory / "base")
    del config.quantization_config
    plain = on_meta({"mxfp4": GptOssForCausalLM, "fp8": LlamaForCausalLM}[kind], config, torch.bfloat16)
    with torch.device("meta"):
        model = peft.get_peft_model(plain, peft.LoraConfig(**OVER_QUANTIZED[kind]))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with checkpointer(directory / "run", model_repo_id=str(directory / "base")) as saver:
        saver.load_base_model(model, "cpu", None, str(directory / "base"))
        optimizer = step(model)
        torch.save(values(model, optimizer), directory / f"saved_{dist.get_rank()}.pt")
        saver.save(0, 1, model, optimizer)


#: How bitsandbytes quantizes a base as it is loaded -> its settings.
QUANTIZED_IN_MEMORY: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4, its scales quantized": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def quantized_in_memory(kind: str, base: Path) -> Any:
    """The base, with linear layers of bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**QUANTIZED_IN_MEMORY[kind])
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)


def over_quantized_in_memory(base: nn.Module, *, use_dora: bool = False) -> nn.Module:
    """An adapter on some of the linear layers, that has been trained."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], use_dora=use_dora)
    model: nn.Module = peft.get_peft_model(base, config)
    randomise(model, 1)
    return model


def save_over_quantized_in_memory(kind: str, how: str, root: str, use_dora: bool) -> None:
    """A step over a base that is quantized in memory, and a save; the model that trains stays as it is."""
    directory = Path(root)
    model = over_quantized_in_memory(quantized_in_memory(kind, directory / "base"), use_dora=use_dora)
    spread_out = placed(model, how) if how else model
    optimizer = step(spread_out)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, directory / "trained.pt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with checkpointer(directory / "run", model_repo_id=str(directory / "base")) as saver:
        saver.save(0, 1, spread_out, optimizer)
    after = model.state_dict()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    assert model.base_model.model.config.quantization_config is not None


def convolutions(*, use_dora: bool, seed: int = 1) -> nn.Module:
    """A network of plain convolutions with an adapter that has been trained."""
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, bias=False))
    made: nn.Module = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=use_dora, use_rslora=True)
    )
    randomise(made, seed)
    return made


def save_convolutions(root: str, use_dora: bool) -> None:
    """Save them in shards."""
    model = fully_shard(convolutions(use_dora=use_dora), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with checkpointer(Path(root)) as saver:
        saver.save(0, 1, model)


#: A module of this many MiB, so many of them.
WIDE_MIB, WIDE_LAYERS = 4, 24


def wide() -> nn.Module:
    """Many adapted layers, each much smaller than all of them."""
    import peft

    side = 1024
    assert side * side * 4 == WIDE_MIB * 2**20
    layers = nn.ModuleDict({f"layer{number}": nn.Linear(side, side, bias=False) for number in range(WIDE_LAYERS)})
    model: nn.Module = peft.get_peft_model(layers, peft.LoraConfig(r=2, target_modules=list(layers)))
    randomise(model, 1)
    return model


def memory_of_merging(root: str) -> tuple[int, int]:
    """By how much a save's peak grows with the merged export, and without it, in bytes."""
    model = fully_shard(wide(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    def grown(path: Path, **settings: object) -> int:
        with checkpointer(path, **settings) as saver:
            for step in (1, 2):  # the first one also loads code
                reset_peak()
                before = peak()
                saver.save(0, step, model)
        return peak() - before

    return grown(Path(root) / "merged"), grown(Path(root) / "adapter", export_merged=False)


class _KilledWriting(LocalStorage):
    """The process is killed by its first write into the merged export's files."""

    def __init__(self) -> None:
        self._merged: set[int] = set()

    def open(self, path: Path, *, writable: bool) -> int:
        handle = super().open(path, writable=writable)
        self._merged.discard(handle)
        if writable and path.parent.name == "consolidated" and path.suffix == ".safetensors":
            self._merged.add(handle)
        return handle

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        super().write(handle, data, offset)
        if handle in self._merged:
            os.kill(os.getpid(), signal.SIGKILL)


def save_until_killed(root: str) -> None:
    """A save that is published, then one that is cut off."""
    model = adapted("lora")
    optimizer = step(model)
    directory = Path(root)
    torch.save(values(model, optimizer), directory / "first.pt")
    with checkpointer(directory / "run") as saver:
        saver.save(0, 1, model, optimizer)
        step(model)
    config = saver.config
    with Checkpointer(config, storage=_KilledWriting()) as killed:
        killed.save(0, 2, model, optimizer)


def save_without_room(root: str, operation: str, rank: int, nth: int) -> None:
    """The file system refuses on one rank, while the merged export is written."""
    config = CheckpointingConfig(
        checkpoint_dir=root, is_peft=True, save_consolidated="every", export_merged=True, collective_timeout_seconds=60
    )
    storage = FaultyStorage(operation, rank, nth=nth, folder="consolidated")
    with Checkpointer(config, storage=storage) as saver:
        saver.save(0, 1, placed(adapted("lora"), "fsdp"))


def save_what_fails(root: str) -> None:
    """peft's merge fails on values, on the rank that computes: none of the ranks waits for another."""
    from peft.tuners.lora.layer import Linear

    class Failing(Linear):
        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            delta = super().get_delta_weight(adapter)
            if not delta.is_meta:
                raise RuntimeError("no memory for this")
            return delta

    model = adapted("lora")
    model.base_model.model.model.layers[1].mlp.up_proj.__class__ = Failing
    with checkpointer(Path(root)) as saver:
        saver.save(0, 1, placed(model, "fsdp"))
