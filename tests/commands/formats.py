"""Everything that a command may be pointed at, made small: each row puts it below a directory and gives its path."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.ops.checkpoints import saved
from tests.ops.damaged import cut, describe, flip, gpt2, save_dcp, shards_by_torch, stepped
from tests.sources.per_rank import save_fsdp1, save_fsdp2, trainer_directory, verl_directory
from tests.support.ranks import run

EXPORT = "model/consolidated/model.safetensors"
#: Written by ``tests/interop/make_deepspeed.py``.
DEEPSPEED = Path(__file__).parent.parent / "interop" / "deepspeed"
VERL = "model_world_size_2_rank_{}.pt"
Maker = Callable[[Path], Path]


@dataclass(frozen=True, slots=True)
class Row:
    """A thing to point at.

    Attributes:
        name: What it is.
        make: Makes it below an empty directory, and gives its path.
        damaged: Part of it is lost: nothing may say that it is whole, or make a model of it.
        ranks: It takes processes of its own to make.
        out: Where commands that write are to write, if not to a place that takes it.
    """

    name: str
    make: Maker
    damaged: bool = False
    ranks: bool = False
    out: Path | None = None


def _root(place: Path, **settings: object) -> Path:
    return saved(place / "root", (1, 2), **settings).parent


def _checkpoint(place: Path, **settings: object) -> Path:
    return saved(place / "root", **settings)


def a_model(place: Path, split: bool = False) -> Path:
    """What transformers writes."""
    model = gpt2()
    model.config.architectures = ["GPT2LMHeadModel"]
    model.save_pretrained(place / "hf", max_shard_size="10kB" if split else "1GB")
    return place / "hf"


def _split(place: Path) -> Path:
    return a_model(place, split=True)


def _snapshot(place: Path) -> Path:
    snapshot, blobs = place / "models--o--m" / "snapshots" / "abc", place / "models--o--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(a_model(place).iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (place / "hf").rmdir()
    return snapshot


def _described(directory: Path) -> Path:
    describe(directory)
    return directory


def _dcp(place: Path, optimizer: bool = False) -> Path:
    model = gpt2()
    state: dict[str, object] = dict(model.state_dict())
    if optimizer:
        state = {"model": state, "optimizer": stepped(model).state_dict(), "step": 3}
    return _described(save_dcp(state, place / "dcp"))


def _sharded(place: Path) -> Path:
    (place / "sharded").mkdir()
    run(2, shards_by_torch, str(place / "sharded"), 0)
    return _described(place / "sharded")


def _bin(place: Path) -> Path:
    (place / "bin").mkdir()
    torch.save(gpt2().state_dict(), place / "bin" / "pytorch_model.bin")
    return _described(place / "bin")


def _pt(place: Path) -> Path:
    torch.save({"model": gpt2().state_dict(), "epoch": 3}, place / "last.pt")
    return place / "last.pt"


def _lightning(place: Path) -> Path:
    """Its keys by Lightning's documentation, written by hand."""
    model = gpt2()
    state = {f"net.{name}": value for name, value in model.state_dict().items()}
    rest = {"epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.5.0", "lr_schedulers": [], "loops": {}}
    torch.save({"state_dict": state, "optimizer_states": [stepped(model).state_dict()], **rest}, place / "last.ckpt")
    return place / "last.ckpt"


def _verl(place: Path) -> Path:
    root = verl_directory(place / "actor")
    run(2, save_fsdp2, str(root), 1, {})
    return root


def _deepspeed(place: Path, stage: int = 3) -> Path:
    """What DeepSpeed itself wrote, with the configuration beside it."""
    root = Path(shutil.copytree(DEEPSPEED / f"zero{stage}", place / "deepspeed"))
    (root / "expected.safetensors").unlink()
    describe(root, n_layer=1, n_embd=6, vocab_size=17, n_positions=9)
    return root


