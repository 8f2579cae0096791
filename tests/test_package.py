from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import grimp
import pytest

import shardwise


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "shardwise",
        "shardwise.config",
        "shardwise.errors",
        "shardwise.lifecycle",
        "shardwise.upstream.names",
        "shardwise.upstream.transformers",
        "shardwise.upstream.peft",
        "shardwise.upstream.hugging_face",
    ],
)
def test_importing_is_cheap(module: str) -> None:
    heavy = "('torch', 'transformers', 'peft', 'safetensors', 'numpy', 'huggingface_hub')"
    assert _run(f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_making_a_configuration_does_not_load_torch() -> None:
    code = "import sys, shardwise; shardwise.CheckpointingConfig(); print('torch' in sys.modules)"
    assert _run(code) == "False"


def test_importing_leaves_torch_as_it_was() -> None:
    code = """
import sys
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.planner as planner
watched = [torch, torch.nn.Module, torch.optim.Optimizer, torch.Tensor, torch.distributed, dcp, planner]
before = [dict(vars(each)) for each in watched]
import shardwise
for name in shardwise.__all__:
    getattr(shardwise, name)
def changed(was, now):
    return [key for key, value in was.items() if now.get(key, None) is not value]
print([changed(was, vars(each)) for was, each in zip(before, watched) if changed(was, vars(each))])
"""
    assert _run(code) == "[]"


def test_every_public_name_is_there() -> None:
    for name in shardwise.__all__:
        assert getattr(shardwise, name) is not None
    assert set(shardwise.__all__) <= set(dir(shardwise))
    assert sorted(shardwise.__all__) == [
        "CallRecord",
        "CheckpointInfo",
        "Checkpointer",
        "CheckpointingConfig",
        "PreemptionGuard",
        "RestoreRecord",
        "SafetensorsReader",
        "SafetensorsWriter",
        "SaveConsolidatedMode",
        "ShardwiseError",
        "__version__",
        "base_dtype",
    ]


def test_public_names_are_those_of_their_modules() -> None:
    from shardwise import config, errors

    assert shardwise.CheckpointingConfig is config.CheckpointingConfig
    assert shardwise.SaveConsolidatedMode is config.SaveConsolidatedMode
    assert shardwise.ShardwiseError is errors.ShardwiseError


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = shardwise.no_such_name
    assert not hasattr(shardwise, "__path_that_is_not__")


def test_the_version_is_that_of_the_installed_package() -> None:
    from importlib.metadata import version

    assert version("shardwise") == shardwise.__version__


def test_the_range_of_peft_begins_after_the_legacy_layout_of_expert_adapters() -> None:
    """What peft up to 0.19.0 lays out `v4_compatible` cannot split: it refuses, and the range leaves it out."""
    from shardwise.peft.check import is_legacy_version

    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    lowest = re.findall(r'"peft>=([\d.]+)[",]', text)
    assert lowest
    assert not any(map(is_legacy_version, lowest))
    assert is_legacy_version("0.18.0")
    assert is_legacy_version("0.19.0")


def test_the_benchmarks_are_of_this_state_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """They use inner modules, and nothing else runs them in the tests."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    cases = importlib.import_module("run").CASES
    assert {"consolidated", "load", "plan"} <= cases.keys()


def test_no_module_defines_a_name_twice() -> None:
    """The second would quietly be meant by all that was written for the first, as when two files become one."""
    twice = []
    for path in sorted(Path(shardwise.__file__).parent.rglob("*.py")):
        names: Counter[str] = Counter()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names[node.name] += 1
            elif isinstance(node, ast.Assign):
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names[node.target.id] += 1
        twice += [f"{path.name}: {name}" for name, count in names.items() if count > 1]
    assert not twice


def test_no_module_imports_itself_by_any_way() -> None:
    """Imports inside functions and for type checkers count too: in a circle no module can be read first."""
    graph = grimp.build_graph("shardwise", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    try:
        order = [*graphlib.TopologicalSorter(imports).static_order()]
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert len(order) == len(graph.modules) > 200
