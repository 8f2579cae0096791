"""Every optimizer of the table, every way of spreading a model, and what becomes of a run that is resumed.

``python -m tools.optimizer_table`` writes docs/optimizers.md from the same functions as the tests use.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tests.optimizers import layouts
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shardwise import CheckpointingConfig
from shardwise.errors import ShardwiseError

SINGLE, DDP, FSDP = "single", "ddp", "fsdp"
#: Flattening a DTensor takes shards of one size.
_EVEN = (12, 12, 6)
_RANKS, _WHOLE, _EVERYWHERE = frozenset({DDP}), frozenset({SINGLE, DDP}), frozenset({SINGLE, DDP, FSDP})


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        make: Makes it for a model.
        local: Whether it works on each rank's shard, so that plain states of a shard's shape are parts of a whole.
        runs: The ways of spreading a model with which it works at all.
        package: What has to be installed.
        sizes: Sizes of the model's layers; odd ones, which shards differ of, where the optimizer works with those.
    """

    make: Callable[[nn.Module], object]
    local: bool = False
    runs: frozenset[str] = _EVERYWHERE
    package: str = ""
    sizes: tuple[int, int, int] = (9, 9, 5)

    @property
    def is_here(self) -> bool:
        return not self.package or importlib.util.find_spec(self.package) is not None


def _of(make: Callable[[Iterable[nn.Parameter]], object]) -> Callable[[nn.Module], object]:
    return lambda model: make(list(model.parameters()))


def _torchs() -> Iterator[tuple[str, Row]]:
    """All that `torch.optim` has."""
    options: dict[str, dict[str, object]] = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}}
    for name, cls in inspect.getmembers(torch.optim, inspect.isclass):
        if cls is torch.optim.Optimizer:
            continue
        if name == "Muon":
            yield "Muon and AdamW", Row(_muon)
        elif name == "SparseAdam":
            yield name, Row(_of(cls), runs=_WHOLE)
        elif name == "LBFGS":
            yield name, Row(_of(lambda ps, cls=cls: cls(ps, max_iter=2, history_size=3)), sizes=_EVEN)
        else:
            kwargs = options.get(name, {})
            runs = _WHOLE if name in ("Adafactor", "Rprop") else _EVERYWHERE  # torch 2.13 has no DTensor rules for them
            yield name, Row(_of(lambda ps, cls=cls, kwargs=kwargs: cls(ps, lr=1e-2, **kwargs)), runs=runs)
    yield "AdamW, amsgrad", Row(_of(lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True)))
    yield "AdamW, rate a tensor", Row(_of(lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(1e-2), foreach=False)))


def _muon(model: nn.Module) -> object:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)]


def _from(package: str, name: str, **options: object) -> Callable[[nn.Module], object]:
    def make(model: nn.Module) -> object:
        cls = getattr(importlib.import_module(package), name)
        return cls(list(model.parameters()), **options)

    return make


def _torchao(name: str) -> Row:
    # Smaller states are not quantized, and shards of two sizes do not run there.
    return Row(_from("torchao.optim", name, lr=1e-2, block_size=16), package="torchao", sizes=(1024, 8, 4))


def _zero(model: nn.Module) -> object:
    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)


def _local_sgd(model: nn.Module) -> object:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    averager = PeriodicModelAverager(period=2, warmup_steps=1)
    return PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), averager)


def _accelerates(model: nn.Module) -> object:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    return AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))


