"""What the demo looks at: the state of the checkpoint root after a kill, and the result in plain transformers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from examples.finetune.texts import SENTENCES, make_blocks

from shardwise.errors import IncompleteCheckpointError
from shardwise.lifecycle import list_checkpoints, resolve

_NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Remains:
    """What a killed save left.

    Attributes:
        name: The unfinished directory's name.
        files: Files in it.
        nbytes: Bytes of them.
        refused: Resuming from it by name is refused as incomplete.
        published: The checkpoints that stand, oldest first.
        latest: The one that ``LATEST`` resolves to.
    """

    name: str
    files: int
    nbytes: int
    refused: bool
    published: tuple[str, ...]
    latest: str | None


def unfinished(root: Path) -> list[Path]:
    """Directories of the root that are neither a checkpoint nor a pointer to one."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.name.startswith(".") and path.is_dir())


def look_at_remains(root: Path) -> Remains | None:
    """Describe what is left of a killed save; ``None`` if nothing is."""
    left = unfinished(root)
    if not left:
        return None
    try:
        resolve(root, left[0])
        refused = False
    except IncompleteCheckpointError:
        refused = True
    latest = resolve(root)
    files, nbytes = measure(left[0])
    names = tuple(info.name for info in list_checkpoints(root) if info.complete)
    return Remains(left[0].name, files, nbytes, refused, names, latest.name if latest else None)


def writing_weights(directory: Path) -> bool:
    """Whether a save that goes on in ``directory`` has begun to write tensors."""
    for where, _, names in os.walk(directory):
        for name in names:
            if name.endswith(".safetensors") and (Path(where) / name).exists():
                return True
    return False


def measure(directory: Path) -> tuple[int, int]:
    """Number of files below ``directory``, and their bytes."""
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def weight_bytes(directory: Path) -> int:
    """Bytes of the safetensors files anywhere below ``directory``."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class Opened:
    """The export as plain transformers sees it.

    Attributes:
        problems: Missing, unexpected and mismatched names, with the word for what is wrong.
        tensors: Number of parameters.
        loss: Of the training text.
        text: Prompt and continuation, greedily decoded.
    """

    problems: tuple[str, ...]
    tensors: int
    loss: float
    text: str


def open_with_transformers(directory: Path, prompt: str) -> Opened:
    """Open a model directory with transformers alone; nothing of this library takes part."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    problems = [
        f"{key.removesuffix('_keys')}: {entry}"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        for entry in info.get(key, ())
    ]
    # The arithmetic of the training, so that the losses can be compared.
    model = model.float().eval()
    batch = torch.tensor(make_blocks(tokenizer(" ".join(SENTENCES))["input_ids"]))
    with torch.no_grad():
        loss = float(model(input_ids=batch, labels=batch).loss)
        asked = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
        )
    text = tokenizer.decode(answer[0], skip_special_tokens=True)
    return Opened(tuple(problems), sum(1 for _ in model.parameters()), loss, " ".join(text.split()))
