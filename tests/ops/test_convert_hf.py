"""`convert --to hf`: transformers opens what others wrote, with the logits of the original."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ops.damaged import cut, gpt2, save_dcp, stepped
from tests.ops.llamas import TOKENS, Titan, base, llama, opens_as
from torch import nn
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import LlamaForCausalLM

from shardwise.cli import main
from shardwise.errors import (
    AmbiguousFilesError,
    CheckpointExistsError,
    FormatError,
    IntegrityError,
    MissingTensorError,
    MisuseError,
    UnsafePickleError,
)
from shardwise.ops.convert import Format, convert


def left_of(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def net() -> LlamaForCausalLM:
    return llama(3)


@pytest.fixture
def config(net: LlamaForCausalLM, tmp_path: Path) -> Path:
    return base(tmp_path / "base", net)


# --- DCP and its like ------------------------------------------------------------------------------------------------


def dcp_states(net: nn.Module) -> dict[str, dict[str, object]]:
    """What people give to dcp.save; the last two as Lightning's FSDP strategy does."""
    model, optim = net.state_dict(), get_optimizer_state_dict(net, stepped(net))
    inside = {f"model.{name}": value for name, value in model.items()}
    return {
        "bare": dict(model),
        "model": {"model": model},
        "app": {"app": {"model": model, "optim": optim}},
        "beside an optimizer": {"model": model, "optimizer": optim, "step": 3},
        "lightning": {"model": inside, "optimizer_0": optim},
        "lightning, FSDP2": {"state_dict": inside, "optimizer_0": optim, "optimizer_1": optim},
    }


@pytest.mark.parametrize("form", list(dcp_states(nn.Linear(1, 1))))
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_dcp(form: str, tied: bool, tmp_path: Path) -> None:
    net = llama(3, tie_word_embeddings=tied)
    state = dcp_states(net)[form]  # steps the model
    source = save_dcp(state, tmp_path / "dcp")
    if "lightning" in form:
        torch.save({"epoch": 1}, source / "meta.pt")
    report = convert(source, tmp_path / "out", "hf", config=base(tmp_path / "base", net))
    assert opens_as(report.path, net)
    assert not any("exp_avg" in name for file in report.path.glob("*.safetensors") for name in load_file(file))
    assert (report.path / "tokenizer_config.json").exists()


def test_lightnings_directory_without_a_configuration_asks_where_the_model_is(
    net: LlamaForCausalLM, tmp_path: Path
) -> None:
    source = save_dcp(dcp_states(net)["lightning"], tmp_path / "dcp")
    torch.save({"epoch": 1}, source / "meta.pt")
    with pytest.raises(MisuseError, match="attribute of a LightningModule"):
        convert(source, tmp_path / "out", "hf")
    report = convert(source, tmp_path / "out", "hf", prefix="model.model")
    assert load_file(report.path / "model.safetensors").keys() == net.state_dict().keys()


def test_a_tensor_outside_of_the_model_is_told(net: LlamaForCausalLM, config: Path, tmp_path: Path) -> None:
    state = {f"model.{name}": value for name, value in net.state_dict().items()} | {"loss.weight": torch.ones(3)}
    report = convert(save_dcp({"state_dict": state}, tmp_path / "dcp"), tmp_path / "out", "hf", config=config)
    assert any("state_dict.loss.weight" in note for note in report.notes)
    assert opens_as(report.path, net)


