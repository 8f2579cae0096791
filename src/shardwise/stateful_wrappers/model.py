"""A model's state: what it holds, as DCP's ``Stateful`` and as the engine's currency, and how modules take it in.

State that was not read into memory directly modules load by their own methods, in torch's order.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from shardwise.errors import MissingTensorError, ModuleStateError, UnexpectedTensorError
from shardwise.plan.deferred import deferred, release, resolve
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.memory import install, plain_view
from shardwise.stateful_wrappers.names import Listing, NamedTensor, is_lm_head, list_state
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.stateful_wrappers.units import (
    StandIns,
    Step,
    Taker,
    every_module,
    failing,
    has_foreign_hooks,
    label,
    saved_tensors,
)
from shardwise.stateful_wrappers.wrapping import plain_name, unwrap
from shardwise.upstream import torch_modules as upstream
from shardwise.upstream.torch_tensors import local_part

#: A model as a rank holds it: one module, or its pipeline stages.
Model = nn.Module | Sequence[nn.Module]


class ModelState:
    """The state of a model, or of the pipeline stages that a rank runs.

    Follows DCP's ``Stateful`` protocol: ``dcp.save({"model": ModelState(model)}, ...)`` works, each tied tensor being
    saved once. All names are plain: without what torch.compile, DDP and activation checkpointing add.

    Args:
        model: A module, or the list of this rank's pipeline stages.
        skip_prefixes: Tensors whose names start with one of these are left out (task heads when a base model is
            loaded).

    Attributes:
        model: The parts, always a list.
    """

    def __init__(self, model: Model, *, skip_prefixes: Sequence[str] = ()) -> None:
        self.model: list[nn.Module] = [model] if isinstance(model, nn.Module) else list(model)
        self._skip = tuple(skip_prefixes)

    @property
    def uses_tied_lm_head(self) -> bool:
        """Whether the model's configuration ties head and embedding: ``tie_word_embeddings`` at its top level."""
        key = "tie_word_embeddings"
        configs = [getattr(unwrap(part), "config", None) for part in self.model]
        said = [config.get(key) if isinstance(config, Mapping) else getattr(config, key, False) for config in configs]
        return any(map(bool, said))

    @property
    def has_local_tied_lm_head(self) -> bool:
        """Whether a head, ``lm_head.weight``, shares its memory with another tensor of this rank's parts."""
        shared = ((named.name, *named.aliases) for named in list_state(self.model).tensors if named.aliases)
        return any(is_lm_head(name) for names in shared for name in names)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the model is left out."""
        return not self._skip

    def listing(self, stand_ins: StandIns | None = None, *, values: bool = True, norms: bool = False) -> Listing:
        """The model's state, each tied tensor once, and the modules that have it; see `list_state`."""
        listed = list_state(self.model, stand_ins, values=values, norms=norms)
        if self.is_whole:
            return listed
        return listed._replace(tensors=tuple(t for t in listed.tensors if not t.name.startswith(self._skip)))

    def held(self) -> list[HeldTensor]:
        """What this rank holds, under the model's own names, as views of its memory or of stand-ins for it."""
        return held_tensors(((named.name, named.tensor) for named in self.listing().tensors), MeshRegister())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Plain names to detached tensors.

        They share the model's memory, but for those that a module makes when it is asked; and so do they go back, by
        `load_state_dict`. Each is listed once: ``lm_head.weight`` is left out where it shares its memory with the
        embedding, and only there. Extra state of modules is listed under torch's names.

        Raises:
            ModuleStateError: A module gives what cannot be described.
            TensorError: A tensor's class wraps others, and no plain tensor has its elements.
        """
        listed = self.listing()
        found: dict[str, torch.Tensor] = {}
        try:
            for named in listed.tensors:
                found[named.name] = _made(named)
        finally:
            release()
        # DCP keeps values of other kinds, too, and its protocol says so nowhere.
        return found | {name: cast(torch.Tensor, value) for name, (value, _) in listed.aside.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take values in, with the effect of the modules' own ``load_state_dict``.

        Tensors that already share the model's memory are left alone. What is not named stays as it is.

        Raises:
            KeyError: A name that the model does not have.
            ModuleStateError: A module refuses what it is given.
            TensorError: As `state_dict`.
        """
        listed = self.listing(values=False)
        own = {name: named.tensor for named in listed.tensors for name in (named.name, *named.aliases)}
        is_lenient = any(step.taker is not None and step.taker.is_lenient for steps in listed.steps for step in steps)
        takers: dict[int, dict[str, torch.Tensor]] = {}
        aside: dict[str, object] = {}
        with torch.no_grad():
            for key, value in state_dict.items():
                name = plain_name(key)
                target = own.get(name)
                what = None if target is None else deferred(local_part(target))
                if what is not None:
                    takers.setdefault(id(what.owner), {})[what.key] = value
                elif target is not None:
                    install(plain_view(name, target), plain_view(name, value))
                elif is_lenient or name.rpartition(".")[2] == upstream.EXTRA:
                    aside[name] = value
                else:
                    raise KeyError(name)
        metadata = {name: dict(noted) for name, noted in listed.metadata.items()}
        installing = Installing(lambda taker: takers.get(id(taker), {}), aside, metadata, allow_missing=True)
        for part, steps in zip(self.model, listed.steps, strict=True):
            wanted = [
                step
                for step in steps
                if step.kind != "take"
                or id(step.taker) in takers
                or any(name.startswith(plain_name(step.prefix)) for name in aside)
            ]
            installing.run([*wanted, *(() if steps else post_steps(unwrap(part)))])


