"""What is saved is what ``state_dict()`` gives, and restoring has the effect of ``load_state_dict()``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.checkpointing.contract_models import (
    BUILDERS,
    Cloned,
    ExtraTensor,
    ExtraValues,
    HalfOnDisk,
    TransposedOnDisk,
    build,
    differing,
    effect,
    train_some,
)
from tests.checkpointing.modes import EVERY, MODES, SHARDS
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import MissingTensorError, ModuleStateError, ShapeMismatchError, UnexpectedTensorError
from shardwise.ops.verify import verify
from shardwise.stateful_wrappers import ModelState

STEPS = itertools.count()


def checkpointer(root: Path, mode: dict[str, Any]) -> Checkpointer:
    return Checkpointer(CheckpointingConfig(checkpoint_dir=root, **mode))


def saved(root: Path, model: nn.Module, mode: dict[str, Any], *rest: Any) -> Path:
    with checkpointer(root, mode) as writer:
        path = writer.save(0, next(STEPS), model, *rest)
    assert path is not None
    assert verify(path).status == "whole"
    return path


def as_torch_loads(kind: str, model: nn.Module) -> nn.Module:
    reference = build(kind, 1)
    reference.load_state_dict(model.state_dict())
    return reference


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*BUILDERS, "own_root"])
def test_restoring_is_loading_the_state_dict(tmp_path: Path, kind: str, mode: dict[str, Any]) -> None:
    model = build(kind, 0)
    train_some(model)
    saved(tmp_path, model, mode)
    expected = effect(as_torch_loads(kind, model))
    restored = build(kind, 1)
    assert differing(effect(restored), expected)
    with checkpointer(tmp_path, mode) as reader:
        reader.restore(restored)
    assert differing(effect(restored), expected) == []


@pytest.mark.parametrize("kind", [*BUILDERS, "own_root"])
def test_the_export_and_a_base_model_load_likewise(tmp_path: Path, kind: str) -> None:
    model = build(kind, 0)
    train_some(model)
    path = saved(tmp_path, model, EVERY) / "model" / "consolidated"
    expected = effect(as_torch_loads(kind, model))
    for is_init_step in (False, True):
        restored = build(kind, 1)
        with checkpointer(tmp_path / "x", EVERY) as reader:
            reader.load_model(restored, path, is_init_step=is_init_step)
        assert differing(effect(restored), expected) == []


@pytest.mark.parametrize("kind", [*BUILDERS, "own_root"])
def test_the_stateful_protocol(kind: str) -> None:
    model = build(kind, 0)
    train_some(model)
    restored = build(kind, 1)
    state = ModelState(restored)
    given = ModelState(model).state_dict()
    if kind != "own_root":
        assert given.keys() == dict.fromkeys(model.state_dict()).keys() or kind in ("shared", "checkpointed")
    state.load_state_dict(given)
    expected = effect(as_torch_loads(kind, model))
    # DCP's protocol has no place for the versions that torch notes.
    skipped = {"odd.found"} if kind == "versioned" else set()
    assert set(differing(effect(restored), expected)) <= skipped


@pytest.mark.parametrize("mode", [EVERY, SHARDS], ids=["every", "shards"])
def test_later_saves_have_the_later_values(tmp_path: Path, mode: dict[str, Any]) -> None:
    model = nn.ModuleDict({"a": TransposedOnDisk(), "b": ExtraTensor(), "c": HalfOnDisk()})
    with checkpointer(tmp_path, mode) as writer:
        for step in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(step + 1)
            model["b"].amax = step + 0.5
            writer.save(1, step, model)
            restored = nn.ModuleDict({"a": TransposedOnDisk(), "b": ExtraTensor(), "c": HalfOnDisk()})
            writer.restore(restored)
            assert all(bool((p == step + 1).all()) for p in restored.parameters())
            assert (restored["b"].amax, restored["b"].calls) == (step + 0.5, 1)


def test_extra_state_is_in_no_export(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": ExtraTensor(), "b": ExtraValues()})
    train_some(model)
    path = saved(tmp_path, model, EVERY)
    names = {name for file in (path / "model" / "consolidated").glob("*.safetensors") for name in load_file(file)}
    assert names == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_with_an_optimizer_whose_parameters_are_cloned_in_the_state(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(Cloned(), TransposedOnDisk(4, 4))
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = made()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    saved(tmp_path, model, EVERY, optimizer)
    restored, other = made()
    with checkpointer(tmp_path, EVERY) as reader:
        reader.restore(restored, other)
    assert differing(effect(restored), effect(model)) == []
    for mine, theirs in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], other.state[theirs]["exp_avg"])


def test_extra_state_that_cannot_be_stored_names_the_module(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> object:
            return object()

        def set_extra_state(self, state: object) -> None:
            raise AssertionError

    for mode in (EVERY, {**EVERY, "model_save_format": "torch_save", "save_consolidated": "false"}):
        with (
            checkpointer(tmp_path, mode) as writer,
            pytest.raises(ModuleStateError, match=r"the module 'odd' \(Odd\) gives for its state"),
        ):
            writer.save(0, 0, nn.ModuleDict({"odd": Odd(2, 2)}))
    assert not list(tmp_path.glob("epoch*"))


def test_a_module_that_fails_to_give_its_state_is_named(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def _save_to_state_dict(self, *_: object) -> None:
            raise RuntimeError("no memory on the card")

    with (
        checkpointer(tmp_path, EVERY) as writer,
        pytest.raises(ModuleStateError, match=r"the module 'odd' \(Odd\) failed to give its state: RuntimeError: no m"),
    ):
        writer.save(0, 0, nn.ModuleDict({"odd": Odd(2, 2)}))


def test_hooks_on_a_wrapper_that_is_taken_off_are_refused(tmp_path: Path) -> None:
    model = torch.compile(nn.Linear(2, 2))
    assert isinstance(model, nn.Module)
    handle = model.register_load_state_dict_pre_hook(lambda *_: None)
    with checkpointer(tmp_path, EVERY) as both:
        with pytest.raises(ModuleStateError, match="the OptimizedModule around the model has state_dict hooks"):
            both.save(0, 0, model)
        handle.remove()
        both.save(0, 0, model)


def test_a_module_that_fails_to_take_its_state_is_named(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            args[-1].append("scale is negative")

    model = nn.ModuleDict({"odd": Odd(2, 2)})
    saved(tmp_path, model, EVERY)
    with (
        checkpointer(tmp_path, EVERY) as reader,
        pytest.raises(ModuleStateError, match=r"the module 'odd' \(Odd\) does not take .* scale is negative"),
    ):
        reader.restore(model)


def test_a_state_that_changes_its_shape_while_it_is_saved(tmp_path: Path) -> None:
    class Odd(nn.Module):
        calls = 0

        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            self.calls += 1
            destination[prefix + "x"] = torch.zeros(self.calls)

    with (
        checkpointer(tmp_path, EVERY) as writer,
        pytest.raises(ModuleStateError, match=r"the module 'odd' \(Odd\) gave torch.float32 of shape \[1\] when"),
    ):
        writer.save(0, 0, nn.ModuleDict({"odd": Odd()}))


def test_what_does_not_fit_is_found_before_anything_is_written(tmp_path: Path) -> None:
    saved(tmp_path, nn.ModuleDict({"a": HalfOnDisk(), "b": ExtraTensor(), "c": nn.Linear(4, 4)}), EVERY)
    others = (
        (nn.ModuleDict({"a": nn.ModuleDict({"x": HalfOnDisk()}), "c": nn.Linear(4, 4)}), MissingTensorError),
        (nn.ModuleDict({"a": HalfOnDisk(), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)}), UnexpectedTensorError),
        (nn.ModuleDict({"a": HalfOnDisk(), "b": ExtraTensor(), "c": nn.Linear(3, 4)}), ShapeMismatchError),
    )
    for other, expected in others:
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with checkpointer(tmp_path, EVERY) as reader, pytest.raises(expected):
            reader.restore(other)
        assert differing(other.state_dict(), before) == []


def test_extra_state_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    saved(tmp_path, nn.ModuleDict({"a": ExtraTensor(), "b": nn.Linear(4, 4)}), EVERY)
    other = nn.ModuleDict({"a": ExtraTensor(), "b": ExtraTensor()})
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with (
        checkpointer(tmp_path, EVERY) as reader,
        pytest.raises(MissingTensorError, match="no extra state for"),
    ):
        reader.restore(other)
    assert differing(other.state_dict(), before) == []


def test_an_export_loads_into_a_model_without_extra_state(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": ExtraTensor()})
    path = saved(tmp_path, model, EVERY)
    plain = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with checkpointer(tmp_path, EVERY) as reader:
        reader.load_model(plain, path / "model" / "consolidated")
        assert torch.equal(plain["a"].weight, model["a"].weight)
        with pytest.raises(UnexpectedTensorError, match="that no module of the model takes"):
            reader.load_model(plain, path / "model")


def test_files_of_others_have_no_extra_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"a": ExtraTensor(), "b": nn.Linear(4, 4)})
    train_some(model)
    save_file(
        {name: t for name, t in model.state_dict().items() if "extra" not in name}, tmp_path / "model.safetensors"
    )
    restored = nn.ModuleDict({"a": ExtraTensor(), "b": nn.Linear(4, 4)})
    with checkpointer(tmp_path / "x", EVERY) as reader:
        reader.load_model(restored, tmp_path)
    assert torch.equal(restored["a"].weight, model["a"].weight)
    assert (restored["a"].calls, restored["a"].amax) == (0, 0.0)
    assert "no state was saved for the module 'a' (ExtraTensor)" in caplog.text


def test_extra_state_among_the_tensors_of_others(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = nn.ModuleDict({"a": ExtraTensor(), "b": nn.Linear(4, 4)})
    train_some(model)
    (tmp_path / "one").mkdir()
    save_file(model.state_dict(), tmp_path / "one" / "model.safetensors")
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    for place in ("one", "dcp"):
        restored = nn.ModuleDict({"a": ExtraTensor(), "b": nn.Linear(4, 4)})
        with checkpointer(tmp_path / "x", EVERY) as reader:
            reader.load_model(restored, tmp_path / place)
        assert (restored["a"].amax, restored["a"].calls) == (3.25, 1)
        assert torch.equal(restored["a"].weight, model["a"].weight)


@pytest.mark.parametrize("is_init_step", [False, True], ids=["checkpoint", "base"])
def test_normalisation_of_old_files(tmp_path: Path, is_init_step: bool) -> None:
    model = nn.ModuleDict({"n": nn.BatchNorm1d(3), "b": HalfOnDisk()})
    train_some(model)
    old = {name: t for name, t in model.state_dict().items() if "num_batches" not in name}
    save_file(old, tmp_path / "model.safetensors")
    restored = nn.ModuleDict({"n": nn.BatchNorm1d(3), "b": HalfOnDisk()})
    reference = nn.ModuleDict({"n": nn.BatchNorm1d(3), "b": HalfOnDisk()})
    for each in (restored, reference):
        each["n"].num_batches_tracked.fill_(9)
    reference.load_state_dict(old)
    with checkpointer(tmp_path / "x", EVERY) as reader:
        reader.load_model(restored, tmp_path, is_init_step=is_init_step)
    assert differing(effect(restored), effect(reference)) == []


def test_a_lazy_module_takes_the_shapes_of_the_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with checkpointer(tmp_path, EVERY) as writer, pytest.raises(ModuleStateError, match="has no values yet"):
        writer.save(0, 0, model)
    model(torch.ones(1, 5))
    saved(tmp_path, model, EVERY)
    restored = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with checkpointer(tmp_path, EVERY) as reader:
        reader.restore(restored)
    assert differing(restored.state_dict(), model.state_dict()) == []
