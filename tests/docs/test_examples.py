"""The examples in the docstrings of what docs/api documents."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.docs.pages import ROOT

from shardwise import CheckpointingConfig

_OBJECT = re.compile(r"^::: (shardwise[\w.]*)\.(\w+)$", re.M)


def examples() -> Iterator[doctest.DocTest]:
    """The docstrings with examples of everything that the reference names, and of its methods."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for module, name in _OBJECT.findall(page.read_text()):
            thing = getattr(importlib.import_module(module), name)
            globs = vars(importlib.import_module(thing.__module__)) if hasattr(thing, "__module__") else {}
            yield from (each for each in finder.find(thing, name, globs=dict(globs)) if each.examples)


EXAMPLES = {example.name: example for example in examples()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_does_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = EXAMPLES[name]
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with CheckpointingConfig(save_consolidated="false").build() as checkpointer:
        example.globs |= {
            "torch": torch,
            "CheckpointingConfig": CheckpointingConfig,
            "model": model,
            "optimizer": optimizer,
            "checkpointer": checkpointer,
        }
        said: list[str] = []
        outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert outcome.failed == 0, "".join(said)


def test_the_calls_that_every_loop_makes_have_examples() -> None:
    assert {"CheckpointingConfig", "Checkpointer.save", "Checkpointer.restore", "Checkpointer.batches"} <= set(EXAMPLES)