def _made(named: NamedTensor) -> torch.Tensor:
    """A tensor, detached; what is behind it, where it is a stand-in."""
    what = deferred(local_part(named.tensor))
    if what is None:
        return plain_view(named.name, named.tensor)
    value = resolve(what.stand_in())
    return value if what.template is None else what.template(value)


# --- loading by modules' own methods ---------------------------------------------------------------------------------


@dataclass
class Installing:
    """Loads state through modules' own methods, and judges their answers."""

    #: Gives the tensors for a module, by name in `plain_name` form or as `state_dict` has it.
    tensors: Callable[[Taker], Mapping[str, torch.Tensor]]
    aside: Mapping[str, object] | None  #: Plain name -> other values of the state; ``None`` where none were saved.
    #: Plain module name -> torch's metadata of it.
    metadata: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    allow_missing: bool = False  #: Whether tensors may be absent.
    skips_empty: bool = False  #: Whether a module without any saved entry is skipped.
    without: list[str] = field(default_factory=list)  #: Modules that found no extra state.

    def run(self, steps: Sequence[Step]) -> None:
        """Carry out steps. Local, unless a module's own methods communicate."""
        for step in steps:
            if step.kind == "take":
                assert step.taker is not None
                self._take(step.taker)
            elif step.kind == "extra":
                self._take_extra(step.module, step.prefix)
            else:
                answer = _Answer(step.module, step.prefix)
                answer.after(step.module)
                self._judge(answer)

    def _take(self, taker: Taker) -> None:
        values: dict[str, object] = OrderedDict(
            (given_name(taker, key), value) for key, value in self.tensors(taker).items()
        )
        values |= self._aside_of(taker)
        if not values and (self.skips_empty or not taker.is_lenient):
            return
        answer = _Answer(taker.module, taker.prefix)
        if taker.calls_root:
            answer.root(values, {name: dict(noted) for name, noted in self.metadata.items()})
        elif taker.whole:
            answer.below(taker.module, values, taker.prefix, self._noted)
        else:
            if not taker.is_lenient:  # what was read directly already is copied onto itself
                for name, tensor in saved_tensors(taker.module):
                    values.setdefault(taker.prefix + name, tensor.detach())
            answer.own(taker.module, values, taker.prefix, self._noted(taker.prefix))
        self._judge(answer)

    def _noted(self, prefix: str) -> dict[str, object]:
        return dict(self.metadata.get(plain_name(prefix)[:-1], {}))

    def _aside_of(self, taker: Taker) -> dict[str, object]:
        found: dict[str, object] = {}
        prefix = plain_name(taker.prefix)
        for name, value in (self.aside or {}).items():
            rest = name.removeprefix(prefix)
            is_below = rest.partition(".")[0] in upstream.own_children(taker.module)
            if name.startswith(prefix) and (taker.whole or not is_below):
                found[taker.prefix + rest] = value
        return found

    def _take_extra(self, module: nn.Module, prefix: str) -> None:
        name = plain_name(prefix + upstream.EXTRA)
        if self.aside is None or name not in self.aside:
            self.without.append(label(module, prefix))
            return
        with _failing(module, prefix, "set_extra_state"):
            module.set_extra_state(self.aside[name])

    def _judge(self, answer: _Answer) -> None:
        where = label(answer.module, answer.prefix)
        self.without += [where for key in answer.missing if key.rpartition(".")[2] == upstream.EXTRA]
        missing = [key for key in answer.missing if key.rpartition(".")[2] != upstream.EXTRA]
        if answer.errors:
            raise ModuleStateError(
                f"{where} does not take the state that was saved: {'; '.join(answer.errors)}",
                hint="Build the model as it was when the checkpoint was saved.",
            )
        if answer.unexpected:
            raise UnexpectedTensorError(
                f"{where} does not know what the checkpoint has for it: {', '.join(map(str, answer.unexpected[:5]))}",
                tensor=plain_name(str(answer.unexpected[0])),
                hint="Build the model as it was when the checkpoint was saved.",
            )
        if missing and not self.allow_missing:
            raise MissingTensorError(
                f"the checkpoint lacks what {where} needs: {', '.join(map(str, missing[:5]))}",
                tensor=plain_name(str(missing[0])),
                hint="Build the model as it was when the checkpoint was saved, or allow a subset of the keys.",
            )


