"""Quantized bases: values and scales as the formats' owners write them, and what transformers makes of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.base.support import (
    CountingStorage,
    assert_same,
    checkpointer,
    edit_config,
    llama,
    llama_config,
    on_meta,
    two_by_two,
    whole_tensor,
)
from tests.support.ranks import run
from torch.distributed.fsdp import fully_shard
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from shardwise import base_dtype
from shardwise.base.source import find_quantized, read_dequantized
from shardwise.comm import Group
from shardwise.disk.storage import LocalStorage
from shardwise.errors import DtypeMismatchError, FormatError, QuantizationError
from shardwise.format.header import read_header
from shardwise.geometry import Box
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part
from shardwise.sources.reader import Reader
from shardwise.sources.sources import open_source

FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _quantize_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    scales = torch.rand(rows, columns) * 0.01 + 1e-3
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: weight.shape[0], : weight.shape[1]]
    return (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def _formula(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    spread = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return values.float() * spread[: values.shape[0], : values.shape[1]]


def _fp8_base(
    model: PreTrainedModel, directory: Path, block: tuple[int, int], suffix: str = "_scale_inv"
) -> dict[str, torch.Tensor]:
    """Save a model with its projections quantized; returns what each tensor is once dequantized, in float32."""
    model.save_pretrained(directory)
    stored, plain = {}, {}
    for name, value in load_file(directory / "model.safetensors").items():
        if value.dim() == 2 and "proj" in name:
            stored[name], stored[name + suffix] = _quantize_blocks(value.float(), block)
            plain[name] = _formula(stored[name], stored[name + suffix], block)
        else:
            stored[name] = plain[name] = value
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return plain


def _as_saved(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def _deepseek() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=160,
        intermediate_size=200,
        moe_intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        max_position_embeddings=64,
    )
    return DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_block_scaled_fp8_into_fused_experts(tmp_path: Path, dtype: torch.dtype) -> None:
    model = _deepseek()
    plain = _fp8_base(model, tmp_path / "base", (128, 128))
    edit_config(tmp_path / "base", quantization_config=FP8_CONFIG)
    fresh = on_meta(DeepseekV3ForCausalLM, model.config, dtype)
    assert any(
        ".experts." in name and name.endswith("_scale_inv") for name in load_file(tmp_path / "base/model.safetensors")
    )
    storage = CountingStorage()
    checkpointer(tmp_path, storage).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    assert storage.overlaps() == []
    saved = _as_saved(fresh, tmp_path / "again")
    assert saved.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(saved[name], value.to(saved[name].dtype)), name


def test_the_formula_is_that_of_transformers() -> None:
    values, scales = _quantize_blocks(torch.randn(256, 384), (128, 128))
    theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
    assert torch.equal(_formula(values, scales, (128, 128)), theirs)


@pytest.mark.parametrize(
    ("strategy", "shape"),
    [("tensor", ()), ("tensor", (1,)), ("channel", (-1, 1)), ("channel", (-1,)), ("block", (16, 8))],
)
def test_fp8_of_compressed_tensors(tmp_path: Path, strategy: str, shape: tuple[int, ...]) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    stored, plain = load_file(file), {}
    for name, value in list(stored.items()):
        if "proj" not in name:
            continue
        size = {"tensor": tuple(value.shape), "channel": (1, value.shape[1]), "block": (16, 8)}[strategy]
        values, scales = _quantize_blocks(value, size)  # type: ignore[arg-type]
        scales = scales.to(torch.bfloat16)
        plain[name] = _formula(values, scales, size)  # type: ignore[arg-type]
        stored[name] = values
        stored[name + "_scale"] = scales if strategy == "block" else scales.reshape(shape)
    save_file(stored, file, metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if strategy == "block":
        weights["block_structure"] = [16, 8]
    group = {"weights": weights, "targets": ["Linear"]}
    method: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    edit_config(tmp_path / "base", quantization_config=method | {"config_groups": {"group_0": group}})
    fresh = on_meta(LlamaForCausalLM, model.config, torch.bfloat16)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], plain.get(name, value).to(torch.bfloat16)), name


def _gpt_oss() -> GptOssForCausalLM:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    return GptOssForCausalLM(config)


def _mxfp4_base(directory: Path) -> tuple[GptOssForCausalLM, dict[str, torch.Tensor]]:
    model = _gpt_oss().to(torch.bfloat16)
    model.save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    plain = {}
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = stored.pop(name).shape  # (experts, in, out)
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 130, (experts, rows, columns // 32), dtype=torch.uint8)
        stored[name + "_blocks"], stored[name + "_scales"] = blocks, scales
        plain[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, quantization_config={"quant_method": "mxfp4"})
    return model, plain


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    model, plain = _mxfp4_base(tmp_path / "base")
    assert len(plain) == 4
    fresh = on_meta(GptOssForCausalLM, model.config, torch.bfloat16)
    storage = CountingStorage()
    checkpointer(tmp_path, storage).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], plain.get(name, value)), name
    assert storage.overlaps() == []


def _load_sharded(base: str, directory: str, kind: str, dim: int) -> tuple[list[str], int, int]:
    """Load on this rank; returns names that differ from the whole, bytes read, and overlapping reads."""
    torch.manual_seed(0)
    cls: type[PreTrainedModel] = GptOssForCausalLM if kind == "mxfp4" else DeepseekV3ForCausalLM
    config = (_gpt_oss() if kind == "mxfp4" else _deepseek()).config
    whole = on_meta(cls, config, torch.bfloat16)
    checkpointer(Path(directory)).load_base_model(whole, "cpu", None, base)
    model = on_meta(cls, config, torch.bfloat16)

    def place(parameter: torch.nn.Parameter) -> object:
        from torch.distributed.tensor import Shard

        return Shard(dim if parameter.dim() > dim else 0)

    for layer in model.model.layers:
        fully_shard(layer, shard_placement_fn=place)  # type: ignore[arg-type]
    fully_shard(model, shard_placement_fn=place)  # type: ignore[arg-type]
    storage = CountingStorage()
    checkpointer(Path(directory), storage).load_base_model(model, "cpu", None, base)
    expected = whole.state_dict()
    differ = [n for n, p in model.state_dict().items() if not torch.equal(whole_tensor(p), expected[n])]
    return differ, storage.nbytes, len(storage.overlaps())


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_mxfp4_on_two_ranks(tmp_path: Path, dim: int) -> None:
    _mxfp4_base(tmp_path / "base")
    results: Any = run(2, _load_sharded, str(tmp_path / "base"), str(tmp_path), "mxfp4", dim)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    for differ, nbytes, overlaps in results:
        assert differ == []
        assert overlaps == 0 or dim > 0
        assert nbytes < size * (0.6 if dim == 0 else 1.1)


@pytest.mark.parametrize("dim", [0, 1])
def test_fp8_on_two_ranks_cut_across_blocks(tmp_path: Path, dim: int) -> None:
    _fp8_base(_deepseek(), tmp_path / "base", (128, 128))
    edit_config(tmp_path / "base", quantization_config=FP8_CONFIG)
    results: Any = run(2, _load_sharded, str(tmp_path / "base"), str(tmp_path), "fp8", dim)
    for differ, _, _ in results:
        assert differ == []


def _load_replicas(base: str, directory: str, kind: str, how: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Load with and without passing on; returns names that differ, and the ranges that this rank read when it did."""
    cls: type[PreTrainedModel] = GptOssForCausalLM if kind == "mxfp4" else DeepseekV3ForCausalLM
    config = (_gpt_oss() if kind == "mxfp4" else _deepseek()).config
    states: list[dict[str, torch.Tensor]] = []
    storage = CountingStorage()
    for mode in ("never", "always"):
        model = on_meta(cls, config, torch.bfloat16)
        if how == "hsdp":
            two_by_two(model)
        storage = CountingStorage()
        checkpointer(Path(directory), storage, share_replica_reads=mode).load_base_model(model, "cpu", None, base)
        states.append({name: whole_tensor(value) for name, value in model.state_dict().items()})
    differ = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    return differ, [(begin, end) for _, begin, end in storage.ranges]


