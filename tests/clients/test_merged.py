"""Adapters merged on the way: byte for byte what peft's ``merge_and_unload()`` and ``save_pretrained`` give."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.base.support import edit_config
from tests.base.test_quantized import FP8_CONFIG, _fp8_base, _mxfp4_base
from tests.checkpointing.test_adapter_methods import _allocating, _train
from tests.checkpointing.test_state_dict_adapters import Halved
from tests.clients.adapters_whole import two_alone
from tests.clients.lora import values
from tests.clients.merged import (
    ADAPTERS,
    OVER_QUANTIZED,
    WIDE_LAYERS,
    WIDE_MIB,
    adapted,
    checkpointer,
    convolutions,
    memory_of_merging,
    over_quantized_in_memory,
    quantized_in_memory,
    save,
    save_convolutions,
    save_over_quantized,
    save_over_quantized_in_memory,
    save_until_killed,
    save_what_fails,
    save_without_room,
)
from tests.peft.models import causal, logits, randomise
from tests.peft.own_models import OwnConfig, dense
from tests.support.ranks import failure, fresh, run
from torch import nn

import peft
from shardwise import CheckpointingConfig
from shardwise.errors import (
    AdapterError,
    ConfigError,
    ConversionError,
    ModuleStateError,
    QuantizationError,
    ShardwiseError,
    StorageError,
)
from shardwise.ops.verify import verify

WEIGHTS = "adapter_model.safetensors"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_export(ours: Path, reference: nn.Module, directory: Path, dtype: torch.dtype | None = None) -> None:
    """The export is that of the merged model, and opens as it without peft."""
    merged = reference.merge_and_unload()
    if dtype is not None:
        merged = merged.to(dtype)
    merged.save_pretrained(directory)
    found, expected = tensors(ours), tensors(directory)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config, theirs = (json.loads((path / "config.json").read_text()) for path in (ours, directory))
    assert {key: config.get(key) for key in theirs} == theirs
    assert not (ours / "adapter_config.json").exists()
    opened, report = tf.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values())
    assert type(opened) is type(merged)
    assert torch.equal(logits(opened.eval()), logits(merged.eval()))


#: Methods that are like another one to everything but peft.
RARE = {"AdaLoRA", "BOFT", "HRA", "LN tuning", "LoKr", "RandLoRA", "SHiRA", "VBLoRA"}
METHODS = [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in ADAPTERS]


@pytest.mark.parametrize("name", METHODS)
def test_a_merged_export_is_the_one_that_peft_makes(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    causal(ADAPTERS[name][0]).save_pretrained(base)
    model = adapted(name).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = logits(model)
    with checkpointer(tmp_path / "run", model_repo_id=str(base)) as saver:
        saver.restore(model)
        saver.save(0, 1, model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    saved = tmp_path / "run/LATEST/model"
    assert (saved / WEIGHTS).is_file()
    same_export(saved / "consolidated", model, tmp_path / "reference")


def gathered(name: str, root: Path) -> nn.Module:
    """The trained model in one process."""
    model = adapted(name)
    trained: dict[str, torch.Tensor] = {}
    for path in sorted(root.glob("saved_[0-9].pt")):
        trained |= {key.removeprefix("module."): found[0] for key, found in torch.load(path).items()}
    assert set(trained) == {key for key, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(trained, strict=False)
    return model.eval()


CASES = [
    pytest.param("lora", 1, "fsdp", {}, marks=pytest.mark.slow),
    ("lora", 2, "fsdp", {}),
    ("lora", 2, "ddp", {}),
    ("lora", 2, "pipeline", {}),
    ("lora", 4, "fsdp+tp", {}),
    ("dora", 2, "fsdp", {}),
    pytest.param("dora", 4, "fsdp", {"single_rank_consolidation": True}, marks=pytest.mark.slow),
    ("experts", 2, "fsdp", {}),
    ("experts", 4, "fsdp", {"random_writes": False}),
    ("copies, tied", 2, "fsdp", {}),
    ("both ends of a tie", 2, "fsdp", {}),
    ("tokens", 2, "fsdp", {}),
    pytest.param("more", 2, "pipeline", {}, marks=pytest.mark.slow),
    pytest.param("VeRA", 2, "fsdp", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "world", "how", "settings"), CASES)
def test_ranks_merge_what_they_hold_parts_of(
    name: str, world: int, how: str, settings: dict[str, object], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    causal(ADAPTERS[name][0]).save_pretrained(base)
    run(world, save, name, how, str(tmp_path), {"model_repo_id": str(base), **settings})
    same_export(tmp_path / "run/LATEST/model/consolidated", gathered(name, tmp_path), tmp_path / "reference")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("experts", "fsdp"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("lora", "fsdp"), ("dora", "pipeline"))),
    ],
)
def test_merging_in_the_background(name: str, how: str, tmp_path: Path) -> None:
    output, settings = tmp_path / "output", {"is_async": True}
    code = fresh(
        two_alone, str(tmp_path / "store"), save, name, how, str(tmp_path), settings, output=output, seconds=200
    )
    assert code == 0, output.with_name("output.err").read_text()
    same_export(tmp_path / "run/LATEST/model/consolidated", gathered(name, tmp_path), tmp_path / "reference")


@pytest.mark.parametrize("name", ["lora", "dora", "copies"])
def test_the_export_has_the_dtypes_of_the_base(name: str, tmp_path: Path) -> None:
    causal(ADAPTERS[name][0]).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(name).eval()  # trains in float32, and is merged in it
    with checkpointer(tmp_path / "run", model_repo_id=str(tmp_path / "base")) as saver:
        saver.save(0, 1, model)
    saved = tmp_path / "run/LATEST/model"
    assert not list(saved.glob("shard-*"))
    same_export(saved / "consolidated", model, tmp_path / "reference", torch.bfloat16)


def test_files_that_join_what_is_merged_with_what_is_not(tmp_path: Path) -> None:
    def build() -> nn.Module:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        return tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=16, patch_size=4, use_swiglu_ffn=True))

    build().save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["query", "gate_proj"]))
    randomise(model, 1)
    with checkpointer(tmp_path / "run", model_repo_id=str(tmp_path / "base")) as saver:
        saver.save(0, 1, model)
    model.merge_and_unload().save_pretrained(tmp_path / "reference")
    found, expected = tensors(tmp_path / "run/LATEST/model/consolidated"), tensors(tmp_path / "reference")
    assert "encoder.layer.0.mlp.weights_in.weight" in found
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def mxfp4(directory: Path) -> nn.Module:
    _mxfp4_base(directory)
    return tf.GptOssForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=tf.Mxfp4Config(dequantize=True)
    )


def fp8(directory: Path) -> nn.Module:
    model = causal("llama-bf16")
    plain = _fp8_base(model, directory, (128, 128))
    edit_config(directory, quantization_config=FP8_CONFIG)
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in plain.items()})
    return model


@pytest.mark.parametrize(("kind", "base"), [("mxfp4", mxfp4), ("fp8", fp8)])
def test_a_quantized_base_is_exported_dequantized(kind: str, base: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    dequantized = base(tmp_path / "base")
    run(2, save_over_quantized, kind, str(tmp_path))
    ours = tmp_path / "run/LATEST/model/consolidated"
    assert "quantization_config" not in json.loads((ours / "config.json").read_text())
    reference = peft.get_peft_model(dequantized, peft.LoraConfig(**OVER_QUANTIZED[kind]))
    for path in sorted(tmp_path.glob("saved_[0-9].pt")):
        trained = {key: found[0] for key, found in torch.load(path).items()}
        assert not reference.load_state_dict(trained, strict=False).unexpected_keys
    expected = {n: t.detach() for n, t in reference.merge_and_unload().state_dict().items()}
    found = tensors(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert tf.AutoModelForCausalLM.from_pretrained(ours).dtype == torch.bfloat16


def _needs_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantizes the base")


@pytest.mark.parametrize(
    ("kind", "world", "use_dora"),
    [
        ("nf4", 1, False),
        ("nf4, its scales quantized", 2, False),
        ("int8", 1, False),
        pytest.param("nf4, its scales quantized", 1, True, marks=pytest.mark.slow),
        pytest.param("int8", 2, True, marks=pytest.mark.slow),
    ],
)
def test_a_base_quantized_in_memory_is_exported_dequantized(
    kind: str, world: int, use_dora: bool, tmp_path: Path
) -> None:
    """As ``dequantize()``, ``merge_and_unload()`` and ``save_pretrained`` do, also what has no adapter."""
    _needs_bitsandbytes()
    causal("qwen2").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    if world == 1:
        save_over_quantized_in_memory(kind, "", str(tmp_path), use_dora)
    else:
        run(world, save_over_quantized_in_memory, kind, "ddp", str(tmp_path), use_dora)
    dequantized = quantized_in_memory(kind, tmp_path / "base").dequantize()
    reference = over_quantized_in_memory(dequantized, use_dora=use_dora)
    trained = torch.load(tmp_path / "trained.pt")
    assert set(trained) == {name for name, p in reference.named_parameters() if p.requires_grad}
    reference.load_state_dict(trained, strict=False)
    ours = tmp_path / "run/LATEST/model/consolidated"
    same_export(ours, reference.eval(), tmp_path / "reference")
    assert "quantization_config" not in json.loads((ours / "config.json").read_text())


def test_shards_of_a_base_quantized_in_memory_are_refused(tmp_path: Path) -> None:
    _needs_bitsandbytes()
    causal("llama-bf16").save_pretrained(tmp_path / "base")
    error = failure(2, save_over_quantized_in_memory, "nf4", "fsdp", str(tmp_path), False)
    assert isinstance(error, QuantizationError)
    assert "only whole linear layers of bitsandbytes" in str(error)


def test_quantized_weights_that_are_laid_out_to_compute(tmp_path: Path) -> None:
    """As bitsandbytes does it in eval mode where the processor has AVX512-BF16."""
    _needs_bitsandbytes()
    causal("llama-bf16").save_pretrained(tmp_path / "base")
    model = over_quantized_in_memory(quantized_in_memory("nf4", tmp_path / "base"))
    model.base_model.model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with checkpointer(tmp_path / "run") as saver, pytest.raises(QuantizationError, match="layout in which"):
        saver.restore(model)


def test_methods_that_merge_into_quantized_layers_alone(tmp_path: Path) -> None:
    """What they would do to dequantized ones is not known, so they are refused by name."""
    _needs_bitsandbytes()
    causal("llama-bf16").save_pretrained(tmp_path / "base")
    base = quantized_in_memory("nf4", tmp_path / "base")
    model = peft.get_peft_model(base, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with (
        checkpointer(tmp_path / "run") as saver,
        pytest.raises(AdapterError, match="IA3 over layers that bitsandbytes"),
    ):
        saver.restore(model)


@pytest.mark.parametrize(
    ("world", "use_dora"),
    [(2, False), (2, True), *(pytest.param(1, dora, marks=pytest.mark.slow) for dora in (False, True))],
)
def test_convolutions(world: int, use_dora: bool, tmp_path: Path) -> None:
    run(world, save_convolutions, str(tmp_path), use_dora)
    # On one thread, as the ranks: sums in another order have another last bit.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = convolutions(use_dora=use_dora).merge_and_unload().state_dict()
    finally:
        torch.set_num_threads(threads)
    found = tensors(tmp_path / "LATEST/model/consolidated")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("steps", [5, 8])
def test_ranks_that_are_being_allocated(steps: int, tmp_path: Path) -> None:
    """AdaLoRA masks ranks and then leaves them out of its file; the run goes on, and what it masked is merged so."""
    model, optimizer = _allocating(1)
    _train(model, optimizer, range(steps))
    with checkpointer(tmp_path / "run") as saver:
        saver.save(0, steps, model, optimizer)
    again, other = _allocating(2)
    with checkpointer(tmp_path / "run") as loader:
        loader.restore(again, other)
    assert (tmp_path / "run/LATEST/model/adapter_extra.safetensors").is_file()
    same_export(tmp_path / "run/LATEST/model/consolidated", deepcopy(model).eval(), tmp_path / "reference")
    for each, its in ((model, optimizer), (again, other)):
        _train(each, its, range(steps, 10))
    ours, theirs = again.state_dict(), model.state_dict()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def test_memory_is_that_of_a_module(tmp_path: Path) -> None:
    found = run(2, memory_of_merging, str(tmp_path))
    for merged, alone in found:  # type: ignore[misc]
        assert merged - alone <= 8 * WIDE_MIB * 2**20 < WIDE_MIB * WIDE_LAYERS * 2**20 / 2


def test_a_run_that_is_killed_while_the_export_is_written(tmp_path: Path) -> None:
    output = tmp_path / "output"
    code = fresh(save_until_killed, str(tmp_path), output=output, seconds=100)
    assert code == -signal.SIGKILL, output.with_name("output.err").read_text()
    root = tmp_path / "run"
    assert [path for path in root.rglob("consolidated/*.safetensors") if "epoch_0_step_1" not in str(path)]
    assert (root / "LATEST").resolve().name == "epoch_0_step_1"
    assert verify(root / "LATEST").status == "whole"
    again = adapted("lora", seed=9)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1.0)
    with checkpointer(root) as saver:
        assert saver.restore(again, optimizer) is not None
        expected, found = torch.load(tmp_path / "first.pt"), values(again, optimizer)
        assert expected.keys() == found.keys()
        assert all(torch.equal(a, b) for name in expected for a, b in zip(expected[name], found[name], strict=True))
        saver.save(0, 2, again, optimizer)
    assert (root / "LATEST").resolve().name == "epoch_0_step_2"
    same_export(root / "LATEST/model/consolidated", again.eval(), tmp_path / "reference")


def test_several_adapters(tmp_path: Path) -> None:
    """Those are merged that are active, as peft does; one that is merged already is in the base weights."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(causal("llama"), config)
    for name in ("second", "third"):
        model.add_adapter(name, peft.LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.base_model.set_adapter(["default", "third"])
    model.merge_adapter(["third"])
    with checkpointer(tmp_path / "run") as saver:
        saver.save(0, 1, model)
    same_export(tmp_path / "run/LATEST/model/consolidated", model.eval(), tmp_path / "reference")


def test_merging_is_done_when_an_export_is(tmp_path: Path) -> None:
    model = adapted("lora")
    with checkpointer(tmp_path, save_consolidated="final") as saver:
        saver.save(0, 1, model)
        assert not (tmp_path / "LATEST/model/consolidated").exists()
        saver.save(0, 2, model, is_final_checkpoint=True)
        assert (tmp_path / "LATEST/model/consolidated/config.json").is_file()
        saver.save_model(model, tmp_path / "alone", is_final_checkpoint=True)
    assert verify(tmp_path / "LATEST").status == "whole"
    same_export(tmp_path / "alone/model/consolidated", model.eval(), tmp_path / "reference")


@pytest.mark.parametrize(("operation", "rank", "nth"), [("create", 0, 1), ("write", 1, 2), ("sync", 1, 1)])
def test_a_save_that_fails_leaves_nothing(operation: str, rank: int, nth: int, tmp_path: Path) -> None:
    error = failure(2, save_without_room, str(tmp_path), operation, rank, nth)
    assert isinstance(error, StorageError)
    assert "consolidated" in str(error)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "LATEST").exists()