def test_torchs_sharded_files(net: LlamaForCausalLM, config: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = HuggingFaceStorageWriter(str(tmp_path / "hf"), save_distributed=True)
        dcp_save(net.state_dict(), storage_writer=writer)
    assert any(name.startswith("shard-00001-model-") for name in left_of(tmp_path / "hf"))
    assert opens_as(convert(tmp_path / "hf", tmp_path / "out", "hf", config=config).path, net)


def test_a_run_of_automodel(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "interop" / "automodel" / "epoch_0_step_3"
    report = convert(source, tmp_path / "out", "hf", assume_complete=True)
    assert report.tensors == len(load_file(report.path / "model.safetensors")) > 2
    assert not any("exp_avg" in name for name in load_file(report.path / "model.safetensors"))


# --- torch.save ------------------------------------------------------------------------------------------------------


class Module(nn.Module):
    """As a LightningModule has its model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, nn.Linear(2, 2)


def files(net: nn.Module) -> dict[str, tuple[str, dict[str, object]]]:
    """What people give to torch.save, and how they call the file."""
    state, optim = net.state_dict(), stepped(net).state_dict()
    lightning = {"epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.5", "optimizer_states": [optim]}
    parallel = {f"module._orig_mod.{name}": value for name, value in state.items()}
    return {
        "bare": ("model.pt", dict(state)),
        "bin": ("pytorch_model.bin", dict(state)),
        "model": ("last.pth", {"model": state, "optimizer": optim, "step": 3}),
        "module": ("last.pt", {"module": state}),
        "model_state_dict": ("last.pt", {"model_state_dict": state, "optimizer_state_dict": optim, "loss": 0.1}),
        "parallel": ("last.pt", {"state_dict": parallel}),
        "lightning": ("last.ckpt", {**lightning, "state_dict": Module(net).state_dict(), "loops": {}}),
    }


@pytest.mark.parametrize("form", list(files(nn.Linear(1, 1))))
@pytest.mark.parametrize("how", ["file", "directory"])
def test_files_of_torch(form: str, how: str, net: LlamaForCausalLM, config: Path, tmp_path: Path) -> None:
    name, content = files(net)[form]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("not the model's")
    torch.save(content, tmp_path / "run" / name)
    source = tmp_path / "run" / name if how == "file" else tmp_path / "run"
    report = convert(source, tmp_path / "out", "hf", config=config)
    assert opens_as(report.path, net)
    assert left_of(report.path) == {
        "config.json", "tokenizer_config.json", "model.safetensors", "manifest.json",
        "model.safetensors.index.json",
    }  # fmt: skip
    told = " ".join(report.notes)
    assert ("optimizer_states" in told and "loss.weight" in told) is (form == "lightning")


@pytest.mark.parametrize("kind", ["old", "transposed", "tied"])
def test_files_that_byte_ranges_do_not_describe(kind: str, tmp_path: Path) -> None:
    net = llama(5, tie_word_embeddings=kind == "tied")
    state = net.state_dict()
    if kind == "transposed":
        state = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in state.items()}
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=kind != "old")
    assert opens_as(convert(tmp_path / "model.pt", tmp_path / "o", "hf", config=base(tmp_path / "b", net)).path, net)


def test_files_with_an_index(net: LlamaForCausalLM, config: Path, tmp_path: Path) -> None:
    state = net.state_dict()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    where = {name: names[number % 2] for number, name in enumerate(state)}
    for file in names:
        torch.save({name: value for name, value in state.items() if where[name] == file}, config / file)
    index = {"metadata": {}, "weight_map": where}
    (config / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert opens_as(convert(config, tmp_path / "out", "hf").path, net)
    (config / names[1]).unlink()
    with pytest.raises((IntegrityError, FormatError)):
        convert(config, tmp_path / "new", "hf")
    assert not (tmp_path / "new").exists()


def test_a_configuration_beside_the_file_is_used(net: LlamaForCausalLM, config: Path, tmp_path: Path) -> None:
    torch.save(net.state_dict(), config / "pytorch_model.bin")
    for source in (config, config / "pytorch_model.bin"):
        assert opens_as(convert(source, tmp_path / source.name / "out", "hf").path, net)


def test_without_a_configuration_lightning_asks_and_the_prefix_says(net: LlamaForCausalLM, tmp_path: Path) -> None:
    name, content = files(net)["lightning"]
    torch.save(content, tmp_path / name)
    with pytest.raises(MisuseError, match="begin with 'net', 'loss'") as caught:
        convert(tmp_path / name, tmp_path / "out", "hf")
    assert "--prefix" in str(caught.value)
    with pytest.raises(MisuseError, match="begins with 'model.'"):
        convert(tmp_path / name, tmp_path / "out", "hf", prefix="model")
    (tmp_path / "train.log").write_text("not the model's")
    for source in (tmp_path / name, tmp_path):
        report = convert(source, tmp_path.parent / f"out-{source.name}", "hf", prefix="net")
        assert load_file(report.path / "model.safetensors").keys() == net.state_dict().keys()
        assert left_of(report.path) == {"manifest.json", "model.safetensors", "model.safetensors.index.json"}
        shutil.rmtree(report.path)
    assert left_of(tmp_path) == {name, "train.log"}


def test_two_models_in_a_file_that_fit(net: LlamaForCausalLM, config: Path, tmp_path: Path) -> None:
    average = llama(8)
    both = {
        f"{name}.{key}": v for name, model in (("net", net), ("ema", average)) for key, v in model.state_dict().items()
    }
    torch.save(both, tmp_path / "m.pt")
    with pytest.raises(MisuseError, match="below each of net, ema"):
        convert(tmp_path / "m.pt", tmp_path / "out", "hf", config=config)
    report = convert(tmp_path / "m.pt", tmp_path / "out", "hf", config=config, prefix="ema")
    assert opens_as(report.path, average)


# --- torchtitan ------------------------------------------------------------------------------------------------------


def titan_source(model: Titan, directory: Path, form: str) -> Path:
    if form == "file":
        directory.mkdir()
        torch.save({**model.state_dict(), "rope.freqs": torch.ones(2)}, directory / "consolidated.00.pth")
        return directory / "consolidated.00.pth"
    optimizer = get_optimizer_state_dict(model, stepped(model))
    return save_dcp({**model.state_dict(), "optimizer": optimizer, "train_state": {"step": 3}}, directory)


@pytest.mark.parametrize("form", ["dcp", "file"])
@pytest.mark.parametrize("rope", ["interleaved", "halves"])
def test_torchtitans_names_with_the_rotation_said(form: str, rope: str, tmp_path: Path) -> None:
    config = llama().config
    model = Titan(config, interleaved=rope == "interleaved").eval()
    source = titan_source(model, tmp_path / "step-3", form)
    with pytest.raises(MisuseError, match="order of the rows of q and k") as caught:
        convert(source, tmp_path / "out", "hf", config=base(tmp_path / "base", llama()))
    assert "--rope interleaved" in str(caught.value)
    assert not (tmp_path / "out").exists()
    report = convert(source, tmp_path / "out", "hf", config=tmp_path / "base", rope=rope)  # type: ignore[arg-type]
    opened = LlamaForCausalLM.from_pretrained(report.path).eval()
    with torch.no_grad():
        expected, found = model(TOKENS), opened(TOKENS).logits
        # The other rotation is another model.
        other = Titan(config, interleaved=rope != "interleaved").eval()
        other.load_state_dict(model.state_dict())
        assert not torch.allclose(other(TOKENS), expected, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert any("q_proj and k_proj" in note or "stay as they are" in note for note in report.notes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_key_value_heads": None}, "has no num_key_value_heads|has a Llama"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "not known, only in a LlamaForCausalLM"),
        ({"num_hidden_layers": 3}, "tensors are absent"),
        ({"num_hidden_layers": 1}, "not in the configuration"),
        ({"tie_word_embeddings": True, "attention_bias": True}, "tensors are absent"),
    ],
)
def test_torchtitans_names_are_refused_where_anything_is_not_known(
    changes: dict[str, object], why: str, tmp_path: Path
) -> None:
    source = titan_source(Titan(llama().config), tmp_path / "step-3", "file")
    config = base(tmp_path / "base", llama(), **changes)
    with pytest.raises((MisuseError, FormatError), match=why):
        convert(source, tmp_path / "out", "hf", config=config, rope="interleaved")
    assert not (tmp_path / "out").exists()


def test_the_names_of_torchtitan_0_3(tmp_path: Path) -> None:
    model = Titan(llama().config).eval()
    state = {
        name.replace("attention.w", "attention.qkv_linear.w")
        .replace("qkv_linear.wo", "wo")
        .replace("output", "lm_head"): v
        for name, v in model.state_dict().items()
    }
    torch.save(state, tmp_path / "m.pt")
    config = base(tmp_path / "base", llama())
    report = convert(tmp_path / "m.pt", tmp_path / "out", "hf", config=config, rope="interleaved")
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(report.path).eval()(TOKENS).logits
        torch.testing.assert_close(found, model(TOKENS), atol=1e-5, rtol=1e-4)
    said = ["--config", str(config), "--rope", "interleaved"]
    assert main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "a"), "--to", "hf", *said]) == 0
    assert main(["consolidate", str(tmp_path / "m.pt"), "--output", str(tmp_path / "b"), *said]) == 0
    for place in ("a", "b"):
        content = (tmp_path / place / "model.safetensors").read_bytes()
        assert content == (report.path / "model.safetensors").read_bytes()
    torch.save({**state, "output.weight": state["lm_head.weight"]}, tmp_path / "two.pt")
    with pytest.raises(MisuseError, match=r"2 tensors are one: lm_head.weight, output.weight"):
        convert(tmp_path / "two.pt", tmp_path / "new", "hf", config=config, rope="interleaved")


def test_a_name_more_than_torchtitans_is_refused(tmp_path: Path) -> None:
    model = Titan(llama().config)
    model.layers["0"].attention.register_parameter("q_norm", nn.Parameter(torch.ones(4)))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(MisuseError, match=r"1 tensors are not known: layers.0.attention.q_norm"):
        convert(tmp_path / "m.pt", tmp_path / "o", "hf", config=base(tmp_path / "b", llama()), rope="interleaved")


def test_torchtitans_names_without_a_configuration_stay_as_they_are(tmp_path: Path) -> None:
    state = Titan(llama().config).state_dict()
    torch.save(state, tmp_path / "m.pt")
    report = convert(tmp_path / "m.pt", tmp_path / "out", "hf")
    found = load_file(report.path / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert any("torchtitan" in note for note in report.notes)


def test_the_rotation_of_another_model_is_misuse(net: LlamaForCausalLM, config: Path, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "m.pt")
    with pytest.raises(MisuseError, match="rope is for a Llama"):
        convert(tmp_path / "m.pt", tmp_path / "out", "hf", config=config, rope="interleaved")


# --- refused ---------------------------------------------------------------------------------------------------------


class Code:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("ran",))


def test_a_pickle_that_would_run_code(
    net: LlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": net.state_dict(), "args": Code()}, tmp_path / "m.pt")
    capsys.readouterr()
    with pytest.raises(UnsafePickleError, match="print") as caught:
        convert(tmp_path / "m.pt", tmp_path / "out", "hf")
    assert "weights_only=False" in str(caught.value)
    assert "ran" not in capsys.readouterr().out
    assert left_of(tmp_path) == {"m.pt"}


def test_what_is_no_model_is_refused_by_name(net: LlamaForCausalLM, config: Path, tmp_path: Path) -> None:
    optim, state = stepped(net).state_dict(), net.state_dict()
    lora = {"base_model.model.q_proj.lora_A.weight": torch.ones(2, 2)}
    for name, content, why in (
        ("optimizer.pt", optim, "optimizer's state and no model"),
        ("adapter_model.bin", lora, "an adapter"),
        ("lora.pt", lora, "an adapter's state"),
        ("pytorch_model-00001-of-00002.bin", state, "one of several files"),
        ("both.pt", {"a": state, "b": state}, "which of them is the model"),
    ):
        place = tmp_path / name.partition(".")[0] / name
        place.parent.mkdir()
        torch.save(state, place.with_name(place.name.replace("00001-of", "00002-of")))
        torch.save(content, place)
        with pytest.raises((MisuseError, FormatError), match=why):
            convert(place, tmp_path / "out", "hf")
    with pytest.raises(MissingTensorError):
        convert(
            save_dcp(dict(llama(num_hidden_layers=1).state_dict()), tmp_path / "d"),
            tmp_path / "out",
            "hf",
            config=config,
        )
    with pytest.raises(MisuseError, match="has no config.json"):
        convert(tmp_path / "d", tmp_path / "out", "hf", config=tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(net: LlamaForCausalLM, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "m.pt")
    (tmp_path / "out").mkdir()
    for to in ("hf", "dcp", "shards"):
        with pytest.raises(CheckpointExistsError):
            convert(tmp_path / "m.pt", tmp_path / "out", to)  # type: ignore[arg-type]
    assert left_of(tmp_path / "out") == set()


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_what_comes_there_meanwhile_stays(net: LlamaForCausalLM, tmp_path: Path, to: Format) -> None:
    torch.save(net.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointExistsError, match="already there"):
        convert(tmp_path / "m.pt", tmp_path / "out", to, progress=lambda *_: (tmp_path / "out").mkdir(exist_ok=True))
    assert left_of(tmp_path) == {"m.pt", "out"}
    assert left_of(tmp_path / "out") == set()


def test_cut_files_and_several_files(net: LlamaForCausalLM, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "a.ckpt")
    torch.save(net.state_dict(), tmp_path / "b.ckpt")
    with pytest.raises(AmbiguousFilesError, match=r"a\.ckpt"):
        convert(tmp_path, tmp_path / "out", "hf")
    cut(tmp_path / "a.ckpt", 100)
    with pytest.raises((IntegrityError, FormatError)):
        convert(tmp_path / "a.ckpt", tmp_path / "out", "hf")
    assert left_of(tmp_path) == {"a.ckpt", "b.ckpt"}


def test_folders_that_belong_to_a_model_go_along(tmp_path: Path) -> None:
    """As sentence-transformers lays them out, by hand."""
    source = tmp_path / "source"
    gpt2().save_pretrained(source)
    for folder in ("1_Pooling", "additional_chat_templates", "unrelated"):
        (source / folder).mkdir()
        (source / folder / "config.json").write_text("{}")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}, {"path": "/etc"}]
    (source / "modules.json").write_text(json.dumps(modules))
    convert(source, tmp_path / "made", "hf")
    assert {path.name for path in (tmp_path / "made").iterdir() if path.is_dir()} == {
        *("1_Pooling", "additional_chat_templates"),
    }
    (source / "modules.json").write_text("[1]")
    convert(source, tmp_path / "again", "hf")
    assert not (tmp_path / "again" / "1_Pooling").exists()
