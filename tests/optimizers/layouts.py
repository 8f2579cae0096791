"""Optimizers with the state layouts of well-known third-party ones, and wrappers that keep state of their own.

The arithmetic is short and stands for the real one; what state there is, under which keys and of which kind, is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


class _Simple(Optimizer):
    """Steps one parameter at a time."""

    def __init__(self, params: Iterable[object], lr: float = 1e-2, **options: object) -> None:
        super().__init__(params, {"lr": lr, **options})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group, self.state[param])

    def update(self, param, group, state):
        raise NotImplementedError


class Lion(_Simple):
    def update(self, param, group, state):
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
        step = state["exp_avg"] * 0.9 + param.grad * 0.1
        param.sub_(step.sign() * group["lr"])
        state["exp_avg"].lerp_(param.grad, 0.01)


class Madgrad(_Simple):
    """facebookresearch/madgrad: a count of steps under a key that is no parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        if "k" not in self.state:
            self.state["k"] = torch.tensor([0], dtype=torch.long)
        super().step()
        self.state["k"] += 1

    def update(self, param, group, state):
        if not state:
            state["grad_sum_sq"], state["s"] = torch.zeros_like(param), torch.zeros_like(param)
            state["x0"] = param.detach().clone()
        lamb = group["lr"] * (float(self.state["k"]) + 1) ** 0.5
        state["s"].add_(param.grad * lamb)
        state["grad_sum_sq"].add_(param.grad * param.grad * lamb)
        param.copy_(state["x0"] - state["s"] / (state["grad_sum_sq"].pow(1 / 3) + 1e-6))


class Prodigy(_Simple):
    """konstmish/prodigy: a sliced copy of the first weights, and the distance in the group."""

    def __init__(self, params):
        super().__init__(params, lr=1.0, d=1e-3, d0=1e-3, k=0, d_numerator=0.0)

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = group["d0"] * (1 + group["k"] * 0.1)

    def update(self, param, group, state):
        if not state:
            state["step"] = 0
            state["s"] = torch.zeros_like(param.flatten()[::3]).detach()
            state["p0"] = param.flatten()[::3].detach().clone()
            state["exp_avg"] = torch.zeros_like(param).detach()
        state["exp_avg"].lerp_(param.grad, group["d"] * 10)
        state["s"].add_(param.grad.flatten()[::3] * group["d"])
        state["step"] += 1
        param.sub_(state["exp_avg"] * group["d"] * 10)


class ScheduleFree(_Simple):
    """facebookresearch/schedule_free: a second point, and in the groups a flag and sums."""

    def __init__(self, params):
        super().__init__(params, k=0, train_mode=False, weight_sum=0.0, lr_max=-1.0)

    def train(self):
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"] ** 2

    def update(self, param, group, state):
        if "z" not in state:
            state["z"] = param.detach().clone()
        state["z"].sub_(param.grad * group["lr"])
        param.lerp_(state["z"], 1 / (group["k"] + 2))


class Soap(_Simple):
    """nikhilvyas/SOAP: lists of preconditioners and their bases, replicated in the whole."""

    def update(self, param, group, state):
        grad = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param)
            state["GG"] = [torch.zeros(n, n) if n <= 64 else [] for n in grad.shape]
            state["Q"] = None
        state["step"] += 1
        state["exp_avg"].lerp_(param.grad, 0.1)
        for dim, gg in enumerate(state["GG"]):
            flat = grad.movedim(dim, 0).reshape(grad.shape[dim], -1)
            gg.lerp_(flat @ flat.T, 0.1)
        state["Q"] = [torch.linalg.inv(gg + torch.eye(len(gg))) for gg in state["GG"]]
        whole = (state["Q"][0] @ grad.reshape(grad.shape[0], -1)).reshape(grad.shape)
        step = distribute_tensor(whole, param.device_mesh, param.placements) if isinstance(param, DTensor) else whole
        param.sub_((step * 0.1 + state["exp_avg"]) * group["lr"])


