"""Adapters of a model built on the meta device: what peft begins with, or a refusal that names method and module."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.base.support import checkpointer
from tests.peft.models import causal, logits
from tests.support.ranks import run
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import peft
from shardwise.checkpointing import Checkpointer
from shardwise.errors import AdapterError, MisuseError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
_LINEAR = ["q_proj", "v_proj"]
_SQUARE = ["q_proj", "o_proj"]
_ALL: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": _LINEAR}


def _lora(**settings: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"r": 4, **_ALL, **settings})


def _unmasked(**settings: Any) -> peft.PeftConfig:
    """SHiRA without what peft would look at while it adapts a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.ShiraConfig(r=1, **_ALL, **settings)
    config.mask_fn = None
    return config


_TOKENS: dict[str, Any] = {"num_virtual_tokens": 8, "task_type": "CAUSAL_LM"}

METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": _lora,
    "dora": lambda: _lora(use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "pissa": lambda: _lora(init_lora_weights="pissa"),
    "pissa_niter_4": lambda: _lora(init_lora_weights="pissa_niter_4"),
    "olora": lambda: _lora(init_lora_weights="olora"),
    "orthogonal": lambda: _lora(init_lora_weights="orthogonal"),
    "gaussian": lambda: _lora(init_lora_weights="gaussian"),
    "false": lambda: _lora(init_lora_weights=False),
    "mica": lambda: _lora(init_lora_weights="mica"),
    "patterns": lambda: _lora(rank_pattern={"layers.1.self_attn.q_proj": 2}, exclude_modules=["layers.0.*q_proj"]),
    "saved": lambda: _lora(modules_to_save=["lm_head"], trainable_token_indices=[1, 5]),
    "replication": lambda: _lora(layer_replication=[(0, 2), (1, 2)]),
    "moved": lambda: _lora(layer_replication=[(1, 2), (0, 2)]),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "loha": lambda: peft.LoHaConfig(r=4, **_ALL),
    "lokr": lambda: peft.LoKrConfig(r=4, **_ALL),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **_ALL),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **_ALL),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **_ALL),
    "vera": lambda: peft.VeraConfig(r=4, **_ALL),
    "vera-unsaved": lambda: peft.VeraConfig(r=4, save_projection=False, **_ALL),
    "randlora": lambda: peft.RandLoraConfig(r=4, **_ALL),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, **_ALL),
    "ln": lambda: peft.LNTuningConfig(**{**_ALL, "target_modules": ["norm"]}),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=16, **_ALL),
    "hra": lambda: peft.HRAConfig(r=4, **_ALL),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 5], task_type="CAUSAL_LM"),
    "c3a": lambda: peft.C3AConfig(block_size=8, **_ALL),
    "road": lambda: peft.RoadConfig(group_size=16, **_ALL),
    "miss": lambda: peft.MissConfig(r=4, **_ALL),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=16, **_ALL),
    "delora": lambda: peft.DeloraConfig(r=4, **_ALL),
    "gralora": lambda: peft.GraloraConfig(r=4, **_ALL),
    "osf": lambda: peft.OSFConfig(**_ALL),
    "prompt": lambda: peft.PromptTuningConfig(**_TOKENS),
    "vocabulary": lambda: peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **_TOKENS),
    "prefix": lambda: peft.PrefixTuningConfig(**_TOKENS),
    "zero-prefix": lambda: peft.PrefixTuningConfig(init_weights="zero", **_TOKENS),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(num_tasks=2, **_TOKENS),
    "adaption": lambda: peft.AdaptionPromptConfig(adapter_len=8, adapter_layers=1, task_type="CAUSAL_LM"),
}  # fmt: skip

#: Methods that are refused, and what the message names.
REFUSED = {
    "tied": (lambda: _lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True), "LORA"),
    "hook": (
        lambda: peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
        ),
        "CPT has a hook",
    ),
    "no_mask": (lambda: _unmasked(mask_type="mine"), "SHIRA has no mask_fn"),
}


def _base(directory: Path, **settings: Any) -> Path:
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings})).save_pretrained(directory)
    return directory


def _from_meta(base: Path, config: peft.PeftConfig, path: Path) -> nn.Module:
    with torch.device("meta"):
        bare = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
    # BOFT looks at values while it adapts a model; peft moves what it made to the base's device afterwards.
    looks = isinstance(config, peft.BOFTConfig)
    with torch.device("cpu" if looks else "meta"):
        model = peft.get_peft_model(bare, config)
    checkpointer(path).load_base_model(model, "cpu", None, str(base))
    return model


def _eager(base: Path, config: peft.PeftConfig, seed: int) -> nn.Module:
    model = LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict) and not key.startswith("_"):
                found |= {f"{path}.{key}.{k}": v for k, v in value.items() if isinstance(v, torch.Tensor)}
    return {name: tensor.detach() for name, tensor in found.items()}


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_begin_is_refused_by_name(method: str, tmp_path: Path) -> None:
    make, named = REFUSED[method]
    base = _base(tmp_path / "base", tie_word_embeddings=method == "tied")
    with pytest.raises(AdapterError, match=f"cannot begin on the meta device: {named}"):
        _from_meta(base, make(), tmp_path / "run")


