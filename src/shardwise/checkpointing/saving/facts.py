"""What ranks tell each other of a model before they save it: pipeline stages have different parts of one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from shardwise.checkpointing.saving.header_checks import Expectation, ExpectationRow, merge_expectations
from shardwise.comm import JsonValue
from shardwise.geometry import TensorSpec


class RankFacts(NamedTuple):
    """What one rank tells of its part, as it travels.

    Attributes:
        quantized: Whether it has quantized parameters.
        beside: Names of the state beside ordinary tensors, as `saving.module_state.module_state_names`
            gives them.
        expectation: What it says of the model's files, where there is a base model to compare them with.
        native: Dtype in memory of each tensor that the export has in another.
        outside: Names of tensors that are no part of the exported model.
        excluded: Names of tensors that its class keeps out of its files.
        specs: Names, shapes and dtypes of what an export would have, where the files that are written do not tell.
        keys: Names that its settings say the base model has (``model_state_dict_keys``).
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
    """What all ranks know of a model that is to be saved.

    Attributes:
        quantized: Whether any rank has quantized parameters.
        beside: For each rank, the names of its state beside ordinary tensors.
        expectation: What the model says of its files.
        native: Dtype in memory of each tensor of any rank that the export has in another.
        outside: Names of any rank's tensors that are no part of the exported model; they are saved beside it.
        excluded: Names of tensors of any rank that its class keeps out of its files.
        specs: What an export would have, where the files that are written do not tell.
    """

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
        """What the notes of all ranks say together, each an `RankFacts`."""
        rows = [RankFacts(*cast(_Row, note)) for note in notes]
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


_Row = tuple[
    bool,
    list[list[str]],
    ExpectationRow | None,
    dict[str, str],
    list[str],
    list[str],
    list[tuple[str, list[int], str]],
    list[str],
]
