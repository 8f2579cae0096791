"""`convert --to shards` and `--to dcp`: training goes on bit for bit, and torch reads what was written."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import cast
from zipfile import ZipFile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from tests.engine.setups import checkpointer
from tests.interop.automodel_run import build, everything
from tests.ops.damaged import flip, save_dcp
from tests.ops.llamas import Titan, base, llama, opens_as, outputs
from tests.support.faults import NamedHandles
from tests.support.peak import peak, reset_peak
from tests.support.ranks import run as ranks
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from shardwise import CheckpointingConfig
from shardwise.disk.storage import Buffer
from shardwise.errors import CheckpointNotFoundError, IntegrityError, MisuseError, StorageError, UnsafePickleError
from shardwise.ops.convert import FORMATS, Format, convert
from shardwise.ops.listing import list_checkpoints
from shardwise.ops.torchtitan_names import ROPES
from shardwise.ops.verify import verify


class Run:
    """A small run with groups of parameters, whose losses show every bit of its state."""

    def __init__(self, seed: int, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **changes: object) -> None:
        self.net = llama(seed, **changes)
        flat = [p for p in self.net.parameters() if p.ndim == 1]
        rest = [p for p in self.net.parameters() if p.ndim > 1]
        groups = [{"params": flat, "lr": 0.02}, {"params": rest, "lr": 0.01}]
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        self.optimizer = kind(groups, **options)

    def steps(self, first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(step))
            loss = self.net(tokens, labels=tokens).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def bits(self) -> dict[str, torch.Tensor]:
        names = {param: name for name, param in self.net.named_parameters()}
        found = {name: value.clone() for name, value in self.net.state_dict().items()}
        for param, state in self.optimizer.state.items():
            found |= {f"{names[param]}/{key}": value.clone() for key, value in state.items()}
        return found


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(run: Run, layout: str, directory: Path) -> None:
    """As people do, by DCP alone."""
    model, optim = get_state_dict(run.net, run.optimizer, options=FLAT if layout == "flat" else None)
    if layout == "app":
        save_dcp({"app": {"model": model, "optim": optim}, "lr_scheduler": {"last": 3}}, directory)
    elif layout == "apart":
        save_dcp(dict(model), directory / "model")
        save_dcp({"optim": optim, "sched": {"last": 3}}, directory / "optim")
    elif layout == "trainer":
        save_dcp({"model": model}, directory / "pytorch_model_fsdp_0")
        save_dcp({"optimizer": optim}, directory / "optimizer_0")
    elif layout == "lightning":
        inside = {f"net.{name}": value for name, value in model.items()}
        state = {f"net.{name}": value for name, value in cast("dict[str, object]", optim["state"]).items()}
        groups = [{**g, "params": [f"net.{p}" for p in g["params"]]} for g in cast("list[dict]", optim["param_groups"])]
        save_dcp({"model": inside, "optimizer_0": {"state": state, "param_groups": groups}}, directory)
        torch.save({"epoch": 0}, directory / "meta.pt")
    else:
        save_dcp({"model": model, "optimizer": optim, "train_state": {"step": 3}}, directory)


def test_tied_parameters_go_on(tmp_path: Path) -> None:
    run = Run(1, tie_word_embeddings=True)
    run.steps(0, 2)
    save(run, "named", tmp_path / "step-2")
    expected = run.steps(2, 2)
    for known in (None, base(tmp_path / "base", run.net)):
        root = tmp_path / f"root {known is None}"
        convert(tmp_path / "step-2", root, "shards", config=known)
        other = Run(3, tie_word_embeddings=True)
        with CheckpointingConfig(checkpoint_dir=root).build(0, 0, 0) as engine:
            engine.restore(other.net, other.optimizer)
        assert other.steps(2, 2) == expected


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_on_as_in_torch(kind: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    for layout in ("named", "flat", "app", "apart", "lightning", "trainer"):
        run = Run(1, kind)
        run.steps(0, 3)
        source = tmp_path / layout / "step-3"
        save(run, layout, source)
        expected = run.steps(3, 3), run.bits()
        if layout == "named":  # torch itself, in another process of training
            again = Run(7, kind)
            model, optim = get_state_dict(again.net, again.optimizer)
            state = {"model": model, "optimizer": optim}
            dcp.load(state, checkpoint_id=str(source))
            set_state_dict(again.net, again.optimizer, model_state_dict=model, optim_state_dict=state["optimizer"])
            assert again.steps(3, 3) == expected[0]
        known = base(tmp_path / "base", run.net) if layout == "lightning" else None
        report = convert(source, tmp_path / layout / "root", "shards", config=known)
        assert report.optimizer
        assert report.path == tmp_path / layout / "root" / "epoch_0_step_3"
        other = Run(9, kind)
        with CheckpointingConfig(checkpoint_dir=tmp_path / layout / "root").build(0, 0, 0) as engine:
            record = engine.restore(other.net, other.optimizer)
        assert record is not None
        assert record.step == 3
        assert other.steps(3, 3) == expected[0]
        bits = other.bits()
        assert bits.keys() == expected[1].keys()
        assert all(torch.equal(bits[name], value) for name, value in expected[1].items())
        assert verify(report.path).status == "whole"
        if layout == "trainer":
            assert any("not carried over: optimizer_0" in n for n in convert(source, tmp_path / "dcp", "dcp").notes)
        left = {"named": "train_state", "flat": "train_state", "app": "lr_scheduler", "apart": "sched"}.get(layout)
        assert any(f"not carried over: {left}" in note for note in report.notes) is (left is not None)


def test_a_root_to_go_on_from(tmp_path: Path) -> None:
    run = Run(1)
    run.steps(0, 2)
    save(run, "named", tmp_path / "dcp")
    with pytest.raises(MisuseError, match="at which step"):
        convert(tmp_path / "dcp", tmp_path / "root", "shards")
    assert not (tmp_path / "root").exists()
    (tmp_path / "dcp" / "train.log").write_text("not the model's")
    plain = convert(tmp_path / "dcp", tmp_path / "plain", "shards", epoch=1, step=2).path
    assert not (plain / "model" / ".hf_metadata").exists()
    convert(tmp_path / "dcp", tmp_path / "root", "shards", epoch=1, step=2, config=base(tmp_path / "base", run.net))
    [entry] = list_checkpoints(tmp_path / "root")
    assert (entry.step, entry.state, entry.pointers) == (2, "published", ("LATEST",))
    other = Run(5)
    with CheckpointingConfig(checkpoint_dir=tmp_path / "root").build(0, 0, 0) as engine:
        engine.load_model(other.net, tmp_path / "root" / "epoch_1_step_2" / "model")
        assert torch.equal(outputs(other.net), outputs(run.net))
        engine.restore(other.net, other.optimizer)
        engine.save(1, 3, other.net, other.optimizer)
    # A checkpoint like any other: with the configuration, its export can be made.
    assert opens_as(convert(tmp_path / "root" / "epoch_1_step_2", tmp_path / "hf", "hf").path, run.net)
    assert (tmp_path / "root" / "epoch_1_step_2" / "model" / ".hf_metadata" / "tokenizer_config.json").exists()


def test_ties_and_tensors_of_a_model(tmp_path: Path) -> None:
    net = llama(2, tie_word_embeddings=True)
    config = base(tmp_path / "base", net)
    for name, source in {
        "dcp": save_dcp({"model": net.state_dict()}, tmp_path / "source"),
        "hf": convert(tmp_path / "source", tmp_path / "hf_source", "hf", config=config).path,
    }.items():
        convert(source, tmp_path / name / "root", "shards", config=config)
        other = llama(4, tie_word_embeddings=True)
        with CheckpointingConfig(checkpoint_dir=tmp_path / name / "root").build(0, 0, 0) as engine:
            engine.restore(other)
        assert torch.equal(outputs(other), outputs(net))
        convert(tmp_path / name / "root", tmp_path / name / "back", "dcp", config=config)
        third = llama(6, tie_word_embeddings=True)
        state = {"model": third.state_dict()}
        dcp.load(state, checkpoint_id=str(tmp_path / name / "back"))
        assert state["model"].keys() == net.state_dict().keys()
        third.load_state_dict(state["model"])
        assert torch.equal(outputs(third), outputs(net))


@pytest.mark.parametrize("choice", [None, True, False])
def test_an_optimizer_that_cannot_go_on_is_refused_unless_left_out(choice: bool | None, tmp_path: Path) -> None:
    run = Run(1)
    run.steps(0, 1)
    numbered = save_dcp({"model": run.net.state_dict(), "optimizer": run.optimizer.state_dict()}, tmp_path / "step-1")
    torch.save({"model": run.net.state_dict(), "optimizer": run.optimizer.state_dict()}, tmp_path / "step-1.pt")
    for source in (numbered, tmp_path / "step-1.pt"):
        if choice is False:
            report = convert(source, tmp_path / source.suffix / "root", "shards", optimizer=False)
            assert not report.optimizer
            assert any("optimizer" in note for note in report.notes)
            assert any("optimizer" in note for note in convert(source, source.with_name("d"), "dcp").notes)
            shutil.rmtree(source.with_name("d"))
            assert report.path.name == "epoch_0_step_1"
            assert not (report.path / "optim").exists()
        else:
            with pytest.raises(MisuseError, match="known by number alone|parameters by number alone") as caught:
                convert(source, tmp_path / "root", "shards", optimizer=choice)
            assert "--no-optimizer" in str(caught.value)
            assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin", "optimizer_0_rank1.bin", "bf16_x_optim_states.pt"])
def test_an_optimizer_in_a_file_beside_the_model_is_not_passed_over(name: str, tmp_path: Path) -> None:
    run = Run(1)
    run.net.save_pretrained(tmp_path / "checkpoint-1")
    torch.save({}, tmp_path / "checkpoint-1" / name)
    with pytest.raises(MisuseError, match=name) as caught:
        convert(tmp_path / "checkpoint-1", tmp_path / "root", "shards")
    assert "--no-optimizer" in str(caught.value)
    assert not (tmp_path / "root").exists()
    convert(tmp_path / "checkpoint-1", tmp_path / "root", "shards", optimizer=False)


def test_rope_is_refused_where_it_does_nothing(tmp_path: Path) -> None:
    with CheckpointingConfig(checkpoint_dir=tmp_path / "own").build(0, 0, 0) as engine:
        engine.save(0, 1, Run(1).net)
    with pytest.raises(MisuseError, match="rope is for"):
        convert(tmp_path / "own", tmp_path / "out", "dcp", rope="interleaved")


def test_an_optimizer_of_other_parameters_or_none(tmp_path: Path) -> None:
    run, other = Run(1), nn.Linear(2, 2)
    run.steps(0, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    _, foreign = get_state_dict(other, optimizer)
    save_dcp({"model": run.net.state_dict(), "optimizer": foreign}, tmp_path / "a")
    with pytest.raises(MisuseError, match="2 parameters that are not the model's"):
        convert(tmp_path / "a", tmp_path / "root", "shards", step=1)
    save_dcp({"model": run.net.state_dict()}, tmp_path / "b")
    with pytest.raises(MisuseError, match="no optimizer beside the model"):
        convert(tmp_path / "b", tmp_path / "root", "shards", optimizer=True)
    with pytest.raises(MisuseError, match="are for shards"):
        convert(tmp_path / "b", tmp_path / "root", "dcp", optimizer=True)


def titan_steps(model: Titan, optimizer: torch.optim.Optimizer, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_run_of_torchtitan_goes_on_in_transformers_with_its_optimizer(tmp_path: Path) -> None:
    model = Titan(llama().config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    titan_steps(model, optimizer, 0, 4)
    own, state = get_state_dict(model, optimizer, options=FLAT)
    source = save_dcp({**own, "optimizer": state, "train_state": {"step": torch.tensor(4)}}, tmp_path / "step-4")
    expected = titan_steps(model, optimizer, 4, 4)
    known = base(tmp_path / "base", llama())
    found = {}
    for rope in ROPES:
        report = convert(source, tmp_path / rope, "shards", config=known, rope=rope)
        assert report.optimizer
        run = Run(2)
        run.optimizer = torch.optim.AdamW(run.net.parameters(), lr=0.5)
        with CheckpointingConfig(checkpoint_dir=tmp_path / rope).build(0, 0, 0) as engine:
            engine.restore(run.net, run.optimizer)
        found[rope] = run.steps(4, 4)
    assert found["interleaved"] == pytest.approx(expected, abs=1e-4)
    assert found["halves"] != pytest.approx(expected, abs=1e-3)
    # Without a configuration the model is torchtitan's own, and goes on with its own names.
    convert(source, tmp_path / "own", "shards")
    again = Titan(llama().config)
    optimizer = torch.optim.AdamW(again.parameters())
    with CheckpointingConfig(checkpoint_dir=tmp_path / "own").build(0, 0, 0) as engine:
        engine.restore(again, optimizer)
    assert titan_steps(again, optimizer, 4, 4) == expected


def test_state_of_rows_whose_order_is_not_known_is_refused(tmp_path: Path) -> None:
    model = Titan(llama().config)
    optimizer = torch.optim.AdamW(model.parameters())
    titan_steps(model, optimizer, 0, 1)
    own, state = get_state_dict(model, optimizer)
    states = cast("dict[str, dict[str, object]]", state["state"])
    states["layers.1.attention.wk.weight"]["rows"] = torch.ones(8)
    save_dcp({**own, "optimizer": state}, tmp_path / "step-1")
    known = base(tmp_path / "base", llama())
    with pytest.raises(MisuseError, match=r"keeps \[8\] of a parameter whose rows"):
        convert(tmp_path / "step-1", tmp_path / "root", "shards", config=known, rope="interleaved")
    assert not (tmp_path / "root").exists()


def test_an_optimizer_of_old_torch_or_of_single_ranks(tmp_path: Path) -> None:
    run = Run(1)
    run.steps(0, 1)
    model, optim = get_state_dict(run.net, run.optimizer)
    states = cast("dict[str, dict[str, object]]", optim["state"])
    old = {**optim, "state": {name: {**state, "step": 1} for name, state in states.items()}}
    save_dcp({"model": model, "optimizer": old}, tmp_path / "step-1")
    with pytest.raises(MisuseError, match="counts its steps in numbers"):
        convert(tmp_path / "step-1", tmp_path / "root", "shards")
    with CheckpointingConfig(checkpoint_dir=tmp_path / "own").build(0, 0, 0) as engine:
        own = engine.save(0, 1, run.net, run.optimizer)
    assert own is not None
    (own / "manifest.json").unlink()
    (own / "optim" / "per_rank").mkdir()
    with pytest.raises(MisuseError, match="single ranks keep"):
        convert(own, tmp_path / "root", "shards")
    assert not (tmp_path / "root").exists()


class Code:
    """A value that only code can make."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("ran",))


