"""Models in other modules: the export is the inner model's, and what is around it comes back."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.clients.opening import opened, same_weights
from tests.clients.training import EXPORT
from tests.clients.wrapped import WRAPPERS, RewardModel, build_checkpointer, llama, save_reward_model
from tests.support.ranks import run
from tests.support.releases import needs_add_adapter
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from shardwise.errors import AdapterError, ExportMismatchError, NameCollisionError
from shardwise.ops.consolidate import consolidate

IDS = torch.arange(8).view(1, 8)


def opens_as(directory: Path, inner: nn.Module) -> None:
    """Whether transformers opens an export, finds every tensor and no other, and computes the same."""
    model = opened(directory, "AutoModelForCausalLM")
    assert type(model) is type(inner)
    assert torch.equal(model(IDS).logits, inner(IDS).logits)


def same_state(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    assert {name for name, _ in one.state_dict().items()} == set(theirs)
    for name, value in one.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("tied", [False, True])
def test_an_export_is_the_inner_models(tmp_path: Path, name: str, tied: bool) -> None:
    wrap = WRAPPERS[name]
    inner = llama(1, tie_word_embeddings=tied)
    model, again = wrap(inner), wrap(llama(2, tie_word_embeddings=tied))
    with build_checkpointer(tmp_path) as saver:
        path = saver.save(0, 1, model)
        opens_as(path / EXPORT, inner)
        saver.restore(again)
    same_state(model, again)


@pytest.mark.parametrize("name", WRAPPERS)
def test_shards_are_consolidated_to_the_inner_models_export(tmp_path: Path, name: str) -> None:
    wrap, inner = WRAPPERS[name], llama(1)
    model, again = wrap(inner), wrap(llama(2))
    with build_checkpointer(tmp_path, save_consolidated="false") as saver:
        path = saver.save(0, 1, model)
        consolidate(path)
        opens_as(path / EXPORT, inner)
        saver.restore(again)
    same_state(model, again)


@pytest.mark.parametrize("with_base", [False, True])
def test_two_ranks_export_the_inner_model_and_restore_the_head(tmp_path: Path, with_base: bool) -> None:
    base = tmp_path / "base"
    llama(5, tie_word_embeddings=True).save_pretrained(base)
    assert run(2, save_reward_model, str(tmp_path), str(base) if with_base else None) == [True, True]
    whole = torch.load(tmp_path / "whole.pt")
    inner = {n.removeprefix("backbone."): v for n, v in whole.items() if n.startswith("backbone.")}
    same_weights(opened(tmp_path / "run" / "LATEST" / EXPORT, "AutoModelForCausalLM"), inner)


def test_a_head_is_in_no_file_of_the_export(tmp_path: Path) -> None:
    with build_checkpointer(tmp_path) as saver:
        path = saver.save(0, 1, RewardModel(llama()))
    assert not [
        name for name in load_file(path / EXPORT / "model.safetensors") if "head." in name and "lm_" not in name
    ]


def test_a_name_of_the_wrappers_that_the_files_have_is_refused(tmp_path: Path) -> None:
    model = RewardModel(llama())
    model.lm_head = nn.Linear(16, 32, bias=False)
    with build_checkpointer(tmp_path) as saver, pytest.raises(NameCollisionError, match=r"lm_head\.weight"):
        saver.save(0, 1, model)
    assert not list(tmp_path.iterdir())


def with_another_head() -> nn.Module:
    model = llama()
    model.score = nn.Linear(16, 1)
    return model


def of_another_size() -> nn.Module:
    model = llama()
    model.model.embed_tokens = nn.Embedding(40, 16)
    return model


def without_a_layer() -> nn.Module:
    model = llama()
    del model.model.layers[0]
    return model


class Two(nn.Module):
    """Holds two models, either of which its configuration could be of."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = llama(1)
        self.config = self.policy.config
        self.reference = type(self.policy)(self.config)


MISFITS = [
    (with_another_head, r"LlamaForCausalLM.*unexpected: score\.bias, score\.weight"),
    (of_another_size, r"of another shape: model\.embed_tokens\.weight \(\[40, 16\], in the class \[32, 16\]\)"),
    (without_a_layer, r"missing: model\.layers\.0\.input_layernorm\.weight"),
    (Two, r"unexpected: "),
]


@pytest.mark.parametrize(("build", "message"), MISFITS)
@pytest.mark.parametrize("mode", ["every", "final"])
def test_an_export_that_its_class_would_not_load_is_refused(
    tmp_path: Path, build: object, message: str, mode: str
) -> None:
    with (
        build_checkpointer(tmp_path, save_consolidated=mode) as saver,
        pytest.raises(ExportMismatchError, match=message),
    ):
        saver.save(0, 1, build())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("build", [with_another_head, of_another_size])
