"""What becomes of a run with adapters that is saved and resumed: one cell of the matrix for each moment of a save.

``python -m tools.adapter_table`` writes docs/adapters.md from the same functions as the tests use.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from tests.adapters.methods import FAMILIES, IDS, ROWS, build, keep_bases, opened
from tests.adapters.spreads import (
    ONE,
    SAME_SUMS,
    SPREADS,
    STAGES,
    TP,
    everything,
    filled,
    forward,
    made,
    resharded,
)
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import ShardwiseError

#: Saves of one run: after an optimizer step, and after a forward pass in eval, before any other.
STEPPED, EVALUATED = 1, 2
MOMENTS = {STEPPED: "after a step", EVALUATED: "after an evaluation"}
SAME, CANNOT, REFUSED, WRONG = "same", "cannot", "refused", "wrong"

_TREE = Path(__file__).parents[2]
_PEER_WENT = re.compile("closed by peer|Broken pipe|Connection reset")

State = dict[str, torch.Tensor]


class Differs(Exception):
    """Something is not what it has to be."""


@dataclass(frozen=True)
class Case:
    """One method on one topology.

    Attributes:
        name: Of the method.
        spread: One of `SPREADS`.
        is_async: Whether saves go on in the background.
    """

    name: str
    spread: str
    is_async: bool


def outcomes(cases: Sequence[Case], scratch: Path, known: Path) -> dict[Case, str]:
    """What becomes of each case.

    Args:
        cases: Those wanted.
        scratch: A directory for the bases and for what is saved.
        known: A file of outcomes, one in a line, which are not found out again; new ones are added to it.

    Returns:
        For each case ``same``, or one of ``cannot``, ``refused`` and ``wrong`` with the reason.
    """
    found = known_outcomes(known)
    missing = [case for case in cases if case not in found]
    if missing:
        scratch.mkdir(parents=True, exist_ok=True)
        rows = json.dumps([astuple(case) for case in missing])
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(scratch), str(known)],
            input=rows,
            env={**os.environ, "PYTHONPATH": f"{_TREE / 'src'}{os.pathsep}{_TREE}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise AssertionError(done.stderr[-2000:])
        found = known_outcomes(known)
    return {case: found[case] for case in cases}


def known_outcomes(path: Path) -> dict[Case, str]:
    """What a file says: of a case that it has twice, what it says last."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Case(name, spread, is_async): text for name, spread, is_async, text in rows}


def find(cases: Sequence[Case], scratch: Path, known: Path) -> None:
    """Find out what becomes of cases, in a process that has computed nothing, so that ranks can be forked from it."""
    warm(scratch)
    found = known_outcomes(known)
    for case in cases:
        text = found.get(replace(case, is_async=False), SAME) if case.is_async else SAME
        if text.startswith((SAME, WRONG)):  # else it has failed before the first save, in whatever mode
            text = _outcome(case, scratch, scratch / f"run_{os.getpid()}")
        found[case] = text
        with known.open("a") as file:
            file.write(json.dumps([*astuple(case), text]) + "\n")


def warm(root: Path) -> None:
    """Open the bases, so that no rank has to."""
    run_alone(keep_bases, root)
    for family in FAMILIES:
        with torch.no_grad():
            opened(family, root)(input_ids=IDS)


