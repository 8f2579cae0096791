"""Casts tensors to the base model's dtypes for an export."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shardwise.dtypes import FLOATS
from shardwise.geometry import DTYPE_BYTES, TensorSpec
from shardwise.plan.fragments import HeldTensor


@dataclass(frozen=True, slots=True, eq=False)
class Recast:
    """This rank's tensors in the base model's dtypes.

    Attributes:
        export: The tensors to export, each in the dtype that the base has it in.
        exact: The original tensors where the base's dtype cannot hold their values exactly: a run that trains in
            float32 from a bfloat16 base exports bfloat16 and resumes from float32.
        native: Name of a tensor exported in another dtype -> its dtype in memory.
        outside: Names of tensors outside the exported model; they are in ``exact``.
    """

    export: Sequence[HeldTensor]
    exact: Sequence[HeldTensor]
    native: Mapping[str, str]
    outside: Collection[str]

    @staticmethod
    def none(held: Sequence[HeldTensor], outside: Collection[str]) -> Recast:
        """All tensors unchanged, for shards."""
        return Recast(list(held), [], {}, outside)

    @staticmethod
    def of(held: Sequence[HeldTensor], base: Mapping[str, TensorSpec], outside: Collection[str] = ()) -> Recast:
        """Give each tensor the dtype that the base model has it in, where both are of ordinary weights."""
        if not base and not outside:
            return Recast(list(held), [], {}, ())
        export, exact, native = [], [], {}
        for tensor in held:
            if tensor.spec.name in outside:
                exact.append(tensor)
                continue
            known = base.get(tensor.spec.name)
            have = tensor.spec.dtype
            if known is None or known.dtype == have:
                export.append(tensor)
                continue
            native[tensor.spec.name] = have
            if not {known.dtype, have} <= FLOATS.keys():
                export.append(tensor)
                continue
            export.append(tensor._replace(spec=tensor.spec._replace(dtype=known.dtype)))
            if DTYPE_BYTES[known.dtype] <= DTYPE_BYTES[have]:
                exact.append(tensor)
        return Recast(export, exact, native, outside)