def test_a_model_with_memory_keeps_no_part_of_the_base_twice(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    for begin, refused in (("pissa", True), ("olora", True), (True, False)):
        model = _eager(base, _lora(init_lora_weights=begin), 1)
        if refused:
            with pytest.raises(AdapterError, match="took a part of the base weights out"):
                checkpointer(tmp_path / "run").load_base_model(model, "cpu", None, str(base))
            with pytest.raises(AdapterError, match="took a part of the base weights out"):
                checkpointer(tmp_path / "run").load_model(model, str(base), is_init_step=True)
        else:
            checkpointer(tmp_path / "run").load_base_model(model, "cpu", None, str(base))


class Kept(nn.Module):
    """A module with a tensor in a dictionary, where nothing fills it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.tables = {"a": torch.ones(3)}

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Bare(nn.Module):
    """A dictionary of parameters that no code fills."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({"a": torch.ones(count)})


@pytest.mark.parametrize(("kind", "named"), [(Kept, "'tables' holds tensors"), (lambda: Bare(3), "scales.a")])
def test_nothing_unfilled_is_left(kind: Callable[[], nn.Module], named: str) -> None:
    with torch.device("meta"):
        model = kind()
    with pytest.raises(MisuseError, match=named):
        Checkpointer.initialize_model_weights(model, "cpu")


def _whole_values(base: str, directory: str, method: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return _tensors(_from_meta(Path(base), METHODS[method](), Path(directory)))


def _sharded_values(base: str, directory: str, method: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        bare = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
        model = peft.get_peft_model(bare, METHODS[method]())
    mesh = init_device_mesh("cpu", (2,))
    for layer in bare.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(dist.get_rank())
    checkpointer(Path(directory)).load_base_model(model, "cpu", None, base)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in _tensors(model).items()}


@pytest.mark.parametrize(
    "method",
    ["dora", "saved", pytest.param("pissa", marks=pytest.mark.slow), "fourier", "moved", "vocabulary", "adaption"],
)
def test_shards_have_the_values_of_one_process(method: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    # On as many threads as the ranks have: the last bits of a singular value decomposition depend on their number.
    [expected] = run(1, _whole_values, str(base), str(tmp_path / "run"), method)
    assert isinstance(expected, dict)
    for found in run(2, _sharded_values, str(base), str(tmp_path / "two"), method):
        assert isinstance(found, dict)
        assert {n for n, t in expected.items() if not torch.equal(found[n], t)} == set()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_begins_as_in_an_eager_model(method: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    ours = _tensors(_from_meta(base, METHODS[method](), tmp_path / "run"))
    first, second = (_tensors(_eager(base, METHODS[method](), seed)) for seed in (1, 2))
    assert ours.keys() == first.keys()
    for name, theirs in first.items():
        mine = ours[name]
        assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device), name
        assert mine.isfinite().all(), name
        if torch.equal(theirs, second[name]):
            assert torch.equal(mine, theirs), name
        elif mine.numel() >= 100 and mine.is_floating_point():
            assert 0.7 < mine.std() / theirs.std() < 1.4, name
            assert (mine.mean() - theirs.mean()).abs() < 0.3 * theirs.std(), name


def test_masks_of_shira_are_those_of_an_eager_model(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    ours = _from_meta(base, _unmasked(random_seed=3), tmp_path / "run")
    theirs = _eager(base, peft.ShiraConfig(r=1, random_seed=3, **_ALL), 1)
    found, expected = _tensors(ours), _tensors(theirs)
    assert sum("shira_indices" in name for name in expected) == 4
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    first, second = (_from_meta(base, _unmasked(), tmp_path / "run") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(_tensors(first).values(), _tensors(second).values(), strict=True))


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("qwen3_moe", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "experts_and_dora": ("qwen3_moe", {"target_modules": ["q_proj"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "init_lora_weights": "pissa"}),
    "half": ("llama-bf16", {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
    "tied_tokens": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_kinds_of_layers_and_a_second_adapter(kind: str, tmp_path: Path) -> None:
    family, settings = _KINDS[kind]
    eager = causal(family)
    eager.save_pretrained(tmp_path / "base")

    def adapted(model: nn.Module) -> Any:
        out = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
        if kind in ("half", "experts_and_dora"):
            out.add_adapter("ref", peft.LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM"))
        return out

    dtype = next(eager.parameters()).dtype
    with torch.device("meta"):
        model = adapted(type(eager)(eager.config).to(dtype))
    checkpointer(tmp_path / "run").load_base_model(model, "cpu", None, str(tmp_path / "base"))
    want = adapted(eager)
    ours, theirs = _tensors(model), _tensors(want)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].isfinite().all(), name
        if ".lora_A." not in name or settings.get("init_lora_weights") == "pissa":
            assert torch.equal(ours[name], tensor), name
        else:
            assert ours[name].std() > 0, name
    assert torch.allclose(logits(model.eval()), logits(want.eval()), atol=1e-5)
