"""``v4_compatible`` exports, opened by transformers 4.57 in an environment of its own, which the test sets up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

from shardwise.addons import ConsolidatedHFAddon

pytestmark = pytest.mark.slow

#: transformers of the 4.x generation and the two packages that it pins; the rest of this environment serves both.
V4 = ["transformers==4.57.1", "huggingface-hub<1.0", "tokenizers>=0.22,<=0.23"]

READER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

seen = {"version": transformers.__version__}
for directory in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    logits = model.eval()(torch.tensor([list(range(40))])).logits
    torch.save(logits, directory + "/logits.pt")
    keys = {kind: sorted(names) for kind, names in info.items()}
    seen[directory] = {"info": keys, "ids": tokenizer("hello world")["input_ids"], "template": tokenizer.chat_template}
print(json.dumps(seen))
"""

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass
class Parts:
    model: list[nn.Module]


def tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"[UNK]": 0, "hello": 3, "world": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = Tokenizer(tokenizer_object=backend, unk_token="[UNK]", additional_special_tokens=["hello"])
    made.chat_template = "{{ 1 }}"
    return made


def base_as_v4_wrote_it(directory: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=777.0)).save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    return directory


def models(tmp_path: Path) -> dict[str, tuple[nn.Module, str | None]]:
    base = base_as_v4_wrote_it(tmp_path / "base")
    gemma = Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8, sliding_window=8)
    gemma.rope_parameters["sliding_attention"]["rope_theta"] = 333.0
    gemma.rope_parameters["full_attention"]["rope_theta"] = 99.0
    return {
        "with a base": (AutoModelForCausalLM.from_pretrained(base), str(base)),
        "without a base": (LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=777.0)), None),
        "scaled": (LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(YARN))), None),
        "two rotations": (Gemma3ForCausalLM(gemma), None),
    }


def test_the_previous_generation_opens_the_export_and_computes_the_same(tmp_path: Path) -> None:
    environment = tmp_path / "v4"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(environment), *V4]
    subprocess.run(pip, check=True)
    torch.manual_seed(0)
    addon, wanted = ConsolidatedHFAddon(), {}
    for name, (model, base) in models(tmp_path).items():
        directory = tmp_path / name.replace(" ", "_")
        kwargs = {
            "model_state": Parts([model]),
            "hf_metadata_dir": str(directory / ".hf_metadata"),
            "consolidated_path": str(directory),
            "original_model_path": base,
            "tokenizer": tokenizer(),
            "v4_compatible": True,
        }
        addon.pre_save(**kwargs)  # type: ignore[arg-type]
        addon.post_save(**kwargs)  # type: ignore[arg-type]
        tied = getattr(model.config, "tie_word_embeddings", False)
        state = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        wanted[str(directory)] = model.eval()(torch.tensor([list(range(40))])).logits

    (tmp_path / "reader.py").write_text(READER)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "reader.py"), *wanted],
        env={**os.environ, "PYTHONPATH": str(environment), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["version"] == "4.57.1"
    for directory, logits in wanted.items():
        assert not any(seen[directory]["info"].values()), directory
        assert seen[directory]["ids"] == [3, 4]
        assert seen[directory]["template"] == "{{ 1 }}"
        # The two generations order some additions differently: equal to rounding.
        torch.testing.assert_close(torch.load(Path(directory, "logits.pt")), logits, rtol=1e-5, atol=1e-6)
