"""`merge-adapter`: byte for byte what peft's ``from_pretrained``, ``merge_and_unload()``, ``save_pretrained`` give."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.base.support import edit_config
from tests.base.test_quantized import FP8_CONFIG, _fp8_base
from tests.clients.merged import ADAPTERS, OVER_QUANTIZED, adapted
from tests.ops.checkpoints import saved
from tests.ops.damaged import save_dcp
from tests.peft.models import causal, randomise
from tests.support.peak import peak, reset_peak

import peft
from shardwise import CheckpointingConfig
from shardwise.cli import main
from shardwise.errors import (
    AdapterError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IntegrityError,
    MisuseError,
    ShardwiseError,
    UnsafePickleError,
)
from shardwise.ops.merge import merge_adapter
from shardwise.ops.verify import verify

WEIGHTS = "adapter_model.safetensors"

#: What peft makes anew at each start, and no file has.
REFUSED = ("AdaLoRA", "BOFT", "OFT", "SHiRA")
#: Methods that are like another one to everything but peft.
RARE = {"HRA", "LN tuning", "LoKr", "RandLoRA", "VBLoRA", "LoHa", "FourierFT", "columns", "bias", "more", "tied"}
#: peft before 0.20 says of its own that a file's projections have no place.
OLD = {"VeRA": pytest.mark.skipif(peft.__version__ < "0.20", reason="peft before 0.20 does not find its projections")}
METHODS = [
    pytest.param(name, marks=[*([pytest.mark.slow] if name in RARE else []), *([OLD[name]] if name in OLD else [])])
    for name in ADAPTERS
    if name not in REFUSED
]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_tensors(ours: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert verify(ours).status == "whole"


def same_as_peft(ours: Path, base: Path, adapter: Path, directory: Path) -> None:
    """Tensors, names and dtypes are those that peft leaves, and the directory opens without it."""
    model = peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(directory)
    same_tensors(ours, tensors(directory))
    opened, report = tf.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values())
    assert opened.config.to_dict().items() >= json.loads((base / "config.json").read_text()).items()


def made(root: Path, name: str) -> tuple[Path, Path]:
    """The directories of a base model and of an adapter."""
    causal(ADAPTERS[name][0]).save_pretrained(root / "base")
    adapted(name).save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


@pytest.mark.parametrize("name", METHODS)
def test_a_merged_model_is_the_one_that_peft_makes(name: str, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, name)
    report = merge_adapter(base, adapter, tmp_path / "merged")
    assert report.merged
    same_as_peft(report.path, base, adapter, tmp_path / "reference")


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_makes_anew_is_refused_by_name(name: str, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, name)
    with pytest.raises(AdapterError, match="merge_and_unload|peft cannot put"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("name", ["lora", "copies", "dora in bf16"])
def test_an_adapter_in_another_dtype_than_its_base(name: str, tmp_path: Path) -> None:
    """peft computes in float32 what was saved in less, and rounds to the base's dtype what it copies."""
    base, adapter = made(tmp_path, name)
    causal(ADAPTERS[name][0]).to(torch.bfloat16).save_pretrained(base)
    to = torch.bfloat16 if name == "lora" else torch.float32
    save_file({n: t.to(to) for n, t in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    same_as_peft(merge_adapter(base, adapter, tmp_path / "merged").path, base, adapter, tmp_path / "reference")


def test_a_base_of_several_files(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "lora")
    causal("llama").save_pretrained(base, max_shard_size="8KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    names = {path.name for path in base.glob("model-*.safetensors")}
    assert len(names) > 2
    report = merge_adapter(base, adapter, tmp_path / "merged")
    assert set(report.files) == names
    same_as_peft(report.path, base, adapter, tmp_path / "reference")
    again = merge_adapter(base, adapter, tmp_path / "split", max_file_bytes=12_000)
    assert len(again.files) > 1
    same_tensors(again.path, tensors(report.path))


def test_an_adapter_of_torch_save(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "lora")
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    same_as_peft(merge_adapter(base, adapter, tmp_path / "merged").path, base, adapter, tmp_path / "reference")
    torch.save({"x": print}, adapter / "adapter_model.bin")
    with pytest.raises(UnsafePickleError):
        merge_adapter(base, adapter, tmp_path / "other")


def test_a_checkpoint_with_what_was_trained_beside_the_adapter(tmp_path: Path) -> None:
    """The norms are in `adapter_extra.safetensors`; the run's own merged export says what is right."""
    base, _ = made(tmp_path, "more")
    config = {"is_peft": True, "export_merged": True, "save_consolidated": "every", "model_repo_id": str(base)}
    with CheckpointingConfig(checkpoint_dir=tmp_path / "run", **config).build() as saver:  # type: ignore[arg-type]
        saver.save(0, 1, adapted("more"))
    report = merge_adapter(base, tmp_path / "run", tmp_path / "merged")
    same_tensors(report.path, tensors(tmp_path / "run/LATEST/model/consolidated"))
    assert report.notes == ()


def test_the_layout_of_older_releases_of_peft(tmp_path: Path) -> None:
    """Which means the same: today's peft would read it transposed."""
    base, adapter = made(tmp_path, "experts")
    config = {"is_peft": True, "legacy_paramwrapper_layout": True}
    with CheckpointingConfig(checkpoint_dir=tmp_path / "run", **config).build() as saver:  # type: ignore[arg-type]
        saver.save(0, 1, adapted("experts"))
    old, new = (load_file(directory / WEIGHTS) for directory in (tmp_path / "run/LATEST/model", adapter))
    assert any(old[name].shape != tensor.shape for name, tensor in new.items())
    report = merge_adapter(base, tmp_path / "run/LATEST", tmp_path / "merged")
    same_as_peft(report.path, base, adapter, tmp_path / "reference")
    save_file({name: t for name, t in old.items() if "q_proj" not in name}, tmp_path / "run/LATEST/model" / WEIGHTS)
    with pytest.raises(ShardwiseError):
        merge_adapter(base, tmp_path / "run/LATEST", tmp_path / "other")


def test_tokens_alone(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    causal("llama").save_pretrained(base)
    config = peft.TrainableTokensConfig(token_indices=[1, 5], target_modules=["embed_tokens"])
    over = peft.get_peft_model(causal("llama"), config)
    randomise(over, 1)
    over.save_pretrained(adapter)
    report = merge_adapter(base, adapter, tmp_path / "merged")
    assert report.merged == ("model.embed_tokens.weight",)
    same_as_peft(report.path, base, adapter, tmp_path / "reference")


def test_a_base_in_the_cache_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = made(tmp_path, "lora")
    folder = tmp_path / "cache" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in base.iterdir():  # links into blobs, as in a real one
        (folder / "blobs").mkdir(exist_ok=True)
        shutil.copy(file, folder / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    report = merge_adapter("org/name", adapter, tmp_path / "merged")
    same_as_peft(report.path, base, adapter, tmp_path / "reference")


def test_what_the_class_does_not_load_and_other_adapters_are_said(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "lora")
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "mtp.weight": torch.ones(2)}, base / "model.safetensors", {"format": "pt"})
    shutil.copytree(adapter, adapter / "second")
    report = merge_adapter(base, adapter, tmp_path / "merged")
    assert len(report.notes) == 2
    assert "second" in report.notes[0]
    assert "mtp.weight" in report.notes[1]


def test_a_damaged_checkpoint_of_an_adapter(tmp_path: Path) -> None:
    base, _ = made(tmp_path, "lora")
    with CheckpointingConfig(checkpoint_dir=tmp_path / "run", is_peft=True).build() as saver:
        saver.save(0, 1, adapted("lora"))
    file = tmp_path / "run/LATEST/model" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=WEIGHTS):
        merge_adapter(base, tmp_path / "run", tmp_path / "merged")


def test_a_quantized_base_is_dequantized(tmp_path: Path) -> None:
    model = causal("llama-bf16")
    plain = _fp8_base(model, tmp_path / "base", (128, 128))
    edit_config(tmp_path / "base", quantization_config=FP8_CONFIG)
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in plain.items()})
    over = peft.get_peft_model(model, peft.LoraConfig(**OVER_QUANTIZED["fp8"]))
    randomise(over, 1)
    over.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    same_tensors(report.path, dict(over.merge_and_unload().state_dict()))
    assert "quantization_config" not in json.loads((report.path / "config.json").read_text())
    assert tf.AutoModelForCausalLM.from_pretrained(report.path).dtype == torch.bfloat16


