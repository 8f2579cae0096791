"""A model's state: what it holds, as DCP's ``Stateful`` and as the engine's currency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from shardwise.plan.deferred import deferred, release, resolve
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.install import Installing, post_steps
from shardwise.stateful_wrappers.memory import install, plain_view
from shardwise.stateful_wrappers.names import Listing, NamedTensor, is_lm_head, list_state
from shardwise.stateful_wrappers.state_dict_overrides import EXTRA
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.stateful_wrappers.units import StandIns, Step
from shardwise.stateful_wrappers.wrapping import plain_name, unwrap
from shardwise.upstream.torch_tensors import local_part

#: A model as a rank holds it: one module, or its pipeline stages.
Model = nn.Module | Sequence[nn.Module]


class ModelState:
    """The state of a model, or of the pipeline stages that a rank runs.

    Follows DCP's ``Stateful`` protocol: ``dcp.save({"model": ModelState(model)}, ...)`` works, each tied tensor being
    saved once. All names are plain: without what torch.compile, DDP and activation checkpointing add.

    Args:
        model: A module, or the list of this rank's pipeline stages.
        skip_prefixes: Tensors whose names start with one of these are left out (task heads when a base model is
            loaded).

    Attributes:
        model: The parts, always a list.
    """

    def __init__(self, model: Model, *, skip_prefixes: Sequence[str] = ()) -> None:
        self.model: list[nn.Module] = [model] if isinstance(model, nn.Module) else list(model)
        self._skip = tuple(skip_prefixes)

    @property
    def uses_tied_lm_head(self) -> bool:
        """Whether the model's configuration ties head and embedding: ``tie_word_embeddings`` at its top level."""
        key = "tie_word_embeddings"
        configs = [getattr(unwrap(part), "config", None) for part in self.model]
        said = [config.get(key) if isinstance(config, Mapping) else getattr(config, key, False) for config in configs]
        return any(map(bool, said))

    @property
    def has_local_tied_lm_head(self) -> bool:
        """Whether a head, ``lm_head.weight``, shares its memory with another tensor of this rank's parts."""
        shared = ((named.name, *named.aliases) for named in list_state(self.model).tensors if named.aliases)
        return any(is_lm_head(name) for names in shared for name in names)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the model is left out."""
        return not self._skip

    def listing(self, stand_ins: StandIns | None = None, *, values: bool = True, norms: bool = False) -> Listing:
        """The model's state, each tied tensor once, and the modules that have it; see `list_state`."""
        listed = list_state(self.model, stand_ins, values=values, norms=norms)
        if self.is_whole:
            return listed
        return listed._replace(tensors=tuple(t for t in listed.tensors if not t.name.startswith(self._skip)))

    def held(self, meshes: MeshRegister | None = None) -> list[HeldTensor]:
        """What this rank holds, under the model's own names, as views of its memory or of stand-ins for it."""
        register = meshes or MeshRegister()
        return held_tensors(((named.name, named.tensor) for named in self.listing().tensors), register)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Plain names to detached tensors.

        They share the model's memory, but for those that a module makes when it is asked; and so do they go back, by
        `load_state_dict`. Each is listed once: ``lm_head.weight`` is left out where it shares its memory with the
        embedding, and only there. Extra state of modules is listed under torch's names.

        Raises:
            ModuleStateError: A module gives what cannot be described.
            TensorError: A tensor's class wraps others, and no plain tensor has its elements.
        """
        listed = self.listing()
        found: dict[str, torch.Tensor] = {}
        try:
            for named in listed.tensors:
                found[named.name] = _made(named)
        finally:
            release()
        # DCP keeps values of other kinds, too, and its protocol says so nowhere.
        return found | {name: cast(torch.Tensor, value) for name, (value, _) in listed.aside.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take values in, with the effect of the modules' own ``load_state_dict``.

        Tensors that already share the model's memory are left alone. What is not named stays as it is.

        Raises:
            KeyError: A name that the model does not have.
            ModuleStateError: A module refuses what it is given.
            TensorError: As `state_dict`.
        """
        listed = self.listing(values=False)
        own = {name: named.tensor for named in listed.tensors for name in (named.name, *named.aliases)}
        takers: dict[int, dict[str, torch.Tensor]] = {}
        aside: dict[str, object] = {}
        with torch.no_grad():
            for key, value in state_dict.items():
                name = plain_name(key)
                target = own.get(name)
                what = None if target is None else deferred(local_part(target))
                if what is not None:
                    takers.setdefault(id(what.owner), {})[what.key] = value
                elif target is not None:
                    install(plain_view(name, target), plain_view(name, value))
                elif self._may_take(listed, name):
                    aside[name] = value
                else:
                    raise KeyError(name)
        metadata = {name: dict(noted) for name, noted in listed.metadata.items()}
        installing = Installing(lambda taker: takers.get(id(taker), {}), aside, metadata, allow_missing=True)
        for part, steps in zip(self.model, listed.steps, strict=True):
            wanted = [s for s in steps if s.kind != "take" or id(s.taker) in takers or _concerns(s, aside)]
            installing.run([*wanted, *(() if steps else post_steps(unwrap(part)))])

    @staticmethod
    def _may_take(listed: Listing, name: str) -> bool:
        if name.rpartition(".")[2] == EXTRA:
            return True
        return any(step.taker is not None and step.taker.is_lenient for steps in listed.steps for step in steps)


def _concerns(step: Step, names: Mapping[str, object]) -> bool:
    return any(name.startswith(plain_name(step.prefix)) for name in names)


def _made(named: NamedTensor) -> torch.Tensor:
    """A tensor, detached; what is behind it, where it is a stand-in."""
    what = deferred(local_part(named.tensor))
    if what is None:
        return plain_view(named.name, named.tensor)
    value = resolve(what.stand_in())
    return value if what.template is None else what.template(value)