class Shampoo(_Simple):
    """facebookresearch/optimizers: dictionaries in dictionaries, with DTensors in them, under tuple keys."""

    def update(self, param, group, state):
        if not state:
            state["block", 0] = {"factors": (torch.zeros_like(param),), "steps": {"count": 0}, "bias": [None]}
        block = state["block", 0]
        block["factors"][0].lerp_(param.grad * param.grad, 0.1)
        block["steps"]["count"] += 1
        param.sub_(param.grad / (block["factors"][0].sqrt() + 1e-2) * group["lr"])


class Factored(_Simple):
    """Row and column moments: DTensors of another shape than the parameter's under FSDP2."""

    def update(self, param, group, state):
        squares = param.grad * param.grad + 1e-12
        if param.ndim < 2:
            state["v"] = squares if "v" not in state else state["v"].lerp(squares, 0.1)
            param.sub_(param.grad / (state["v"].sqrt() + 1e-3) * group["lr"])
            return
        row, col = squares.mean(dim=1), squares.mean(dim=0)
        if isinstance(col, DTensor):  # replicated, as it is a sum over the ranks
            col = col.redistribute(placements=[_replicate()])
        state["row"] = row if "row" not in state else state["row"].lerp(row, 0.1)
        state["col"] = col if "col" not in state else state["col"].lerp(col, 0.1)
        param.sub_(param.grad / (state["row"].sqrt().unsqueeze(-1) + 1e-3) * group["lr"])


def _replicate():
    from torch.distributed.tensor import Replicate

    return Replicate()


class Local(_Simple):
    """Works on ``to_local()``: plain tensors of this rank's shard."""

    def update(self, param, group, state):
        own, grad = (x.to_local() if isinstance(x, DTensor) else x for x in (param, param.grad))
        if not state:
            state["m"] = torch.zeros_like(grad)
        state["m"].lerp_(grad, 0.1)
        own.sub_(state["m"] * group["lr"])


class LocalNorms(_Simple):
    """A vector for each shard, which has not the shard's shape."""

    def update(self, param, group, state):
        own, grad = (x.to_local() if isinstance(x, DTensor) else x for x in (param, param.grad))
        if not state:
            state["norms"] = torch.zeros(7)
        state["norms"].lerp_(torch.stack([grad.norm(), own.norm()] * 4)[:7], 0.1)
        own.sub_(grad * (group["lr"] / (1 + state["norms"][0])))


