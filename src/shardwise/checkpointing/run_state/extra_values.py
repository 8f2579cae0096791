"""Values in ``extra_state`` that have a state without having DCP's two methods: random number generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import torch

from shardwise.errors import MisuseError
from shardwise.upstream.python import bits_of

if TYPE_CHECKING:
    import numpy as np

    _Numpys: TypeAlias = np.random.Generator | np.random.RandomState | np.random.BitGenerator

_State: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class GeneratorState:
    """A random number generator with DCP's two methods.

    Attributes:
        kind: What it is, for messages.
        get: Its state.
        fits: Whether a state is of this kind of generator.
        put: Sets it to a state that fits.
    """

    kind: str
    get: Callable[[], dict[str, object]]
    fits: Callable[[_State], bool]
    put: Callable[[_State], object]

    def state_dict(self) -> dict[str, object]:
        """The generator's state."""
        return self.get()

    def load_state_dict(self, state_dict: _State) -> None:
        """Set the generator.

        Raises:
            MisuseError: The state is of another kind of generator.
        """
        if not self.fits(state_dict):
            raise _other(self.kind, state_dict)
        self.put(state_dict)


def as_stateful(value: object) -> object:
    """A generator with ``state_dict`` and ``load_state_dict``; any other value unchanged."""
    if isinstance(value, torch.Generator):
        device = value.device.type
        return GeneratorState(
            f"a torch.Generator of {device}",
            lambda: {"torch.Generator": device, "state": value.get_state()},
            lambda state: state.get("torch.Generator") == device,
            lambda state: value.set_state(cast(torch.Tensor, state["state"])),
        )
    if isinstance(value, random.Random):
        return GeneratorState(
            "a random.Random",
            lambda: {"random.Random": value.getstate()},
            lambda state: "random.Random" in state,
            lambda state: value.setstate(cast(tuple[object, ...], state["random.Random"])),
        )
    if "numpy" in sys.modules:
        import numpy as np

        if isinstance(value, np.random.Generator | np.random.RandomState | np.random.BitGenerator):
            return _of_numpy(value)
    return value


def _of_numpy(generator: _Numpys) -> GeneratorState:
    """A generator of numpy's: new or old, or the source of bits alone."""
    import numpy as np

    if isinstance(generator, np.random.BitGenerator):
        bits = generator
    else:
        bits = generator.bit_generator if isinstance(generator, np.random.Generator) else bits_of(generator)
    kind = type(bits).__name__

    def get() -> dict[str, object]:
        if isinstance(generator, np.random.RandomState):
            # With the half of a pair of normal numbers that an old generator keeps.
            return {"numpy.random": generator.get_state(legacy=False)}
        return {"numpy.random": bits.state}

    def fits(state: _State) -> bool:
        saved = state.get("numpy.random")
        return isinstance(saved, Mapping) and saved.get("bit_generator") == kind

    def put(state: _State) -> None:
        saved = dict(cast("Mapping[str, object]", state["numpy.random"]))
        if isinstance(generator, np.random.RandomState):
            generator.set_state(saved)
        else:
            bits.state = saved

    return GeneratorState(f"a numpy generator with {kind}", get, fits, put)


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
