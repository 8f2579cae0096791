"""What one rank alone has, lacks or fails with: all learn of it, and none is left waiting in another collective."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.engine.test_merge_computed import Negated
from tests.peft.own_models import HIDDEN, INNER, OwnConfig, dense
from tests.peft.test_models import LINEAR, adapted
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from peft import LoraConfig
from shardwise import Checkpointer, CheckpointingConfig
from shardwise.addons import CheckpointAddon, ConsolidatedHFAddon, SaveHookArgs
from shardwise.comm import Group
from shardwise.disk.storage import LocalStorage, Status
from shardwise.engine.agreement import Agreement
from shardwise.engine.background import Background, waiting_for_copies
from shardwise.engine.computed import gather
from shardwise.engine.export import exchange_rows
from shardwise.engine.records import ComponentRecord, SaveJob
from shardwise.engine.staging import Stager
from shardwise.errors import AdapterError, CheckpointNotFoundError, MisuseError, RemoteError, StorageError
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.layout import lay_out
from shardwise.plan.schedule import WriteRun, schedule
from shardwise.sources.sources import open_source
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors


class Stage(nn.Module):
    """One layer of a model of two, under the name that it has in the whole."""

    def __init__(self) -> None:
        super().__init__()
        number = dist.get_rank()
        torch.manual_seed(number)
        self.layers = nn.ModuleDict({str(number): nn.Linear(4, 3)})


def engine(root: Path, addons: list[CheckpointAddon] | None = None, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root / "run", collective_timeout_seconds=15, **settings)  # type: ignore[arg-type]
    return Checkpointer(config, 0, 0, dist.get_rank(), addons=addons)


# --- addons ---------------------------------------------------------------------------------------------------------


class Quiet:
    """Does nothing."""

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        pass

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        pass


class Looking(Quiet):
    """Uses the library on one rank, in a group of that rank alone, which puts the rank into what is raised."""

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        if dist.get_rank() == 1:
            open_source("/nowhere", Group(None))


class Unlisted(nn.Linear):
    def modules(self):  # type: ignore[no-untyped-def]
        raise RuntimeError("no list of modules")


def save_with_addon(root: Path, one_more: bool) -> None:
    addons: list[CheckpointAddon] = [ConsolidatedHFAddon()]
    if one_more and dist.get_rank() == 1:
        addons.append(Quiet())
    engine(root, addons if one_more else [*addons, Looking()]).save(0, 1, Stage())


def test_an_addon_that_one_rank_alone_has(tmp_path: Path) -> None:
    error = failure(2, save_with_addon, tmp_path, True)
    assert isinstance(error, MisuseError)
    assert "Quiet as addon 2 was passed on rank 1 and not on rank 0" in str(error)


def test_an_addon_whose_failure_looks_like_that_of_all(tmp_path: Path) -> None:
    error = failure(2, save_with_addon, tmp_path, False)
    assert isinstance(error, CheckpointNotFoundError)
    assert error.path == "/nowhere"


class Parts:
    def __init__(self, part: nn.Module) -> None:
        self.model = [part]


def write_metadata(root: Path) -> None:
    part = (Unlisted if dist.get_rank() == 1 else nn.Linear)(2, 2)
    group = Group.dedicated(None, 15)
    ConsolidatedHFAddon().pre_save(model_state=Parts(part), hf_metadata_dir=str(root), group=group)


def test_a_model_that_cannot_be_looked_at_for_quantization(tmp_path: Path) -> None:
    error = failure(2, write_metadata, tmp_path)
    assert isinstance(error, RemoteError)
    assert (error.rank, error.message) == (1, "RuntimeError: no list of modules")


# --- adapters -------------------------------------------------------------------------------------------------------


def adapted_stage(names: list[str]) -> nn.Module:
    model = adapted("llama", {"target_modules": LINEAR})
    for name in names:
        model.add_adapter(name, LoraConfig(r=2, target_modules=LINEAR, task_type="CAUSAL_LM"))  # type: ignore[operator]
    holder = model.base_model.model.model
    holder.layers = nn.ModuleDict({str(dist.get_rank()): holder.layers[dist.get_rank()]})
    if dist.get_rank() == 1:
        del holder.embed_tokens
    return model


def save_adapters(root: Path, names: list[list[str]]) -> None:
    model = adapted_stage(names[dist.get_rank()])
    with engine(root, is_peft=True) as checkpointer:
        path = checkpointer.save(0, 1, model)
        before = {name: param.detach().clone() for name, param in model.named_parameters() if "lora_" in name}
        for name, param in model.named_parameters():
            if name in before:
                param.detach().fill_(9)
        assert path is not None
        checkpointer.load_model(model, path / "model")
        assert all(torch.equal(param, before.get(name, param)) for name, param in model.named_parameters())


def test_an_adapter_that_one_stage_alone_has(tmp_path: Path) -> None:
    error = failure(2, save_adapters, tmp_path, [[], ["more"]])
    assert isinstance(error, AdapterError)
    assert "rank 0 has the adapters ['default'] and rank 1 has ['default', 'more']" in str(error)


def test_adapters_that_stages_were_given_in_different_orders(tmp_path: Path) -> None:
    run(2, save_adapters, tmp_path, [["a", "b"], ["b", "a"]])
    assert len(list(tmp_path.glob("run/epoch_0_step_1/model/**/adapter_model.safetensors"))) == 3


def own_stage() -> nn.Module:
    """A stage with adapters in combined projections, of which the second has them in fewer places."""
    model = dense(OwnConfig())
    layer = model.model.layers[dist.get_rank()]
    if dist.get_rank() == 1:
        layer.mlp.gate_up_proj = nn.Linear(HIDDEN, 2 * INNER, bias=False).requires_grad_(False)
    model.model.layers = nn.ModuleDict({str(dist.get_rank()): layer})
    return model


def save_own_adapter(root: Path, odd: str) -> None:
    model = own_stage()
    factor = model.model.layers[str(dist.get_rank())].mlp.down_proj.lora_B
    sparse = nn.Parameter(torch.ones_like(factor.weight).to_sparse())
    with engine(root, is_peft=True) as checkpointer:
        if odd == "save" and dist.get_rank() == 1:
            factor.weight = sparse
        path = checkpointer.save(0, 1, model, peft_config=OwnConfig())
        before = factor.weight.detach().clone()
        factor.weight.detach().fill_(9)
        if odd == "load" and dist.get_rank() == 1:
            factor.weight = sparse
        assert path is not None
        checkpointer.load_model(model, path / "model")
        assert torch.equal(factor.weight, before)


def test_stages_whose_combined_projections_differ(tmp_path: Path) -> None:
    run(2, save_own_adapter, tmp_path, "")


@pytest.mark.parametrize("when", ["save", "load"])
def test_a_factor_of_one_stage_that_cannot_be_described(tmp_path: Path, when: str) -> None:
    error = failure(2, save_own_adapter, tmp_path, when)
    assert isinstance(error, MisuseError)
    assert error.rank == 1
    assert "sparse" in str(error)


# --- tensors that one rank alone cannot describe or plan ------------------------------------------------------------


def with_odd_state() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer, whose state holds something sparse on rank 1."""
    model = Stage()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if dist.get_rank() == 1:
        optimizer.state[next(model.parameters())]["odd"] = torch.ones(3, 4).to_sparse()
    return model, optimizer


