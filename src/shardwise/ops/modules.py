"""Which module of a model a tensor belongs to, by its name alone. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardwise.geometry import TensorSpec

#: Levels of a name that are told apart where none of them is a number.
_DEPTH = 3


@dataclass(frozen=True, slots=True)
class ModuleDescription:
    """A module, or the modules of one kind in all layers.

    Attributes:
        name: Its name, with ``*`` for the number of the layer; empty for tensors outside of any module.
        layers: How many layers have it; 1 where it is in none.
        tensors: Number of its tensors in all layers.
        parameters: Number of their elements.
        nbytes: Their bytes.
    """

    name: str
    layers: int
    tensors: int
    parameters: int
    nbytes: int


def module_of(name: str) -> str:
    """The kind of module: ``model.layers.*.mlp`` of ``model.layers.7.mlp.up_proj.weight``."""
    path, at = _path(name)
    return ".".join(path[:_DEPTH] if at is None else [*path[:at], "*", *path[at + 1 : at + 2]])


def layer_of(name: str) -> str:
    """The layer: ``model.layers.7`` of ``model.layers.7.mlp.up_proj.weight``; outside of layers the module."""
    path, at = _path(name)
    return ".".join(path[: _DEPTH if at is None else at + 1])


def _path(name: str) -> tuple[list[str], int | None]:
    """The module's name in parts, and which is the layer's number; ``state.PARAMETER.KEY`` is an optimizer's state."""
    *path, _ = name.split(".")
    path = path[:-1] if path[:1] == ["state"] and len(path) > 2 else path
    return path, next((at for at, part in enumerate(path) if part.isdecimal()), None)


def describe_modules(specs: Iterable[TensorSpec]) -> tuple[ModuleDescription, ...]:
    """The modules of some tensors, in order of appearance."""
    found: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        found.setdefault(module_of(spec.name), []).append(spec)
    return tuple(
        ModuleDescription(
            name,
            len({layer_of(spec.name) for spec in own}),
            len(own),
            sum(spec.numel for spec in own),
            sum(spec.nbytes for spec in own),
        )
        for name, own in found.items()
    )
