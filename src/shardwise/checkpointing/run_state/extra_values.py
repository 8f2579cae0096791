"""Values in ``extra_state`` that have a state without having DCP's two methods: random number generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch

from shardwise.errors import MisuseError
from shardwise.upstream.python import bits_of

if TYPE_CHECKING:
    import numpy as np


def as_stateful(value: object) -> object:
    """The value with ``state_dict`` and ``load_state_dict`` where it is a generator; any other as it is."""
    if isinstance(value, torch.Generator):
        return TorchGenerator(value)
    if isinstance(value, random.Random):
        return PythonGenerator(value)
    if "numpy" in sys.modules:
        import numpy as np

        if isinstance(value, np.random.Generator | np.random.RandomState | np.random.BitGenerator):
            return NumpyGenerator(value)
    return value


class TorchGenerator:
    """A ``torch.Generator`` with its state; on an accelerator, too."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, object]:
        """The state."""
        return {"torch.Generator": self._generator.device.type, "state": self._generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Set the generator.

        Raises:
            MisuseError: The state is of another kind of generator.
        """
        own = self._generator.device.type
        if state_dict.get("torch.Generator") != own:
            raise _other(f"a torch.Generator of {own}", state_dict)
        self._generator.set_state(cast(torch.Tensor, state_dict["state"]))


class PythonGenerator:
    """A ``random.Random`` with its state."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, object]:
        """The state."""
        return {"random.Random": self._generator.getstate()}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Set the generator.

        Raises:
            MisuseError: The state is of another kind of generator.
        """
        if "random.Random" not in state_dict:
            raise _other("a random.Random", state_dict)
        self._generator.setstate(cast(tuple[object, ...], state_dict["random.Random"]))


class NumpyGenerator:
    """A generator of numpy's with its state: new or old, or the source of bits alone."""

    def __init__(self, generator: np.random.Generator | np.random.RandomState | np.random.BitGenerator) -> None:
        self._generator = generator

    @property
    def _bits(self) -> np.random.BitGenerator:
        import numpy as np

        if isinstance(self._generator, np.random.BitGenerator):
            return self._generator
        if isinstance(self._generator, np.random.Generator):
            return self._generator.bit_generator
        return bits_of(self._generator)

    def state_dict(self) -> dict[str, object]:
        """The state; of an old generator with the half of a pair of normal numbers that it keeps."""
        import numpy as np

        if isinstance(self._generator, np.random.RandomState):
            return {"numpy.random": self._generator.get_state(legacy=False)}
        return {"numpy.random": self._bits.state}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Set the generator.

        Raises:
            MisuseError: The state is of another kind of generator.
        """
        import numpy as np

        saved = state_dict.get("numpy.random")
        own = type(self._bits).__name__
        if not isinstance(saved, Mapping) or saved.get("bit_generator") != own:
            raise _other(f"a numpy generator with {own}", state_dict)
        if isinstance(self._generator, np.random.RandomState):
            self._generator.set_state(dict(saved))
        else:
            self._bits.state = dict(saved)


def _other(own: str, state: Mapping[str, object]) -> MisuseError:
    kinds = {
        "torch.Generator": "a torch.Generator of {}",
        "random.Random": "a random.Random",
        "numpy.random": "numpy's",
    }
    found = next((text.format(state[key]) for key, text in kinds.items() if key in state), "no generator's")
    return MisuseError(
        f"the generator is {own}, and the saved state is of another kind: {found}",
        hint="Pass a generator like the one that the checkpoint was saved with.",
    )