def save_odd_state(root: Path) -> None:
    engine(root).save(0, 1, *with_odd_state())


def test_an_optimizer_whose_state_cannot_be_described(tmp_path: Path) -> None:
    error = failure(2, save_odd_state, tmp_path)
    assert (type(error), error.rank) == (MisuseError, 1)
    assert list((tmp_path / "run").iterdir()) == []


class Reserved(nn.Module):
    """Has a tensor on rank 1 that no file can hold under its name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("__metadata__" if dist.get_rank() == 1 else "fine", nn.Parameter(torch.ones(3)))


def save_reserved(root: Path, mode: str) -> None:
    engine(root, save_consolidated=mode).save(0, 1, Reserved())


@pytest.mark.parametrize("mode", ["every", "false"])
def test_a_name_that_one_stage_cannot_write(tmp_path: Path, mode: str) -> None:
    error = failure(2, save_reserved, tmp_path, mode)
    assert isinstance(error, MisuseError)
    assert "__metadata__" in str(error)


# --- saves in the background ----------------------------------------------------------------------------------------


def restore_with_odd_state(root: Path) -> None:
    """There is nothing to restore, but memory to be made for later saves."""
    engine(root, is_async=True).restore(*with_odd_state())


def test_memory_for_later_saves_that_one_rank_cannot_make(tmp_path: Path) -> None:
    error = failure(2, restore_with_odd_state, tmp_path)
    assert (type(error), error.rank) == (MisuseError, 1)


class Unfinished(Stager):
    """Its copying fails, as that of a GPU that is lost."""

    def wait(self) -> None:
        raise RuntimeError("the device is lost")


def write_uncopied() -> list[str]:
    background = Background(Group.dedicated(None, 15))
    if dist.get_rank() == 1:
        background.stager = Unfinished()
    seen: list[str] = []

    def step(group: Group) -> ComponentRecord:
        seen.append("written")
        return ComponentRecord()

    steps = (waiting_for_copies(background.stager), step)
    background.submit(SaveJob("saving", steps, lambda group, record: None, lambda group: seen.append("abandoned")))
    with pytest.raises(RemoteError, match="the device is lost"):
        background.wait()
    return seen


def test_a_copy_that_fails_on_one_rank(tmp_path: Path) -> None:
    assert run(2, write_uncopied) == [["abandoned"], ["abandoned"]]


# --- base models and what was noted beside a model ------------------------------------------------------------------


def tensors(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """The files' tensors of both stages."""
    return {f"layers.{n}.{k}": torch.ones(s) for n in (0, 1) for k, s in (("weight", (3, 4)), ("bias", (3,)))} | more


