"""The metadata hooks on two ranks, with FSDP2: rank 0 writes, all leave together, a failure is everybody's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM, dynamic_module_utils

from shardwise.addons import ConsolidatedHFAddon, _iter_custom_code_classes
from shardwise.comm import Group
from shardwise.errors import ShardwiseError

top = Path(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank = dist.get_rank()
# Each process has a module cache of its own: two that fill one race.
dynamic_module_utils.HF_MODULES_CACHE = str(top / f"modules_{rank}")


@dataclass
class Parts:
    model: list


class FSDPNamedByItsAuthor(LlamaForCausalLM):
    pass


class Broken:
    def __init__(self, root):
        self.root = root

    def save_pretrained(self, save_directory):
        (self.root / f"tried_{rank}").touch()
        raise ValueError("cannot serialise")


def build(scenario):
    if scenario == "custom":
        config = AutoConfig.from_pretrained(top / "base", trust_remote_code=True)
        return AutoModel.from_config(config, trust_remote_code=True)
    if scenario == "diffusers":
        from diffusers import AutoencoderKL

        return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**sizes, vocab_size=40)
    config.quantization_config = {"quant_method": "fp8"}
    return (FSDPNamedByItsAuthor if scenario == "prefix" else LlamaForCausalLM)(config)


def run(scenario, mesh):
    root = top / scenario
    root.mkdir(exist_ok=True)
    model = build(scenario).to(torch.bfloat16)
    if scenario == "stages":
        # Rank 1's stage is quantized, rank 0's is not.
        if rank == 1:
            packed = torch.zeros(40, 16).to(torch.float8_e4m3fn)
            model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
    else:
        fully_shard(model, mesh=mesh)

    kwargs = {
        "model_state": Parts([model]),
        "hf_metadata_dir": str(root / "model" / ".hf_metadata"),
        "consolidated_path": str(root / "model" / "consolidated"),
        "tokenizer": Broken(root) if scenario == "broken" else None,
        "diffusers_compatible": scenario == "diffusers",
        "group": Group.current() if scenario == "plain" else None,
    }
    noted = dict(model.config) if scenario == "diffusers" else None
    seen = {"rank": rank, "error": None, "classes": [c.__name__ for c in _iter_custom_code_classes(model)]}
    try:
        addon = ConsolidatedHFAddon()
        addon.pre_save(**kwargs)
        seen["written_when_left"] = (root / "model" / ".hf_metadata" / "config.json").is_file()
        addon.post_save(**kwargs)
        seen["config_is_unchanged"] = noted is None or dict(model.config) == noted
        seen["copied_when_left"] = (root / "model" / "consolidated" / "config.json").is_file()
    except ShardwiseError as error:
        seen["error"] = [type(error).__name__, str(error), error.rank]
    (root / f"seen_{rank}.json").write_text(json.dumps(seen))


mesh = init_device_mesh("cpu", (2,))
for scenario in sys.argv[2:]:
    run(scenario, mesh)
dist.barrier()
# Now and then gloo aborts while the interpreter shuts down; what is tested is over by now.
os._exit(0)
"""


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
    """What two processes left behind, a directory for each scenario. They start once: starting is what takes long."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "program.py").write_text(PROGRAM)
    (root / "base").mkdir()
    (root / "base" / "modeling_own.py").write_text(CODE)
    (root / "base" / "config.json").write_text(json.dumps({"model_type": "own_of_this_test", "auto_map": AUTO_MAP}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(root / "program.py"), str(root), "plain", "prefix", "stages", "broken", "custom", "diffusers"]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
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
