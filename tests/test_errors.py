"""What an error says."""

from __future__ import annotations

import errno
import os
import traceback

import pytest

from shardwise.errors import MisuseError, ShapeMismatchError, ShardwiseError, StorageError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MisuseError("step is -1", hint="Count from 0."), "step is -1. Count from 0."),
        (MisuseError("step is -1.", hint="Count from 0."), "step is -1. Count from 0."),
        (MisuseError("step is -1"), "step is -1"),
        (
            ShapeMismatchError("they differ", path="/a", tensor="w", rank=2, hint="Build another."),
            "they differ [tensor 'w', path '/a', rank 2] Build another.",
        ),
    ],
)
def test_sentences_stay_apart(error: ShardwiseError, text: str) -> None:
    assert str(error) == text
    assert str(ShardwiseError.from_record(error.to_record())) == text


def test_a_traceback_ends_with_where_the_error_is_explained() -> None:
    error = ShardwiseError.from_record(MisuseError("step is -1").to_record())
    assert "".join(traceback.format_exception(error)).splitlines()[-1] == "More: docs/troubleshooting.md#misuseerror"


@pytest.mark.parametrize("code", sorted(errno.errorcode))
def test_whatever_the_system_refuses_there_is_something_to_do(code: int) -> None:
    error = StorageError.from_os(OSError(code, os.strerror(code), "/data/run"), rank=1)
    assert error.hint is not None
    assert str(error) == f"{os.strerror(code)} [path '/data/run', rank 1] {error.hint}"
    assert error.errno == code
