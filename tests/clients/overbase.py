"""Bases that differ from what is trained over them, and what the ranks do with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file, save_file
from tests.clients.families import SIZES, text
from tests.clients.training import checkpointer, keep_whole, locals_of, shard, trained

Inputs = Callable[[], dict[str, torch.Tensor]]


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite the tensors of a base model of one file."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def llama(**changes: object) -> nn.Module:
    import transformers as tf

    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **changes}))


def deepseek() -> nn.Module:
    """A model whose class does not load the head that predicts several tokens, which its bases ship as layer 61."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.DeepseekV3Config(
        **{key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")},
        num_key_value_heads=4,
        first_k_dense_replace=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    return tf.DeepseekV3ForCausalLM(config)


def train_over(
    opener: str,
    base: str,
    root: str,
    loading: Mapping[str, object],
    vocabulary: int | None,
    settings: Mapping[str, object],
    inputs: Inputs = text,
) -> bool:
    """Open a base, train, save over it, restore into a fresh model; whether every bit came back."""
    import transformers

    def opened() -> nn.Module:
        torch.manual_seed(4)
        model: nn.Module = getattr(transformers, opener).from_pretrained(base, **loading)
        if vocabulary is not None:
            model.resize_token_embeddings(vocabulary)
        return shard(model)

    directory, model, again = Path(root), opened(), opened()
    optimizer = trained(model, inputs())
    keep_whole(model, directory / "whole.pt")
    with checkpointer(directory / "run", base, **settings) as saver:
        saver.save(0, 1, model, optimizer)
        saver.restore(again)
    pairs = zip(locals_of(model.state_dict().values()), locals_of(again.state_dict().values()), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def save_over(base: str, root: str, changes: Mapping[str, object], settings: Mapping[str, object]) -> None:
    """Save a model that was built without its base."""
    model = shard(llama(**changes))
    with checkpointer(Path(root) / "run", base, **settings) as saver:
        saver.save(dist.get_world_size() - 2, 1, model)