def own_copy(root: Path, files: dict[str, torch.Tensor], note: str, text: str) -> Path:
    """A copy of the files for each rank's machine; the note is beside that of rank 0 alone."""
    directory = root / f"machine-{dist.get_rank()}"
    directory.mkdir()
    save_file(files, directory / "model.safetensors")
    if dist.get_rank() == 0:
        (directory / note).parent.mkdir(exist_ok=True)
        (directory / note).write_text(text)
    return directory


def load_with_note(root: Path) -> None:
    path = own_copy(root, tensors(more=torch.ones(2)), ".hf_metadata/passed_through.json", '["more"]')
    engine(root).load_model(Stage(), path)


def test_a_note_that_rank_0_alone_can_see(tmp_path: Path) -> None:
    run(2, load_with_note, tmp_path)


def load_quantized(root: Path) -> bool:
    blocks = {"z_blocks": torch.ones(2, 2, 16, dtype=torch.uint8), "z_scales": torch.ones(2, 2, dtype=torch.uint8)}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    path = own_copy(root, tensors(**blocks), "config.json", json.dumps(config))
    model = Stage()
    engine(root).load_model(model, path, is_init_step=True)
    return all(bool((param == 1).all()) for param in model.parameters())


def test_a_base_config_that_rank_0_alone_can_see(tmp_path: Path) -> None:
    assert run(2, load_quantized, tmp_path) == [True, True]


class Knowing(Stage):
    """A pattern of the class is no regular expression, which is noticed when rank 0 tells what it has loaded."""

    _keys_to_ignore_on_load_unexpected = ("(",)


def load_and_tell(root: Path) -> None:
    path = own_copy(root, tensors(more=torch.ones(2)), "config.json", "{}")
    model = Knowing() if dist.get_rank() == 0 else Stage()
    engine(root).load_model(model, path, is_init_step=True)


def test_what_rank_0_cannot_tell(tmp_path: Path) -> None:
    error = failure(2, load_and_tell, tmp_path)
    assert isinstance(error, RemoteError)
    assert error.rank == 0


# --- what some ranks compute together -------------------------------------------------------------------------------


class Shared(nn.Module):
    """A layer that both ranks have, and on rank 0 one that is its own; both have to be computed."""

    def __init__(self) -> None:
        super().__init__()
        if dist.get_rank() == 0:
            self.apart = nn.Linear(4, 6)
        torch.manual_seed(0)
        self.same = nn.Linear(4, 6)
        self.state_dict_adapter = Negated()


