"""Tiny transformers models, spread over four ranks in every way that the engine promises to handle.

What a rank ought to hold is never computed here: a model whose elements are numbered is spread by torch, and the
numbers in its local tensors say which elements of the whole model's weights and optimizer states the rank has.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import Storage
from shardwise.stateful_wrappers.names import list_parameters

FAMILIES = ("dense", "tied", "moe")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STATES = ("exp_avg", "exp_avg_sq")
LAYERS = 4

Stage = tuple[int, ...]


@functools.cache
def _model(family: str) -> nn.Module:
    common = {
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 53,
        "tie_word_embeddings": family == "tied",
    }
    if family == "dense":
        from transformers.models.llama import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**common))
    if family in ("tied", "untied"):
        from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

        return Qwen3ForCausalLM(Qwen3Config(**common))
    from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if family == "fused":
        from transformers.models.phi3 import Phi3Config, Phi3ForCausalLM

        del common["head_dim"]
        return Phi3ForCausalLM(Phi3Config(**{**common, "intermediate_size": 13, "pad_token_id": 0}))
    experts = {"moe_intermediate_size": 11, "num_experts": 5, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts))


def value(family: str, kind: str, name: str, shape: torch.Size) -> torch.Tensor:
    """The whole tensor ``name``: a weight, or a state of the optimizer."""
    if family == "tied" and name == HEAD:
        name = EMBEDDING
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name}".encode()))
    return torch.randn(shape, generator=generator)


def whole(family: str, kind: str) -> nn.Module:
    """The whole model with values of one kind."""
    model = copy.deepcopy(_model(family))
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(value(family, kind, name, tensor.shape))
    return model


def numbered(family: str) -> nn.Module:
    """The whole model, each element's value its place in `flat`."""
    model = copy.deepcopy(_model(family))
    begin = 0
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.copy_(torch.arange(begin, begin + tensor.numel()).view(tensor.shape))
            begin += tensor.numel()
    return model


@functools.cache
def flat(family: str, kind: str) -> torch.Tensor:
    """The values of one kind of all the model's elements, one after the other."""
    state = _model(family).state_dict()
    out = torch.cat([value(family, kind, name, tensor.shape).flatten() for name, tensor in state.items()])
    assert out.numel() < 2**24, "float32 does not hold every number"
    return out


# --- ways of spreading a model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A rank's parts of a model; none where the rank takes no part."""

    parts: list[nn.Module]
    group: dist.ProcessGroup | None = None


def _mesh(*shape: int, names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    layers = model.model.layers
    yield from (layers.values() if isinstance(layers, nn.ModuleDict) else layers)


def _fsdp(model: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter] | None = None) -> nn.Module:
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    return fully_shard(model, mesh=mesh, ignored_params=ignored)


#: Tensor parallelism by the last parts of a weight's name: columns (outputs) are rows of the matrix, and the other way.
_BY_NAME = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "o_proj": 1,
    "down_proj": 1,
    "embed_tokens": 0,
    "lm_head": 0,
}


def _tp(model: nn.Module, mesh: DeviceMesh, by_name: dict[str, int] = _BY_NAME) -> nn.Module:
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        dim = by_name.get(name.rpartition(".")[2])
        weight = module._parameters.get("weight")
        if dim is None or weight is None:
            continue
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(distribute_tensor(weight.data, mesh, [Shard(dim)], src_data_rank=None))
        module.weight = made[id(weight)]
    return model