def test_an_option_of_an_optimizer_that_would_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(1)
    run.steps(0, 1)
    model, optim = get_state_dict(run.net, run.optimizer)
    for group in cast("list[dict[str, object]]", optim["param_groups"]):
        group["hook"] = Code()
    save_dcp({"model": model, "optimizer": optim}, tmp_path / "step-1")
    capsys.readouterr()
    with pytest.raises(UnsafePickleError, match="print") as caught:
        convert(tmp_path / "step-1", tmp_path / "root", "shards")
    assert "--no-optimizer" in str(caught.value)
    assert not convert(tmp_path / "step-1", tmp_path / "root", "shards", optimizer=False).optimizer
    assert "ran" not in capsys.readouterr().out


def test_our_own_in_dcps_format(tmp_path: Path) -> None:
    run = Run(1)
    run.steps(0, 2)
    settings = {"checkpoint_dir": tmp_path / "a", "model_save_format": "torch_save", "save_consolidated": False}
    with CheckpointingConfig(**settings).build(0, 0, 0) as engine:  # type: ignore[arg-type]
        engine.save(0, 2, run.net, run.optimizer, extra_state={"seen": [1]})
    expected = run.steps(2, 2)
    report = convert(tmp_path / "a", tmp_path / "b", "shards")
    assert report.verified
    assert report.optimizer
    assert any("extra" in note for note in report.notes)
    other = Run(5)
    with CheckpointingConfig(checkpoint_dir=tmp_path / "b").build(0, 0, 0) as engine:
        engine.restore(other.net, other.optimizer)
    assert other.steps(2, 2) == expected
    file = next((tmp_path / "a" / "epoch_0_step_2" / "optim").glob("*.distcp"))
    flip(file, file.stat().st_size // 2)
    with pytest.raises(IntegrityError):
        convert(tmp_path / "a", tmp_path / "c", "shards")
    assert not (tmp_path / "c").exists()


def go_on(root: Path) -> object:
    model, optimizer, _ = build(seed=1)
    with checkpointer(root) as engine:
        record = engine.restore(model, optimizer)
    assert record is not None
    assert (record.epoch, record.step, record.unrestored) == (0, 3, ())
    return everything(model, optimizer)


@pytest.mark.slow
def test_a_run_of_automodel_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    files = Path(__file__).parents[1] / "interop" / "automodel"
    report = convert(files / "epoch_0_step_3", tmp_path / "root", "shards", assume_complete=True)
    assert any("dataloader" in note for note in report.notes)
    saved = json.loads((files / "saved.json").read_text())
    for found in ranks(2, go_on, tmp_path / "root"):
        assert json.loads(json.dumps(found)) == saved


# --- DCP -------------------------------------------------------------------------------------------------------------


def mixtral(seed: int) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [llama, mixtral])
def test_torch_reads_a_hugging_face_model_into_the_state_dict_of_its_class(make: object, tmp_path: Path) -> None:
    build = cast("type[LlamaForCausalLM]", make)
    net = build(2)  # type: ignore[arg-type]
    net.save_pretrained(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "dcp", "dcp")
    other = build(3)  # type: ignore[arg-type]
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"))
    other.load_state_dict(state["model"])
    assert torch.equal(outputs(other), outputs(net))
    assert report.tensors == len(net.state_dict())
    assert {path.name for path in report.path.iterdir()} == {".metadata", "__0_0.distcp"}
    assert opens_as(convert(report.path, tmp_path / "back", "hf", config=tmp_path / "hf").path, net)


