"""Adapters under other names, in other files, of other methods: opened, or refused by name."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.clients.test_wrappers import encoder
from tests.peft.models import causal, logits, randomise
from tests.support.releases import needs_add_adapter
from torch import nn

import peft
from shardwise.checkpointing import Checkpointer
from shardwise.config import CheckpointingConfig
from shardwise.errors import AdapterError, FormatError, MissingTensorError, UnsafePickleError

_ALL: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def _saver(path: Path, **settings: Any) -> Checkpointer:
    return CheckpointingConfig(checkpoint_dir=str(path), is_peft=True, **settings).build(0, 0, 0)


def _adapted(config: peft.PeftConfig | None = None, name: str = "default", seed: int = 1) -> Any:
    model = peft.get_peft_model(causal("llama"), config or peft.LoraConfig(r=4, **_ALL), adapter_name=name)
    randomise(model, seed)
    return model


def _same(first: nn.Module, second: nn.Module) -> bool:
    return torch.equal(logits(first.eval()), logits(second.eval()))


METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "shira": lambda: peft.ShiraConfig(r=1, random_seed=3, **_ALL),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, **_ALL),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_beside_lora_are_saved_as_peft_does_and_opened(method: str, tmp_path: Path) -> None:
    model = _adapted(METHODS[method]())
    with _saver(tmp_path) as saver:
        saver.save_model(model, str(tmp_path / "ours"))
        model.save_pretrained(tmp_path / "theirs")
        ours = load_file(tmp_path / "ours/model/adapter_model.safetensors")
        theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in theirs.items())
        again = _adapted(METHODS[method](), seed=2)
        assert not _same(again, model)
        saver.load_model(again, str(tmp_path / "ours/model"))
    assert _same(again, model)
    assert _same(peft.PeftModel.from_pretrained(causal("llama"), str(tmp_path / "ours/model")), model)


def test_an_adapter_whose_ranks_were_allocated_is_saved_whole(tmp_path: Path) -> None:
    settings = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 4, **_ALL}
    model = _adapted(peft.AdaLoraConfig(**settings))
    for step in range(5):
        model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    assert model.peft_config["default"].rank_pattern
    with _saver(tmp_path) as saver:
        saver.save_model(model, str(tmp_path / "out"))
        again = _adapted(
            peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=4, **_ALL), seed=2
        )
        saver.load_model(again, str(tmp_path / "out/model"))
    assert _same(again, model)
    opened = peft.PeftModel.from_pretrained(causal("llama"), str(tmp_path / "out/model"))
    torch.testing.assert_close(logits(opened.eval()), logits(model.eval()))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, save_only_topk_weights=True, **_ALL), "save_only_topk"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True), "PREFIX_TUNING"),
        (peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8), "P_TUNING"),
    ],
    ids=["topk", "projection", "encoder"],
)
def test_what_peft_computes_is_refused_before_training(config: peft.PeftConfig, named: str, tmp_path: Path) -> None:
    model = _adapted(config)
    with _saver(tmp_path) as saver, pytest.raises(AdapterError, match=named):
        saver.restore(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_base_is_named_by_the_settings_where_the_model_does_not(tmp_path: Path) -> None:
    base = causal("llama")
    base.save_pretrained(tmp_path / "base")
    model = _adapted()
    model.base_model.model.resize_token_embeddings(40)
    with _saver(tmp_path, model_repo_id=str(tmp_path / "base")) as saver:
        saver.save_model(model, str(tmp_path / "out"))
        settings = json.loads((tmp_path / "out/model/adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tmp_path / "base")
        saved = load_file(tmp_path / "out/model/adapter_model.safetensors")
        assert saved["base_model.model.model.embed_tokens.weight"].shape[0] == 40
        again = _adapted(seed=2)
        again.base_model.model.resize_token_embeddings(40)
        saver.load_model(again, str(tmp_path / "out/model"))
    assert _same(again, model)


def test_other_files_and_names(tmp_path: Path) -> None:
    model = _adapted()
    model.save_pretrained(tmp_path / "st")
    tensors = load_file(tmp_path / "st/adapter_model.safetensors")
    shutil.copytree(tmp_path / "st", tmp_path / "bin")
    (tmp_path / "bin/adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "bin/adapter_model.bin")
    _adapted(name="mine").save_pretrained(tmp_path / "named")
    with _saver(tmp_path) as saver:
        for place in ("bin", "named", "st/adapter_model.safetensors", "bin/adapter_model.bin"):
            again = _adapted(seed=2)
            saver.load_model(again, str(tmp_path / place))
            assert _same(again, model), place
        other = _adapted(name="other", seed=2)
        saver.load_model(other, str(tmp_path / "st"))
        assert _same(other, model)


def test_a_pickle_of_more_than_tensors_is_opened_where_the_settings_allow_it(tmp_path: Path) -> None:
    model = _adapted()
    model.save_pretrained(tmp_path / "old")
    tensors = load_file(tmp_path / "old/adapter_model.safetensors")
    (tmp_path / "old/adapter_model.safetensors").unlink()
    file = tmp_path / "old/adapter_model.bin"
    torch.save({**tensors, "arguments": argparse.Namespace(lr=1.0)}, file)
    again = _adapted(seed=2)
    with _saver(tmp_path / "run") as saver, pytest.raises(UnsafePickleError, match="allow_legacy_pickle_restore"):
        saver.load_model(again, str(tmp_path / "old"))
    with _saver(tmp_path / "run", allow_legacy_pickle_restore=True) as saver:
        saver.load_model(again, str(tmp_path / "old"))
        assert _same(again, model)
        torch.save(tensors, file, _use_new_zipfile_serialization=False)  # of torch before 1.6, older than peft
        with pytest.raises(FormatError, match="no range of bytes"):
            saver.load_model(again, str(tmp_path / "old"))


def test_names_are_mapped_and_a_subset_is_allowed(tmp_path: Path) -> None:
    model = _adapted()
    with _saver(tmp_path) as saver:
        saver.save_model(model, str(tmp_path / "out"))
        file = tmp_path / "out/model/adapter_model.safetensors"
        from safetensors.torch import save_file

        tensors = load_file(file)
        save_file({n.replace("base_model.model.", "net."): t for n, t in tensors.items()}, file)
        again = _adapted(seed=2)
        saver.load_model(again, str(tmp_path / "out/model"), key_mapping={r"^net\.": "base_model.model."})
        assert _same(again, model)
        some = {n: t for n, t in tensors.items() if "layers.0" in n}
        save_file(some, file)
        again = _adapted(seed=2)
        with pytest.raises(MissingTensorError):
            saver.load_model(again, str(tmp_path / "out/model"))
        saver.load_model(again, str(tmp_path / "out/model"), allow_checkpoint_key_subset=True)
        own = peft.get_peft_model_state_dict(again)
        old = peft.get_peft_model_state_dict(_adapted(seed=2))
        assert all(torch.equal(t, tensors[n] if n in some else old[n]) for n, t in own.items())


def test_a_second_adapter_is_named_where_it_is_missing(tmp_path: Path) -> None:
    model = _adapted()
    with _saver(tmp_path) as saver:
        saver.save_model(model, str(tmp_path / "one"))
        model.add_adapter("ref", peft.LoraConfig(r=4, **_ALL))
        before = {n: p.clone() for n, p in model.named_parameters() if ".ref." in n}
        with pytest.raises(AdapterError, match=r"no adapter called 'ref'; it has 'default'"):
            saver.load_model(model, str(tmp_path / "one/model"))
        randomise(model, 4)
        saver.load_model(model, str(tmp_path / "one/model"), allow_checkpoint_key_subset=True)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        assert _same(model, _adapted())
        saver.save_model(model, str(tmp_path / "two"))
        again = _adapted(seed=3)
        again.add_adapter("ref", peft.LoraConfig(r=4, **_ALL))
        saver.load_model(again, str(tmp_path / "two/model"))
    assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in model.named_parameters() if "lora" in n)


def test_a_whole_sentence_transformer_has_the_adapter_of_its_model(tmp_path: Path) -> None:
    needs_add_adapter()

    def built(seed: int) -> tuple[nn.Module, Any]:
        model = encoder(tmp_path / "bert")
        inner: Any = next(iter(model[0].children()))  # type: ignore[operator]
        inner.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION"))
        torch.manual_seed(0)
        randomise(inner, seed)
        return model, inner

    model, inner = built(1)
    with _saver(tmp_path) as saver:
        saver.save_model(model, str(tmp_path / "out"))
        inner.save_pretrained(tmp_path / "theirs")
        ours = load_file(tmp_path / "out/model/adapter_model.safetensors")
        theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], t) for n, t in theirs.items())
        again, inner_again = built(2)
        saver.load_model(again, str(tmp_path / "out/model"))
    fresh = dict(inner_again.named_parameters())
    assert all(torch.equal(p, fresh[n]) for n, p in inner.named_parameters() if "lora" in n)


def test_the_layout_of_expert_adapters_is_recorded_and_compared(tmp_path: Path) -> None:
    def model(seed: int) -> Any:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
        out = peft.get_peft_model(causal("qwen3_moe"), config)
        randomise(out, seed)
        return out

    first = model(1)
    for legacy in (True, False):
        path = tmp_path / str(legacy)
        with _saver(tmp_path, legacy_paramwrapper_layout=legacy) as saver:
            saver.save_model(first, str(path))
            again = model(2)
            saver.load_model(again, str(path / "model"))
            assert _same(again, first)
        with (
            _saver(tmp_path, legacy_paramwrapper_layout=not legacy) as saver,
            pytest.raises(AdapterError, match=f"legacy_paramwrapper_layout was {legacy}"),
        ):
            saver.load_model(again, str(path / "model"))


@pytest.mark.parametrize(
    ("config", "key", "other"),
    [
        (lambda: peft.VeraConfig(r=4, save_projection=False, **_ALL), "projection_prng_key", 7),
        (lambda: peft.FourierFTConfig(n_frequency=8, **_ALL), "random_loc_seed", 7),
        (lambda: peft.LoHaConfig(r=4, **_ALL), "alpha", 3),
        (lambda: peft.LoraConfig(r=4, trainable_token_indices=[1, 2], **_ALL), "trainable_token_indices", [2, 1]),
        (lambda: peft.LoraConfig(r=4, **_ALL), "alora_invocation_tokens", [3]),
    ],
    ids=["vera", "fourier", "loha", "tokens", "alora"],
)
def test_an_adapter_that_means_something_else_is_refused(
    config: Callable[[], Any], key: str, other: object, tmp_path: Path
) -> None:
    model = _adapted(config())
    unlike = config()
    setattr(unlike, key, other)
    with _saver(tmp_path) as saver:
        saver.save_model(model, str(tmp_path / "out"))
        with pytest.raises(AdapterError, match=f"would mean something else in this model: {key} was"):
            saver.load_model(_adapted(unlike), str(tmp_path / "out/model"))
        saver.load_model(_adapted(config(), seed=2), str(tmp_path / "out/model"))
