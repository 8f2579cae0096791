"""The contents of a directory without a model, and which directories below hold one: for the hints of errors."""

from __future__ import annotations

import re
from pathlib import Path

from shardwise.disk.names import exists, is_directory, names_in
from shardwise.format.sniff import Kind, what_is_file
from shardwise.format.weight_files import SAFETENSORS, TORCH, is_adapter

#: Names of weight files of other tools; other files of a directory are not mentioned.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|hdf5|keras|msgpack|onnx|npz|npy|pkl|pickle|nemo|tar|zip|gz|tgz|zst|"
    r"distcp|llamafile|tflite|pb)$"
)
#: Files of the same kind that a training run keeps beside a model's weights.
_NO_MODEL = re.compile(
    r"^(training_args|optimizer|optim|scheduler|scaler|sched|random_states|rng_state|trainer_state|dataloader|"
    r"custom_checkpoint)\b.*|^(optimizer|rng_state|random_states|sampler|scheduler)(_.*)?\.(bin|pt|pth|pkl)$"
)
#: Directories beside a model's that hold other tensors than the model's.
_BESIDE = frozenset({"model_ema", "optim", "optimizer", "rng", "extra", "extra_state", "dataloader", "scheduler"})
_SHOWN, _DEPTH, _MOST_DIRECTORIES = 3, 3, 400


def torch_files(directory: Path) -> list[str]:
    """Names of the files of ``torch.save`` in a directory that may hold a model, sorted.

    Standard names count whatever is in them, so that a damaged file is found damaged and not absent; other names where
    the file begins as torch's do.
    """
    found = []
    for name in names_in(directory):
        stem = TORCH.stem_of(name)
        if stem is None or _NO_MODEL.match(name):
            continue
        standard = re.fullmatch(r"(pytorch_model|model|diffusion_pytorch_model)(-\d+-of-\d+)?\.bin", name)
        kind = None if standard else what_is_file(directory / name)
        if standard or (kind is not None and kind.kind is Kind.TORCH):
            found.append(name)
    return found


def kept_beside_models(name: str) -> bool:
    """Whether a file's name is one under which training runs keep other state than a model's, in torch's formats."""
    return TORCH.stem_of(name) is not None and _NO_MODEL.match(name) is not None


def holds_model(directory: Path) -> bool:
    """Whether there are weights in a directory that can be opened: by names, nothing is read of safetensors files."""
    if not is_directory(directory):
        return False
    return exists(directory / ".metadata") or holds_safetensors(directory) or holds_torch_files(directory)


def holds_safetensors(directory: Path) -> bool:
    """Whether there is a model in safetensors files in a directory, or in ``consolidated/`` below it."""
    names = [n for place in (directory, directory / "consolidated") if is_directory(place) for n in names_in(place)]
    return any(
        SAFETENSORS.index_stem(name) is not None or (SAFETENSORS.stem_of(name) is not None and not is_adapter(name))
        for name in names
    )


def holds_torch_files(directory: Path) -> bool:
    """Whether there is a model in files of ``torch.save`` in a directory."""
    return any(TORCH.index_stem(name) is not None for name in names_in(directory)) or bool(torch_files(directory))


def found_instead(directory: Path) -> str:
    """The contents of a directory without a model, for a message: "only model-q4.gguf (a GGUF file)"; may be empty."""
    weights = _weights(directory)
    shown = []
    for name in weights[:_SHOWN]:
        found = what_is_file(directory / name)
        shown.append(name if found is None or found.kind is Kind.SAFETENSORS else f"{name} ({found.name})")
    more = len(weights) - len(shown)
    return ("only " + ", ".join(shown) + (f" and {more} more" if more else "")) if shown else ""


def how_to_open(directory: Path) -> str:
    """The hint for the first of the files that `found_instead` lists; may be empty."""
    for name in _weights(directory):
        if is_adapter(name):
            return "It holds an adapter: set is_peft=True, or load its base model."
        found = what_is_file(directory / name)
        if found is not None and found.kind is not Kind.SAFETENSORS:
            return found.hint
    return ""


def _weights(directory: Path) -> list[str]:
    return sorted(name for name in names_in(directory) if _WEIGHTS.search(name))


def models_below(directory: Path) -> list[Path]:
    """Directories with a model some levels below a directory, the nearest first, later numbers before earlier ones."""
    found: list[Path] = []
    level, seen = [directory], 0
    for _ in range(_DEPTH):
        below = [child for parent in level for child in _children(parent)]
        level = []
        for child in below:
            seen += 1
            if seen > _MOST_DIRECTORIES:
                return found
            if _holds_safely(child):
                found.append(child)
            else:
                level.append(child)
        if found:
            return found
    return found


def did_you_mean(directory: Path) -> str:
    """A sentence that names what is below a directory; empty where no model is."""
    found = models_below(directory)
    if not found:
        return ""
    others = found[1:_SHOWN]
    text = f"Did you mean {str(found[0])!r}"
    return text + (f", or {', '.join(repr(str(path)) for path in others)}?" if others else "?")


def _holds_safely(directory: Path) -> bool:
    try:
        return holds_model(directory)
    except OSError:
        return False


def _children(directory: Path) -> list[Path]:
    try:
        named = [name for name in names_in(directory) if not name.startswith(".") and name not in _BESIDE]
        below = [directory / name for name in named if is_directory(directory / name)]
    except OSError:
        return []
    return sorted(below, key=lambda path: natural(path.name), reverse=True)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Names in an order in which step_10 comes after step_9."""
    parts = re.findall(r"\d+|\D+", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
