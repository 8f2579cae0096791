"""Staging by itself: order on accelerators, several devices and threads, memory that is kept, reused and let go."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch
from tests.support.streams import FakeStreams

from shardwise.dtypes import dtype_code
from shardwise.engine.staging import DeviceStreams, Stager
from shardwise.errors import MisuseError
from shardwise.geometry import TensorSpec
from shardwise.plan.fragments import HeldTensor, Part, hold


class First(torch.Tensor):
    """A tensor that says it is on an accelerator."""

    device = torch.device("cuda:0")  # type: ignore[assignment]


class Second(torch.Tensor):
    """A tensor of another one."""

    device = torch.device("cuda:1")  # type: ignore[assignment]


def held(**tensors: torch.Tensor) -> list[HeldTensor]:
    """As they are: `held_tensor` would take the memory behind a class, which is the CPU's here."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    specs = {name: TensorSpec(name, shapes[name], dtype_code(tensor.dtype)) for name, tensor in tensors.items()}
    return [hold(specs[name], Part(shapes[name]), (), tensor.detach()) for name, tensor in tensors.items()]


def data(staged: list[HeldTensor]) -> list[torch.Tensor]:
    return [fragment.data for tensor in staged for fragment in tensor.fragments]


@pytest.mark.parametrize("holds_back", [True, False])
def test_a_later_kernel_runs_behind_the_copies(holds_back: bool) -> None:
    streams = FakeStreams(holds_back)
    stager, tensor = Stager(streams), torch.zeros(8)
    streams.launch(lambda: tensor.fill_(1))
    [staged] = data(stager.stage("model", held(x=tensor)))
    streams.launch(lambda: tensor.fill_(2))
    stager.wait()
    assert staged.tolist() == [1.0 if holds_back else 2.0] * 8
    stager.clear()


@pytest.mark.parametrize("holds_back", [True, False])
def test_every_device_has_its_order(holds_back: bool) -> None:
    streams = FakeStreams(holds_back)
    stager = Stager(streams)
    memory = torch.zeros(4), torch.zeros(4)
    first, second = memory[0].as_subclass(First), memory[1].as_subclass(Second)
    for tensor, device in zip(memory, ("cuda:0", "cuda:1"), strict=True):
        streams.launch(lambda t=tensor: t.fill_(1), device)  # type: ignore[misc]
    staged = data(stager.stage("model", held(a=first, b=second)))
    for tensor, device in zip(memory, ("cuda:0", "cuda:1"), strict=True):
        streams.launch(lambda t=tensor: t.fill_(2), device)  # type: ignore[misc]
    stager.wait()
    assert streams.devices == {torch.device("cuda:0"), torch.device("cuda:1")}
    assert [t.tolist() for t in staged] == [[1.0 if holds_back else 2.0] * 4] * 2
    stager.clear()


class Counting(torch.optim.Optimizer):
    """Adds one, on the stream that is the current one when it steps."""

    def __init__(self, parameters: list[torch.Tensor], streams: FakeStreams) -> None:
        super().__init__(parameters, {})
        self._streams = streams

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self._streams.launch(lambda p=parameter: p.data.add_(1))  # type: ignore[misc]


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("holds_back", [True, False])
def test_an_optimizer_of_another_stream_runs_behind_the_copies(holds_back: bool, in_thread: bool) -> None:
    streams = FakeStreams(holds_back)
    stager, tensor = Stager(streams), torch.zeros(8)
    optimizer = Counting([tensor], streams)
    [staged] = data(stager.stage("model", held(x=tensor)))

    def step() -> None:
        with streams.using("other"):
            optimizer.step()

    if in_thread:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    else:
        step()
    stager.wait()
    streams.finish()
    assert tensor.tolist() == [1.0] * 8
    assert staged.tolist() == [0.0 if holds_back else 1.0] * 8
    stager.clear()
    with streams.using("other"):
        optimizer.step()  # no hook is left
    streams.finish()
    assert tensor.tolist() == [2.0] * 8


@pytest.mark.slow
def test_a_compiled_step_runs_behind_the_copies() -> None:
    streams = FakeStreams()
    stager, tensor = Stager(streams), torch.zeros(4)
    [staged] = data(stager.stage("model", held(x=tensor)))
    with streams.using("other"):
        torch.compile(Counting([tensor], streams).step, backend="eager")()
    stager.wait()
    streams.finish()
    stager.clear()
    assert (staged.tolist(), tensor.tolist()) == ([0.0] * 4, [1.0] * 4)


class FailsAt(FakeStreams):
    """Refuses the second copy."""

    copied = 0

    def copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        self.copied += 1
        if self.copied == 2:
            raise MemoryError("no more")
        super().copy(buffer, source)


def test_copies_before_one_that_fails_are_waited_for_as_well() -> None:
    streams = FailsAt()
    stager, tensor = Stager(streams), torch.zeros(4)
    with pytest.raises(MemoryError):
        stager.stage("model", held(x=tensor, y=torch.ones(4)))
    streams.launch(lambda: tensor.fill_(5))
    stager.wait()
    assert tensor.tolist() == [0.0] * 4, "the kernel waits for the copy that was queued"
    streams.finish()
    stager.clear()


