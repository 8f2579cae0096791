"""For every type for which transformers has rules: the derived conversion against `save_pretrained`."""

from __future__ import annotations

import pytest
from tests.convert import compare
from tests.convert.tiny_models import SLOW, UNBUILT, build, quiet, registered

from shardwise.convert.adapter import check_round_trip
from shardwise.convert.derive import derive

#: A routine run takes one type in this many; the rest are slow only by their number.
SHARE = 5
TYPES = [
    pytest.param(key, marks=[pytest.mark.slow] if key in SLOW or number % SHARE else [])
    for number, key in enumerate(registered())
]


@pytest.mark.parametrize("key", [param for param in TYPES if param.values[0] not in UNBUILT])
def test_same_names_and_bytes_as_save_pretrained(key: str) -> None:
    model = build(key)
    state = compare.saved_state(model)
    specs = compare.specs_of(state)
    with quiet():
        conversion = derive(model, specs)
        wanted = compare.reference(model)
        again = derive(model, specs)
    assert again.hub == conversion.hub
    check_round_trip(conversion, specs)
    compare.check_whole(conversion, state, wanted)
    for size, placement in compare.SPREADS:
        compare.check_sharded(conversion, state, wanted, size, placement)