ROWS: dict[str, Row] = {
    **dict(_torchs()),
    "Adafactor (transformers)": Row(
        lambda model: importlib.import_module("transformers.optimization").Adafactor(list(model.parameters())),
        runs=_WHOLE,
    ),
    "AdamW8bit (torchao)": _torchao("AdamW8bit"),
    "AdamW4bit (torchao)": _torchao("AdamW4bit"),
    "AdamWFp8 (torchao)": _torchao("AdamWFp8"),
    "AdamWScheduleFree (schedulefree)": Row(
        _from("schedulefree", "AdamWScheduleFree", lr=1e-2), package="schedulefree"
    ),
    "Prodigy (prodigyopt)": Row(_from("prodigyopt", "Prodigy", slice_p=3), package="prodigyopt", sizes=_EVEN),
    "schedule-free, layout": Row(_of(layouts.ScheduleFree)),
    "Prodigy, layout": Row(_of(layouts.Prodigy), sizes=_EVEN),
    "Lion, layout": Row(_of(layouts.Lion)),
    "MADGRAD, layout": Row(_of(layouts.Madgrad)),
    "SOAP, layout": Row(_of(layouts.Soap)),
    "Shampoo, layout": Row(_of(layouts.Shampoo)),
    "factored moments": Row(_of(layouts.Factored)),
    "to_local() states": Row(_of(layouts.Local), local=True),
    "a vector for each shard": Row(_of(layouts.LocalNorms), local=True),
    "bitsandbytes 8-bit, layout": Row(_of(layouts.Bits8), local=True),
    "state that is a tensor; tuple keys": Row(_of(layouts.Raw)),
    "ZeroRedundancyOptimizer": Row(_zero, runs=_RANKS),
    "PostLocalSGDOptimizer": Row(_local_sgd, runs=_RANKS),
    "AcceleratedOptimizer (accelerate)": Row(_accelerates, package="accelerate"),
    "container (torchtitan's form)": Row(layouts.Container),
    "Lookahead": Row(_of(layouts.lookahead)),
    "averaged weights, no Optimizer": Row(_of(layouts.averaged)),
    "SAM": Row(_of(layouts.Sam)),
    "hooks on the state dict": Row(_of(layouts.Hooked)),
    "overridden state_dict": Row(_of(layouts.Counting)),
}


def build(name: str, spread: str) -> tuple[nn.Module, object]:
    """A model and its optimizer."""
    torch.manual_seed(0)
    sparse = name == "SparseAdam"
    wide, narrow, out = ROWS[name].sizes
    first: nn.Module = nn.EmbeddingBag(12, wide, sparse=True) if sparse else nn.Linear(12, wide)
    rest = [] if sparse else [nn.Tanh(), nn.Linear(wide, narrow), nn.Tanh(), nn.Linear(narrow, out)]
    model: nn.Module = nn.Sequential(first, *rest)
    if spread == FSDP:
        fully_shard(model)
    elif spread == DDP:
        model = DistributedDataParallel(model)
    optimizer = ROWS[name].make(model)
    if "train" in dir(optimizer):
        optimizer.train()
    return model, optimizer


def train(name: str, model: nn.Module, optimizer: object, steps: Iterable[int]) -> None:
    """Some steps, each on a batch of its own."""
    # torchao compiles its step, and torch's cache of compiled code takes one of its tensor classes for another.
    with torch.compiler.set_stance("force_eager"):
        _train(name, model, optimizer, steps)


def _train(name: str, model: nn.Module, optimizer: object, steps: Iterable[int]) -> None:
    several = optimizer if isinstance(optimizer, list) else [optimizer]
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + (dist.get_rank() if dist.is_initialized() else 0))
        batch = torch.randn(6, 12, generator=generator)
        ids = torch.randint(0, 12, (6, 2), generator=generator)

        def loss(batch: torch.Tensor = batch, ids: torch.Tensor = ids) -> torch.Tensor:
            for each in several:
                each.zero_grad()
            value = model(ids if name == "SparseAdam" else batch).square().mean()
            value.backward()
            return value

        if name == "LBFGS":
            optimizer.step(loss)
            continue
        loss()
        for each in several:
            each.step()


def leaves(value: object, param: torch.Tensor | None, path: str, local: bool) -> Iterator[tuple[str, object]]:
    """Everything in a state, with tensors whole."""
    if isinstance(value, torch.Tensor):
        kind = type(value)
        if kind not in (torch.Tensor, nn.Parameter, DTensor) and hasattr(value, "__tensor_flatten__"):
            for inner in value.__tensor_flatten__()[0]:
                yield from leaves(getattr(value, inner), None, f"{path}.{inner}", local)
            return
        if isinstance(value, DTensor) and type(value._local_tensor) is not torch.Tensor:
            yield from leaves(value._local_tensor, None, f"{path}.local", local)
            return
        if isinstance(param, DTensor) and local and value.shape == param.to_local().shape:
            value = DTensor.from_local(
                value.detach(), param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
            )
        whole = value.full_tensor() if isinstance(value, DTensor) else value.detach()
        yield f"{path} {'DTensor' if isinstance(value, DTensor) else ''}", whole.clone()
    elif isinstance(value, Mapping):
        for key, each in value.items():
            text = "parameter" if isinstance(key, torch.Tensor) else str(key)[:40] if isinstance(key, str) else "key"
            yield from leaves(each, param, f"{path}.{text}", local)
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from leaves(each, param, f"{path}.{number}", local)
    else:
        yield path, value