def given_name(taker: Taker, key: str) -> str:
    """A name as ``load_state_dict`` gives it to a module: activation checkpointing's own hook adds its prefix."""
    if key.startswith(taker.prefix):
        return taker.prefix + key[len(taker.prefix) :].replace(f"{upstream.CHECKPOINTED}.", "")
    return taker.prefix + plain_name(key).removeprefix(plain_name(taker.prefix))


def _failing(module: nn.Module, prefix: str, method: str) -> contextlib.AbstractContextManager[None]:
    hint = "What was restored before it stays; correct the module, and restore again."
    return failing(f"{method} of {label(module, prefix)} failed", hint)


class _Answer:
    """The lists that torch's loading fills: missing and unexpected keys, errors."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self.module, self.prefix = module, prefix
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.errors: list[str] = []

    def own(self, module: nn.Module, values: dict[str, object], prefix: str, noted: dict[str, object]) -> None:
        """As ``load_state_dict`` does for one module."""
        with _failing(module, prefix, upstream.LOAD_OWN):
            upstream.load_own(module, values, prefix, noted, self.missing, self.unexpected, self.errors)

    def below(
        self, module: nn.Module, values: dict[str, object], prefix: str, noted: Callable[[str], dict[str, object]]
    ) -> None:
        """As ``load_state_dict`` does for a module and all below it."""
        self.own(module, values, prefix, noted(prefix))
        for name, child in upstream.own_children(module).items():
            if child is not None:
                start = f"{prefix}{name}."
                theirs = {key: value for key, value in values.items() if key.startswith(start)}
                self.below(child, theirs, start, noted)
        self.after(module)

    def after(self, module: nn.Module) -> None:
        """Call a module's post-hooks."""
        keys = upstream.loading_answer(self.missing, self.unexpected)
        for hook in upstream.loading_post_hooks(module):
            with _failing(module, self.prefix, "a load_state_dict post-hook"):
                hook(module, keys)

    def root(self, values: dict[str, object], metadata: dict[str, dict[str, object]]) -> None:
        """Call the model's own ``load_state_dict``."""
        given: OrderedDict[str, object] = OrderedDict(values)
        if metadata:
            upstream.note_versions(given, metadata)
        with _failing(self.module, self.prefix, "load_state_dict"):
            found: object = self.module.load_state_dict(given)
        missing, unexpected = upstream.keys_of_answer(found)
        self.missing += missing
        self.unexpected += unexpected


def post_steps(root: nn.Module, prefix: str = "") -> list[Step]:
    """The post-hooks of a model that makes and takes its state as torch does, in torch's order."""
    if not any(upstream.loading_post_hooks(module) for module in every_module([root])):
        return []
    found: list[Step] = []
    for name, child in upstream.own_children(root).items():
        if child is not None:
            found += post_steps(child, f"{prefix}{name}.")
    # FSDP2's own hooks put sharded parameters back in place; these never left it.
    if has_foreign_hooks(upstream.loading_post_hooks(root)):
        found.append(Step("post", root, prefix))
    return found