def test_the_check_can_be_switched_off(tmp_path: Path, build: object) -> None:
    with build_checkpointer(tmp_path, verify_export=False) as saver:
        assert (saver.save(0, 1, build()) / EXPORT / "config.json").is_file()


def test_the_check_draws_no_random_numbers(tmp_path: Path) -> None:
    model = llama()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with build_checkpointer(tmp_path) as saver:
        saver.save(0, 1, model)
    assert torch.equal(torch.rand(3), expected)


def test_what_cannot_be_checked_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Picky(type(llama())):
        def __init__(self, config: object, needed: int) -> None:
            super().__init__(config)

    with build_checkpointer(tmp_path) as saver, caplog.at_level(logging.INFO, logger="shardwise"):
        for step in (1, 2):
            saver.save(0, step, Picky(llama().config, 3))
    assert sum("not checked against a class: Picky on the meta device" in r.message for r in caplog.records) == 1


def adapted(how: str) -> nn.Module:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model, config = llama(), LoraConfig(target_modules=["q_proj"])
    if how == "add_adapter":
        needs_add_adapter()
        model.add_adapter(config)
        return model
    if how == "prompt":
        return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    whole = get_peft_model(model, config)
    return RewardModel(whole) if how == "inside" else whole


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "prompt", "inside"])
@pytest.mark.parametrize("mode", ["every", "final"])
def test_a_model_with_an_adapter_is_not_exported_as_a_whole(tmp_path: Path, how: str, mode: str) -> None:
    with build_checkpointer(tmp_path, save_consolidated=mode) as saver:
        model = adapted(how)
        for _ in range(2):
            with pytest.raises(AdapterError, match=r"is_peft.*merge_and_unload"):
                saver.save(0, 1, model)
    assert not list(tmp_path.iterdir())


def test_a_merged_adapter_is_a_model_again(tmp_path: Path) -> None:
    model = adapted("get_peft_model").merge_and_unload()
    with build_checkpointer(tmp_path) as saver:
        opens_as(saver.save(0, 1, model) / EXPORT, model)


def test_an_encoder_whose_ties_are_biases_too_opens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=16)).eval()
    with build_checkpointer(tmp_path) as saver:
        path = saver.save(0, 1, nn.DataParallel(model))
    again = opened(path / EXPORT, "AutoModelForMaskedLM")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def encoder(folder: Path, *more: nn.Module) -> nn.Module:
    """A small sentence-transformers model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertModel, BertTokenizerFast

    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(**sizes, vocab_size=16)).save_pretrained(folder)
    first = SentenceTransformer(str(folder), device="cpu")[0]
    return SentenceTransformer(modules=[first, Pooling(16, "cls"), *more], device="cpu")


def test_a_sentence_transformer_opens_as_one(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(1)
    model, again = encoder(tmp_path / "a"), encoder(tmp_path / "b")
    with build_checkpointer(tmp_path / "run") as saver:
        path = saver.save(0, 1, model)
        saver.restore(again)
    same_state(model, again)
    same_weights(opened(path / EXPORT, "AutoModel"), _inner(model))
    theirs = SentenceTransformer(str(path / EXPORT), device="cpu")
    assert (theirs.encode("hello world") == model.encode("hello world")).all()


def _inner(model: nn.Module) -> dict[str, torch.Tensor]:
    [inner] = model[0].children()
    return inner.state_dict()


def test_weights_around_a_sentence_transformer_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense

    model, again = encoder(tmp_path / "a", Dense(16, 4)), encoder(tmp_path / "b", Dense(16, 4))
    with build_checkpointer(tmp_path / "run") as saver, caplog.at_level(logging.WARNING, logger="shardwise"):
        path = saver.save(0, 1, model)
        saver.restore(again)
    same_state(model, again)
    same_weights(opened(path / EXPORT, "AutoModel"), _inner(model))
    assert not (path / EXPORT / "modules.json").exists()
    assert "2 (Dense) have weights outside of it" in caplog.text


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: model])
def test_files_with_the_prefix_of_a_wrapper_are_loaded(tmp_path: Path, wrap: object) -> None:
    inner, again = llama(1), wrap(llama(2))
    save_file({f"module.{name}": value for name, value in inner.state_dict().items()}, tmp_path / "model.safetensors")
    with build_checkpointer(tmp_path / "run") as loader:
        loader.load_model(again, tmp_path)
    same_state(wrap(inner), again)
