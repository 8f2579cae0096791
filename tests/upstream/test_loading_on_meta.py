"""Whether a class would load tensors is told without transformers' loop where nothing is renamed, as by the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from tests.peft.models import causal
from torch import nn

from shardwise.base.class_of_config import build_on_meta
from shardwise.upstream.transformers import Loaded, load_on_meta

Tensors = dict[str, torch.Tensor]


def built(family: str) -> nn.Module:
    model = causal(family)
    return build_on_meta(type(model), model.config)


def tensors(family: str) -> Tensors:
    """As a file has them."""
    state = causal(family).state_dict()
    tied = {"lm_head.weight"} if family in ("llama-tied", "gpt2") else set()
    return {name: torch.empty_like(t, device="meta") for name, t in state.items() if name not in tied}


def by_transformers(model: nn.Module, given: Mapping[str, torch.Tensor]) -> Loaded:
    """Through the loop, which a name that no model has leads to."""
    found = load_on_meta(model, {**given, "nobody.knows": torch.empty(1, device="meta")})
    assert "nobody.knows" in found.unexpected
    return replace(found, unexpected=found.unexpected - {"nobody.knows"})


def _same(given: Tensors) -> Tensors:
    return given


def _without_one(given: Tensors) -> Tensors:
    return dict(list(given.items())[:-1])


def _without_prefix(given: Tensors) -> Tensors:
    return {name.removeprefix("model.").removeprefix("transformer."): t for name, t in given.items()}


def _another_shape(given: Tensors) -> Tensors:
    return {name: t if "norm" not in name else torch.empty(3, device="meta") for name, t in given.items()}


def _with_head(given: Tensors) -> Tensors:
    return {**given, "lm_head.weight": torch.empty(32, 16, device="meta")}


CHANGES: list[Callable[[Tensors], Tensors]] = [_same, _without_one, _without_prefix, _another_shape, _with_head]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_same_is_found_without_the_loop(family: str, change: Callable[[Tensors], Tensors]) -> None:
    given = change(tensors(family))
    assert load_on_meta(built(family), given) == by_transformers(built(family), given)
