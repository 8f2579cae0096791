"""Each wrapper of a model, and two around each other, with each use of it: one answer everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from tests.clients.training import EXPORT
from tests.clients.wrapped import build_checkpointer, llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import peft
from shardwise.errors import MisuseError

Wrap = Callable[[nn.Module], nn.Module]


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


#: Wrappers that add a prefix to names and nothing else.
PLAIN: dict[str, Wrap] = {
    "ddp": DistributedDataParallel,
    "dp": nn.DataParallel,
    "compiled": _compiled,
    "checkpointed": checkpoint_wrapper,
}
SINGLE: dict[str, Wrap] = PLAIN | {"averaged": AveragedModel}
#: DDP has hooks on the module inside it that no deep copy, which AveragedModel makes, can take along.
PAIRS = [(one, two) for one in SINGLE for two in SINGLE if one != two and (one, two) != ("averaged", "ddp")]
CASES = [
    *(pytest.param((name,), id=name) for name in SINGLE),
    *(pytest.param(pair, id=" around ".join(pair), marks=pytest.mark.slow) for pair in PAIRS),
]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "ranks"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def around(names: tuple[str, ...], model: nn.Module) -> nn.Module:
    for name in reversed(names):
        model = SINGLE[name](model)
    return model


def innermost(names: tuple[str, ...], model: nn.Module) -> nn.Module:
    for name in names:
        inner = {"compiled": "_orig_mod", "checkpointed": "_checkpoint_wrapped_module"}.get(name, "module")
        model = getattr(model, inner)
    return model


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def file_names(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize("names", CASES)
def test_export_metadata_and_restore(tmp_path: Path, names: tuple[str, ...]) -> None:
    bare = llama(1)
    model, again = around(names, bare), around(names, llama(2))
    with build_checkpointer(tmp_path) as saver:
        path = saver.save(0, 1, model)
        saver.restore(again)
    assert same(again, model)
    assert file_names(path / EXPORT / "model.safetensors") == set(bare.state_dict())
    assert json.loads((path / EXPORT / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("names", CASES)
def test_base_model(tmp_path: Path, names: tuple[str, ...]) -> None:
    base = llama(5)
    base.save_pretrained(tmp_path / "base")
    model = around(names, llama(1))
    with build_checkpointer(tmp_path) as saver:
        saver.load_base_model(model, torch.device("cpu"), None, str(tmp_path / "base"))
    assert same(innermost(names, model), base)


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def adapted(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(llama(0), config)


@pytest.mark.parametrize("names", CASES)
def test_adapter(tmp_path: Path, names: tuple[str, ...]) -> None:
    bare = adapted(1)
    bare.save_pretrained(tmp_path / "theirs")
    model, again = around(names, bare), around(names, adapted(2))
    with build_checkpointer(tmp_path, is_peft=True) as saver:
        if "averaged" in names:
            with pytest.raises(MisuseError, match="n_averaged"):
                saver.save(0, 1, model)
            return
        path = saver.save(0, 1, model)
        saver.restore(again)
    assert same(again, model)
    assert file_names(path / "model" / "adapter_model.safetensors") == file_names(
        tmp_path / "theirs" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("names", [(), *((name,) for name in ("compiled", "checkpointed"))])
def test_fsdp1_is_refused_wherever_it_stands(tmp_path: Path, names: tuple[str, ...]) -> None:
    llama(5).save_pretrained(tmp_path / "base")
    for model in (fsdp1(around(names, llama())), around(names, fsdp1(llama()))):
        with build_checkpointer(tmp_path) as saver:
            with pytest.raises(MisuseError, match="FSDP1"):
                saver.save(0, 1, model)
            with pytest.raises(MisuseError, match="FSDP1"):
                saver.load_base_model(model, torch.device("cpu"), None, str(tmp_path / "base"))
