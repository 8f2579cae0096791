"""`consolidate` takes the model, and only the model, out of DCP directories, under the model's names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ops.damaged import cut, describe, flip, gpt2, same_logits, save_dcp, stepped
from torch import nn
from transformers import GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from shardwise import CheckpointingConfig
from shardwise.cli import main
from shardwise.errors import FormatError, IntegrityError, MissingTensorError, MisuseError, ShapeMismatchError
from shardwise.ops.consolidate import consolidate
from shardwise.ops.verify import verify


def names(directory: Path) -> set[str]:
    return {name for file in directory.glob("*.safetensors") for name in load_file(file)}


def states(net: nn.Module) -> dict[str, dict[str, object]]:
    """What people give to dcp.save."""
    model, optim = net.state_dict(), stepped(net).state_dict()
    compiled = {f"_orig_mod.{name}": value for name, value in model.items()}
    parallel = {f"module.{name}": value for name, value in model.items()}
    flat = {f"model.{name}": value for name, value in model.items()} | {"optimizer.lr": torch.ones(1)}
    return {
        "bare": dict(model),
        "with its optimizer": {"model": model, "optimizer": optim, "step": 3},
        "with a tensor beside it": {"model": model, "optimizer": optim, "step": torch.tensor(3)},
        "an application": {"app": {"model": model, "optim": optim}},
        "a state dict in a state dict": {"state_dict": {"model": model}},
        "whole paths for names": flat,
        "compiled": {"model": compiled, "optimizer": optim},
        "data parallel": {"module": parallel},
    }


@pytest.mark.parametrize("known", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize("form", list(states(nn.Linear(1, 1))))
def test_the_model_and_only_the_model(form: str, known: bool, tmp_path: Path) -> None:
    net = gpt2(5)
    source = save_dcp(states(net)[form], tmp_path / "dcp")
    if known:
        describe(source)
    report = consolidate(source, tmp_path / "export")
    assert names(report.path) == set(net.state_dict())
    assert verify(report.path).status == "whole"
    assert any("config.json" in note for note in report.notes) is not known
    describe(report.path)
    assert same_logits(report.path, net)


def test_a_model_of_its_own_in_one_of_its_own(tmp_path: Path) -> None:
    # The names of a Llama begin with "model." as well: a bare state dict stays what it is.
    net = nn.ModuleDict({"model": nn.Linear(2, 3)})
    assert names(consolidate(save_dcp(dict(net.state_dict()), tmp_path / "bare"), tmp_path / "a").path) == {
        "model.weight",
        "model.bias",
    }
    nested = save_dcp({"model": net.state_dict(), "lr_scheduler": {"last": torch.ones(1)}}, tmp_path / "nested")
    assert names(consolidate(nested, tmp_path / "b").path) == {"model.weight", "model.bias"}


def test_what_is_not_clear_is_refused_and_the_prefix_says_it(tmp_path: Path) -> None:
    net, average = gpt2(1), gpt2(2)
    source = save_dcp({"student": net.state_dict(), "teacher": average.state_dict()}, tmp_path / "dcp")
    assert main(["consolidate", str(source), "--output", str(tmp_path / "export")]) == 2
    assert not (tmp_path / "export").exists()
    with pytest.raises(MisuseError, match="'student', 'teacher'") as caught:
        consolidate(source)
    assert "--prefix" in (caught.value.hint or "")
    describe(source)
    with pytest.raises(MisuseError, match="class fits what is below each"):
        consolidate(source)
    assert main(["consolidate", str(source), "--prefix", "teacher", "--output", str(tmp_path / "export")]) == 0
    assert same_logits(tmp_path / "export", average)
    with pytest.raises(MisuseError, match="begins with"):
        consolidate(source, tmp_path / "other", prefix="nobody")


def test_an_averaged_copy_beside_the_model_is_not_exported(tmp_path: Path) -> None:
    net, average = gpt2(1), gpt2(2)
    source = save_dcp({"model": net.state_dict(), "ema": average.state_dict()}, tmp_path / "dcp")
    with pytest.raises(MisuseError, match="'ema'"):
        consolidate(source)
    assert names(consolidate(source, tmp_path / "export", prefix="model").path) == set(net.state_dict())


def test_an_optimizer_alone_is_refused_by_name(tmp_path: Path) -> None:
    optim = stepped(gpt2()).state_dict()
    for directory, state in (("optim", {"state": optim["state"]}), ("whatever", dict(optim))):
        source = save_dcp(state, tmp_path / directory)
        with pytest.raises(MisuseError, match="optimizer"):
            consolidate(source, tmp_path / "export")
    only = save_dcp({"optimizer": optim}, tmp_path / "only")
    with pytest.raises(MisuseError):
        consolidate(only, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_adapter_without_its_configuration_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    adapted = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
    source = save_dcp({"model": get_peft_model_state_dict(adapted)}, tmp_path / "dcp")
    with pytest.raises(MisuseError, match="an adapter's state"):
        consolidate(source, tmp_path / "export")
    source = save_dcp({"model": adapted.state_dict()}, tmp_path / "whole")
    torch.save(adapted.state_dict(), tmp_path / "whole.pt")
    for each in (source, tmp_path / "whole.pt"):
        with pytest.raises(MisuseError, match="an adapter's modules in it"):
            consolidate(each, tmp_path / "export")


def test_another_models_configuration_is_refused(tmp_path: Path) -> None:
    source = save_dcp({"model": gpt2().state_dict()}, tmp_path / "dcp")
    describe(source, n_layer=3)
    with pytest.raises(MissingTensorError):
        consolidate(source)
    describe(source, vocab_size=48)
    with pytest.raises(ShapeMismatchError):
        consolidate(source)
    assert main(["consolidate", str(source), "--output", str(tmp_path / "export")]) == 1
    assert not (tmp_path / "export").exists()


def test_a_tensor_that_is_not_contiguous_in_memory(tmp_path: Path) -> None:
    state = {"across": torch.arange(12.0).view(3, 4).t(), "along": torch.arange(4), "one": torch.tensor(2.0)}
    found = load_file(
        consolidate(save_dcp(dict(state), tmp_path / "dcp"), tmp_path / "export").path / "model.safetensors"
    )
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_the_files_of_a_model_with_rules_of_conversion_have_the_hubs_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    net = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()  # type: ignore[arg-type]
    source = save_dcp({"model": net.state_dict()}, tmp_path / "dcp")
    net.config.architectures = ["MixtralForCausalLM"]
    net.config.save_pretrained(source)
    with CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated=True).build(0, 0, 0) as engine:
        engine.save(0, 1, net)
    online = tmp_path / "epoch_0_step_1" / "model" / "consolidated"
    report = consolidate(source, tmp_path / "export")
    assert (report.path / "model.safetensors").read_bytes() == (online / "model.safetensors").read_bytes()
    assert same_logits(report.path, net)


# --- torch_save ------------------------------------------------------------------------------------------------------


def trained() -> GPT2LMHeadModel:
    net = gpt2(7)
    stepped(net)
    return net


@pytest.fixture
def own(tmp_path: Path) -> Path:
    net = gpt2(7)
    settings = {"checkpoint_dir": tmp_path / "root", "model_save_format": "torch_save", "save_consolidated": False}
    with CheckpointingConfig(**settings).build(0, 0, 0) as engine:  # type: ignore[arg-type]
        engine.save(0, 1, net, stepped(net))
    return tmp_path / "root" / "epoch_0_step_1"


def test_torch_save_becomes_the_export(own: Path) -> None:
    report = consolidate(own.parent)
    assert report.path == own / "model" / "consolidated"
    assert report.verified
    assert same_logits(report.path, trained())
    assert verify(own).status == "whole"
    assert not any("exp_avg" in name for name in names(report.path))


def test_a_changed_byte_of_a_distcp_file_is_found(own: Path, tmp_path: Path) -> None:
    file = next((own / "model").glob("*.distcp"))
    flip(file, file.stat().st_size // 2)
    assert main(["verify", str(own)]) == 1
    assert main(["consolidate", str(own), "--output", str(tmp_path / "export")]) == 1
    with pytest.raises(IntegrityError):
        consolidate(own, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert sorted(os.listdir(tmp_path)) == ["root"]


def test_changed_metadata_is_found(own: Path, tmp_path: Path) -> None:
    content = (own / "model" / ".metadata").read_bytes()
    (own / "model" / ".metadata").write_bytes(content.replace(b"h.0.ln_1.weight", b"h.1.ln_1.weight"))
    with pytest.raises((IntegrityError, FormatError)):
        consolidate(own, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_its_optimizer_is_refused(own: Path) -> None:
    with pytest.raises(MisuseError, match="optimizer"):
        consolidate(own / "optim")


def test_without_its_manifest_it_is_exported_with_a_note(own: Path, tmp_path: Path) -> None:
    (own / "manifest.json").unlink()
    report = consolidate(own, tmp_path / "export")
    assert not report.verified
    assert same_logits(report.path, trained())
    assert json.loads((report.path / "manifest.json").read_text())["info"]["source"] == "no manifest"


# --- tensors of the base ---------------------------------------------------------------------------------------------


class Carrying(nn.Module):
    """A model whose class does not load a tensor that its base ships."""

    _keys_to_ignore_on_load_unexpected = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.second = nn.Linear(4, 3)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    state = {name: value.to(torch.bfloat16) for name, value in Carrying().state_dict().items()}
    save_file({name: state[name] for name in ("first.weight", "first.bias")}, path / "a.safetensors")
    rest = {name: state[name] for name in ("second.weight", "second.bias")}
    save_file({**rest, "extra.weight": torch.arange(6.0).view(2, 3)}, path / "b.safetensors")
    files = {"first": "a.safetensors", "second": "b.safetensors", "extra": "b.safetensors"}
    weight_map = {name: files[name.split(".")[0]] for name in [*state, "extra.weight"]}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"architectures": ["Carrying"]}))
    return path


def save_over(base: Path, root: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    settings = {"checkpoint_dir": root, "model_repo_id": str(base), "pass_through_unloaded": True, **changes}
    with CheckpointingConfig(**settings).build(0, 0, 0) as engine:  # type: ignore[arg-type]
        engine.save(0, 1, Carrying().to(torch.bfloat16))
    return root / "epoch_0_step_1"


def test_tensors_of_the_base_are_carried_over_as_in_an_online_export(base: Path, tmp_path: Path) -> None:
    online = save_over(base, tmp_path / "online", save_consolidated=True) / "model" / "consolidated"
    shards = save_over(base, tmp_path / "shards", save_consolidated=False)
    by_torch = save_over(base, tmp_path / "torch", save_consolidated=False, model_save_format="torch_save")
    for saved in (shards, by_torch):
        report = consolidate(saved)
        assert "extra.weight" in names(report.path)
        produced = {path.name: path.read_bytes() for path in report.path.iterdir() if path.name != "manifest.json"}
        assert produced == {path.name: path.read_bytes() for path in online.iterdir()}
        assert verify(saved).status == "whole"


def test_a_base_that_is_not_at_hand_is_an_error(base: Path, tmp_path: Path) -> None:
    shards = save_over(base, tmp_path / "shards", save_consolidated=False)
    base.rename(tmp_path / "moved")
    assert main(["consolidate", str(shards), "--output", str(tmp_path / "export")]) == 2
    assert not (tmp_path / "export").exists()
    found = consolidate(shards, tmp_path / "export", base=tmp_path / "moved")
    assert torch.equal(load_file(found.path / "b.safetensors")["extra.weight"], torch.arange(6.0).view(2, 3))
    shutil.rmtree(tmp_path / "moved")
    gpt2().save_pretrained(tmp_path / "moved")
    with pytest.raises(MissingTensorError, match="carries this tensor over"):
        consolidate(shards, tmp_path / "again", base=tmp_path / "moved")


def test_a_component_by_itself_knows_its_base_too(base: Path, tmp_path: Path) -> None:
    settings = {"checkpoint_dir": tmp_path, "model_repo_id": str(base), "pass_through_unloaded": True}
    with CheckpointingConfig(**settings, save_consolidated=False).build(0, 0, 0) as engine:  # type: ignore[arg-type]
        engine.save_model(Carrying().to(torch.bfloat16), tmp_path / "alone")
    assert "extra.weight" in names(consolidate(tmp_path / "alone").path)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_cut_files_of_others_are_refused(tmp_path: Path) -> None:
    source = save_dcp({"model": gpt2().state_dict()}, tmp_path / "dcp")
    cut(next(source.glob("*.distcp")), 1)
    assert main(["verify", str(source)]) == 1
    assert main(["consolidate", str(source), "--output", str(tmp_path / "export")]) == 1
    assert not (tmp_path / "export").exists()