def _packed(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallelism as transformers does it: each rank has a part of the gate and of the up half of a weight."""
    for name, param in list(model.named_parameters()):
        if name.endswith(("gate_up_proj", "gate_up_proj.weight")):
            placement: Shard | _StridedShard = _StridedShard(param.dim() - 2, split_factor=2)
        elif name.endswith(("down_proj", "down_proj.weight", "o_proj.weight")):
            placement = Shard(param.dim() - 1)
        else:
            continue
        pieces, _ = placement._split_tensor(param.data, mesh.size(), with_padding=False, contiguous=True)
        mine = DTensor.from_local(
            pieces[mesh.get_local_rank()].clone(), mesh, [placement], run_check=False, shape=param.shape,
            stride=param.stride(),
        )  # fmt: skip
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner).register_parameter(last, nn.Parameter(mine))
    return model


def experts(model: nn.Module) -> list[nn.Module]:
    """The modules that hold fused experts."""
    return [module for name, module in model.named_modules() if name.endswith("mlp.experts")]


def _ep(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    found = set()
    for module in experts(model):
        for name, param in list(module.named_parameters(recurse=False)):
            sharded = nn.Parameter(distribute_tensor(param.data, mesh, [Shard(0)], src_data_rank=None))
            module.register_parameter(name, sharded)
            found.add(sharded)
    return found


def stage(model: nn.Module, layers: Stage, first: bool, last: bool) -> nn.Module:
    """Cut a pipeline stage out of a model; the names stay those of the whole. A tied head becomes a copy of its own."""
    inner = model.model
    inner.layers = nn.ModuleDict({str(i): inner.layers[i] for i in layers})
    if last:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    else:
        model.lm_head = inner.norm = None
    if not first:
        inner.embed_tokens = None
    return model


def single(make: Callable[[], nn.Module]) -> Spread:
    """Rank 0 alone, in a group of its own."""
    group = dist.new_group([0])
    return Spread([make()], group=group) if dist.get_rank() == 0 else Spread([])


def fsdp(make: Callable[[], nn.Module]) -> Spread:
    """FSDP2 over four ranks."""
    return Spread([_fsdp(make(), _mesh(4, names=("dp",)))])


def fsdp_over_tp(make: Callable[[], nn.Module]) -> Spread:
    """FSDP2 over two, over tensor parallelism over two: strided shards where both cut rows."""
    mesh = _mesh(2, 2, names=("dp", "tp"))
    return Spread([_fsdp(_tp(make(), mesh["tp"]), mesh["dp"])])


def hsdp(make: Callable[[], nn.Module]) -> Spread:
    """FSDP2 over two, replicated twice."""
    return Spread([_fsdp(make(), _mesh(2, 2, names=("replicate", "shard")))])


def ddp(make: Callable[[], nn.Module]) -> Spread:
    """DistributedDataParallel: everybody has everything."""
    return Spread([nn.parallel.DistributedDataParallel(make())])


def tp(make: Callable[[], nn.Module]) -> Spread:
    """Tensor parallelism over four, by rows and columns; what is not cut is a plain tensor on every rank."""
    return Spread([_tp(make(), _mesh(4, names=("tp",)))])


def tp_packed(make: Callable[[], nn.Module]) -> Spread:
    """Tensor parallelism over four, fused weights packed."""
    return Spread([_packed(make(), _mesh(4, names=("tp",)))])


def fsdp_over_packed_tp(make: Callable[[], nn.Module]) -> Spread:
    """FSDP2 over two, over packed tensor parallelism over two."""
    mesh = _mesh(2, 2, names=("dp", "tp"))
    return Spread([_fsdp(_packed(make(), mesh["tp"]), mesh["dp"])])


def hsdp_over_packed_tp(make: Callable[[], nn.Module]) -> Spread:
    """Two replicas of packed tensor parallelism over two."""
    mesh = _mesh(2, 1, 2, names=("replicate", "shard", "tp"))
    return Spread([_fsdp(_packed(make(), mesh["tp"]), mesh["replicate", "shard"])])


def _pipeline(make: Callable[[], nn.Module], stages: list[list[Stage]]) -> Spread:
    mesh = _mesh(2, 2, names=("pp", "dp"))
    pp_rank = mesh.get_local_rank("pp")
    parts = []
    for number, layers in enumerate(stages[pp_rank]):
        first, last = pp_rank == 0 and number == 0, pp_rank == 1 and number == len(stages[1]) - 1
        parts.append(_fsdp(stage(make(), layers, first, last), mesh["dp"]))
    return Spread(parts)


def pp(make: Callable[[], nn.Module]) -> Spread:
    """Two pipeline stages, each FSDP2 over two."""
    return _pipeline(make, [[(0,)], [(1, 2, 3)]])


def pp_virtual(make: Callable[[], nn.Module]) -> Spread:
    """Two virtual stages on each of two pipeline ranks, interleaved, each FSDP2 over two."""
    return _pipeline(make, [[(0,), (2,)], [(1,), (3,)]])


def ep(make: Callable[[], nn.Module]) -> Spread:
    """Experts over four ranks (the last has none of the five), the rest FSDP2 over the same four."""
    model = make()
    ignored = _ep(model, _mesh(4, names=("ep",)))
    return Spread([_fsdp(model, _mesh(4, names=("dp",)), ignored)])


def ep_replicated(make: Callable[[], nn.Module]) -> Spread:
    """Experts over two ranks, twice; the rest is on every rank."""
    model = make()
    _ep(model, _mesh(2, 2, names=("dp", "ep"))["ep"])
    return Spread([model])


def ep_shard(make: Callable[[], nn.Module]) -> Spread:
    """Experts over ``ep``, cut again over ``ep_shard`` along another dimension; the rest FSDP2 over all four."""
    return _ep_shard(make, 1)


def ep_shard_rows(make: Callable[[], nn.Module]) -> Spread:
    """Experts over ``ep``, cut again over ``ep_shard`` along the same dimension: strided shards."""
    return _ep_shard(make, 0)


def _ep_shard(make: Callable[[], nn.Module], dim: int) -> Spread:
    model = make()
    moe_mesh = _mesh(2, 2, names=("ep_shard", "ep"))
    _ep(model, moe_mesh["ep"])
    for module in experts(model):
        fully_shard(module, mesh=moe_mesh["ep_shard"], shard_placement_fn=lambda _: Shard(dim))
    return Spread([_fsdp(model, _mesh(4, names=("dp",)))])


Topology = Callable[[Callable[[], nn.Module]], Spread]
DENSE: tuple[Topology, ...] = (single, fsdp, fsdp_over_tp, hsdp, ddp, tp, pp, pp_virtual)
SPARSE: tuple[Topology, ...] = (*DENSE, ep, ep_replicated, ep_shard, ep_shard_rows)


PACKED: tuple[Topology, ...] = (single, fsdp, tp_packed, fsdp_over_packed_tp, hsdp_over_packed_tp)


def topologies(family: str) -> tuple[Topology, ...]:
    """The topologies that mean something for a family."""
    return SPARSE if family == "moe" else DENSE


# --- a run -----------------------------------------------------------------------------------------------------------

Locals = dict[str, torch.Tensor]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named(parts: list[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters by their plain names, tied ones once."""
    return {t.name: t.tensor for t in list_parameters(parts)}  # type: ignore[misc]


class Run:
    """A model and its optimizer on one topology, and what they ought to hold."""

    def __init__(self, family: str, topology: Topology) -> None:
        self.spread = topology(lambda: numbered(family))
        self.params = named(self.spread.parts)
        places = {name: local(param).long() for name, param in self.params.items()}
        self.truth: dict[str, Locals] = {
            kind: {name: flat(family, kind)[place] for name, place in places.items()} for kind in ("weight", *STATES)
        }
        self.reset()

    @property
    def takes_part(self) -> bool:
        """Whether this rank has anything of the model."""
        return bool(self.spread.parts)

    def reset(self) -> None:
        """A fresh optimizer, and weights that are wrong."""
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=1e-3, foreach=False) if self.params else None
        for param in self.params.values():
            local(param).fill_(-3.0)

    def fill(self) -> None:
        """The right weights, and states as if seven steps had been taken.

        AdamW's own step would make the same entries, but a first one takes seconds to find out how each operation
        works on tensors that are spread so.
        """
        for name, param in self.params.items():
            local(param).copy_(self.truth["weight"][name])
            state = self.optimizer.state[param]  # type: ignore[union-attr]
            state["step"] = torch.tensor(7.0)
            for kind in STATES:
                state[kind] = torch.zeros_like(param, memory_format=torch.preserve_format)
                local(state[kind]).copy_(self.truth[kind][name])

    def check(self) -> None:
        """Everything is bit-equal to what it ought to be."""
        for name, param in self.params.items():
            state = self.optimizer.state[param]  # type: ignore[union-attr]
            assert float(state["step"]) == 7.0, name
            _same(name, local(param), self.truth["weight"][name])
            for kind in STATES:
                _same(f"{name} {kind}", local(state[kind]), self.truth[kind][name])

    def checkpointer(self, directory: Path, storage: Storage | None = None, **settings: object) -> Checkpointer:
        """The engine for a directory, which finds out which rank this is."""
        config = CheckpointingConfig(checkpoint_dir=directory, **settings)  # type: ignore[arg-type]
        return Checkpointer(config, process_group=self.spread.group, storage=storage)

    def save(self, directory: Path, storage: Storage | None = None, **settings: object) -> None:
        """Save as step 7."""
        if self.takes_part:
            with self.checkpointer(directory, storage, **settings) as engine:
                engine.save(0, 7, self.spread.parts, self.optimizer)

    def restore(self, directory: Path) -> None:
        """Restore the latest."""
        if self.takes_part:
            with self.checkpointer(directory) as engine:
                assert engine.restore(self.spread.parts, self.optimizer) is not None


def _same(what: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)}, not {tuple(wanted.shape)}"
    assert torch.equal(found, wanted), f"{what}: other values"
