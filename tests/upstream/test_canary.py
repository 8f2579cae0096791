"""Every name of `shardwise.upstream.names` exists in the installed releases, as what it is used as."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from shardwise.upstream.names import ALL, Name

_STEP = re.compile(r"(\w+)(?:\((\d*)\))?")


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("canary") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


#: Objects whose attributes are on the list.
_EXAMPLES = {
    "@dtensor": lambda: distribute_tensor(torch.zeros(2), init_device_mesh("cpu", (1,)), [Replicate()]),
    "@optimizer": lambda: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1),
}


@pytest.mark.parametrize("name", ALL, ids=lambda name: name.path)
def test_a_name_that_is_used_exists(name: Name) -> None:
    try:
        problem = _problem(name)
    except (ImportError, AttributeError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem and name.optional:
        pytest.skip(f"this release does without {name.path}: {problem}")
    assert not problem, f"{name.path}, which shardwise needs because: {name.why}. {problem}"


def _problem(name: Name) -> str:
    """What is wrong with a name in the installed release; empty where nothing is."""
    module, colon, word = name.path.partition(":")
    if colon:
        source = Path(inspect.getfile(importlib.import_module(module))).read_text()
        return "" if re.search(rf"\b{word}", source) else f"the source of {module} does not mention it"
    found = _find(name.path)
    kinds = {cls.__name__ for cls in type(found).__mro__}
    if name.kind not in kinds:
        return f"it is a {type(found).__name__} and no {name.kind}"
    if name.takes:
        lacking = set(name.takes) - set(inspect.signature(found).parameters)  # type: ignore[arg-type]
        return f"it does not take {', '.join(sorted(lacking))}" if lacking else ""
    return ""


def _find(path: str) -> object:
    first, *rest = path.split(".")
    found: object = _EXAMPLES[first]() if first.startswith("@") else importlib.import_module(first)
    while rest and inspect.ismodule(found):  # modules first: a package may have a function of the same name
        try:
            found = importlib.import_module(f"{found.__name__}.{rest[0]}")
        except ModuleNotFoundError:
            break
        rest = rest[1:]
    for step in rest:
        match = _STEP.fullmatch(step)
        assert match is not None, path
        found = getattr(found, match[1])
        if match[2] is not None:
            assert callable(found), path
            found = found(*(int(number) for number in (match[2],) if number))
    return found


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (Name("torch.nn.Module()._gone", "a test", "dict"), "_gone"),
        (Name("torch.gone.names", "a test", "dict"), "gone"),
        (Name("torch.nn.Module()._parameters", "a test", "list"), "it is a dict and no list"),
        (Name("torch.nn.Module._apply", "a test", "function", ("fn", "gone")), "it does not take gone"),
        (Name("torch.optim.lr_scheduler:_gone", "a test"), "does not mention it"),
    ],
)
def test_a_name_that_a_release_dropped_is_told(name: Name, problem: str) -> None:
    try:
        found = _problem(name)
    except (ImportError, AttributeError) as error:
        found = str(error)
    assert problem in found


def test_each_name_is_listed_once() -> None:
    paths = [name.path for name in ALL]
    assert sorted(set(paths)) == sorted(paths)


def test_a_release_without_quantized_tensors_has_everything_else() -> None:
    """Their makers were looked up when the package was imported."""
    lost = "import torch; del torch._make_per_tensor_quantized_tensor, torch._make_per_channel_quantized_tensor; "
    subprocess.run([sys.executable, "-c", lost + "import shardwise.upstream.torch_tensors"], check=True)
