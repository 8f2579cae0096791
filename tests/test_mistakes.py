"""Typical mistakes, made as users make them: when each is answered, and how. The table is docs/mistakes.md."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.faults import FaultyStorage
from tests.support.ranks import failure, fresh, outcomes
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardwise import Checkpointer, CheckpointingConfig, ShardwiseError
from shardwise.errors import PeerError, UnknownSettingError

NOT_ITS_OWN = "the optimizer updates a parameter of shape [8, 8] that the model does not have"


def model(size: int = 8, layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(size, size) for _ in range(layers)]).to(dtype)


def trained(net: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(net.parameters())
    sum(parameter.sum() for parameter in net.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


def config(root: Path, **settings: object) -> CheckpointingConfig:
    return CheckpointingConfig(checkpoint_dir=root, collective_timeout_seconds=40, **settings)  # type: ignore[arg-type]


def save(root: Path) -> None:
    net = model()
    with config(root).build() as checkpointer:
        checkpointer.save(step=1, model=net, optimizer=trained(net))


# --- before anything runs --------------------------------------------------------------------------------------------


def test_a_typo_in_a_setting() -> None:
    with pytest.raises(UnknownSettingError, match="Did you mean 'max_recent_checkpoints'"):
        CheckpointingConfig(max_recent_checkpoint=3)  # type: ignore[call-arg]
    with pytest.raises(UnknownSettingError, match="Did you mean 'is_async'"):
        CheckpointingConfig.from_yaml("checkpoint:\n  async: true\n")


def test_a_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoint_dir is .*file/run, and .*file is not a directory.*enabled to false"):
        config(tmp_path / "file" / "run").build()
    assert config(tmp_path / "file" / "run", enabled=False).build() is not None
    assert config(tmp_path / "new" / "run").build() is not None
    assert not (tmp_path / "new").exists()


def build_as_another_user(root: Path) -> None:
    root.chmod(0o555)
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        config(root / "run").build()
    except ShardwiseError as error:
        print(type(error).__name__, error)


def test_a_directory_without_permission(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for above in [root, *root.parents]:
        if above.is_relative_to("/tmp") and above != Path("/tmp"):  # so that another user reaches it
            above.chmod(0o755)
    assert fresh(build_as_another_user, root, output=tmp_path / "out", seconds=100) == 0
    text = (tmp_path / "out").read_text()
    assert text.startswith(f"StorageError checkpoint_dir is {root / 'run'}, and this process may not write to {root}")


# --- at the first call, on all ranks ---------------------------------------------------------------------------------


def other_shape(root: Path) -> None:
    save(root)
    with config(root).build() as checkpointer:
        checkpointer.restore(model(size=4))


def other_layers(root: Path) -> None:
    save(root)
    with config(root).build() as checkpointer:
        checkpointer.restore(model(layers=3))


def other_dtype(root: Path) -> None:
    save(root)
    with config(root).build() as checkpointer:
        checkpointer.restore(model(dtype=torch.bfloat16))


def optimizer_of_another_model(root: Path) -> None:
    with config(root).build() as checkpointer:
        checkpointer.restore(model(), trained(model()))


def optimizer_of_another_model_saved(root: Path) -> None:
    with config(root).build() as checkpointer:
        checkpointer.save(step=1, model=model(), optimizer=trained(model()))


def hugging_face_directory(root: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    if dist.get_rank() == 0:
        llama.save_pretrained(root / "hub")
    dist.barrier()
    with config(root / "run").build() as checkpointer:
        checkpointer.restore(llama, torch.optim.AdamW(llama.parameters()), restore_from=root / "hub")


def peft_without_the_setting(root: Path) -> None:
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(model(), LoraConfig(target_modules=["0"]))
    with config(root).build() as checkpointer:
        checkpointer.restore(net)


def setting_without_an_adapter(root: Path) -> None:
    with config(root, is_peft=True).build() as checkpointer:
        checkpointer.restore(model())


def steps_that_differ(root: Path) -> None:
    with config(root).build() as checkpointer:
        checkpointer.save(step=1 + dist.get_rank(), model=model())


def calls_that_differ(root: Path) -> None:
    with config(root).build() as checkpointer:
        if dist.get_rank() == 0:
            checkpointer.restore(model())
        else:
            checkpointer.save(step=1, model=model())


def same_step_of_another_run(root: Path) -> None:
    save(root)
    save(root)


def state_dict_for_a_model(root: Path) -> None:
    with config(root).build() as checkpointer:
        checkpointer.save(step=1, model=model().state_dict())  # type: ignore[arg-type, call-overload]


def sharded_after_restore(root: Path) -> None:
    save(root)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    with config(root).build() as checkpointer:
        checkpointer.restore(net, optimizer)
        fully_shard(net)
        checkpointer.save(step=2, model=net, optimizer=optimizer)


def full_disk(root: Path) -> None:
    with Checkpointer(config(root), storage=FaultyStorage("check_space", 0)) as checkpointer:
        checkpointer.save(step=1, model=model())


@pytest.mark.parametrize(
    ("mistake", "error", "says"),
    [
        (other_shape, "ShapeMismatchError", ["the model's shape is [4, 4], the checkpoint's [8, 8]", "config.json"]),
        (other_layers, "MissingTensorError", ["the checkpoint lacks 2 of the model's tensors: 2.weight, 2.bias"]),
        (other_dtype, "DtypeMismatchError", ["the model's dtype is BF16, the checkpoint's F32", "Build the model in"]),
        (
            optimizer_of_another_model,
            "MisuseError",
            [NOT_ITS_OWN],
        ),
        (
            optimizer_of_another_model_saved,
            "MisuseError",
            [NOT_ITS_OWN],
        ),
        (
            hugging_face_directory,
            "CheckpointNotFoundError",
            ["of a Hugging Face model", "load_base_model"],
        ),
        (peft_without_the_setting, "AdapterError", ["is_peft"]),
        (setting_without_an_adapter, "AdapterError", ["is_peft"]),
        (steps_that_differ, "MisuseError", ["rank 0 saves epoch_0_step_1 and rank 1 saves epoch_0_step_2"]),
        (calls_that_differ, "MisuseError", ["rank 0 calls restore(LATEST) and rank 1 calls save(epoch 0, step 1)"]),
        (same_step_of_another_run, "CheckpointExistsError", ["epoch_0_step_1"]),
        (state_dict_for_a_model, "MisuseError", ["passed as model is a", "Pass an nn.Module"]),
        (sharded_after_restore, "MisuseError", ["optimizer", "fully_shard"]),
        (full_disk, "StorageError", ["No space left on device"]),
    ],
)
def test_all_ranks_are_answered(tmp_path: Path, mistake: Callable[[Path], None], error: str, says: list[str]) -> None:
    answer = failure(2, mistake, tmp_path)
    assert type(answer).__name__ == error, answer
    for text in says:
        assert text in str(answer)


def one_rank_alone(root: Path) -> None:
    if dist.get_rank() == 0:
        made = CheckpointingConfig(checkpoint_dir=root, collective_timeout_seconds=4)
        Checkpointer(made, absent_seconds=1).save(step=1, model=model())


def test_a_save_on_one_rank_ends_after_the_time_out(tmp_path: Path) -> None:
    alone, other = outcomes(2, one_rank_alone, tmp_path)
    assert not other.failed
    assert isinstance(alone.error, PeerError)
    assert "not every rank of 2 came to save(epoch 0, step 1) within 4 s" in str(alone.error)
    assert "if rank == 0" in str(alone.error)


# --- wrappers are no mistake -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_looked_into(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = model()
    with config(tmp_path).build() as checkpointer:
        checkpointer.save(step=1, model=wrap(net))
        found = model()
        nn.init.zeros_(next(found.parameters()))
        checkpointer.restore(found)
    assert torch.equal(next(found.parameters()), next(net.parameters()))