def test_the_tokenizer_of_the_adapter(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "lora")
    for directory in (base, adapter):
        (directory / "tokenizer.json").write_text(json.dumps({"of": directory.name}))
    (base / "generation_config.json").write_text("{}")
    merged = merge_adapter(base, adapter, tmp_path / "merged").path
    assert json.loads((merged / "tokenizer.json").read_text()) == {"of": "adapter"}
    assert (merged / "generation_config.json").is_file()


@pytest.mark.parametrize("verify_export", [True, False])
def test_the_configuration_is_the_bases_own(verify_export: bool, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "lora")
    scaling = {"type": "linear", "factor": 2.0}
    edit_config(base, rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    merged = merge_adapter(base, adapter, tmp_path / "merged", verify_export=verify_export).path
    assert json.loads((merged / "config.json").read_text())["rope_scaling"] == scaling


def test_another_base_than_the_recorded_one_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = made(tmp_path, "lora")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "org/other"}))
    assert main(["merge-adapter", str(base), str(adapter), str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr()
    assert "base model is org/other" in printed.err
    assert "merged" in printed.out


def _other_shape(base: Path, adapter: Path) -> None:
    settings = tf.AutoConfig.from_pretrained(base)
    settings.hidden_size, settings.head_dim = 32, 8
    shutil.rmtree(base)
    tf.LlamaForCausalLM(settings).save_pretrained(base)


def _other_names(base: Path, adapter: Path) -> None:
    shutil.rmtree(base)
    causal("gpt2").save_pretrained(base)


def _cut_base(base: Path, adapter: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_dcp(base: Path, adapter: Path) -> None:
    """The last item, which a tied head's is, and which nothing else reads."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    save_dcp({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, base)
    file = base / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1000])


def _cut_adapter(base: Path, adapter: Path) -> None:
    file = adapter / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def _lacking(base: Path, adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    weights.pop(next(iter(weights)))
    save_file(weights, adapter / WEIGHTS)


def _prompt(base: Path, adapter: Path) -> None:
    shutil.rmtree(adapter)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(causal("llama"), config).save_pretrained(adapter)


def _changed_base(base: Path, adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "init_lora_weights": "pissa"}))


def _truncated_base(base: Path, adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "kasa_config": {"beta": 1e-4}}))


def _foreign_code(base: Path, adapter: Path) -> None:
    edit_config(base, auto_map={"AutoModelForCausalLM": "modeling.Own"})


WRONG: list[tuple[Any, type[ShardwiseError], str]] = [
    (_other_shape, AdapterError, "size mismatch"),
    (_other_names, AdapterError, "peft cannot put"),
    (_cut_base, FormatError, "model.safetensors"),
    (_cut_dcp, IntegrityError, "cut short"),
    (_cut_adapter, FormatError, "damaged"),
    (_lacking, AdapterError, "not in its file"),
    (_prompt, AdapterError, "PROMPT_TUNING does not live in layers"),
    (_changed_base, AdapterError, "pissa"),
    (_truncated_base, AdapterError, "kasa"),
    (_foreign_code, MisuseError, "code of its own"),
]


@pytest.mark.parametrize(("damage", "kind", "text"), WRONG, ids=[case[0].__name__[1:] for case in WRONG])
def test_what_does_not_fit_or_is_damaged_is_refused(
    damage: Any, kind: type[ShardwiseError], text: str, tmp_path: Path
) -> None:
    base, adapter = made(tmp_path, "lora")
    damage(base, adapter)
    with pytest.raises(kind, match=text):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = made(tmp_path, "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"peft, which is not installed.*shardwise\[peft\]"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_there_and_something_there(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "lora")
    with pytest.raises(CheckpointNotFoundError):
        merge_adapter(tmp_path / "absent", adapter, tmp_path / "merged")
    with pytest.raises((CheckpointNotFoundError, FormatError, AdapterError), match="adapter_config"):
        merge_adapter(base, base, tmp_path / "merged")
    with pytest.raises(CheckpointExistsError):
        merge_adapter(base, adapter, base)
    checkpoint = saved(tmp_path / "run")
    with pytest.raises(MisuseError, match="is in the checkpoint"):  # before anything of both is looked for
        merge_adapter(tmp_path / "absent", adapter, checkpoint / "merged")


@pytest.mark.slow
def test_memory_is_that_of_one_module(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = tf.LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=64)  # 17 matrices of 4 MiB and more in each
    model = tf.LlamaForCausalLM(config)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "base")
    over = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    randomise(over, 1)
    over.save_pretrained(tmp_path / "adapter")
    del model, over
    small, factors = made(tmp_path / "small", "lora")
    merge_adapter(small, factors, tmp_path / "imported")
    reset_peak()
    before = peak()
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert nbytes > 380 * 2**20
    assert peak() - before < 200 * 2**20  # twelve times the largest matrix; 12 layers take as much as 6
