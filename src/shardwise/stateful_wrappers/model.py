"""A model's state: what it holds, as DCP's ``Stateful`` and as the engine's currency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from shardwise.plan.collector import collector_paused
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.memory import install, plain_view
from shardwise.stateful_wrappers.names import Listing, NamedTensor, list_state, plain_name
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors


class ModelState:
    """The state of a model, or of the pipeline stages that a rank runs.

    Follows DCP's ``Stateful`` protocol: ``dcp.save({"model": ModelState(model)}, ...)`` works, each tied tensor being
    saved once. All names are plain: without what torch.compile, DDP and activation checkpointing add.

    Args:
        model: A module, or the list of this rank's pipeline stages.
        is_peft: Whether only the adapter's parameters (those that require a gradient) are meant.
        skip_prefixes: Tensors whose names start with one of these are left out (task heads when a base model is
            loaded).

    Attributes:
        model: The parts, always a list.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        is_peft: bool = False,
        skip_prefixes: Sequence[str] = (),
    ) -> None:
        self.model: list[nn.Module] = [model] if isinstance(model, nn.Module) else list(model)
        self.is_peft = is_peft
        self._skip = tuple(skip_prefixes)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the model is left out."""
        return not self.is_peft and not self._skip

    @collector_paused()
    def listing(self) -> Listing:
        """Parameters and persistent buffers, each tied tensor once, and the modules that have them."""
        listed = list_state(self.model)
        if self.is_whole:
            return listed
        tensors = (
            named
            for named in listed.tensors
            if not (self._skip and named.name.startswith(self._skip))
            and (not self.is_peft or named.tensor.requires_grad)
        )
        return listed._replace(tensors=tuple(tensors))

    def tensors(self) -> tuple[NamedTensor, ...]:
        """The tensors of `listing`."""
        return self.listing().tensors

    def held(self, meshes: MeshRegister | None = None) -> list[HeldTensor]:
        """What this rank holds, under the model's own names, as views of its memory."""
        register = meshes or MeshRegister()
        return held_tensors(((named.name, named.tensor) for named in self.tensors()), register)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Plain names to detached tensors that share the model's memory.

        Raises:
            TensorError: A tensor's class wraps others, and no plain tensor has its elements.
        """
        return {named.name: plain_view(named.name, named.tensor) for named in self.tensors()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the model, in place; tensors that already share its memory are left alone.

        Raises:
            KeyError: A name that the model does not have.
            TensorError: As `state_dict`.
        """
        own = {name: named.tensor for named in self.tensors() for name in (named.name, *named.aliases)}
        with torch.no_grad():
            for name, value in state_dict.items():
                plain = plain_name(name)
                install(plain_view(plain, own[plain]), plain_view(plain, value))