def save_shared(root: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every", collective_timeout_seconds=15)
    with config.build(dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0) as checkpointer:
        path = checkpointer.save(0, 1, model := Shared())
    assert path is not None
    saved = load_file(path / "model" / "consolidated" / "model.safetensors")
    found = torch.cat([saved["hub.same.weight.left"], saved["hub.same.weight.right"]], 1)
    assert torch.equal(found, -model.same.weight)


def test_a_layer_to_be_computed_that_one_rank_has_others_before(tmp_path: Path) -> None:
    run(2, save_shared, tmp_path)


def describe() -> list[str]:
    """Rank 0 gets another model; describing rank 1's fails once, while rank 0's is known from then on."""
    agreement = Agreement(Group.dedicated(None, 15), dist.get_rank())
    first, second = ModelState(Stage()).held(), ModelState(nn.Linear(2, 2)).held()
    agreement.roster(lambda: first, "describing")
    with pytest.raises(RemoteError):
        agreement.roster(lambda: second if dist.get_rank() == 0 else [None], "describing")  # type: ignore[list-item]
    return [s.name for s in agreement.roster(lambda: second if dist.get_rank() == 0 else first, "describing").specs]


def test_what_was_agreed_on_before_a_failure_is_not_taken_for_now() -> None:
    assert run(2, describe) == [["weight", "bias", "layers.1.weight", "layers.1.bias"]] * 2


class Carrying(Stage):
    """Knows of a tensor in its base model that it does not load."""

    _keys_to_ignore_on_load_unexpected = ("more",)


def save_carrying(root: Path) -> None:
    path = own_copy(root, tensors(more=torch.ones(2)), "config.json", '{"architectures": ["Carrying"]}')
    settings = {"save_consolidated": "every", "model_repo_id": str(path), "pass_through_unloaded": True}
    found = engine(root, **settings).save(0, 1, Carrying())
    assert found is not None
    saved = load_file(found / "model" / "consolidated" / "model.safetensors")
    assert saved.keys() == tensors(more=torch.ones(2)).keys()


def test_a_base_config_that_says_on_rank_0_alone_what_is_carried_over(tmp_path: Path) -> None:
    run(2, save_carrying, tmp_path)


class Lost(torch.Tensor):
    """Memory of a device that is lost."""

    def detach(self) -> torch.Tensor:
        raise RuntimeError("the device is lost")


def without_device(held: HeldTensor, group: Group) -> HeldTensor:
    """What rank 1 has of a tensor has become unreadable."""
    if group.rank != 1:
        return held
    part, (fragment,) = held.parts[0], held.fragments
    lost = fragment._replace(data=fragment.data.as_subclass(Lost))
    return held._replace(parts=(part._replace(fragments=(lost,)),))


def gather_lost() -> None:
    group = Group.dedicated(None, 15)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = distribute_tensor(torch.arange(12.0).reshape(6, 2), mesh, [Shard(0)])
    (held,) = held_tensors([("matrix", spread)], MeshRegister())
    roster = Agreement(group).roster(lambda: [held], "describing")
    whole = gather(held, roster, group, 0)
    assert whole is None or torch.equal(whole, torch.arange(12.0).reshape(6, 2))
    assert (whole is None) == (group.rank != 0)
    with group.together("gathering"):
        assert gather(without_device(held, group), roster, group, 0) is None


def test_a_holder_of_what_is_computed_that_cannot_read_its_memory() -> None:
    error = failure(3, gather_lost)
    assert (error.rank, error.message) == (1, "RuntimeError: the device is lost")


def exchange_lost() -> int:
    group = Group.dedicated(None, 15)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread = distribute_tensor(torch.arange(1200.0).reshape(200, 6), mesh, [Shard(1)])
    (held,) = held_tensors([("columns", spread)], MeshRegister())
    roster = Agreement(group).roster(lambda: [held], "describing")
    layout = lay_out(roster.specs)
    planned = schedule([held], layout, roster, group.rank).exchanges
    exchanges = [(number, replace(e, rows_per_round=30)) for number, e in planned]
    written: list[WriteRun] = []
    assert exchange_rows(exchanges, [held], layout, group, written.append) is None
    assert len(written) == 3
    with group.together("exchanging"):
        failed = exchange_rows(exchanges, [without_device(held, group)], layout, group, written.append)
        if failed is not None:
            raise failed
    return len(written)


def test_a_holder_of_columns_that_cannot_read_its_memory() -> None:
    error = failure(3, exchange_lost)
    assert (error.rank, error.message) == (1, "RuntimeError: the device is lost")


# --- extra state ----------------------------------------------------------------------------------------------------


class Blind(LocalStorage):
    """A file system on which rank 1 cannot see whether there is extra state."""

    def status(self, path: Path, *, follows: bool = True) -> Status | None:
        if path.name == "extra" and dist.get_rank() == 1:
            raise StorageError("input/output error", path=path)
        return super().status(path, follows=follows)


def restore_blindly(root: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=root / "run", collective_timeout_seconds=15)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    Checkpointer(config, 0, 0, 0).save(0, 1, model, extra_state={"note": 1})
    Checkpointer(config, 0, 0, 0, storage=Blind()).restore(model, extra_state={"note": 2})


def test_extra_state_that_one_rank_cannot_look_for(tmp_path: Path) -> None:
    error = failure(2, restore_blindly, tmp_path, seconds=60)
    assert isinstance(error, StorageError)
    assert error.rank == 1
