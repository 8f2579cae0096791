"""The adapter's settings files: what PeftAddon writes, and reading it back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import torch
from tests.peft.models import Parts
from tests.peft.own_models import OwnConfig, dense

from shardwise.addons import PeftAddon, _get_automodel_peft_metadata, _get_hf_peft_config
from shardwise.errors import AdapterError, CheckpointNotFoundError, MisuseError, StorageError
from shardwise.peft.config import read_adapter_config


class Tokenizer:
    def save_pretrained(self, save_directory: str) -> None:
        (Path(save_directory) / "tokenizer.json").write_text("{}")


def test_files_beside_the_weights(tmp_path: Path) -> None:
    path, config = tmp_path / "step" / "model", OwnConfig()
    model = dense(config)
    PeftAddon().pre_save(model_state=Parts([model]), model_path=str(path), peft_config=config, tokenizer=Tokenizer())
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter_config.json",
        "automodel_peft_config.json",
        "tokenizer.json",
    ]
    assert read_adapter_config(path) == _get_hf_peft_config(config, Parts([model]))
    assert json.loads((path / "automodel_peft_config.json").read_text()) == _get_automodel_peft_metadata(config)


def test_peft_reads_the_settings(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    PeftAddon().pre_save(
        model_state=Parts([dense(OwnConfig())]), model_path=str(tmp_path), peft_config=OwnConfig(dim=6, alpha=3)
    )
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.task_type, config.inference_mode) == (6, 3, "CAUSAL_LM", True)


def test_the_base_model_is_named(tmp_path: Path) -> None:
    model = dense(OwnConfig())
    args = {"model_state": Parts([model]), "model_path": str(tmp_path), "peft_config": OwnConfig()}
    PeftAddon().pre_save(**args, original_model_path="given/base")
    assert read_adapter_config(tmp_path)["base_model_name_or_path"] == "base/model"
    model.config.name_or_path = ""
    PeftAddon().pre_save(**args, original_model_path="given/base")
    assert read_adapter_config(tmp_path)["base_model_name_or_path"] == "given/base"


def test_a_lora_config_describes_own_modules_too() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["anything"])
    settings = _get_hf_peft_config(config, Parts([dense(OwnConfig(alpha=16))]))
    assert (settings["r"], settings["lora_alpha"]) == (4, 16)
    assert "alpha_pattern" not in settings
    assert "model.layers.0.self_attn.q_proj" in settings["target_modules"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="needs model_state and model_path"):
        PeftAddon().pre_save(model_path=str(tmp_path))
    with pytest.raises(AdapterError, match="need a peft_config"):
        PeftAddon().pre_save(model_state=Parts([dense(OwnConfig())]), model_path=str(tmp_path))


def test_a_refusing_file_system_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        PeftAddon().pre_save(
            model_state=Parts([dense(OwnConfig())]), model_path=str(tmp_path / "file"), peft_config=OwnConfig()
        )


class Position(Enum):
    POST = "post"


class Odd:
    def __str__(self) -> str:
        return "odd"


def test_metadata_is_json(caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class Config:
        dim: int = 8
        alpha: int = 32

        def to_dict(self) -> dict[str, object]:
            return {
                "dim": 8,
                "alpha": 32,
                "position": Position.POST,
                "dtype": torch.bfloat16,
                "modules": {"b", "a"},
                "where": Path("x/y"),
                "nested": {"t": (1, 2.5, None)},
                "odd": Odd(),
            }

    metadata = _get_automodel_peft_metadata(Config())
    assert json.loads(json.dumps(metadata)) == {
        "position": "post",
        "dtype": "torch.bfloat16",
        "modules": ["a", "b"],
        "where": "x/y",
        "nested": {"t": [1, 2.5, None]},
        "odd": "odd",
    }
    assert "'odd' (Odd) is stored as text" in caplog.text


def test_a_config_without_to_dict_is_refused() -> None:
    with pytest.raises(AdapterError, match="has no to_dict"):
        _get_automodel_peft_metadata(object())


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 8}', '{"peft_type": 3}', "\x00", "[" * 100_000])
def test_damaged_settings_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(tmp_path)
    assert caught.value.path == str(tmp_path / "adapter_config.json")


def test_absent_settings_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        read_adapter_config(tmp_path)