@pytest.mark.parametrize(("how", "world"), [("plain", 2), ("plain", 3), ("hsdp", 4)])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_replicas_dequantize_each_value_once(tmp_path: Path, kind: str, how: str, world: int) -> None:
    if kind == "mxfp4":
        _mxfp4_base(tmp_path / "base")
    else:
        _fp8_base(_deepseek(), tmp_path / "base", (128, 128))
        edit_config(tmp_path / "base", quantization_config=FP8_CONFIG)
    results: Any = run(world, _load_replicas, str(tmp_path / "base"), str(tmp_path), kind, how)
    assert all(differ == [] for differ, _ in results)
    file = tmp_path / "base" / "model.safetensors"
    header = read_header(file)
    counts = torch.zeros(file.stat().st_size, dtype=torch.int32)
    for _, ranges in results:
        for begin, end in ranges:
            counts[begin:end] += 1
    quantized = 0
    for entry in header.entries:
        own = counts[header.data_start + entry.begin : header.data_start + entry.begin + entry.spec.nbytes]
        # Scales at the border of two ranks' pieces are read by both, and next to nothing.
        if not entry.spec.name.endswith(("_scale_inv", "_scales")):
            assert (own == 1).all(), entry.spec.name
            quantized += entry.spec.dtype in ("F8_E4M3", "U8")
    assert quantized > 3


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_unsupported_methods_are_named(tmp_path: Path, method: str) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    stored = load_file(file)
    for name in [n for n in stored if "proj" in n]:
        value = stored.pop(name)
        if method == "bitsandbytes":
            stored[name] = torch.zeros(value.numel() // 2, 1, dtype=torch.uint8)
        else:
            stored[name.replace("weight", "weight_packed")] = torch.zeros(8, 8, dtype=torch.int32)
    save_file(stored, file, metadata={"format": "pt"})
    edit_config(tmp_path / "base", quantization_config={"quant_method": method, "format": "pack-quantized"})
    fresh = on_meta(LlamaForCausalLM, model.config)
    with pytest.raises(QuantizationError, match=f"quantized by {method}.*unquantized base"):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))


