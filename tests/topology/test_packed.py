"""Fused weights under tensor parallelism, alone and under FSDP2 and HSDP: the parts of a rank are disjoint regions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from tests.support.ranks import run
from tests.topology.exports import export
from tests.topology.setups import PACKED, Run


def there_and_back(family: str, root: Path) -> int:
    """Save on every topology and load on every other; returns how many loads were right."""
    count = 0
    for topology in PACKED:
        training = Run(family, topology)
        training.fill()
        training.save(root / topology.__name__, save_consolidated="every")
        dist.barrier()
    for topology in PACKED:
        training = Run(family, topology)
        for source in PACKED:
            if source is not topology and "packed" not in source.__name__ + topology.__name__:
                continue  # the matrix has it
            training.reset()
            try:
                training.restore(root / source.__name__)
                training.check()
            except Exception as error:
                raise AssertionError(f"saved on {source.__name__}, loaded on {topology.__name__}") from error
            count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("family", ["fused", "moe"])
def test_packed_weights(family: str, tmp_path: Path) -> None:
    pairs = len(PACKED) ** 2 - 2
    assert run(4, there_and_back, family, tmp_path, seconds=250) == [pairs] * 4
    found = {topology.__name__: export(tmp_path / topology.__name__) for topology in PACKED}
    assert {name for name, files in found.items() if files != found["single"]} == set()
