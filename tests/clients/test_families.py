"""Families of models, saved from two ranks and opened by transformers: every key, every bit of the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.clients.families import FAMILIES, build, tokenizer
from tests.clients.opening import computes_the_same, weight_map
from tests.clients.training import EXPORT, save_both_ways
from tests.support.ranks import run
from transformers import AutoTokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_opens_what_two_ranks_saved(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build(name, seed=1).save_pretrained(base, max_shard_size="6KB")
    tokenizer().save_pretrained(base)

    assert run(2, save_both_ways, name, str(tmp_path), str(base)) == [True, True]

    fresh, tuned = tmp_path / "fresh" / EXPORT, tmp_path / "run" / "LATEST" / EXPORT
    computes_the_same(fresh, name, build(name), torch.load(tmp_path / "fresh.pt"))
    computes_the_same(tuned, name, build(name), torch.load(tmp_path / "tuned.pt"))
    # The base's split is kept, so that users of the base find every tensor in the file where they look for it.
    assert len(set(weight_map(base).values())) > 1
    assert weight_map(tuned) == weight_map(base)
    for directory in (fresh, tuned):
        opened = AutoTokenizer.from_pretrained(directory)
        assert opened("hello world")["input_ids"] == [3, 4]
        assert opened.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
