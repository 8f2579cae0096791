"""Planning of reads: any chunks, any fragments, and what is missing."""

from __future__ import annotations

import pytest
import torch

from shardwise.errors import MissingTensorError
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part
from shardwise.plan.reads import Read, SourceChunk, SourceTensor, plan_reads

SPEC = TensorSpec("w", (6, 10), "F32")


def wanted(box: Box) -> HeldTensor:
    fragment = Fragment(box, torch.zeros(box.sizes))
    return HeldTensor(SPEC, SPEC.shape, (HeldPart(Part(SPEC.shape), (), (fragment,)),))


def test_a_whole_tensor_is_one_read() -> None:
    source = SourceTensor(SPEC, (SourceChunk(Box.whole(SPEC.shape), 3, 100),))
    (read,) = plan_reads(source, wanted(Box.whole(SPEC.shape)))
    assert isinstance(read, Read)
    assert (read.file, read.offset, read.rows, read.width) == (3, 100, 1, SPEC.nbytes)


def test_rows_are_one_read_and_columns_are_one_regular_read() -> None:
    source = SourceTensor(SPEC, (SourceChunk(Box.whole(SPEC.shape), 0, 8),))
    (rows,) = plan_reads(source, wanted(Box((2, 0), (3, 10))))
    (columns,) = plan_reads(source, wanted(Box((0, 4), (6, 2))))
    assert isinstance(rows, Read)
    assert isinstance(columns, Read)
    assert (rows.offset, rows.rows, rows.width) == (8 + 80, 1, 120)
    assert (columns.offset, columns.rows, columns.period, columns.width) == (8 + 16, 6, 40, 8)


def test_a_gap_between_the_chunks_is_an_error_that_names_the_tensor() -> None:
    chunks = (SourceChunk(Box((0, 0), (2, 10)), 0, 0), SourceChunk(Box((3, 0), (3, 10)), 1, 0))
    source = SourceTensor(SPEC, chunks)
    with pytest.raises(MissingTensorError, match="50 of the 60 elements") as found:
        list(plan_reads(source, wanted(Box.whole(SPEC.shape))))
    assert found.value.tensor == "w"
    # What lies beside the gap can be read.
    assert len(list(plan_reads(source, wanted(Box((3, 0), (2, 10)))))) == 1


def test_nothing_is_read_for_an_empty_fragment() -> None:
    source = SourceTensor(SPEC, (SourceChunk(Box.whole(SPEC.shape), 0, 8),))
    assert list(plan_reads(source, wanted(Box((6, 0), (0, 10))))) == []
