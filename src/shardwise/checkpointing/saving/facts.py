"""Facts about a model that the ranks gather before a save: each pipeline stage knows only its own part."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from shardwise.checkpointing.saving.header_checks import Expectation, ExpectationRow, merge_expectations
from shardwise.comm import JsonValue
from shardwise.geometry import TensorSpec


class RankFacts(NamedTuple):
    """The facts of one rank, as they are gathered.

    Attributes:
        quantized: Whether the rank has quantized parameters.
        beside: Names of the state beside ordinary tensors, see `module_state_names`.
        expectation: What its part of the model says about its files, where there is a base model to compare with.
        native: Name of a tensor exported in another dtype -> its dtype in memory.
        outside: Names of tensors outside the exported model.
        excluded: Names of tensors that the class excludes from its files.
        specs: Names, shapes and dtypes that an export would have, where the written files do not show them.
        keys: Names of the base model's tensors in its settings (``model_state_dict_keys``).
    """

    quantized: bool
    beside: list[list[str]]
    expectation: ExpectationRow | None = None
    native: Mapping[str, str] = {}
    outside: Collection[str] = ()
    excluded: Collection[str] = ()
    specs: Sequence[tuple[str, Sequence[int], str]] = ()
    keys: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """The merged `RankFacts` of all ranks; ``specs`` is empty where the written files show them."""

    quantized: bool
    beside: tuple[list[list[str]], ...]
    expectation: Expectation
    native: Mapping[str, str]
    outside: frozenset[str]
    excluded: tuple[str, ...]
    specs: tuple[TensorSpec, ...]

    @property
    def has_beside(self) -> bool:
        """Whether any rank has state beside ordinary tensors."""
        return any(any(names) for names in self.beside)

    @staticmethod
    def of(notes: Sequence[JsonValue]) -> Facts:
        """Merge the gathered `RankFacts` of all ranks."""
        rows = [RankFacts(*cast("tuple[Any, ...]", note)) for note in notes]
        specs = {name: (shape, dtype) for row in rows for name, shape, dtype in row.specs}
        return Facts(
            any(row.quantized for row in rows),
            tuple(row.beside for row in rows),
            merge_expectations(
                [row.expectation for row in rows if row.expectation is not None],
                (key for row in rows for key in row.keys),
            ),
            {name: dtype for row in rows for name, dtype in row.native.items()},
            frozenset(name for row in rows for name in row.outside),
            tuple(sorted({name for row in rows for name in row.excluded})),
            tuple(TensorSpec(name, tuple(shape), dtype) for name, (shape, dtype) in specs.items()),
        )