def test_our_own_shards_have_the_names_of_their_class_in_dcp(tmp_path: Path) -> None:
    net, other = mixtral(1), mixtral(2)
    net.config.architectures = ["MixtralForCausalLM"]
    with CheckpointingConfig(checkpoint_dir=tmp_path / "root", save_consolidated="false").build(0, 0, 0) as engine:
        own = engine.save(0, 1, net)
    assert own is not None
    assert convert(tmp_path / "root", tmp_path / "dcp", "dcp").verified
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"))
    other.load_state_dict(state["model"])
    assert torch.equal(outputs(other), outputs(net))
    # Notes for a later export go along with shards; what is no tensor cannot.
    again = convert(own, tmp_path / "again", "shards").path
    for name in ("fqn_to_dtype_mapping.json", "config.json", "export.json"):
        there = own / "model" / ".hf_metadata" / name
        assert not there.exists() or (again / "model" / ".hf_metadata" / name).read_bytes() == there.read_bytes()
    assert (again / "model" / ".hf_metadata" / "export.json").exists()
    assert opens_as(convert(again, tmp_path / "hf", "hf").path, net)
    (own / "model" / "module_state").mkdir()
    with pytest.raises(MisuseError, match="state that is no tensor of it"):
        convert(own, tmp_path / "third", "shards")