AUTO_GPTQ: dict[str, object] = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AUTO_AWQ: dict[str, object] = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}


def _packed_base(base: Path) -> LlamaForCausalLM:
    """A base as AutoGPTQ and AutoAWQ write it, whose config.json does not say so."""
    model = llama()
    model.save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    for name in [n for n in stored if "proj" in n]:
        stem = name.removesuffix("weight")
        out, columns = stored.pop(name).shape
        stored[f"{stem}qweight"] = torch.zeros(columns // 8, out, dtype=torch.int32)
        stored[f"{stem}qzeros"] = torch.zeros(1, out // 8, dtype=torch.int32)
        stored[f"{stem}scales"] = torch.zeros(1, out, dtype=torch.float16)
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("name", "settings", "method"),
    [
        ("quantize_config.json", AUTO_GPTQ, "gptq"),
        ("quantize_config.json", AUTO_GPTQ | {"quant_method": "awq"}, "awq"),
        ("quant_config.json", AUTO_AWQ, "awq"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_methods_that_a_file_beside_the_config_tells_of_are_named(
    tmp_path: Path, name: str, settings: dict[str, object], method: str, config: bool
) -> None:
    model = _packed_base(tmp_path / "base")
    (tmp_path / "base" / name).write_text(json.dumps(settings))
    if not config:
        (tmp_path / "base" / "config.json").unlink()
    for path in (tmp_path / "base", tmp_path / "base" / "model.safetensors"):
        for dequantize in (None, True):
            fresh = on_meta(LlamaForCausalLM, model.config)
            engine = checkpointer(tmp_path, dequantize_base_checkpoint=dequantize)
            with pytest.raises(QuantizationError, match=f"quantized by {method}.*unquantized base"):
                engine.load_base_model(fresh, "cpu", None, str(path))


def test_the_config_goes_before_a_file_beside_it(tmp_path: Path) -> None:
    model = llama()
    plain = _fp8_base(model, tmp_path / "base", (128, 128))
    edit_config(tmp_path / "base", quantization_config=FP8_CONFIG)
    (tmp_path / "base" / "quantize_config.json").write_text(json.dumps(AUTO_GPTQ))
    fresh = on_meta(LlamaForCausalLM, model.config)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, plain[name]), name


def test_a_file_beside_unquantized_weights_changes_nothing(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "quantize_config.json").write_text(json.dumps(AUTO_GPTQ))
    fresh = on_meta(LlamaForCausalLM, model.config)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    assert_same(fresh, model)


def test_a_damaged_file_beside_the_config_is_named(tmp_path: Path) -> None:
    model = _packed_base(tmp_path / "base")
    (tmp_path / "base" / "quantize_config.json").write_text('{"bits": 4')
    fresh = on_meta(LlamaForCausalLM, model.config)
    with pytest.raises(FormatError, match=r"quantize_config\.json"):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))


_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "tensor"}
_FLOAT8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"bits": 4}, "a method that its config.json does not name"),
        (_FLOAT8 | {"config_groups": {"a": {"weights": _WEIGHTS | {"symmetric": False}}}}, "compressed-tensors"),
        (_FLOAT8 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"compressed-tensors \(sparse-24-bitmask\)"),
    ],
)
def test_settings_that_would_give_wrong_values_are_refused(
    settings: dict[str, object], named: str, tmp_path: Path
) -> None:
    model = llama()
    _fp8_base(model, tmp_path / "base", (128, 128))
    edit_config(tmp_path / "base", quantization_config=settings)
    for dequantize in (None, True):
        fresh = on_meta(LlamaForCausalLM, model.config)
        engine = checkpointer(tmp_path, dequantize_base_checkpoint=dequantize)
        with pytest.raises(QuantizationError, match=f"quantized by {named}"):
            engine.load_base_model(fresh, "cpu", None, str(tmp_path / "base"))