def run_alone(function: Callable[..., None], *args: object) -> None:
    """Run a function in a forked process, so that this one stays without threads."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise AssertionError(f"{function.__name__}: exit status {process.exitcode}")


def _outcome(case: Case, root: Path, scratch: Path) -> str:
    """Two ranks, which are processes of their own, whose exit status tells too."""
    if case.spread == STAGES and ROWS[case.name].stages:
        return f"{CANNOT}: {ROWS[case.name].stages}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_ranked, args=(rank, case, root, scratch)) for rank in range(2)]
    for process in ranks:
        process.start()
    _awaited(ranks)
    try:
        return _verdict(scratch, [process.exitcode for process in ranks])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _awaited(ranks: Sequence[BaseProcess]) -> None:
    """Wait for the ranks. One whose peer has failed has some seconds left, and all of them together 400."""
    deadline = time.monotonic() + 400
    running = list(ranks)
    while running and time.monotonic() < deadline:
        wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + 5)
    for process in running:
        process.kill()
    for process in ranks:
        process.join()


def _verdict(scratch: Path, codes: Sequence[int | None]) -> str:
    paths = [scratch / f"outcome_{rank}" for rank in range(2)]
    found = [path.read_text() for path in paths if path.exists()]
    # A rank whose peer has gone says so; why the peer went is what counts.
    reasons = [text for text in found if not _PEER_WENT.search(text)] or found
    for kind in (WRONG, CANNOT, REFUSED):
        if texts := [text for text in reasons if text.startswith(kind)]:
            return texts[0]
    if any(codes) or len(found) < 2:
        if not list(scratch.glob("begun_*")):
            return f"{CANNOT}: peft or torch ends the process while the model is adapted (exit status {codes[0]})"
        errors = "".join(path.read_text()[-300:] for path in sorted(scratch.glob("errors_*")))
        return f"{WRONG}: exit status {codes}: {errors}"
    return SAME


def _ranked(rank: int, case: Case, root: Path, scratch: Path) -> None:
    """One rank. It ends with exit status 0 if and only if nothing is wrong."""
    handle = os.open(scratch / f"errors_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    faulthandler.enable()
    store = dist.FileStore(str(scratch / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=200))
    run = _Run(case, root, scratch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = run.outcome()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this cell's outcome
        traceback.print_exc()
        text = f"{WRONG}: {run.doing}: {_said(error)}"
    (scratch / f"outcome_{rank}").write_text(text)
    if text != SAME:
        os._exit(3)  # a peer that waits learns of it at once
    dist.destroy_process_group()


def _said(error: Exception) -> str:
    text = error.message if isinstance(error, ShardwiseError) else " ".join(str(error).split())
    return text if isinstance(error, (ShardwiseError, Differs)) else f"{type(error).__name__}: {text[:160]}"


class _Run:
    """A run on one rank, and those that go on from its checkpoints."""

    def __init__(self, case: Case, root: Path, scratch: Path) -> None:
        self._name, self._spread, self._is_async = case.name, case.spread, case.is_async
        self._root, self._scratch = root, scratch
        self._rank = dist.get_rank()
        self._alone = [dist.new_group([rank]) for rank in range(2)][self._rank]
        self.doing = "beginning"

    def outcome(self) -> str:
        """What becomes of it; anything wrong is raised."""
        if self._spread == ONE and self._rank:
            states = self._received()
        else:
            try:
                model, optimizer = self._begun(seed=1)
            except Exception as error:  # noqa: BLE001 - of torch's and peft's own
                traceback.print_exc()
                return f"{CANNOT}: {_said(error)}"
            (self._scratch / f"begun_{self._rank}").touch()
            with self._checkpointer(self._spread) as saver:
                self.doing = "restore before the training"
                try:
                    saver.restore(model, optimizer)
                except ShardwiseError as error:
                    return f"{REFUSED}: {error.message}"
                try:
                    first = self._trained(model, optimizer, 1)
                except Exception as error:  # noqa: BLE001 - likewise
                    traceback.print_exc()
                    return f"{CANNOT}: {_said(error)}"
                if self._spread == TP and (name := self._apart(first)):
                    return f"{CANNOT}: peft knows nothing of TP here: each rank has trained other values of {name}"
                states = [first, *self._run(saver, model, optimizer)]
            self._kept(states)
        for moment in MOMENTS:
            if self._spread != ONE:
                self._resume(moment, self._spread, states)
        dist.barrier()
        self._elsewhere()
        dist.barrier()
        return SAME

    def _begun(self, seed: int, spread: str | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = made(self._name, spread or self._spread, self._root, seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2)

    def _trained(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, spread: str | None = None
    ) -> State:
        """One step, and all that there is then."""
        torch.manual_seed(step)
        forward(self._name, model.train(), spread or self._spread, loss=True)
        optimizer.step()
        after = ROWS[self._name].after
        if after is not None:
            after(getattr(model, "module", model), step)
        optimizer.zero_grad()
        return everything(model, optimizer)

    def _apart(self, state: State) -> str:
        """A tensor that the ranks have different values of, though each has all of it."""
        digests = {name: zlib.crc32(value.numpy().tobytes()) for name, value in state.items()}
        everybody: list[dict[str, int]] = [{}, {}]
        dist.all_gather_object(everybody, digests)
        return next((name for name in state if everybody[0][name] != everybody[1][name]), "")

    def _evaluated(self, model: nn.Module, spread: str | None = None) -> torch.Tensor | None:
        torch.manual_seed(0)
        with torch.no_grad():
            return forward(self._name, model.eval(), spread or self._spread)

    def _checkpointer(self, spread: str, *, alone: bool = False) -> Checkpointer:
        config = CheckpointingConfig(
            checkpoint_dir=self._scratch / "run",
            is_peft=True,
            is_async=self._is_async,
            save_rng=False,
            collective_timeout_seconds=200,
        )
        alone = alone or spread == ONE
        stage = self._rank if spread == STAGES else None
        return config.build(pp_rank=stage, process_group=self._alone if alone else None)

    def _run(self, saver: Checkpointer, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[State]:
        """Two more steps: a save before them, and one between them, after an evaluation."""
        self.doing = f"saving {MOMENTS[STEPPED]}"
        saver.save(0, STEPPED, model, optimizer)
        self.doing = "the run"
        states = [self._trained(model, optimizer, 2)]
        logits = self._evaluated(model)
        self.doing = f"saving {MOMENTS[EVALUATED]}"
        saver.save(0, EVALUATED, model, optimizer)
        _require({"logits": self._evaluated(model)}, {"logits": logits}, "computing after the save")
        states.append(self._trained(model, optimizer, 3))
        return [*states, {} if logits is None else {"logits": logits}]

    def _kept(self, states: Sequence[State]) -> None:
        torch.save(states, self._scratch / f"states_{self._rank}.part")
        (self._scratch / f"states_{self._rank}.part").rename(self._scratch / f"states_{self._rank}.pt")
        if self._spread == ONE:
            dist.barrier()

    def _received(self) -> list[State]:
        dist.barrier()
        return self._whole_states()

    def _whole_states(self) -> list[State]:
        """What all ranks had."""
        paths = sorted(self._scratch.glob("states_*.pt"))
        by_rank = [torch.load(path, weights_only=True) for path in paths]
        return [{k: v for states in by_rank for k, v in states[n].items()} for n in range(len(by_rank[0]))]

    def _resume(
        self, moment: int, spread: str, states: Sequence[State], *, alone: bool = False, exact: bool = True
    ) -> None:
        """Restore into another model, and take the step that the run took next."""
        what = f"resumed on {spread} {MOMENTS[moment]}"
        self.doing = what
        model, optimizer = self._begun(9, spread)
        if moment == EVALUATED:
            self._evaluated(model, spread)
        path = next((self._scratch / "run").glob(f"epoch_*_step_{moment}"))
        with self._checkpointer(spread, alone=alone) as loader:
            loader.restore(model, optimizer, restore_from=path)
        resharded(model)
        _require(everything(model, optimizer), states[moment - 1], what)
        if moment == EVALUATED:
            logits = self._evaluated(model, spread)
            _require({} if logits is None else {"logits": logits}, states[3], what, exact=exact)
            resharded(model)
        if ROWS[self._name].following == "nowhere" or (
            spread != self._spread and ROWS[self._name].following != "everywhere"
        ):
            return
        following = self._trained(model, optimizer, moment + 1, spread)
        _require(following, states[moment], f"{what}, one more step", exact=exact)

    def _elsewhere(self) -> None:
        """On another number of ranks; and peft's own file of the same values."""
        self.doing = "reading what was saved"
        states = self._whole_states()
        for moment, when in MOMENTS.items():
            if self._spread == ONE:
                self._resume(moment, ROWS[self._name].elsewhere, states)
            elif not self._rank:
                self._resume(moment, ONE, states, alone=True, exact=self._spread in SAME_SUMS)
            if not self._rank:
                self.doing = f"compared with peft's own save_pretrained {when}"
                self._compare_with_pefts(moment, states[moment - 1])

    def _compare_with_pefts(self, moment: int, state: State) -> None:
        model = filled(build(self._name, self._root, 9), state)
        theirs = self._scratch / f"pefts_{moment}"
        model.save_pretrained(theirs)
        ours = next((self._scratch / "run").glob(f"epoch_*_step_{moment}")) / "model"
        _same_files(ours, theirs, ROWS[self._name].differs)