class Bits8(_Simple):
    """bitsandbytes' 8-bit format: bytes, a table of what they mean, and a scale for each block."""

    def update(self, param, group, state):
        own, grad = (x.to_local() if isinstance(x, DTensor) else x for x in (param, param.grad))
        if not state:
            state["step"] = 0
            state["state1"] = torch.zeros_like(own, dtype=torch.uint8)
            state["qmap1"] = torch.linspace(-1, 1, 256)
            state["absmax1"] = torch.zeros(max(1, -(-own.numel() // 16)))
        state["step"] += 1
        scale = state["absmax1"].repeat_interleave(16)[: own.numel()].view_as(own)
        moment = torch.lerp(state["qmap1"][state["state1"].long()] * scale, grad, 0.3)
        padded = torch.nn.functional.pad(moment.flatten(), (0, len(state["absmax1"]) * 16 - moment.numel()))
        state["absmax1"].copy_(padded.view(-1, 16).abs().amax(dim=1) + 1e-8)
        scale = state["absmax1"].repeat_interleave(16)[: own.numel()].view_as(own)
        state["state1"].copy_(((moment / scale + 1) * 127.5).round().to(torch.uint8))
        own.sub_(moment * group["lr"])


class Raw(_Simple):
    """State that is a tensor itself, and a tuple with the parameter in it as a key."""

    def update(self, param, group, state):
        if isinstance(state, dict):
            state = self.state[param] = torch.zeros_like(param)
        count = self.state.get((param, "count"), 0) + 1
        self.state[(param, "count")] = count
        state.lerp_(param.grad, 1 / count)
        param.sub_(state * group["lr"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group, self.state.get(param, {}))


class Lookahead(Optimizer):
    """Slow weights around another optimizer, whose groups it shares."""

    def __init__(self, base: Optimizer) -> None:
        self.base_optimizer = base
        super().__init__([p for g in base.param_groups for p in g["params"]], {})
        self.param_groups = base.param_groups
        self.counter = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.base_optimizer.step()
        self.counter += 1
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if "slow" not in state:
                    state["slow"] = param.detach().clone()
                if self.counter % 2 == 0:
                    state["slow"].lerp_(param, 0.5)
                    param.copy_(state["slow"])

    def state_dict(self):
        own = super().state_dict()
        return {"base": self.base_optimizer.state_dict(), "state": own["state"], "counter": self.counter}

    def load_state_dict(self, state_dict):
        self.base_optimizer.load_state_dict(state_dict["base"])
        self.param_groups = self.base_optimizer.param_groups
        super().load_state_dict({"state": state_dict["state"], "param_groups": super().state_dict()["param_groups"]})
        self.param_groups = self.base_optimizer.param_groups
        self.counter = state_dict["counter"]


class Averaged:
    """No `Optimizer` at all: slow weights in a list of its own, in the order of the groups."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self.slow = [[p.detach().clone() for p in g["params"]] for g in base.param_groups]
        self.steps = 0

    @property
    def param_groups(self):
        return self.base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step()
        self.steps += 1
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for param, each in zip(group["params"], slow, strict=True):
                each.lerp_(param, 0.3)
                param.lerp_(each, 0.1)

    def zero_grad(self):
        self.base.zero_grad()

    def state_dict(self):
        return {"base": self.base.state_dict(), "slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict["base"])
        for mine, slow in zip(self.slow, state_dict["slow"], strict=True):
            for each, value in zip(mine, slow, strict=True):
                each.copy_(value)
        self.steps = state_dict["steps"]


class Container(Optimizer):
    """Several optimizers in a list, as torchtitan's ``OptimizersContainer``, whose state dict is flattened by name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = [model]
        self.optimizers = [torch.optim.AdamW([param], lr=1e-2) for param in model.parameters()]
        super().__init__(list(model.parameters()), {"lr": 1e-2})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self):
        names = {id(param): name for name, param in self.model[0].named_parameters()}
        found = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    name = names[id(param)]
                    found |= {f"param_groups.{name}.{key}": v for key, v in group.items() if key != "params"}
                    found |= {f"state.{name}.{key}": v for key, v in optimizer.state[param].items()}
        return found

    def load_state_dict(self, state_dict):
        names = {id(param): name for name, param in self.model[0].named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    name = names[id(param)]
                    for key in group:
                        if key != "params":
                            group[key] = state_dict[f"param_groups.{name}.{key}"]
                    prefix = f"state.{name}."
                    state = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
                    optimizer.state[param] = state


class Sam(Optimizer):
    """davda54/sam: the base optimizer's moments are in none of its state dict."""

    def __init__(self, params) -> None:
        super().__init__(params, {"rho": 0.05, "lr": 1e-2})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=1e-2, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["old_p"] = param.detach().clone()
        self.base_optimizer.step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class Hooked(torch.optim.AdamW):
    """Hooks put a counter into the state dict, and take it out again."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=1e-2)
        self.seen = 0

        def put(optimizer, state_dict):
            return {**state_dict, "seen": optimizer.seen, "names": {"first": ("a", self.seen)}}

        def take(optimizer, state_dict):
            optimizer.seen = state_dict["seen"]

        self.register_state_dict_post_hook(put)
        self.register_load_state_dict_pre_hook(take)

    def step(self, closure=None):
        self.seen += 1
        for group in self.param_groups:
            group["lr"] = 1e-2 / self.seen
        return super().step(closure)


class Counting(torch.optim.SGD):
    """Overrides the methods of its state dict."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=1e-2, momentum=0.9)
        self.extra = {"scale": torch.ones(2), "history": []}

    def step(self, closure=None):
        super().step(closure)
        self.extra["scale"] *= 0.5
        self.extra["history"].append(len(self.extra["history"]))
        for group in self.param_groups:
            group["lr"] = 1e-2 * float(self.extra["scale"][0])

    def state_dict(self):
        return super().state_dict() | {"extra": self.extra}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.extra = state_dict["extra"]


def lookahead(params) -> Lookahead:
    return Lookahead(torch.optim.AdamW(params, lr=1e-2))


def averaged(params) -> Averaged:
    return Averaged(torch.optim.SGD(params, lr=1e-2, momentum=0.9))