_INNER = ("base", "base_optimizer", "optim", "optimizer", "optimizers")
_KEPT = ("counter", "steps", "slow", "seen", "extra", "averager")


def everything(model: nn.Module, optimizer: object, local: bool, path: str = "") -> dict[str, object]:
    """Weights, and all that an optimizer keeps, as its next step reads it."""
    found: dict[str, object] = {}
    if not path:
        for name, param in model.named_parameters():
            found |= dict(leaves(param, param, name, local))
    for number, each in enumerate(optimizer if isinstance(optimizer, list) else [optimizer]):
        here = f"{path}/{number}"
        for inner in _INNER:
            if inner in vars(each):
                found |= everything(model, vars(each)[inner], local, f"{here}.{inner}")
        for kept in _KEPT:
            value = vars(each).get(kept)
            found |= dict(leaves(getattr(value, "step", value), None, f"{here}.{kept}", local))
        known = [param for group in each.param_groups for param in group["params"]]
        state = getattr(each, "state", {})
        for place, param in enumerate(known):
            found |= dict(leaves(state.get(param), param, f"{here}.{place}", local))
        for key, value in state.items():
            if not isinstance(key, torch.Tensor):
                label = "with a parameter" if isinstance(key, tuple) else str(key)
                found.setdefault(f"{here}[{label}]", []).append(copy.copy(value))  # type: ignore[attr-defined]
        for place, group in enumerate(each.param_groups):
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            found |= dict(leaves(options, None, f"{here}.group{place}", local))
    return found


def differences(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """What differs in any bit."""
    return sorted(key for key in {**a, **b} if key not in a or key not in b or not _same(a[key], b[key]))


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = [each.contiguous().flatten().view(torch.uint8) if each.numel() else each.flatten() for each in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _config(root: str, is_async: bool) -> CheckpointingConfig:
    return CheckpointingConfig(checkpoint_dir=root, save_consolidated="false", is_async=is_async, save_rng=False)


def resumed(name: str, spread: str, is_async: bool, root: str) -> str:
    """Train, save, restore into fresh objects, train on, and compare with a run that was not interrupted.

    Returns:
        ``exact``; else what was refused, or differs.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    row = ROWS[name]
    model, optimizer = build(name, spread)
    train(name, model, optimizer, (1, 2, 3))
    with _config(root, is_async).build(rank, 0, 0) as checkpointer:
        try:
            checkpointer.save(0, 3, model, optimizer)  # type: ignore[arg-type]
            train(name, model, optimizer, (4, 5))
            fresh, fresh_optimizer = build(name, spread)
            checkpointer.restore(fresh, fresh_optimizer)  # type: ignore[arg-type]
        except ShardwiseError as error:
            return f"refused: {error.message}"
    train(name, fresh, fresh_optimizer, (4, 5))
    wrong = differences(everything(model, optimizer, row.local), everything(fresh, fresh_optimizer, row.local))
    return f"differs: {wrong[:6]}" if wrong else "exact"


def saved(name: str, is_async: bool, root: str) -> str:
    """The first half of a resume on other ranks: what was saved is kept beside the checkpoint."""
    model, optimizer = build(name, FSDP)
    train(name, model, optimizer, (1, 2, 3))
    with _config(root, is_async).build(dist.get_rank(), 0, 0) as checkpointer:
        try:
            checkpointer.save(0, 3, model, optimizer)  # type: ignore[arg-type]
        except ShardwiseError as error:
            return f"refused: {error.message}"
    kept = everything(model, optimizer, ROWS[name].local)
    if dist.get_rank() == 0:
        torch.save(kept, Path(root) / "kept.pt")
    return "saved"


def moved(name: str, root: str) -> str:
    """The second half: what was saved is there, bit for bit, and a step can be taken."""
    model, optimizer = build(name, FSDP)
    with _config(root, False).build(dist.get_rank(), 0, 0) as checkpointer:
        try:
            checkpointer.restore(model, optimizer)  # type: ignore[arg-type]
        except ShardwiseError as error:
            return f"refused: {error.message}"
    kept = torch.load(Path(root) / "kept.pt", weights_only=False)
    wrong = differences(kept, everything(model, optimizer, ROWS[name].local))
    train(name, model, optimizer, (4,))
    return f"differs: {wrong[:6]}" if wrong else "exact"


def emptied(root: Path) -> str:
    """A directory with nothing in it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    return str(root)
