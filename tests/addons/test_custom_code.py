"""Custom model code: what is copied, what is left out, and that transformers opens the copy."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shardwise.addons import ConsolidatedHFAddon, _iter_custom_code_classes, _maybe_save_custom_model_code
from shardwise.errors import StorageError

CONFIGURATION = """
from transformers import PreTrainedConfig


class TinyConfig(PreTrainedConfig):
    model_type = "shardwise_tiny"

    def __init__(self, width=4, vocab_size=11, **kwargs):
        self.width = width
        self.vocab_size = vocab_size
        super().__init__(**kwargs)
"""

HELPERS = """
from torch import nn


def block(width):
    return nn.Linear(width, width)
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation.utils import (
    GenerationMixin,
    NEED_SETUP_CACHE_CLASSES_MAPPING as CACHES,
)

from .configuration_tiny import TinyConfig
from .helpers_tiny import block


class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.block = block(config.width)
        self.caches = dict(CACHES)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return self.block(self.embed(input_ids))
"""

#: transformers of this environment lacks the symbol, so the base itself is made loadable as its author's release was.
LOADABLE = MODELING.replace("    NEED_SETUP_CACHE_CLASSES_MAPPING as CACHES,\n", "").replace("CACHES", "{}")


@dataclass
class Parts:
    model: list[nn.Module]


def write_model(directory: Path, modeling: str = LOADABLE, prefix: str = "") -> Path:
    directory.mkdir(parents=True)
    (directory / "configuration_tiny.py").write_text(CONFIGURATION)
    (directory / "helpers_tiny.py").write_text(HELPERS)
    (directory / "modeling_tiny.py").write_text(modeling)
    auto_map = {
        "AutoConfig": f"{prefix}configuration_tiny.TinyConfig",
        "AutoModel": f"{prefix}modeling_tiny.TinyModel",
    }
    config = {"model_type": "shardwise_tiny", "width": 6, "architectures": ["TinyModel"], "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Hub and module caches of this test's own, and no hub to ask."""
    from huggingface_hub import constants
    from transformers import dynamic_module_utils

    hub, modules = tmp_path / "hub", tmp_path / "modules"
    hub.mkdir()
    modules.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield SimpleNamespace(hub=hub, modules=modules)
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def save_weights(model: nn.Module, directory: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


def hub_model(hub: Path, repo: str, source: Path) -> str:
    """Lay ``source`` out as the hub cache does: blobs, and a snapshot of links to them."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = hub / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for index, path in enumerate(sorted(p for p in source.iterdir() if p.is_file())):
        blob = root / "blobs" / f"{index:040x}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return repo


def export(model: nn.Module, root: Path, original_model_path: str | None) -> Path:
    addon = ConsolidatedHFAddon()
    kwargs = {
        "model_state": Parts([model]),
        "hf_metadata_dir": str(root / ".hf_metadata"),
        "consolidated_path": str(root / "consolidated"),
        "original_model_path": original_model_path,
    }
    addon.pre_save(**kwargs)  # type: ignore[arg-type]
    addon.post_save(**kwargs)  # type: ignore[arg-type]
    save_weights(model, root / "consolidated")
    return root / "consolidated"


def reopened_equals(directory: Path, model: nn.Module) -> None:
    from transformers import AutoModel

    reopened = AutoModel.from_pretrained(directory, trust_remote_code=True)
    ids = torch.tensor([[1, 2, 3]])
    assert type(reopened) is not type(model)
    assert torch.equal(reopened(ids), model(ids))


def python_files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*.py"))


TINY = ["configuration_tiny.py", "helpers_tiny.py", "modeling_tiny.py"]

# --- opened by transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_is_known", [True, False])
def test_a_local_custom_model_reopens_from_its_export_alone(
    base_is_known: bool, tmp_path: Path, caches: SimpleNamespace
) -> None:
    from transformers import AutoModel

    base = write_model(tmp_path / "base.v1")
    fresh = AutoModel.from_config(_config(base), trust_remote_code=True)
    directory = export(fresh, tmp_path / "out", str(base) if base_is_known else None)
    assert python_files(directory) == TINY
    shutil.rmtree(base)
    reopened_equals(directory, fresh)


def _config(base: Path | str) -> object:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base, trust_remote_code=True)


@pytest.mark.parametrize("prefix", ["", "some-org/tiny.model--"])
def test_a_hub_model_reopens_without_the_hub(prefix: str, tmp_path: Path, caches: SimpleNamespace) -> None:
    from transformers import AutoModel

    repo = hub_model(caches.hub, "some-org/tiny.model", write_model(tmp_path / "source", prefix=prefix))
    model = AutoModel.from_config(_config(repo), trust_remote_code=True)
    directory = export(model, tmp_path / "out", repo)
    assert python_files(directory) == TINY
    shutil.rmtree(caches.hub / "models--some-org--tiny.model")
    assert json.loads((directory / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModel": "modeling_tiny.TinyModel",
    }
    reopened_equals(directory, model)


def test_a_hub_model_fetched_at_one_revision_is_found_without_main(tmp_path: Path, caches: SimpleNamespace) -> None:
    from transformers import AutoModel, BertConfig

    source = write_model(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 9}))
    (source / "vocab.txt").write_text("[UNK]\n")
    repo = hub_model(caches.hub, "some-org/pinned", source)
    (caches.hub / "models--some-org--pinned" / "refs" / "main").unlink()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig.from_pretrained(repo, revision="0123456789abcdef0123456789abcdef01234567", **sizes)
    directory = export(AutoModel.from_config(config), tmp_path / "out", repo)
    assert (directory / "vocab.txt").read_text() == "[UNK]\n"


def test_code_that_auto_map_names_is_taken_from_the_hub_cache_where_it_was_never_loaded(
    tmp_path: Path, caches: SimpleNamespace
) -> None:
    repo = hub_model(caches.hub, "some-org/tiny", write_model(tmp_path / "source"))
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(auto_map={"AutoModel": "modeling_tiny.TinyModel"})  # type: ignore[assignment]
    _maybe_save_custom_model_code(repo, str(tmp_path / "out"), model)
    assert python_files(tmp_path / "out") == TINY


def test_an_export_is_guarded_against_names_that_transformers_removed(tmp_path: Path, caches: SimpleNamespace) -> None:
    from transformers import AutoModel

    base = write_model(tmp_path / "base", modeling=MODELING)
    with pytest.raises(ImportError, match="NEED_SETUP"):
        AutoModel.from_config(_config(base), trust_remote_code=True)
    _maybe_save_custom_model_code(str(base), str(tmp_path / "out"))
    shutil.copy(base / "config.json", tmp_path / "out")
    model = AutoModel.from_config(_config(tmp_path / "out"), trust_remote_code=True)
    assert model.caches == {}
    assert (base / "modeling_tiny.py").read_text() == MODELING
    assert (tmp_path / "out" / "helpers_tiny.py").read_bytes() == (base / "helpers_tiny.py").read_bytes()


def test_a_class_registered_for_an_auto_class_brings_its_module(
    tmp_path: Path, caches: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = write_model(tmp_path / "usercode_of_this_test")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    module = importlib.import_module("usercode_of_this_test.modeling_tiny")
    configuration = importlib.import_module("usercode_of_this_test.configuration_tiny")
    configuration.TinyConfig.register_for_auto_class()
    module.TinyModel.register_for_auto_class("AutoModel")
    model = module.TinyModel(configuration.TinyConfig(width=3))
    directory = export(model, tmp_path / "out", None)
    assert python_files(directory) == TINY
    reopened_equals(directory, model)


# --- which classes --------------------------------------------------------------------------------------------------


def test_classes_are_found_behind_generated_ones(tmp_path: Path, caches: SimpleNamespace) -> None:
    from transformers import AutoModel

    model = AutoModel.from_config(_config(write_model(tmp_path / "base")), trust_remote_code=True)
    own = type(model)
    model.__class__ = type("FSDPTinyModel", (own,), {"__module__": "torch.distributed.fsdp"})
    found = list(_iter_custom_code_classes(model))
    assert found[0] is own
    assert type(model.config) in found
    assert len(found) == len(set(found)) == 2


def test_a_model_of_transformers_own_has_no_custom_classes() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    assert list(_iter_custom_code_classes(BertModel(config))) == []
    assert list(_iter_custom_code_classes(nn.Linear(2, 2))) == []


# --- what is copied from a directory --------------------------------------------------------------------------------


def test_the_folder_structure_is_kept_and_what_is_not_the_models_is_left_out(tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name in (
        "modeling.py",
        "__init__.py",
        "layers/attention.py",
        "layers/__init__.py",
        "layers/deep/mlp.py",
        ".git/hooks/hook.py",
        "__pycache__/stale.py",
        "runs/epoch_0/model/consolidated/modeling.py",
        "notes.txt",
    ):
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    target = base / "runs" / "epoch_1" / "model" / ".hf_metadata"
    _maybe_save_custom_model_code(str(base), str(target))
    assert python_files(target) == ["layers/attention.py", "layers/deep/mlp.py", "modeling.py"]
    assert (target / "layers/deep/mlp.py").read_text() == "# layers/deep/mlp.py\n"


def test_nothing_that_is_copied_runs(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    proof = tmp_path / "ran"
    trap = f"from transformers.generation.utils import NEED_SETUP_CACHE_CLASSES_MAPPING\nopen({str(proof)!r}, 'w')\n"
    (base / "trap.py").write_text(trap)
    _maybe_save_custom_model_code(str(base), str(tmp_path / "out"))
    assert python_files(tmp_path / "out") == ["trap.py"]
    assert not proof.exists()


def test_links_that_leave_the_base_are_not_followed(tmp_path: Path) -> None:
    base, outside = tmp_path / "base", tmp_path / "outside"
    base.mkdir()
    outside.mkdir()
    (outside / "secret.py").write_text("key = 1\n")
    (base / "real.py").write_text("x = 1\n")
    (base / "alias.py").symlink_to("real.py")
    (base / "leak.py").symlink_to(outside / "secret.py")
    (base / "leaks").symlink_to(outside)
    (base / "dangling.py").symlink_to("absent.py")
    _maybe_save_custom_model_code(str(base), str(tmp_path / "out"))
    assert python_files(tmp_path / "out") == ["alias.py", "real.py"]
    assert not (tmp_path / "out" / "alias.py").is_symlink()


def test_a_hub_snapshot_is_a_local_directory_of_links(tmp_path: Path) -> None:
    hub_model(tmp_path / "hub", "org/tiny", write_model(tmp_path / "source"))
    snapshot = next((tmp_path / "hub" / "models--org--tiny" / "snapshots").iterdir())
    _maybe_save_custom_model_code(str(snapshot), str(tmp_path / "out"))
    assert python_files(tmp_path / "out") == TINY
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_a_single_file_brings_the_files_that_it_imports_relatively(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    (base / "unrelated.py").write_text("")
    (base / "helpers_tiny.py").write_text("from . import further\nfrom .modeling_tiny import TinyModel\n")
    (base / "further.py").write_text("from ..outside import x\n")
    (tmp_path / "outside.py").write_text("x = 1\n")
    _maybe_save_custom_model_code(str(base / "modeling_tiny.py"), str(tmp_path / "out"))
    assert python_files(tmp_path / "out") == sorted([*TINY, "further.py"])


@pytest.mark.parametrize("path", [None, "nobody/nothing", "weights.safetensors"])
def test_where_there_is_no_code_nothing_is_written(path: str | None, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    (tmp_path / "beside.py").write_text("")
    original = str(tmp_path / path) if path == "weights.safetensors" else path
    _maybe_save_custom_model_code(original, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(StorageError, match="out"):
        _maybe_save_custom_model_code(str(base), str(tmp_path / "out"))
