"""What users of the documented surface call, beyond the names and signatures of the reference pages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import run
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import shardwise.checkpointing as checkpointing
import shardwise.config as config_module
from shardwise.addons import ConsolidatedHFAddon, PeftAddon, _extract_target_modules, _get_hf_peft_config
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode, SerializationFormat
from shardwise.stateful_wrappers import ModelState

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_settings_are_importable_beside_the_engine() -> None:
    assert checkpointing.CheckpointingConfig is config_module.CheckpointingConfig
    assert checkpointing.SaveConsolidatedMode is SaveConsolidatedMode


@pytest.mark.parametrize("given", ["torch_save", "TORCH_SAVE", SerializationFormat.TORCH_SAVE])
def test_the_format_is_a_member_that_is_text(given: str) -> None:
    made = CheckpointingConfig(model_save_format=given, save_consolidated="false").model_save_format
    assert made is SerializationFormat.TORCH_SAVE
    assert isinstance(made, str)
    assert made == "torch_save"
    assert made.value == "torch_save"
    assert f"{made}" == "torch_save"
    assert CheckpointingConfig().model_save_format is SerializationFormat.SAFETENSORS
    with pytest.raises(ValueError, match="Unsupported model save format"):
        CheckpointingConfig(model_save_format="pickle")


class TwoParts(nn.Module):
    """A head before the embedding, under the usual names, with nothing declared."""

    def __init__(self, *, tied: bool, config: object = None) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(8, 4)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        if config is not None:
            self.config = config


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: [m], torch.compile])
def test_a_tied_head_is_left_out_only_where_memory_is_shared(wrap: object) -> None:
    claims = SimpleNamespace(tie_word_embeddings=True)
    tied, apart = TwoParts(tied=True, config=claims), TwoParts(tied=False, config=claims)
    shared, own = ModelState(wrap(tied)), ModelState(wrap(apart))  # type: ignore[operator]
    assert shared.uses_tied_lm_head
    assert own.uses_tied_lm_head
    assert shared.has_local_tied_lm_head
    assert not own.has_local_tied_lm_head
    assert list(shared.state_dict()) == ["model.embed_tokens.weight"]
    assert set(own.state_dict()) == {"lm_head.weight", "model.embed_tokens.weight"}


def test_what_the_configuration_claims_is_read_at_its_top_level() -> None:
    nested = SimpleNamespace(text_config=SimpleNamespace(tie_word_embeddings=True))
    assert not ModelState(TwoParts(tied=True, config=nested)).uses_tied_lm_head
    assert ModelState(TwoParts(tied=False, config={"tie_word_embeddings": True})).uses_tied_lm_head
    assert not ModelState(TwoParts(tied=True)).uses_tied_lm_head
    for ties in (True, False):
        state = ModelState(LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=ties)))
        assert (state.uses_tied_lm_head, state.has_local_tied_lm_head) == (ties, ties)
        assert ("lm_head.weight" in state.state_dict()) is not ties


def block(*paths: str) -> nn.Module:
    """Empty modules at dotted paths."""
    root = nn.Module()
    for path in paths:
        place = root
        for name in path.split("."):
            if name not in place._modules:
                place.add_module(name, nn.Module())
            place = place.get_submodule(name)
    return root


def test_adapted_modules_are_known_by_the_names_of_their_children() -> None:
    model = block("b.qkv_proj.lora_A", "b.qkv_proj.lora_B", "a.o_proj.my_lora_thing", "a.mlp.up_proj.other")
    assert _extract_target_modules(model) == ["a.o_proj", "b.k_proj", "b.q_proj", "b.v_proj"]
    wrapped = nn.Module()
    wrapped._orig_mod = block("x._checkpoint_wrapped_module.down_proj.lora_A.default")
    assert _extract_target_modules(wrapped) == ["x.down_proj"]
    assert _extract_target_modules(block("a.b")) == []


def test_a_state_dict_adapter_names_adapted_modules() -> None:
    model = block("layers.0.gate_up_proj.lora_A", "layers.0.wo.lora_B")
    model.state_dict_adapter = SimpleNamespace(map_peft_target_module_to_hf=lambda name: f"model.{name}")
    assert _extract_target_modules(model) == ["model.layers.0.gate_proj", "model.layers.0.up_proj", "model.layers.0.wo"]
    state = SimpleNamespace(model=[model])
    described = _get_hf_peft_config(SimpleNamespace(dim=4, alpha=8, use_dora=False), state)
    assert described["target_modules"] == _extract_target_modules(model)


class Dictable:
    def to_dict(self) -> dict[str, object]:
        return {"model_type": "mine", "dtype": torch.bfloat16, "quantization_config": {"bits": 4}}


@pytest.mark.parametrize(
    "config",
    [
        Dictable(),
        {"model_type": "mine", "dtype": "bfloat16"},
        SimpleNamespace(model_type="mine", dtype=torch.bfloat16, _hidden=object()),
    ],
    ids=["to_dict", "mapping", "namespace"],
)
def test_a_config_of_any_kind_gives_a_file(config: object, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.config = config  # type: ignore[assignment]
    directory = tmp_path / ".hf_metadata"
    state = SimpleNamespace(model=[model])
    ConsolidatedHFAddon().pre_save(model_state=state, model_path=str(tmp_path), hf_metadata_dir=str(directory))
    assert json.loads((directory / "config.json").read_text()) == {"model_type": "mine", "dtype": "bfloat16"}


def test_hooks_need_nothing_of_the_model_state_but_its_list(tmp_path: Path) -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
            self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)

    class OnlyParts:
        __slots__ = ("model",)

    state = OnlyParts()
    state.model = [nn.Sequential(Lora())]
    settings = SimpleNamespace(dim=2, alpha=4, to_dict=lambda: {"dim": 2, "alpha": 4, "match_all_linear": False})
    PeftAddon().pre_save(model_state=state, model_path=str(tmp_path), peft_config=settings)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["0"]
    ConsolidatedHFAddon().pre_save(model_state=state, hf_metadata_dir=str(tmp_path / "meta"))
    assert not (tmp_path / "meta" / "config.json").exists()


class _Exporter:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, object]]] = []
        self.refuses: Exception | None = None

    def validate(self, **given: object) -> None:
        self.calls.append(("validate", given))
        if self.refuses is not None:
            raise self.refuses

    def save(self, **given: object) -> None:
        self.calls.append(("save", given))
        Path(str(given["hf_metadata_dir"]), "config.json").write_text('{"theirs": 1}')


class _Tokenizer:
    def save_pretrained(self, save_directory: str) -> None:
        Path(save_directory, "tokenizer.json").write_text("{}")


class _Exporting(nn.Linear):
    exporter: _Exporter | None = None

    def _get_consolidated_hf_metadata_exporter(self, *, tokenizer: object, original_model_path: object) -> object:
        return self.exporter


def test_the_models_own_exporter_is_called_inside_wrappers(tmp_path: Path) -> None:
    model, tokenizer = _Exporting(2, 2), _Tokenizer()
    model.exporter = _Exporter()
    config = CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated="every")
    with config.build() as checkpointer:
        checkpointer.save(0, 1, torch.compile(model), tokenizer=tokenizer)  # type: ignore[arg-type]
    directory = tmp_path / "epoch_0_step_1" / "model"
    asked = {"tokenizer": tokenizer, "original_model_path": None}
    assert [name for name, _ in model.exporter.calls] == ["validate", "save"]
    assert model.exporter.calls[0][1] == asked
    assert {k: v for k, v in model.exporter.calls[1][1].items() if k != "hf_metadata_dir"} == asked
    assert json.loads((directory / "consolidated" / "config.json").read_text()) == {"theirs": 1}


def test_what_the_models_own_exporter_raises_is_raised_as_it_is(tmp_path: Path) -> None:
    model = _Exporting(2, 2)
    model.exporter = _Exporter()
    model.exporter.refuses = LookupError("no such template")
    with CheckpointingConfig(checkpoint_dir=tmp_path).build() as checkpointer:
        with pytest.raises(LookupError, match="no such template"):
            checkpointer.save(0, 1, model)
        assert list(tmp_path.glob("*")) == []
        model.exporter = None  # the usual metadata, with a tokenizer or without
        checkpointer.save(0, 1, model, tokenizer=_Tokenizer())  # type: ignore[arg-type]
        checkpointer.save(0, 2, model)
    assert (tmp_path / "epoch_0_step_1" / "model" / ".hf_metadata" / "tokenizer.json").exists()


def refused_by_one(root: Path) -> tuple[str, str, int]:
    """What this rank is refused with, and how often the exporter was asked."""
    model = _Exporting(2, 2)
    model.exporter = _Exporter()
    model.exporter.refuses = LookupError("no such template") if dist.get_rank() == 1 else None
    checkpointer = CheckpointingConfig(checkpoint_dir=root, collective_timeout_seconds=30).build()
    try:
        checkpointer.save(0, 1, nn.parallel.DistributedDataParallel(model))
    except Exception as error:  # noqa: BLE001 - given to the test
        return type(error).__name__, str(error), len(model.exporter.calls)
    finally:
        checkpointer.finalize()
    return "", "", 0


def test_what_an_exporter_refuses_on_one_rank_is_known_on_all(tmp_path: Path) -> None:
    here, there = run(2, refused_by_one, tmp_path)
    assert there == ("LookupError", "no such template", 1)
    assert here[0] == "RemoteError"  # type: ignore[index]
    assert "no such template" in here[1]  # type: ignore[index]
    assert here[2] == 1  # type: ignore[index]
    assert list(tmp_path.iterdir()) == []