def test_the_dtypes_and_shapes_of_a_model_of_ones_own(tmp_path: Path) -> None:
    state = {
        "half": torch.randn(5, 3).to(torch.bfloat16), "byte": torch.arange(7, dtype=torch.uint8),
        "none": torch.empty(0, 4), "one": torch.tensor(2.5, dtype=torch.float64), "yes": torch.tensor([True, False]),
        "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "out", "dcp")
    found = {name: torch.zeros_like(value) for name, value in state.items()}
    dcp.load({"model": found}, checkpoint_id=str(tmp_path / "out"))
    assert all(
        torch.equal(found[name].flatten().view(torch.uint8), value.flatten().view(torch.uint8))
        for name, value in state.items()
    )


def test_items_are_archives_whose_checksums_are_right(tmp_path: Path) -> None:
    save_file({"a": torch.randn(5, 3), "b": torch.empty(0, 4), "c": torch.tensor(7)}, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "out", "dcp")
    items = FileSystemReader(tmp_path / "out").read_metadata().storage_data
    content = (tmp_path / "out" / "__0_0.distcp").read_bytes()
    assert sorted(item.offset for item in items.values())[0] == 0
    assert sum(item.length for item in items.values()) == len(content)
    for item in items.values():
        with ZipFile(BytesIO(content[item.offset : item.offset + item.length])) as archive:
            assert archive.testzip() is None
            assert archive.read("archive/byteorder") == b"little"


@pytest.mark.slow
def test_a_large_model_is_in_several_files_of_dcp(tmp_path: Path) -> None:
    state = {name: torch.full((180, 2**20), number, dtype=torch.uint8) for number, name in enumerate("abc")}
    save_file(state, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "out", "dcp")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".metadata", *(f"__0_{n}.distcp" for n in range(3))}
    found = {name: torch.zeros_like(value) for name, value in state.items()}
    dcp.load({"model": found}, checkpoint_id=str(tmp_path / "out"))
    assert all(torch.equal(found[name], value) for name, value in state.items())


