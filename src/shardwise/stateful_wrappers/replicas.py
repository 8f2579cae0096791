"""Which replicated tensors may have different values on the ranks that hold them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from shardwise.stateful_wrappers.names import NamedTensor
from shardwise.stateful_wrappers.state_dict_overrides import EXTRA
from shardwise.stateful_wrappers.wrapping import plain_name, unwrap


class _Everything:
    """Contains every name."""

    def __contains__(self, name: object) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class MayDiffer:
    """The settings for tensors whose values may differ between the ranks that hold them as replicas.

    Parameters are compared. Buffers and extra state differ between ranks while they train (statistics of their own
    batches), and the lowest rank's are saved for all, as in DistributedDataParallel's own broadcast.
    """

    all: bool = False  #: Whether nothing is compared: the lowest rank's value is saved for all (``replicas="first"``).
    #: Patterns of the names of tensors that have another value on each rank (``per_rank_state``).
    per_rank: tuple[str, ...] = ()

    def of_model(self, tensors: Sequence[NamedTensor], parts: Sequence[nn.Module]) -> Container[str]:
        """Names of the model's tensors with replicas that may differ."""
        if self.all:
            return _Everything()
        others = [named for named in tensors if not isinstance(named.tensor, nn.Parameter)]
        buffers = {
            plain_name(name)
            for part in (parts if others else ())
            for name, _ in unwrap(part).named_buffers(remove_duplicate=False)
        }
        # A tensor that is neither parameter, buffer nor extra state was made of parameters by a hook.
        names = {named.name: (named.name, *named.aliases) for named in others}
        found = {n for n, own in names.items() if any(o in buffers or o.rpartition(".")[2] == EXTRA for o in own)}
        return found | {named.name for named in self.own(tensors)}

    def of_adapter(self, tensors: Iterable[tuple[str, torch.Tensor]], parts: Sequence[nn.Module]) -> Container[str]:
        """As `of_model`, for the tensors of an adapter by their names in its file."""
        if self.all:
            return _Everything()
        buffers = {id(buffer) for part in parts for buffer in part.buffers()}
        return {name for name, tensor in tensors if id(tensor) in buffers}

    def of_state(self, names: Iterable[tuple[str, str]]) -> Container[str]:
        """Names of an optimizer's state tensors with replicas that may differ, of pairs with the parameter."""
        if self.all:
            return _Everything()
        return {name for name, parameter in names if self.is_own(parameter)} if self.per_rank else frozenset()

    def own(self, tensors: Iterable[NamedTensor]) -> list[NamedTensor]:
        """The tensors that have another value on each rank."""
        if not self.per_rank:
            return []
        return [named for named in tensors if any(map(self.is_own, (named.name, *named.aliases)))]

    @staticmethod
    def matches(pattern: str, names: Iterable[str]) -> bool:
        """Whether a pattern matches any of ``names``."""
        return any(fnmatchcase(name, pattern) for name in names)

    def is_own(self, name: str) -> bool:
        """Whether the tensor called ``name`` has another value on each rank."""
        return any(fnmatchcase(name, pattern) for pattern in self.per_rank)