def _fsdp1(place: Path) -> Path:
    (place / "ranks").mkdir()
    run(2, save_fsdp1, str(place / "ranks"), 1, {}, False)
    return _described(place / "ranks")


def _accelerate(place: Path) -> Path:
    """Its names by hand."""
    directory = place / "checkpoint-10"
    directory.mkdir()
    save_dcp({"model": gpt2().state_dict()}, directory / "pytorch_model_fsdp_0")
    return trainer_directory(_described(directory))


def an_adapter(place: Path) -> Path:
    """What peft writes, by hand."""
    directory = place / "adapter"
    directory.mkdir()
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, 16), name.format("B"): torch.zeros(48, 2)}
    save_file(factors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["h.0.attn.c_attn"],
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _pipeline(place: Path) -> Path:
    """What diffusers writes, by hand."""
    top = place / "pipeline"
    for name in ("unet", "vae"):
        (top / name).mkdir(parents=True)
        save_file({"w": torch.ones(4)}, top / name / "diffusion_pytorch_model.safetensors")
        (top / name / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (top / "model_index.json").write_text(json.dumps(index))
    return top


def _trainer(place: Path) -> Path:
    """Directories as transformers' Trainer names them."""
    for step in (500, 1000):
        (place / "output").mkdir(exist_ok=True)
        a_model(place).rename(place / "output" / f"checkpoint-{step}")
    return place / "output"


def _gguf(place: Path) -> Path:
    (place / "model-q4.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(64))
    return place / "model-q4.gguf"


def _foreign(place: Path) -> Path:
    (place / "keras").mkdir()
    (place / "keras" / "weights.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    (place / "keras" / "README.md").write_text("# weights")
    return place / "keras"


def _text(place: Path) -> Path:
    (place / "notes.txt").write_text("nothing of a model")
    return place / "notes.txt"


# --- damaged ---------------------------------------------------------------------------------------------------------


def _but(make: Maker, damage: Callable[[Path], object]) -> Maker:
    def made(place: Path) -> Path:
        path = make(place)
        damage(path)
        return path

    return made


def _header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


def _without_rank(path: Path) -> None:
    for file in path.rglob("*_rank_1_mp_rank_00_*_states.pt"):
        file.unlink()


# --- nothing of the kind ---------------------------------------------------------------------------------------------


def _empty(place: Path) -> Path:
    (place / "empty").mkdir()
    return place / "empty"


def _fifo(place: Path) -> Path:
    os.mkfifo(place / "pipe.safetensors")
    return place / "pipe.safetensors"


def _circle(place: Path) -> Path:
    (place / "circle").symlink_to("circle")
    return place / "circle"


def _dangling(place: Path) -> Path:
    (place / "link").symlink_to("absent")
    return place / "link"


def _nothing_in_it(place: Path) -> Path:
    (place / "model.safetensors").touch()
    return place / "model.safetensors"


def _huge(place: Path) -> Path:
    directory = _described(place / "huge")
    (directory / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    os.truncate(directory / "model.safetensors", 2**40)  # sparse
    return directory


def _linked(place: Path) -> Path:
    _root(place)
    (place / "link").symlink_to("root")
    return place / "link"


def _interrupted(place: Path) -> Path:
    root = _checkpoint(place).parent
    (root / "epoch_0_step_1").rename(root / ".saving-epoch_0_step_3")
    for name in ("LATEST", "LOWEST_VAL"):
        (root / name).unlink()
    return root / ".saving-epoch_0_step_3"


def _without_files(place: Path) -> Path:
    path = _checkpoint(place)
    shutil.rmtree(path / "model")
    return path


ROWS = (
    Row("a root", _root),
    Row("a root, through a link", _linked),
    Row("a checkpoint with an export", _checkpoint),
    Row("a checkpoint of shards", lambda place: _checkpoint(place, save_consolidated="false")),
    Row(
        "a checkpoint of torch_save",
        lambda place: _checkpoint(place, save_consolidated="false", model_save_format="torch_save"),
    ),
    Row("its optim/", lambda place: _checkpoint(place) / "optim"),
    Row("a Hugging Face directory", a_model),
    Row("a Hugging Face directory, several files", _split),
    Row("a hub cache's snapshot", _snapshot),
    Row("a safetensors file", lambda place: a_model(place) / "model.safetensors"),
    Row("DCP, bare", _dcp),
    Row("DCP with an optimizer", lambda place: _dcp(place, optimizer=True)),
    Row("torch's sharded Hugging Face files", _sharded, ranks=True),
    Row("a directory with a .bin", _bin),
    Row("a .pt, wrapped", _pt),
    Row("Lightning's .ckpt", _lightning),
    Row("verl's ranks", _verl, ranks=True),
    Row("DeepSpeed, ZeRO-2", lambda place: _deepspeed(place, 2)),
    Row("DeepSpeed, ZeRO-3", _deepspeed),
    Row("FSDP1's ranks", _fsdp1, ranks=True),
    Row("accelerate's FSDP directory", _accelerate),
    Row("an adapter", an_adapter),
    Row("a diffusers pipeline", _pipeline),
    Row("a GGUF file", _gguf),
    Row("a directory of Keras", _foreign),
    Row("a text file", _text),
    Row("export cut short", _but(_checkpoint, lambda p: cut(p / EXPORT, 100)), damaged=True),
    Row("export with one bit changed", _but(_checkpoint, lambda p: flip(p / EXPORT, 100_000)), damaged=True),
    Row("checkpoint without its model's files", _without_files, damaged=True),
    Row("manifest cut short", _but(_checkpoint, lambda p: cut(p / "manifest.json", 100)), damaged=True),
    Row("Hugging Face file cut short", _but(a_model, lambda p: cut(p / "model.safetensors", 10)), damaged=True),
    Row(
        "Hugging Face file with a broken header",
        _but(a_model, lambda p: _header(p / "model.safetensors")),
        damaged=True,
    ),
    Row("one of several files absent", _but(_split, lambda p: next(p.glob("*-00002-of*")).unlink()), damaged=True),
    Row("DCP's file cut short", _but(_dcp, lambda p: cut(p / "__0_0.distcp", 3000)), damaged=True),
    Row("DCP's file absent", _but(_dcp, lambda p: (p / "__0_0.distcp").unlink()), damaged=True),
    Row("DCP's .metadata cut short", _but(_dcp, lambda p: cut(p / ".metadata", 100)), damaged=True),
    Row("DCP's .metadata absent", _but(_dcp, lambda p: (p / ".metadata").unlink()), damaged=True),
    Row(".bin cut short", _but(_bin, lambda p: cut(p / "pytorch_model.bin", 2000)), damaged=True),
    Row("a rank's file of verl absent", _but(_verl, lambda p: (p / VERL.format(1)).unlink()), damaged=True, ranks=True),
    Row("a rank's file of DeepSpeed absent", _but(_deepspeed, _without_rank), damaged=True),
    Row("an empty .safetensors file", _nothing_in_it, damaged=True),
    Row("a header that claims to be huge", _huge, damaged=True),
    Row("an interrupted save", _interrupted, damaged=True),
    Row("a root of interrupted saves alone", lambda place: _interrupted(place).parent),
    Row("a directory of settings alone", lambda place: _described(place / "settings")),
    Row("a directory of runs, with roots below", lambda place: _root(place / "runs").parent),
    Row("a Trainer's directory", _trainer),
    Row("a place that takes nothing", lambda place: _checkpoint(place, save_consolidated="false"), out=Path("/sys")),
    Row("an empty directory", _empty),
    Row("nothing", lambda place: place / "absent"),
    Row("a FIFO", _fifo),
    Row("a link in a circle", _circle),
    Row("a link to nothing", _dangling),
)
