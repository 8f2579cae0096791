"""Configurations: those of huggingface_hub's mixin, those that cannot be written, and models that have none."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from tests.clients.training import EXPORT
from tests.clients.wrapped import build_checkpointer, llama
from tests.support.ranks import run
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise.errors import MisuseError


class Small(nn.Module, PyTorchModelHubMixin):
    """A model of huggingface_hub's kind."""

    def __init__(self, width: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_a_mixins_model_opens(tmp_path: Path, wrap: object) -> None:
    model = Small(width=6, depth=3)
    with build_checkpointer(tmp_path, max_file_bytes=100) as saver:
        path = saver.save(0, 1, wrap(model))
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = ((d / "config.json").read_text() for d in (path / EXPORT, tmp_path / "theirs"))
    assert ours == theirs
    again = Small.from_pretrained(path / EXPORT, strict=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


class Raising(LlamaConfig):
    """Has a property that cannot be read."""

    @property
    def rope_base(self) -> float:
        raise RuntimeError("no base yet")

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {"rope_base": self.rope_base}


def with_object() -> nn.Module:
    model = llama()
    model.config.training = {"stages": [{"sampler": object()}]}
    return model


def with_key() -> nn.Module:
    model = llama()
    model.config.table = {(1, 2): 3}
    return model


def raising() -> nn.Module:
    model = llama()
    model.config.__class__ = Raising
    return model


class Without(LlamaForCausalLM):
    """Its configuration cannot be read."""

    @property
    def config(self) -> object:
        if "_is_ready" in vars(self):
            raise RuntimeError("gone")
        return vars(self)["_own"]

    @config.setter
    def config(self, value: object) -> None:
        vars(self)["_own"] = value


def unreadable() -> nn.Module:
    model = Without(llama().config)
    vars(model)["_is_ready"] = True
    return model


BROKEN = [
    (with_object, r"LlamaForCausalLM.*training\.stages\[0\]\.sampler, a object"),
    (with_key, r"table\.\(1, 2\), whose key is a tuple"),
    (raising, r"rope_base, a property that raises RuntimeError: no base yet"),
    (unreadable, r"the config of Without cannot be read: RuntimeError: gone"),
]


@pytest.mark.parametrize(("build", "message"), BROKEN)
@pytest.mark.parametrize("mode", ["every", "false"])
def test_an_entry_that_cannot_be_written_is_named(tmp_path: Path, build: object, message: str, mode: str) -> None:
    model = build()
    with build_checkpointer(tmp_path, save_consolidated=mode) as saver, pytest.raises(MisuseError, match=message):
        saver.save(0, 1, model)
    assert not list(tmp_path.iterdir())


def test_a_config_that_is_no_librarys_is_named_too(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.config = {"sizes": [1, {"device": object()}]}
    with (
        build_checkpointer(tmp_path) as saver,
        pytest.raises(MisuseError, match=r"Linear.*sizes\[1\]\.device, a object"),
    ):
        saver.save(0, 1, model)
    assert not list(tmp_path.iterdir())


class Holder(nn.Module):
    """Holds a model, and does not show its configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Holder, r"Holder has no config, but a model inside it has one: model \(LlamaForCausalLM\)"),
        (lambda: nn.Linear(2, 2), r"Linear has no config"),
    ],
)
def test_an_export_without_a_config_is_told_of_once(
    tmp_path: Path, build: object, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    with build_checkpointer(tmp_path) as saver, caplog.at_level(logging.INFO, logger="shardwise"):
        for step in (1, 2):
            path = saver.save(0, step, model)
    assert not (path / EXPORT / "config.json").exists()
    assert caplog.text.count("the export has no config.json") == 1
    [record] = [record for record in caplog.records if "the export has no config.json" in record.message]
    assert record.levelno == logging.WARNING
    assert re.search(message, record.message)


def save_broken(root: str) -> str:
    """What a rank is told of a configuration that cannot be written."""
    with build_checkpointer(Path(root)) as saver:
        try:
            saver.save(0, 1, with_object())
        except MisuseError as error:
            return error.message
    return ""


def test_every_rank_is_told(tmp_path: Path) -> None:
    first, second = run(2, save_broken, str(tmp_path))
    assert first == second
    assert "training.stages[0].sampler" in first
    assert not list(tmp_path.iterdir())


def test_json_is_what_readers_get(tmp_path: Path) -> None:
    with build_checkpointer(tmp_path) as saver:
        path = saver.save(0, 1, llama())
    assert json.loads((path / EXPORT / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
