"""Every way of writing a model."""

from __future__ import annotations

import pytest

EVERY: dict[str, object] = {"save_consolidated": "every"}
SHARDS: dict[str, object] = {"save_consolidated": "false"}
MODES = [
    pytest.param(EVERY, id="every"),
    pytest.param({**EVERY, "single_rank_consolidation": True}, id="merged"),
    pytest.param({**EVERY, "is_async": True}, id="async"),
    pytest.param(SHARDS, id="shards"),
    pytest.param({**SHARDS, "model_save_format": "torch_save"}, id="torch_save"),
]
