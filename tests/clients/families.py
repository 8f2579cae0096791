"""Tiny random models of many families, each with the transformers class that is to open its export, and an input."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
IDS = torch.arange(3, 13).view(2, 5)

Inputs = Callable[[], dict[str, torch.Tensor]]


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS}


def sequence_to_sequence() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS.flip(0)}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        build: Makes it, of random weights that depend on torch's seed alone.
        opener: Name of the auto class of transformers that opens it.
        inputs: What it is called with.
    """

    build: Callable[[], nn.Module]
    opener: str = "AutoModelForCausalLM"
    inputs: Inputs = text


def _simple(name: str, **settings: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
        return model

    return build


def _gpt2() -> nn.Module:
    import transformers as tf

    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def _bert(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers as tf

        model: nn.Module = getattr(tf, kind)(tf.BertConfig(**BERT))
        return model

    return build


def _t5() -> nn.Module:
    import transformers as tf

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=40, **sizes, dropout_rate=0.0))


def _gemma3_text() -> nn.Module:
    import transformers as tf

    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZES, sliding_window=8))


VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _gemma3_with_images() -> nn.Module:
    import transformers as tf

    config = tf.Gemma3Config(
        text_config={**SIZES, "sliding_window": 8},
        vision_config={**VISION, "image_size": 8, "patch_size": 2},
        mm_tokens_per_image=4,
        image_token_index=37,
        boi_token_index=38,
        eoi_token_index=39,
    )
    return tf.Gemma3ForConditionalGeneration(config)


def _gemma3_inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[3, 38, 37, 37, 37, 37, 39, 5]])
    pixels = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == 37).long()}


def _llava() -> nn.Module:
    import transformers as tf

    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**SIZES),
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=8, patch_size=4, projection_dim=16),
        image_token_index=37,
        image_seq_length=4,
    )
    return tf.LlavaForConditionalGeneration(config)


def _llava_inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[3, 37, 37, 37, 37, 5]])
    return {"input_ids": ids, "pixel_values": torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)}


FAMILIES: dict[str, Family] = {
    "llama": Family(_simple("Llama")),
    "llama-tied": Family(_simple("Llama", tie_word_embeddings=True)),
    "qwen3": Family(_simple("Qwen3")),
    "gemma3-text": Family(_gemma3_text),
    "gemma3": Family(_gemma3_with_images, "AutoModelForImageTextToText", _gemma3_inputs),
    "mistral": Family(_simple("Mistral")),
    "phi3": Family(_simple("Phi3")),
    "gpt2": Family(_gpt2),
    "bert": Family(_bert("BertForSequenceClassification"), "AutoModelForSequenceClassification"),
    "bert-lm": Family(_bert("BertForMaskedLM"), "AutoModelForMaskedLM"),
    "encoder": Family(_bert("BertModel"), "AutoModel"),
    "t5": Family(_t5, "AutoModelForSeq2SeqLM", sequence_to_sequence),
    "llava": Family(_llava, "AutoModelForImageTextToText", _llava_inputs),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of a family, the same in every process; nothing random in its forward pass."""
    torch.manual_seed(seed)
    return FAMILIES[name].build().eval()


def result(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the last hidden state of an encoder without a head."""
    with torch.no_grad():
        out = model(**inputs)
    found: torch.Tensor | None = getattr(out, "logits", None)
    return out.last_hidden_state if found is None else found


def tokenizer() -> object:
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 3, "world": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    made.chat_template = "{{ messages[0]['content'] }}!"
    return made


CONFIGURATION = """
from transformers import PreTrainedConfig


class TinyClientConfig(PreTrainedConfig):
    model_type = "shardwise_tiny_client"

    def __init__(self, width=8, vocab_size=40, **kwargs):
        self.width = width
        self.vocab_size = vocab_size
        super().__init__(**kwargs)
"""

BLOCKS = """
from torch import nn


def block(width):
    return nn.Linear(width, width)
"""

MODELING = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_tiny import TinyClientConfig
from .blocks_tiny import block


class TinyClientForCausalLM(PreTrainedModel):
    config_class = TinyClientConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(block(config.width) for _ in range(2))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        hidden = self.embed(input_ids)
        for each in self.blocks:
            hidden = each(hidden)
        return CausalLMOutput(logits=self.head(hidden))
"""


def write_custom_base(directory: Path) -> Path:
    """A model whose code is in its own directory, with weights made by that code."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "configuration_tiny.py").write_text(CONFIGURATION)
    (directory / "modeling_tiny.py").write_text(MODELING)
    (directory / "blocks_tiny.py").write_text(BLOCKS)
    config = {
        "model_type": "shardwise_tiny_client",
        "architectures": ["TinyClientForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_tiny.TinyClientConfig",
            "AutoModelForCausalLM": "modeling_tiny.TinyClientForCausalLM",
        },
        "width": 8,
        "vocab_size": 40,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    shapes = {"embed.weight": (40, 8), "head.weight": (40, 8)}
    for index in range(2):
        shapes |= {f"blocks.{index}.weight": (8, 8), f"blocks.{index}.bias": (8,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
