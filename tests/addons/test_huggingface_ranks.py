"""The metadata hooks on two ranks, with FSDP2: rank 0 writes, all leave together, a failure is everybody's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.addons import huggingface_ranks
from tests.support.ranks import fresh

CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class OwnConfig(PreTrainedConfig):
    model_type = "own_of_this_test"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(4, 4)
        self.post_init()
"""

AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind, a directory for each scenario."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "base").mkdir()
    (root / "base" / "modeling_own.py").write_text(CODE)
    (root / "base" / "config.json").write_text(json.dumps({"model_type": "own_of_this_test", "auto_map": AUTO_MAP}))
    output = root / "output"
    scenarios = ("plain", "prefix", "stages", "broken", "custom", "diffusers")
    assert fresh(huggingface_ranks.main, root, scenarios, output=output, seconds=120) == 0, (
        root / "output.err"
    ).read_text()[-4000:]
    return root


def left_behind(root: Path, scenario: str) -> list[dict[str, object]]:
    return [json.loads((root / scenario / f"seen_{rank}.json").read_text()) for rank in range(2)]


def exported(root: Path, scenario: str) -> dict[str, object]:
    return json.loads((root / scenario / "model" / "consolidated" / "config.json").read_text())


@pytest.mark.parametrize(
    ("scenario", "architecture"), [("plain", "LlamaForCausalLM"), ("prefix", "FSDPNamedByItsAuthor")]
)
def test_a_sharded_model_is_described_as_the_model_that_it_is(root: Path, scenario: str, architecture: str) -> None:
    for seen in left_behind(root, scenario):
        assert seen["error"] is None
        assert seen["written_when_left"]
        assert seen["copied_when_left"]
    config = exported(root, scenario)
    assert config["architectures"] == [architecture]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_a_quantized_stage_on_another_rank_keeps_the_entry(root: Path) -> None:
    assert exported(root, "stages")["quantization_config"] == {"quant_method": "fp8"}


def test_what_fails_on_rank_0_is_raised_on_every_rank(root: Path) -> None:
    first, second = left_behind(root, "broken")
    assert first["error"] == second["error"]
    name, text, rank = first["error"]
    assert (name, rank) == ("RemoteError", 0)
    assert "cannot serialise" in text
    assert [p.name for p in (root / "broken").glob("tried_*")] == ["tried_0"]
    assert not (root / "broken" / "model" / "consolidated").exists()


def test_custom_code_is_found_behind_the_class_that_fully_shard_makes(root: Path) -> None:
    for seen in left_behind(root, "custom"):
        assert seen["error"] is None
        assert seen["classes"] == ["OwnModel", "OwnConfig"]
    config = exported(root, "custom")
    assert config["architectures"] == ["OwnModel"]
    assert config["auto_map"] == AUTO_MAP
    assert (root / "custom" / "model" / "consolidated" / "modeling_own.py").read_text() == CODE


def test_a_sharded_diffusers_model_names_its_own_class(root: Path) -> None:
    from diffusers import AutoencoderKL

    assert exported(root, "diffusers")["_class_name"] == "AutoencoderKL"
    assert all(seen["config_is_unchanged"] for seen in left_behind(root, "diffusers"))
    reopened = AutoencoderKL.from_config(AutoencoderKL.load_config(root / "diffusers" / "model" / "consolidated"))
    assert list(reopened.config.block_out_channels) == [8]
