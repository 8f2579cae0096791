"""Before an adapter is loaded: does the file fit the model in ways that names and shapes do not show?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from shardwise.addons.peft_tensors import AdapterFile
from shardwise.errors import AdapterError, CheckpointNotFoundError

#: Settings that change what the tensors mean, and what peft assumes where they are absent.
_MEANING: dict[str, object] = {
    "peft_type": "LORA",
    "lora_alpha": 8,
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}


def differing_settings(saved: Mapping[str, object], current: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Settings that would give the saved tensors another meaning in the current model, with both values.

    Ranks are not among them, since tensors of another rank have another shape.

    Args:
        saved: The checkpoint's ``adapter_config.json``, from `shardwise.addons.peft.read_adapter_config`.
        current: The model's, from `shardwise.addons.peft.adapter_settings`.
    """
    out: dict[str, tuple[object, object]] = {}
    for key, default in _MEANING.items():
        theirs, ours = (config.get(key) for config in (saved, current))
        if (default if theirs is None else theirs) != (default if ours is None else ours):
            out[key] = (theirs, ours)
    return out


def check_shared_factors(file: AdapterFile, model_directory: str | os.PathLike[str]) -> None:
    """Check that tensors which share memory in the model are equal in the file. One rank calls.

    A model with a combined projection has one A factor for all of its parts; an adapter trained with one factor each
    cannot be loaded into it. Reads those tensors of the file, two at a time.

    Args:
        file: One adapter of the model.
        model_directory: The checkpoint's ``model`` directory.

    Raises:
        AdapterError: Two such tensors differ.
        CheckpointNotFoundError: The adapter file is absent.
    """
    shared = [(item.spec.name, item.alias_of) for item in file.entries if item.alias_of is not None]
    if not shared:
        return
    import torch
    from safetensors import safe_open

    path = Path(model_directory) / file.path
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"no {path.name}", path=path, hint="Pass the model directory of an adapter checkpoint."
        )
    with safe_open(path, framework="pt") as reader:
        names = set(reader.keys())
        for name, first in shared:
            if name in names and first in names and not torch.equal(reader.get_tensor(name), reader.get_tensor(first)):
                raise AdapterError(
                    f"{name!r} differs from {first!r}, and both are one parameter of this model",
                    path=path,
                    tensor=name,
                    hint="Load this adapter into a model with separate projections, for example with peft.",
                )
