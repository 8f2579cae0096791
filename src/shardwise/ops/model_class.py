"""The tensors that a model has according to its configuration, from its class built on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from shardwise.addons.hf_config import CONFIG
from shardwise.base.class_of_config import build_on_meta, configuration, named_classes
from shardwise.checkpointing.hub import HubNames, HubState
from shardwise.disk.names import is_file
from shardwise.errors import FormatError, MissingTensorError, ShapeMismatchError, some
from shardwise.format.json_file import read_json
from shardwise.geometry import TensorSpec
from shardwise.stateful_wrappers import ModelState
from shardwise.upstream.hugging_face import CLASS_NAME

_WRONG = "A file is absent, or the configuration is another model's: restore the right one."


@dataclass(frozen=True)
class ModelClass:
    """The tensors of a class with a configuration.

    Attributes:
        config: The file that names it.
        native: Name in the model -> shape, each tied tensor under one name.
        hub: The same under the names of its files.
        others: Aliases of tied tensors, which files may have or lack.
        prefix: transformers' ``base_model_prefix``.
        state: The captured state of such a model, on the meta device.
    """

    name: str
    config: Path
    native: Mapping[str, tuple[int, ...]]
    hub: Mapping[str, tuple[int, ...]]
    others: Mapping[str, str]
    prefix: str
    state: HubState

    def compare(self, specs: Sequence[TensorSpec], path: Path, *, whole: bool) -> None:
        """Compare tensors, under the model's names or those of its files, with those of the class; ``whole``: all."""
        names = {spec.name for spec in specs}
        prefix = f"{self.prefix}." if self.prefix else ""
        # The class's own names or its files', with its prefix or without.
        ways = [self.hub, self.native]
        ways.append({name.removeprefix(prefix): shape for name, shape in self.hub.items()})
        ways.append({prefix + name: shape for name, shape in self.hub.items()})
        known = max(ways, key=lambda way: len(names & way.keys()))
        for spec in specs:
            shape = known.get(spec.name, spec.shape)
            if shape != spec.shape:
                raise ShapeMismatchError(
                    f"the files make up a tensor of {list(spec.shape)}; by {self.config.name} that of a {self.name} "
                    f"has {list(shape)}",
                    path=path,
                    tensor=spec.name,
                    hint=_WRONG,
                )
        missing = [name for name in known if name not in names] if whole else []
        if missing:
            raise MissingTensorError(
                f"{len(missing)} of the {len(known)} tensors that a {self.name} has by {self.config.name} are not "
                f"there: {some(missing, 5)}",
                path=path,
                tensor=missing[0],
                hint=_WRONG,
            )


def model_class(directory: Path) -> ModelClass | None:
    """The class that a directory's ``config.json`` names.

    ``None`` where there is no such file, or it names no class that transformers or diffusers has (or these are not
    installed), or one whose tensors the configuration does not tell (quantized).
    """
    path = directory / CONFIG
    found = read_json(path) if is_file(path) else None
    if not isinstance(found, dict) or found.get("quantization_config"):
        return None
    config: dict[str, object] = dict(found)
    named = config.get("architectures")
    if CLASS_NAME not in config and (config.get("auto_map") or not isinstance(named, list) or len(named) != 1):
        return None  # no class, several, or code of its own
    kind = next(iter(named_classes(config)), None)
    if kind is None:
        return None
    try:
        if CLASS_NAME in config:
            model = build_on_meta(kind, config)
        else:
            model = build_on_meta(kind, configuration(cast(Any, kind).config_class, config))
            cast(Any, model).tie_weights()
    except Exception as error:
        raise FormatError(
            f"{kind.__name__} cannot be built from the configuration: {type(error).__name__}: {error}",
            path=path,
            hint="Restore the configuration that the model was saved with.",
        ) from error
    state = HubNames().capture(ModelState(model))
    return ModelClass(
        kind.__name__,
        path,
        {tensor.spec.name: tensor.spec.shape for tensor in state.native},
        {
            **{tensor.spec.name: tensor.spec.shape for tensor in state.held},
            **{spec.name: spec.shape for group in state.groups for spec in group.computed.hub},
        },
        dict(state.ties),
        str(getattr(model, "base_model_prefix", "") or ""),
        state,
    )
