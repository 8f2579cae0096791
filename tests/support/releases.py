"""What the installed releases of other libraries can do with each other."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs_add_adapter() -> None:
    """Skip a test that calls ``add_adapter`` of a transformers model, where transformers refuses the installed peft."""
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"add_adapter of transformers {version('transformers')} wants peft {MIN_PEFT_VERSION}")