def test_two_threads_stage_and_wait() -> None:
    streams = FakeStreams()
    stager = Stager(streams)
    failures: list[BaseException] = []

    def work(component: str, value: float) -> None:
        try:
            for number in range(50):
                tensor = torch.full((16,), value + number)
                [staged] = data(stager.stage(component, held(x=tensor)))
                stager.wait()
                assert staged.tolist() == [value + number] * 16
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"c{n}", 1000.0 * n)) for n in range(3)]
    threads += [threading.Thread(target=lambda: [stager.wait() for _ in range(300)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    stager.clear()


def test_memory_that_is_being_read_is_not_staged_into() -> None:
    stager = Stager()
    [staged] = data(stager.stage("model", held(x=torch.ones(4))))
    stager.lend()
    thread = threading.Thread(target=lambda: stager.stage("model", held(x=torch.zeros(4))))
    thread.start()
    time.sleep(0.05)
    assert staged.tolist() == [1.0] * 4
    stager.take_back()
    thread.join(60)
    assert staged.tolist() == [0.0] * 4, "the same memory, once it is free"


def test_no_source_is_kept_alive() -> None:
    stager = Stager()
    tensor = torch.ones(4)
    storage = weakref.ref(tensor.untyped_storage())
    tensors = held(x=tensor)
    staged = stager.stage("model", tensors)
    stager.stage_tensors("optim", {"x": tensor})
    del tensor, tensors
    gc.collect()
    assert storage() is None
    assert stager.stage("model", held(x=torch.full((4,), 2.0)))[0] is staged[0], "tensors alike share a plan"
    assert data(staged)[0].tolist() == [2.0] * 4


def test_what_was_staged_in_inference_mode_can_be_staged_again_outside() -> None:
    stager = Stager()
    with torch.inference_mode():
        inside = stager.stage("model", held(x=torch.ones(4)))
    assert not data(inside)[0].is_inference()
    [staged] = data(stager.stage("model", held(x=torch.full((4,), 3.0))))
    assert staged.tolist() == [3.0] * 4
    assert stager.stage_tensors("optim", {"x": torch.ones(2)})["x"].tolist() == [1.0, 1.0]


def test_other_views_are_staged_as_the_values_that_they_have() -> None:
    complex_ = torch.tensor([1 + 2j, 3 - 4j])
    views = {"conj": complex_.conj(), "neg": complex_.conj().imag, "row": torch.ones(1).expand(3)}
    staged = Stager().stage_tensors("model", views)
    for name, view in views.items():
        assert torch.equal(staged[name], view.clone()), name
        assert staged[name].is_contiguous()


def test_a_tensor_that_keeps_its_values_in_its_own_way_is_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(MisuseError, match="a TwoTensor of layout torch.strided cannot be staged") as caught:
        Stager().stage_tensors("model", {"layer.weight": TwoTensor(torch.ones(2), torch.ones(2))})
    assert caught.value.tensor == "layer.weight"


# --- torch's streams ------------------------------------------------------------------------------------------------


class Recorded(torch.Tensor):
    """A tensor of an accelerator that notes which stream its memory is used on."""

    device = torch.device("cuda:1")  # type: ignore[assignment]

    def record_stream(self, stream: object) -> None:  # type: ignore[override]
        assert isinstance(stream, Stream)
        stream.log.append(f"{stream.name} uses the source's memory")


class Stream:
    """A stream that notes what it is told."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> Event:
        self.log.append(f"{self.name} records")
        return Event(self.log)

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for the event")

    def synchronize(self) -> None:
        self.log.append(f"the host waits for {self.name}")

    def __enter__(self) -> None:
        self.log.append(f"{self.name} is current")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"{self.name} is no longer current")


class Event:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def synchronize(self) -> None:
        self._log.append("the host waits")


class Module:
    """What ``torch.cuda`` has."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def Stream(self, device: torch.device) -> Stream:
        return Stream(f"side of {device}", self._log)

    def current_stream(self, device: torch.device) -> Stream:
        return Stream(f"current of {device}", self._log)

    def stream(self, stream: Stream) -> Stream:
        return stream


class Unpinned(DeviceStreams):
    """Without page-locked memory, which needs an accelerator."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)


def test_the_calls_of_a_device_module() -> None:
    log: list[str] = []
    streams: DeviceStreams = Unpinned(lambda device: Module(log))
    stager = Stager(streams)
    tensor = torch.ones(3).as_subclass(Recorded)
    tensors = held(x=tensor)
    [staged] = data(stager.stage("model", tensors))
    stager.wait()
    stager.clear()
    assert staged.tolist() == [1.0] * 3
    assert log == [
        "side of cuda:1 waits for current of cuda:1",
        "side of cuda:1 is current",
        "side of cuda:1 uses the source's memory",
        "side of cuda:1 is no longer current",
        "side of cuda:1 records",
        "current of cuda:1 waits for the event",
        "the host waits",
    ]


class Capturing(Module):
    """While a graph is captured."""

    def is_current_stream_capturing(self) -> bool:
        return True


def test_settling_waits_for_the_stream_that_is_current() -> None:
    log: list[str] = []
    DeviceStreams(lambda device: Module(log)).settle(torch.device("cuda:1"))
    assert log == ["the host waits for current of cuda:1"]


def test_a_graph_that_is_captured_is_not_made_to_wait() -> None:
    log: list[str] = []
    streams = DeviceStreams(lambda device: Capturing(log))
    streams.hold_back(torch.device("cuda:1"), Event(log))
    assert log == []


def test_a_device_without_streams_is_copied_from_at_once() -> None:
    streams = DeviceStreams(lambda device: object())
    assert not streams.has_streams(torch.device("mps"))
    stager, memory = Stager(streams), torch.ones(3)
    [staged] = data(stager.stage("model", held(x=memory.as_subclass(First))))
    memory.fill_(2)
    stager.wait()
    assert staged.tolist() == [1.0] * 3


@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_torchs_modules_are_what_is_expected(name: str) -> None:
    # Their modules are there without a device; nothing of them is called.
    assert DeviceStreams().has_streams(torch.device(name))
    assert not DeviceStreams().has_streams(torch.device("cpu"))