# --- failures --------------------------------------------------------------------------------------------------------


class Failing(NamedHandles):
    """Fails the nth write, creation or rename of all."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.left, self.done = nth, 0

    def _one(self, path: Path) -> None:
        self.done += 1
        self.left -= 1
        if self.left == 0:
            raise StorageError.from_os(OSError(28, "No space left on device"), path=path)

    def create(self, path: Path, size: int, head: Buffer) -> None:
        self._one(path)
        super().create(path, size, head)

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        self._one(self.paths[handle])
        super().write(handle, data, offset)

    def sync(self, handle: int) -> None:
        self._one(self.paths[handle])
        super().sync(handle)

    def rename_new(self, source: Path, target: Path) -> None:
        self._one(source)
        super().rename_new(source, target)


@pytest.mark.parametrize("to", ["hf", "dcp", "shards"])
def test_wherever_it_fails_nothing_is_left(to: str, tmp_path: Path) -> None:
    run = Run(1)
    run.steps(0, 1)
    save(run, "named", tmp_path / "step-1")
    config = base(tmp_path / "base", run.net)
    place = tmp_path / "new" / "deep" / "out"
    counting = Failing(0)
    convert(tmp_path / "step-1", tmp_path / "whole" / "out", to, config=config, storage=counting)  # type: ignore[arg-type]
    assert counting.done > 8
    for nth in sorted({1, 2, 3, counting.done // 2, counting.done - 2, counting.done - 1, counting.done}):
        with pytest.raises(StorageError, match="No space left"):
            convert(tmp_path / "step-1", place, to, config=config, storage=Failing(nth))  # type: ignore[arg-type]
        assert {path.name for path in tmp_path.iterdir()} == {"step-1", "base", "whole"}
    assert json.loads((config / "config.json").read_text())


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path) -> None:
    class Full(NamedHandles):
        def check_space(self, path: Path, nbytes: int) -> None:
            raise StorageError.from_os(OSError(28, "No space left on device"), path=path)

        def create(self, path: Path, size: int, head: Buffer) -> None:
            raise AssertionError(path)

    save_dcp({"model": llama().state_dict()}, tmp_path / "dcp")
    for to in ("hf", "dcp", "shards"):
        with pytest.raises(StorageError, match="No space left"):
            convert(tmp_path / "dcp", tmp_path / "out", to, storage=Full())  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


def test_what_an_earlier_failure_left_is_removed(tmp_path: Path) -> None:
    save_dcp({"model": llama(3).state_dict()}, tmp_path / "dcp")
    (tmp_path / ".saving-out").mkdir()
    (tmp_path / ".saving-out" / "half").write_text("")
    convert(tmp_path / "dcp", tmp_path / "out", "dcp")
    assert {path.name for path in tmp_path.iterdir()} == {"dcp", "out"}
    with pytest.raises(CheckpointNotFoundError):
        convert(tmp_path / "nobody", tmp_path / "other", "dcp")
    with pytest.raises(MisuseError, match="to is"):
        convert(tmp_path / "dcp", tmp_path / "other", "gguf")  # type: ignore[arg-type]
    assert len(load_file(convert(tmp_path / "out", tmp_path / "hf", "hf").path / "model.safetensors")) > 2


MB = 2**20


def save_large(path: Path, form: str) -> None:
    state = {f"layers.{number}": torch.full((2048, 2048), float(number)) for number in range(24)}  # 16 MB each
    save_dcp({"model": state}, path) if form == "dcp" else torch.save(state, path)


def grown(path: Path, to: Format) -> int:
    convert(path, path.parent / "warm", to)
    reset_peak()
    before = peak()
    convert(path, path.parent / "out", to)
    return peak() - before


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("form", ["dcp", "file"])
def test_memory_is_that_of_a_tensor_and_not_of_the_model(to: Format, form: str, tmp_path: Path) -> None:
    ranks(1, save_large, tmp_path / "source.pt", form)
    [nbytes] = ranks(1, grown, tmp_path / "source.pt", to)
    assert nbytes < 128 * MB  # the model has 384
