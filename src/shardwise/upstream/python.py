"""Private names of the standard library and of numpy."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import numpy as np

#: The bit generator below one of numpy's old generators.
bits_of: Callable[[np.random.RandomState], np.random.BitGenerator] = attrgetter("_bit_generator")


def before_threads_end(call: Callable[[], object]) -> None:
    """Have the interpreter call something at its end before it waits for threads, after which ``atexit`` functions run.

    Nothing is registered by an interpreter that has no such list, or is on its way out already.
    """
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        with contextlib.suppress(RuntimeError):
            register(call)


def imported_class(where: str, name: str) -> type | None:
    """A class of a module, which is not imported for this: nothing of the class exists without; ``None`` then."""
    found: object = getattr(sys.modules.get(where), name, None)
    return found if isinstance(found, type) else None


def class_of(where: str, name: str) -> type:
    """A class of a module, which is imported for this."""
    return cast(type, getattr(importlib.import_module(where), name))
