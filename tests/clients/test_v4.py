"""``v4_compatible`` exports of two ranks, opened by transformers 4.57 in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.addons.test_huggingface_v4 import V4
from tests.clients.families import build, result, text, tokenizer
from tests.clients.training import EXPORT, save_for_v4
from tests.support.ranks import run

pytestmark = pytest.mark.slow

READER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

seen = {"version": transformers.__version__}
ids = torch.tensor(json.loads(sys.argv[1]))
for directory in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    torch.save(model.state_dict(), directory + "/state.pt")
    torch.save(model.eval()(ids).logits, directory + "/logits.pt")
    words = AutoTokenizer.from_pretrained(directory)("hello world")["input_ids"]
    seen[directory] = {"info": {kind: sorted(map(str, names)) for kind, names in info.items()}, "ids": words}
print(json.dumps(seen))
"""

#: Family, and whether it is saved over a base.
EXPORTS = [("llama", True), ("llama-tied", False), ("qwen3", True), ("gemma3-text", False), ("gpt2", False)]


def test_the_previous_generation_opens_what_two_ranks_saved(tmp_path: Path) -> None:
    environment = tmp_path / "v4"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(environment), *V4]
    subprocess.run(pip, check=True)
    exports = {}
    for name, over_base in EXPORTS:
        root = tmp_path / name
        base = root / "base"
        base.mkdir(parents=True)
        if over_base:
            build(name, seed=1).save_pretrained(base)
            tokenizer().save_pretrained(base)
        run(2, save_for_v4, str(root), str(base) if over_base else None, name)
        exports[str(root / EXPORT)] = name

    (tmp_path / "reader.py").write_text(READER)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "reader.py"), json.dumps(text()["input_ids"].tolist()), *exports],
        env={**os.environ, "PYTHONPATH": str(environment), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["version"].startswith("4.57")
    for directory, name in exports.items():
        assert not any(seen[directory]["info"].values()), directory
        assert seen[directory]["ids"] == [3, 4]
        whole = torch.load(tmp_path / name / "whole.pt")
        state = torch.load(Path(directory, "state.pt"))
        assert all(torch.equal(state[key], tensor) for key, tensor in whole.items())
        reference = build(name)
        reference.load_state_dict(whole)
        # The two generations order some additions differently: equal to rounding.
        logits = torch.load(Path(directory, "logits.pt"))
        torch.testing.assert_close(logits, result(reference, text()), rtol=1e-5, atol=1e-6)
