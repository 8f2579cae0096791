"""Opens every spoilt checkpoint in every way, watched by an audit hook; prints what happened as JSON.

Run by `test_checkpoints` in a process of its own: an audit hook cannot be removed, and a crash of the interpreter must
not take the test run with it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tests.hostile.cases import NAME, Case, all_cases
from tests.ops.checkpoints import engine, model, optimizer, saved

from shardwise.comm import Group
from shardwise.errors import ShardwiseError
from shardwise.ops.inspect import inspect
from shardwise.ops.verify import verify
from shardwise.sources.sources import open_source

SECONDS = 20.0
EXTRA_MEMORY_BYTES = 2 * 2**30

#: What must never happen while a checkpoint is opened, whatever is in it.
FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "ctypes.dlopen",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "shutil.rmtree",
)


class Watch:
    """What the hook saw while it was on."""

    def __init__(self, root: Path) -> None:
        self.on = False
        self.root = root
        self.seen: list[str] = []
        self.follow_links = False
        code = [sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"], str(Path(__file__).parents[2])]
        self._readable = [os.path.realpath(each) for each in code] + ["/proc/", "/sys/", "/dev/null"]

    def hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on:
            return
        self.on = False
        try:
            problem = self._judge(event, args)
            if problem is not None:
                self.seen.append(problem)
        finally:
            self.on = True

    def _judge(self, event: str, args: tuple[object, ...]) -> str | None:
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            return self._judge_open(os.fsdecode(args[0]), args)
        if event in ("exec", "compile"):
            name = getattr(args[0], "co_filename", args[1] if len(args) > 1 else None)
            if isinstance(name, str) and os.path.exists(name) and self._is_data(name):
                return f"{event} {name}"
        if event in FORBIDDEN:
            return f"{event} {args}"
        return None

    def _is_data(self, path: str) -> bool:
        return os.path.realpath(path).startswith(str(self.root.parent) + os.sep)

    def _judge_open(self, path: str, args: tuple[object, ...]) -> str | None:
        flags = args[2] if isinstance(args[2], int) else 0
        real = os.path.realpath(path)
        if flags & os.O_NOFOLLOW:  # the kernel refuses a link here
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            return f"write {path}"
        inside = real == str(self.root) or real.startswith(str(self.root) + os.sep)
        if not inside and not self.follow_links and not any(real.startswith(each) for each in self._readable):
            return f"read {path} ({real})"
        return None


class TooSlow(BaseException):
    """The alarm went off."""


def _alarm(*_: object) -> None:
    raise TooSlow


def ways(root: Path, case: Case) -> dict[str, Callable[[], object]]:
    """Every way to open the checkpoint."""

    def restored(level: str) -> object:
        net = model()
        optim = optimizer(net)
        with engine(root) as made:
            return made.restore(net, optim, extra_state={"seen": []}, verify=level)  # type: ignore[arg-type]

    def loaded() -> object:
        with engine(root) as made:
            made.load_model(model(), root / NAME / "model")

    found: dict[str, Callable[[], object]] = {
        "restore": lambda: restored("sizes"),
        "restore, digests": lambda: restored("digests"),
        "verify": lambda: verify(root / NAME).status,
        "verify, quick": lambda: verify(root / NAME, digests=False).status,
        "verify, root": lambda: verify(root).status,
        "inspect": lambda: inspect(root / NAME) and None,
        "load_model": loaded,
        "open_source": lambda: open_source(root / NAME / "model", Group(None)) and None,
    }
    return found


def attempt(way: Callable[[], object], watch: Watch) -> dict[str, object]:
    """Open once; how it ended, and what was forbidden in it."""
    watch.seen = []
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    watch.on = True
    try:
        outcome = way()
        ended = outcome if isinstance(outcome, str) else "ok"
    except ShardwiseError as error:
        ended = f"typed {type(error).__name__}"
    except TooSlow:
        ended = "HUNG"
    except BaseException as error:  # noqa: BLE001 - exactly what is looked for
        ended = f"UNTYPED {type(error).__name__}: {str(error)[:200]}"
    finally:
        watch.on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"ended": ended, "seconds": time.monotonic() - started, "forbidden": list(watch.seen)}


def main() -> None:
    torch.set_num_threads(1)
    # In memory where that is to be had: removing thousands of directories is what would take longest.
    base = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    pristine, secret = base / "pristine", base / "secret"
    secret.write_bytes(b"S" * 5000)
    os.chdir(base)
    saved(pristine, (1, 2))
    with engine(pristine) as made:
        made.restore(model())
    watch = Watch(base / "root")
    sys.addaudithook(watch.hook)
    signal.signal(signal.SIGALRM, _alarm)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY_BYTES, resource.RLIM_INFINITY))
    for case in all_cases():
        shutil.copytree(pristine, watch.root, symlinks=True)
        case.spoil(watch.root, secret)
        results = {}
        for name, way in ways(watch.root, case).items():
            # A model directory of somebody else may consist of links, as the hub's cache does.
            watch.follow_links = case.links and (not case.detected or name in ("load_model", "open_source"))
            results[name] = attempt(way, watch)
        print(json.dumps({"case": case.name, "detected": case.detected, "ways": results}), flush=True)
        shutil.rmtree(watch.root)
        shutil.rmtree(base / "elsewhere", ignore_errors=True)
    print(json.dumps({"owned": (base / "owned").exists(), "secret": secret.read_bytes() == b"S" * 5000}))
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
