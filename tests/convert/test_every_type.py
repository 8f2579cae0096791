"""For every type for which transformers has rules: the derived conversion against `save_pretrained`."""

from __future__ import annotations

import pytest
from tests.convert import compare
from tests.convert.tiny_models import CannotBuildError, build, is_slow, quiet, registered

from shardwise.convert import check_round_trip, derive


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[pytest.mark.slow] if is_slow(key) else []) for key in registered()]
)
def test_same_names_and_bytes_as_save_pretrained(key: str) -> None:
    try:
        model = build(key)
    except CannotBuildError as error:
        pytest.skip(str(error))
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
