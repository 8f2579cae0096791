"""Exports over a base model: what may differ from it, what is carried over, and what stops the publication."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests.clients.families import BERT, build
from tests.clients.opening import dtypes_of, opened, same_weights, tensors_of
from tests.clients.overbase import deepseek, edit, llama, save_over, train_over
from tests.clients.training import EXPORT
from tests.support.ranks import failure, run
from torch import nn

from shardwise.errors import ExportMismatchError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A llama as its author published it."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(
    opener: str,
    base: Path,
    loading: Mapping[str, object] | None = None,
    vocabulary: int | None = None,
    **settings: object,
) -> tuple[Path, Tensors]:
    """Train on two ranks over a base; the export and the trained weights."""
    root = base.parent
    assert run(2, train_over, opener, str(base), str(root), loading or {}, vocabulary, settings) == [True, True]
    return root / "run" / "LATEST" / EXPORT, torch.load(root / "whole.pt")


def published(base: Path) -> list[str]:
    return sorted(p.name for p in (base.parent / "run").iterdir())


def test_another_shape_is_listed_and_nothing_is_published(base: Path) -> None:
    error = failure(2, save_over, str(base), str(base.parent), {"intermediate_size": 28}, {})
    assert isinstance(error, ExportMismatchError)
    assert "model.layers.0.mlp.down_proj.weight: shape [16, 28], in the base model [16, 24]" in str(error)
    assert "model.layers.1.mlp.up_proj.weight" in str(error)
    assert "q_proj" not in str(error)
    assert "verify_export" in str(error)
    assert published(base) == []


def test_a_difference_that_is_wanted_goes_through(base: Path) -> None:
    run(2, save_over, str(base), str(base.parent), {"intermediate_size": 28}, {"verify_export": False})
    model = opened(base.parent / "run" / "LATEST" / EXPORT, "AutoModelForCausalLM")
    same_weights(model, llama(intermediate_size=28).state_dict())


def test_a_tensor_of_the_base_that_the_model_lacks_is_listed(base: Path) -> None:
    edit(base, lambda tensors: {**tensors, "model.layers.1.gate.weight": torch.ones(3)})
    error = failure(2, save_over, str(base), str(base.parent), {}, {})
    assert isinstance(error, ExportMismatchError)
    assert "model.layers.1.gate.weight: the base model ships it, the export lacks it" in str(error)
    assert published(base) == []
    run(2, save_over, str(base), str(base.parent), {}, {"verify_export": False})
    assert "model.layers.1.gate.weight" not in tensors_of(base.parent / "run" / "LATEST" / EXPORT)


@pytest.mark.parametrize("carried", [True, False])
def test_tensors_that_the_class_does_not_load_are_carried_over(carried: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    deepseek().save_pretrained(base)
    head = {f"model.layers.61.{name}.weight": torch.randn(5, 3).to(torch.bfloat16) for name in ("eh_proj", "enorm")}
    edit(base, lambda tensors: tensors | head)
    export, whole = train("AutoModelForCausalLM", base, pass_through_unloaded=carried)
    same_weights(opened(export, "AutoModelForCausalLM"), whole)
    found = tensors_of(export)
    assert {name for name in found if ".61." in name} == (set(head) if carried else set())
    for name in head if carried else ():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], head[name])


def test_a_resized_vocabulary_is_no_difference(base: Path) -> None:
    export, whole = train("AutoModelForCausalLM", base, vocabulary=48)
    assert whole["lm_head.weight"].shape == (48, 16)
    same_weights(opened(export, "AutoModelForCausalLM"), whole)


def test_a_new_head_over_a_language_model(base: Path) -> None:
    export, whole = train("AutoModelForSequenceClassification", base)
    same_weights(opened(export, "AutoModelForSequenceClassification"), whole)
    assert json.loads((export / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    assert "lm_head.weight" not in tensors_of(export)


def test_the_names_that_bert_was_published_with(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build("bert-lm").save_pretrained(base)

    def as_published(tensors: Tensors) -> Tensors:
        old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
        out = {}
        for name, tensor in tensors.items():
            for new, published in old.items():
                name = name.replace(new, published)
            out[name] = tensor
        # Early releases saved these too: further names of tied tensors, and a buffer that is computed.
        embedding = out["bert.embeddings.word_embeddings.weight"]
        positions = torch.arange(BERT["max_position_embeddings"]).unsqueeze(0)
        return out | {
            "cls.predictions.decoder.weight": embedding.clone(),
            "cls.predictions.decoder.bias": out["cls.predictions.bias"].clone(),
            "bert.embeddings.position_ids": positions,
        }

    edit(base, as_published)
    export, whole = train("AutoModelForMaskedLM", base)
    same_weights(opened(export, "AutoModelForMaskedLM"), whole)


@pytest.mark.parametrize(
    ("name", "opener", "head"),
    [
        ("llama-tied", "AutoModelForCausalLM", "lm_head.weight"),
        ("gemma3", "AutoModelForImageTextToText", "language_model.lm_head.weight"),
    ],
)
def test_a_tied_head_that_the_base_ships(name: str, opener: str, head: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build(name).save_pretrained(base)

    def with_head(tensors: Tensors) -> Tensors:
        embedding = next(tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.weight"))
        return tensors | {head: embedding.clone()}

    edit(base, with_head)
    export, whole = train(opener, base)
    model: nn.Module = opened(export, opener)
    same_weights(model, whole)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_run_in_float32_over_a_bfloat16_base_exports_bfloat16(base: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(base)
    export, whole = train("AutoModelForCausalLM", base, {"dtype": torch.float32})
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert set(dtypes_of(export).values()) == {"BF16"}
    same_weights(opened(export, "AutoModelForCausalLM"), {n: t.to(torch.bfloat16) for n, t in whole.items()})
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