def _same_files(ours: Path, theirs: Path, differs: Collection[str]) -> None:
    for path in sorted(theirs.rglob("adapter_model.safetensors")):
        directory = path.parent.relative_to(theirs)
        own = ours / directory / path.name
        if not own.exists():
            raise Differs(f"peft writes {directory / path.name}")
        if str(directory) in differs:
            continue
        if own.read_bytes() != path.read_bytes():
            raise Differs(f"{directory / path.name} is not peft's: {_difference(own, path)}")
        a, b = (_settings(each.with_name("adapter_config.json")) for each in (own, path))
        if wrong := sorted(key for key in {**a, **b} if a.get(key) != b.get(key)):
            key = wrong[0]
            raise Differs(f"the settings in {directory} have {key}={a.get(key)!r}, and peft's {b.get(key)!r}")


def _settings(path: Path) -> dict[str, object]:
    """Lists that peft makes from sets have no order, and what is excluded may be listed as well."""
    values = json.loads(path.read_text())
    targets, excluded = values.get("target_modules"), values.get("exclude_modules")
    if isinstance(targets, list):
        values["target_modules"] = [name for name in targets if name not in (excluded or ())]
    return {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in values.items()}


def _difference(ours: Path, theirs: Path) -> str:
    from safetensors.torch import load_file

    a, b = load_file(ours), load_file(theirs)
    lacking, more = sorted(set(b) - set(a)), sorted(set(a) - set(b))
    if lacking or more:
        return f"lacks {lacking[:2]}, and has {more[:2]} besides"
    unequal = [name for name in a if not _equal(a[name], b[name])]
    return f"other values of {unequal[:2]}" if unequal else "other bytes of equal tensors"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = [each.contiguous().flatten().view(torch.uint8) for each in (a, b)] if a.numel() else [a, b]
    return torch.equal(*bits)


def _require(found: Mapping[str, object], wanted: Mapping[str, object], what: str, *, exact: bool = True) -> None:
    """Check that tensors are equal: bit for bit, or but for the order of sums."""
    if set(found) != set(wanted):
        raise Differs(f"{what}: {sorted(set(found) ^ set(wanted))[:4]} on one side only")
    for name, value in wanted.items():
        other = found[name]
        if value is None or other is None:
            same = value is other
        elif exact:
            same = _equal(other, value)
        else:
            same = torch.allclose(other, value, rtol=1e-4, atol=1e-5)
        if not same:
            raise Differs(f"{what}: {name} differs")


__all__ = ["MOMENTS", "SPREADS", "Case", "find", "known_outcomes", "outcomes"]

if __name__ == "__main__":
    # Not under this module's name, by which the others know it.
    from tests.adapters.cells import Case as _Case
    from tests.adapters.cells import find

    find([_Case(*row) for row in json.load(sys.stdin)], Path(sys.argv[1]), Path(sys.argv[2]))
