"""What the orchestrator asks of the workers of one run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Task:
    """One run, from where the last one stopped up to a step.

    Attributes:
        base: Directory of the base model.
        checkpoints: Root of the checkpoints.
        scratch: Directory on the same file system, for the raw writes.
        events: File to append events to.
        steps: Steps of the whole training, over all runs.
        last_step: The step after which this run ends.
        learning_rate: Of AdamW, at the first step.
        orchestrator: Process id without which a worker leaves.
    """

    base: Path
    checkpoints: Path
    scratch: Path
    events: Path
    steps: int
    last_step: int
    learning_rate: float
    orchestrator: int

    def write(self, path: Path) -> None:
        """Store as JSON."""
        path.write_text(json.dumps(asdict(self), default=str, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Task:
        """Read what `write` stored."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        for key in ("base", "checkpoints", "scratch", "events"):
            fields[key] = Path(fields[key])
        return cls(**fields)