def test_merging_that_fails_is_said_on_every_rank(tmp_path: Path) -> None:
    error = failure(2, save_what_fails, str(tmp_path))
    assert "no memory for this" in str(error)
    assert not list(tmp_path.rglob("*.safetensors"))


def prompts() -> nn.Module:
    return peft.get_peft_model(causal("llama"), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


def tokens_alone() -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    return peft.get_peft_model(causal("llama"), config)


def quantized() -> nn.Module:
    model = adapted("lora")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.uint8), requires_grad=False)
    return model


def biased() -> nn.Module:
    """peft cannot merge a bias into a layer that has none."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)
    with pytest.warns(UserWarning, match="bias"):
        return peft.get_peft_model(causal("llama"), config)


def shared_memory() -> nn.Module:
    model = adapted("tied")
    weight = model.base_model.model.model.embed_tokens.base_layer.weight
    model.base_model.model.lm_head.weight = nn.Parameter(weight.data, requires_grad=False)
    return model


class Doubled(nn.Linear):
    """Gives out its weight times two."""

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.detach() * 2

    def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        self.weight.data.copy_(state[f"{prefix}weight"] / 2)


def in_its_own_way() -> nn.Module:
    model = nn.Sequential(Doubled(4, 4, bias=False))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))


def computed() -> nn.Module:
    class Second(Halved):
        which = "0.weight"

    model = nn.Sequential(nn.Linear(4, 4))
    model.state_dict_adapter = Second()
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))


def groups() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))


UNMERGEABLE: dict[str, tuple[Callable[[], nn.Module], type[ShardwiseError], str]] = {
    "prompt tuning": (prompts, AdapterError, "PROMPT_TUNING does not live in layers"),
    "activated LoRA": (tokens_alone, AdapterError, r"layers.0.self_attn.q_proj.*failed with NotImplementedError"),
    "a bias that is not there": (biased, AdapterError, "base layer has no bias"),
    "grouped convolutions": (groups, AdapterError, "groups > 1"),
    "a state of its own making": (in_its_own_way, ModuleStateError, "from a tensor that an adapter is merged into"),
    "a conversion that computes": (computed, ConversionError, "the model's conversion computes tensors"),
    "quantized weights": (quantized, QuantizationError, "quantized in memory"),
    "LoRA of the model's own": (lambda: dense(OwnConfig()), AdapterError, "LoRA modules of its own"),
    "one memory, two parameters": (shared_memory, AdapterError, "are one memory"),
}


@pytest.mark.parametrize("case", UNMERGEABLE)
def test_what_cannot_be_merged_is_said_before_training(case: str, tmp_path: Path) -> None:
    make, kind, message = UNMERGEABLE[case]
    with checkpointer(tmp_path) as saver, pytest.raises(kind, match=message):
        saver.restore(make())
    with CheckpointingConfig(checkpoint_dir=tmp_path, is_peft=True).build(0, 0, 0) as saver:
        saver.restore(make())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_peft": False}, "is_peft is false"),
        ({"model_save_format": "torch_save"}, "torch_save"),
        ({"save_consolidated": "false"}, "save_consolidated is 'false'"),
    ],
)
def test_settings_under_which_nothing_is_merged(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointingConfig(**{"is_peft": True, "export_merged": True, **settings})
