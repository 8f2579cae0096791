"""The random number generators of a process: torch's of CPU and devices, Python's, and numpy's if it is in use.

Also generators that are values in ``extra_state``, which have a state without having DCP's two methods.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import torch

from shardwise.errors import MisuseError
from shardwise.upstream.python import bits_of

if TYPE_CHECKING:
    import numpy as np

    _Numpys: TypeAlias = np.random.Generator | np.random.RandomState | np.random.BitGenerator


class DeviceGenerators(Protocol):
    """The default generators of one kind of accelerator, as ``torch.cuda`` and its likes have them."""

    device_count: Callable[[], int]
    current_device: Callable[[], int]
    get_rng_state: Callable[[int], torch.Tensor]
    set_rng_state: Callable[[torch.Tensor, int], None]


def of_accelerator() -> tuple[str, DeviceGenerators] | None:
    """The kind of the accelerator that the process uses, and its generators; ``None`` without one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    module = torch.get_device_module(device)
    if not all(hasattr(module, name) for name in ("device_count", "get_rng_state", "set_rng_state")):
        return None
    if not hasattr(module, "current_device"):  # a kind with a single device: torch.mps, whose functions take no number
        get, put = module.get_rng_state, module.set_rng_state
        module = SimpleNamespace(
            device_count=lambda: 1,
            current_device=lambda: 0,
            get_rng_state=lambda device: get(),
            set_rng_state=lambda new_state, device: put(new_state),
        )
    return device.type, cast(DeviceGenerators, module)


class RandomState:
    """The generators, with their state; ``devices`` are those of one kind of accelerator, by default torch's."""

    def __init__(self, devices: tuple[str, DeviceGenerators] | None = None) -> None:
        self._devices = devices or of_accelerator()

    def state_dict(self) -> dict[str, object]:
        """The generators' states."""
        state: dict[str, object] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self._devices is not None:
            kind, module = self._devices
            current = module.current_device()
            found: dict[str, object] = {"kind": kind, "state": module.get_rng_state(current)}
            # Whether this process has memory on a device, if its module can say; a rank usually uses one device.
            reserved = getattr(module, "memory_reserved", lambda _: True)
            others = [number for number in range(module.device_count()) if number != current and reserved(number)]
            if others:
                # Not otherwise: ranks with equal generators then have the same state, which is restored anywhere.
                found |= {"current": current, "others": {number: module.get_rng_state(number) for number in others}}
            state["accelerator"] = found
        if "numpy" in sys.modules:
            import numpy as np

            state["numpy"] = np.random.get_state()
        return state

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Set the generators: of the current device to that of the one that was current (or `ValueError`)."""
        torch.set_rng_state(cast(torch.Tensor, state_dict["torch"]))
        random.setstate(cast(tuple[object, ...], state_dict["python"]))
        self._set_devices(state_dict)
        if "numpy" in state_dict:
            import numpy as np

            np.random.set_state(cast("tuple[str, np.ndarray[tuple[int], np.dtype[np.uint32]], int, int, float]",
                                     state_dict["numpy"]))  # fmt: skip

    def _set_devices(self, state: Mapping[str, object]) -> None:
        if self._devices is None:
            return
        kind, module = self._devices
        if "cuda" in state and kind == "cuda":  # as older releases saved it
            module.set_rng_state(cast(torch.Tensor, state["cuda"]), module.current_device())
        saved = state.get("accelerator")
        if not isinstance(saved, Mapping) or saved["kind"] != kind:
            return
        current = module.current_device()
        others = cast(Mapping[int, torch.Tensor], saved.get("others", {}))
        if others and (saved["current"] != current or max(others) >= module.device_count()):
            raise ValueError(
                f"generators of {kind} devices {sorted(others)} were saved beside that of {saved['current']}; now "
                f"{current} of {module.device_count()} is current"
            )
        module.set_rng_state(cast(torch.Tensor, saved["state"]), current)
        for number, each in others.items():
            module.set_rng_state(each, number)


_State: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class GeneratorState:
    """A random number generator with DCP's two methods; only a state that ``fits`` is put, ``kind`` names it."""

    kind: str
    state_dict: Callable[[], dict[str, object]]
    fits: Callable[[_State], bool]
    put: Callable[[_State], object]

    def load_state_dict(self, state_dict: _State) -> None:
        """Set the generator; `MisuseError` if the state is of another kind of generator."""
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