def test_forcing_and_forbidding(tmp_path: Path) -> None:
    model = llama()
    plain = _fp8_base(model, tmp_path / "base", (128, 128))  # its config says nothing of quantization
    base = str(tmp_path / "base")
    fresh = on_meta(LlamaForCausalLM, model.config)
    with pytest.raises(DtypeMismatchError, match="scales beside it.*dequantize_base_checkpoint=True"):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, base)
    checkpointer(tmp_path, dequantize_base_checkpoint=True).load_base_model(fresh, "cpu", None, base)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, plain[name]), name
    edit_config(tmp_path / "base", quantization_config=FP8_CONFIG)
    with pytest.raises(DtypeMismatchError, match="scales beside it"):
        checkpointer(tmp_path, dequantize_base_checkpoint=False).load_base_model(fresh, "cpu", None, base)


def test_unquantized_weights_beside_a_method_that_does_not_touch_them(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", quantization_config={"quant_method": "awq", "modules_to_not_convert": ["all"]})
    fresh = on_meta(LlamaForCausalLM, model.config)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    assert_same(fresh, model)


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    model = llama()
    _fp8_base(model, tmp_path / "base", (128, 128))
    file = tmp_path / "base" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(5, 3)
    save_file(stored, file, metadata={"format": "pt"})
    edit_config(tmp_path / "base", quantization_config=FP8_CONFIG)
    with pytest.raises(QuantizationError, match=r"\[5, 3\] do not fit values of shape \[48, 32\].*weight_block_size"):
        checkpointer(tmp_path).load_base_model(
            on_meta(LlamaForCausalLM, llama_config()), "cpu", None, str(tmp_path / "base")
        )


def test_the_dtype_of_a_quantized_base(tmp_path: Path) -> None:
    _fp8_base(llama(), tmp_path / "base", (128, 128))
    edit_config(tmp_path / "base", quantization_config=FP8_CONFIG, dtype=None, torch_dtype=None)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["dtype"] is None
    assert base_dtype(tmp_path / "base") == "bfloat16"


def test_column_ranges_of_the_same_rows_are_read_once(tmp_path: Path) -> None:
    """What a packed placement along columns leaves on a rank: values and scales are read in one pass."""
    shape, block = (900, 640), (16, 16)
    stored = {
        "w": torch.randn(shape).mul(50).to(torch.float8_e4m3fn),
        "w_scale_inv": torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) + 0.1,
    }
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(tmp_path, Group(None))
    found, _ = find_quantized(source.tensors, block)
    boxes = [Box((0, 100), (900, 70)), Box((0, 420), (900, 70))]
    fragments = tuple(Fragment(box, torch.zeros(box.sizes)) for box in boxes)
    ranges: list[tuple[int, int]] = []
    reader = Reader(LocalStorage(), source.files, 1, lambda _, offset, length: ranges.append((offset, offset + length)))
    held = HeldTensor(found["w"].spec, shape, (HeldPart(Part(shape), (), fragments),))
    read_dequantized(found["w"], held, reader)
    reader.close()
    scales = stored["w_scale_inv"].repeat_interleave(16, 0)[:900].repeat_interleave(16, 1)
    expected = stored["w"].float() * scales
    for fragment in fragments:
        assert torch.equal(fragment.data, expected[:, fragment.box.offsets[1] : fragment.box.ends[1]])
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
