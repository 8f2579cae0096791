"""What a caller may get wrong in a call: named on every rank, before anything is written or read."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.support.ranks import failure, run
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import CheckpointNotFoundError, ConfigError, MisuseError


def engine(root: Path, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root, **settings)  # type: ignore[arg-type]
    return config.build(dist.get_rank() if dist.is_initialized() else 0, 0, 0)


def training() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.StepLR]:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", None),
        ("model", {"weight": torch.ones(2)}),
        ("model", [nn.Linear(1, 1), "stage"]),
        ("optimizer", "adamw"),
        ("optimizer", {}),
        ("scheduler", "cosine"),
        ("scheduler", [3]),
        ("metrics", [1.0]),
        ("extra_state", "loader"),
        ("tokenizer", "gpt2"),
    ],
)
def test_what_is_no_model_optimizer_or_scheduler(tmp_path: Path, key: str, value: object) -> None:
    model, optimizer, scheduler = training()
    arguments = {"model": model, "optimizer": optimizer, "scheduler": scheduler} | {key: value}
    checkpointer = engine(tmp_path)
    with pytest.raises(MisuseError, match=f"{key} is a "):
        checkpointer.save(0, 1, **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    if key in ("model", "optimizer", "scheduler"):
        with pytest.raises(MisuseError, match=f"{key} is a "):
            checkpointer.restore(**arguments)  # type: ignore[arg-type]
    if key == "model":
        with pytest.raises(MisuseError, match="model is a "):
            checkpointer.save_model(value, tmp_path)  # type: ignore[arg-type]
        with pytest.raises(MisuseError, match="model is a "):
            checkpointer.load_model(value, tmp_path)  # type: ignore[arg-type]
    if key == "tokenizer":
        with pytest.raises(MisuseError, match="tokenizer is a str.*save_pretrained"):
            checkpointer.save_model(model, tmp_path, tokenizer=value)  # type: ignore[arg-type]
    if key == "optimizer":
        with pytest.raises(MisuseError, match="optimizer is a "):
            checkpointer.save_optimizer(value, model, tmp_path)  # type: ignore[arg-type]
        with pytest.raises(MisuseError, match="optimizer is a "):
            checkpointer.load_optimizer(value, model, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="state is a dict"):
        checkpointer.save_on_global_ranks({}, "loader", tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def save_as_rank(root: Path) -> None:
    rank = dist.get_rank()
    model, optimizer, _ = training()
    with engine(root) as checkpointer:
        checkpointer.save(0, 3 if rank == 0 else -3, model, optimizer)


def test_a_mistake_of_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    error = failure(2, save_as_rank, tmp_path)
    assert isinstance(error, MisuseError)
    assert error.rank == 1
    assert "-3" in str(error)
    assert list(tmp_path.iterdir()) == []


def save_otherwise(root: Path, what: str) -> None:
    """Ask for something else on rank 1 than on the others."""
    odd = dist.get_rank() == 1
    model, optimizer, scheduler = training()
    choices = {
        "mode": {"save_consolidated": "every" if odd else "false"},
        "sharing": {"share_replica_reads": "always" if odd else "never"},
        "staging": {"staging_dir": str(root) if odd else None},
        "carrying": {"pass_through_unloaded": odd},
        "dequantizing": {"dequantize_base_checkpoint": True if odd else None},
        "machine": {"io_threads": 1 + odd, "collective_timeout_seconds": 60 + odd, "staging_dir": str(root / f"{odd}")},
    }
    settings: dict[str, object] = {**choices.get(what, {})}
    with engine(root, **settings) as checkpointer:
        checkpointer.save(
            0,
            2 if odd and what == "step" else 1,
            model,
            None if odd and what == "optimizer" else optimizer,
            None if odd and what in ("optimizer", "scheduler") else scheduler,
            is_final_checkpoint=odd and what == "final",
            extra_state={"odd": 1} if odd and what == "extra" else {},
        )


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("step", MisuseError, "rank 0 saves epoch_0_step_1 and rank 1 saves epoch_0_step_2"),
        ("optimizer", MisuseError, "an optimizer or scheduler was passed on rank 0 and not on rank 1"),
        ("final", MisuseError, "is_final_checkpoint=True was passed on rank 1 and not on rank 0"),
        ("mode", ConfigError, "save_consolidated is false on rank 0 and every on rank 1"),
        ("sharing", ConfigError, "share_replica_reads is never on rank 0 and always on rank 1"),
        ("staging", ConfigError, "staging_dir is not given on rank 0 and given on rank 1"),
        ("carrying", ConfigError, "pass_through_unloaded is False on rank 0 and True on rank 1"),
        ("dequantizing", ConfigError, "dequantize_base_checkpoint is None on rank 0 and True on rank 1"),
    ],
)
def test_ranks_that_ask_for_different_things(tmp_path: Path, what: str, error: type[Exception], text: str) -> None:
    found = failure(3, save_otherwise, tmp_path, what)
    assert isinstance(found, error)
    assert re.search(text, str(found))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["scheduler", "extra", "machine"])
def test_what_may_differ(tmp_path: Path, what: str) -> None:
    assert run(2, save_otherwise, tmp_path, what) == [None, None]


def load_otherwise(root: Path, what: str) -> object:
    """Ask for something else on rank 1 than on the others, of a checkpoint that all saved alike."""
    odd = dist.get_rank() == 1
    model, optimizer, scheduler = training()
    extra: dict[str, object] = {"odd": 0} if odd and what == "extra" else {}
    with engine(root, collective_timeout_seconds=20) as checkpointer:
        path = checkpointer.save(0, 1, model, optimizer, scheduler, extra_state={"odd": 3} if extra else {})
        assert path is not None
        if what == "final":
            checkpointer.save_model(model, root, is_final_checkpoint=odd)
        if what in ("base", "mapping"):
            mapping = {"weight": "weight"} if odd and what == "mapping" else None
            checkpointer.load_model(model, path / "model", is_init_step=odd and what == "base", key_mapping=mapping)
        if what == "only":
            checkpointer.load_base_model(model, "cpu", None, str(path / "model"), load_base_model=odd)
        level: dict[str, object] = {"digests": "digests", "level": "bytes"} if odd else {}
        checkpointer.restore(
            model,
            None if odd and what == "optimizer" else optimizer,
            None if odd and what in ("optimizer", "scheduler") else scheduler,
            extra_state=extra,
            verify=level.get(what, "sizes"),  # type: ignore[arg-type]
        )
    return extra


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("optimizer", "an optimizer or scheduler was passed on rank 0 and not on rank 1"),
        ("digests", "verify='digests' was passed on rank 1 and not on rank 0"),
        ("level", "verify is 'bytes'"),
        ("final", "is_final_checkpoint=True was passed on rank 1 and not on rank 0"),
        ("base", "is_init_step=True was passed on rank 1 and not on rank 0"),
        ("only", "load_base_model=True was passed on rank 1 and not on rank 0"),
        ("mapping", "key_mapping={'weight': 'weight'} was passed on rank 1 and not on rank 0"),
    ],
)
def test_ranks_that_load_different_things(tmp_path: Path, what: str, text: str) -> None:
    found = failure(2, load_otherwise, tmp_path, what)
    assert isinstance(found, MisuseError)
    assert text in str(found)


def test_what_may_differ_in_loading(tmp_path: Path) -> None:
    assert run(2, load_otherwise, tmp_path / "a", "scheduler") == [{}, {}]
    assert run(2, load_otherwise, tmp_path / "b", "extra") == [{}, {"odd": 3}]


@pytest.mark.parametrize("make", [np.int64, np.uint8, torch.tensor])
def test_epochs_and_steps_of_other_libraries(tmp_path: Path, make: type) -> None:
    model, _, _ = training()
    path = engine(tmp_path).save(make(1), make(7), model)
    record = engine(tmp_path).restore(model)
    assert record is not None
    assert (record.epoch, record.step, record.path) == (1, 7, path)
    for wrong in (True, 1.0, np.float32(1), None, "1"):
        with pytest.raises(MisuseError, match="step is"):
            engine(tmp_path).save(0, wrong, model)  # type: ignore[arg-type]


def test_a_scheduler_without_its_optimizer(tmp_path: Path) -> None:
    model, optimizer, scheduler = training()
    optimizer.step()
    scheduler.step()
    engine(tmp_path).save(0, 1, model, None, scheduler)
    fresh = training()[2]
    engine(tmp_path).restore(model, None, fresh)
    assert (scheduler.last_epoch, fresh.last_epoch) == (1, 1)
    with pytest.raises(CheckpointNotFoundError, match="saved without an optimizer"):
        engine(tmp_path).restore(model, optimizer)


@pytest.mark.parametrize(
    ("save_consolidated", "model_save_format"),
    [("every", "safetensors"), ("false", "safetensors"), ("false", "torch_save")],
)
def test_a_model_without_memory(tmp_path: Path, save_consolidated: str, model_save_format: str) -> None:
    checkpointer = engine(tmp_path, save_consolidated=save_consolidated, model_save_format=model_save_format)
    with pytest.raises(MisuseError, match="meta device") as caught:
        checkpointer.save(0, 1, nn.Linear(3, 3, device="meta"))
    assert caught.value.tensor == "weight"
    assert [path.name for path in tmp_path.iterdir()] == []
    assert checkpointer.save(0, 1, nn.Linear(3, 3)) is not None


def test_a_remote_directory_is_not_taken_for_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="s3://bucket/run"):
        engine("s3://bucket/run", save_consolidated="false")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_processes_that_do_not_know_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = training()
    engine(tmp_path).save(0, 1, model)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MisuseError, match="WORLD_SIZE is 2 and torch.distributed is not initialised") as caught:
        engine(tmp_path).restore(model)
    assert "init_process_group" in str(caught.value.hint)


def test_nothing_said_is_not_a_mistake(tmp_path: Path) -> None:
    assert run(2, save_nothing, tmp_path) == [None, None]


def test_extra_state_that_cannot_be_replaced(tmp_path: Path) -> None:
    model, _, _ = training()
    engine(tmp_path).save(0, 1, model, extra_state={"count": 1})
    with pytest.raises(MisuseError, match="extra_state is a mappingproxy"):
        engine(tmp_path).restore(model, extra_state=MappingProxyType({"count": 0}))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["low", None, torch.ones(2), 10**400])
def test_metrics_that_are_no_numbers(tmp_path: Path, value: object) -> None:
    model, _, _ = training()
    with pytest.raises(MisuseError, match="metric 'loss' is .* not a number.* Pass a number"):
        engine(tmp_path).save(0, 1, model, metrics={"loss": value})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", 3])
def test_extra_state_without_a_name(tmp_path: Path, name: object) -> None:
    model, _, _ = training()
    with pytest.raises(MisuseError, match="extra_state has the name"):
        engine(tmp_path).save(0, 1, model, extra_state={name: 1})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []
    odd: dict[str, object] = {"..": 2, "a/b": 3, " ": 4}
    engine(tmp_path).save(0, 1, model, extra_state=odd)
    restored: dict[str, object] = dict.fromkeys(odd)
    engine(tmp_path).restore(model, extra_state=restored)
    assert restored == odd


def save_nothing(root: Path) -> None:
    model, optimizer, scheduler = training()
    with engine(root) as checkpointer:
        checkpointer.save(0, 1, [model], [optimizer], [scheduler], metrics=None, extra_state=None)
        checkpointer.restore((model,), (optimizer,), (scheduler,))


def save_with_damaged_cache(root: Path, is_peft: bool) -> None:
    """The cache of rank 1's machine has a reference that is no text."""
    cache = root / f"cache-{dist.get_rank()}"
    home = cache / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_bytes(b"\xff" if dist.get_rank() == 1 else b"0123")
    (home / "snapshots" / "0123").mkdir(parents=True)
    save_file({}, home / "snapshots" / "0123" / "model.safetensors")
    settings = {"model_repo_id": "org/name", "model_cache_dir": cache, "collective_timeout_seconds": 20}
    with engine(root / "run", is_peft=is_peft, **settings) as checkpointer:
        checkpointer.save(0, 1, training()[0])


@pytest.mark.parametrize("is_peft", [False, True])
def test_a_cache_that_one_rank_cannot_read(tmp_path: Path, is_peft: bool) -> None:
    error = failure(2, save_with_damaged_cache, tmp_path, is_peft)
    assert (error.rank, error.path) == (1, str(tmp_path / "cache-1" / "models--org--name" / "refs" / "main"))
    assert not list(tmp_path.glob("run/epoch_*"))
