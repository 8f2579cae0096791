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
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise.addons import ConsolidatedHFAddon, _iter_custom_code_classes
from shardwise.comm import Group
from shardwise.errors import ShardwiseError

root, scenario = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank = dist.get_rank()


@dataclass
class Parts:
    model: list


class FSDPNamedByItsAuthor(LlamaForCausalLM):
    pass


class Broken:
    def save_pretrained(self, save_directory):
        (root / f"tried_{rank}").touch()
        raise ValueError("cannot serialise")


def build():
    if scenario == "custom":
        from transformers import AutoConfig, AutoModel

        # Each process has a module cache of its own: two that fill one race.
        from transformers import dynamic_module_utils
        dynamic_module_utils.HF_MODULES_CACHE = str(root / f"modules_{rank}")
        config = AutoConfig.from_pretrained(root / "base", trust_remote_code=True)
        return AutoModel.from_config(config, trust_remote_code=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**sizes, vocab_size=40)
    config.quantization_config = {"quant_method": "fp8"}
    return (FSDPNamedByItsAuthor if scenario == "prefix" else LlamaForCausalLM)(config)


model = build().to(torch.bfloat16)
if scenario == "stages":
    # Rank 1's stage is quantized, rank 0's is not.
    if rank == 1:
        packed = torch.zeros(40, 16).to(torch.float8_e4m3fn)
        model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
else:
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))

kwargs = {
    "model_state": Parts([model]),
    "hf_metadata_dir": str(root / "model" / ".hf_metadata"),
    "consolidated_path": str(root / "model" / "consolidated"),
    "tokenizer": Broken() if scenario == "broken" else None,
    "group": Group.current() if scenario == "plain" else None,
}
seen = {"rank": rank, "error": None, "classes": [c.__name__ for c in _iter_custom_code_classes(model)]}
try:
    addon = ConsolidatedHFAddon()
    addon.pre_save(**kwargs)
    seen["written_when_left"] = (root / "model" / ".hf_metadata" / "config.json").is_file()
    addon.post_save(**kwargs)
    seen["copied_when_left"] = (root / "model" / "consolidated" / "config.json").is_file()
except ShardwiseError as error:
    seen["error"] = [type(error).__name__, str(error), error.rank]
(root / f"seen_{rank}.json").write_text(json.dumps(seen))
dist.barrier()
# Now and then gloo aborts while the interpreter shuts down; what is tested is over by now.
os._exit(0)
"""


def run(root: Path, scenario: str) -> list[dict[str, object]]:
    (root / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [*command, str(root / "program.py"), str(root), scenario], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((root / f"seen_{rank}.json").read_text()) for rank in range(2)]


def exported(root: Path) -> dict[str, object]:
    return json.loads((root / "model" / "consolidated" / "config.json").read_text())


@pytest.mark.parametrize(
    ("scenario", "architecture"), [("plain", "LlamaForCausalLM"), ("prefix", "FSDPNamedByItsAuthor")]
)
def test_a_sharded_model_is_described_as_the_model_that_it_is(scenario: str, architecture: str, tmp_path: Path) -> None:
    for seen in run(tmp_path, scenario):
        assert seen["error"] is None
        assert seen["written_when_left"]
        assert seen["copied_when_left"]
    config = exported(tmp_path)
    assert config["architectures"] == [architecture]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_a_quantized_stage_on_another_rank_keeps_the_entry(tmp_path: Path) -> None:
    run(tmp_path, "stages")
    assert exported(tmp_path)["quantization_config"] == {"quant_method": "fp8"}


def test_what_fails_on_rank_0_is_raised_on_every_rank(tmp_path: Path) -> None:
    first, second = run(tmp_path, "broken")
    assert first["error"] == second["error"]
    name, text, rank = first["error"]
    assert (name, rank) == ("RemoteError", 0)
    assert "cannot serialise" in text
    assert [p.name for p in tmp_path.glob("tried_*")] == ["tried_0"]
    assert not (tmp_path / "model" / "consolidated").exists()


def test_custom_code_is_found_behind_the_class_that_fully_shard_makes(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "modeling_own.py").write_text(
        "from torch import nn\n"
        "from transformers import PreTrainedConfig, PreTrainedModel\n"
        "class OwnConfig(PreTrainedConfig):\n"
        '    model_type = "own_of_this_test"\n'
        "class OwnModel(PreTrainedModel):\n"
        "    config_class = OwnConfig\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.layer = nn.Linear(4, 4)\n"
        "        self.post_init()\n"
    )
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (base / "config.json").write_text(json.dumps({"model_type": "own_of_this_test", "auto_map": auto_map}))
    for seen in run(tmp_path, "custom"):
        assert seen["error"] is None
        assert seen["classes"] == ["OwnModel", "OwnConfig"]
    assert exported(tmp_path)["architectures"] == ["OwnModel"]
    assert exported(tmp_path)["auto_map"] == auto_map
    code = (tmp_path / "model" / "consolidated" / "modeling_own.py").read_bytes()
    assert code == (base / "modeling_own.py").read_bytes()
