from __future__ import annotations

import collections
import io
import json
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from shardwise.errors import StateFormatError
from shardwise.format.state_json import decode_state, encode_state


def round_trip(value: object) -> object:
    text, tensors = encode_state(value)
    return decode_state(text, load(save(tensors)))


def same(a: object, b: object) -> bool:
    """Equal in type, value, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
        )
    if isinstance(a, (np.ndarray, np.generic)) and isinstance(b, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float) and isinstance(b, float):
        return math.isnan(a) == math.isnan(b) and (
            math.isnan(a) or (a == b and math.copysign(1, a) == math.copysign(1, b))
        )
    if isinstance(a, complex) and isinstance(b, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict) and isinstance(b, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, collections.deque) and isinstance(b, collections.deque):
        return a.maxlen == b.maxlen and same(list(a), list(b))
    return bool(a == b)


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
keys = st.recursive(
    st.one_of(texts, st.sampled_from(["$dict", "$", "$tensor"]), st.integers(), st.floats(allow_nan=False), st.none()),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=3,
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    texts,
    st.binary(max_size=9),
    st.sets(keys, max_size=3),
    st.frozensets(keys, max_size=3),
    st.integers(-(10**300), 10**300),
    st.lists(texts, max_size=3).map(collections.Counter),
    st.sampled_from([torch.bfloat16, torch.complex128, torch.Size([2, 3]), torch.Size([])]),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(lambda items: collections.deque(items, 5)),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(texts, inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


@given(trees)
def test_any_plain_state_comes_back(value: object) -> None:
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.arange(6).reshape(2, 3).t(),
        torch.zeros(0, 4),
        torch.tensor([float("nan"), -0.0]),
        torch.tensor([True, False]),
        torch.tensor([2**64 - 1], dtype=torch.uint64),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j], dtype=torch.complex128),
        torch.ones(2, requires_grad=True),
        torch.arange(9)[2:5],
    ],
)
def test_tensors_come_back(tensor: torch.Tensor) -> None:
    back = round_trip({"t": [tensor]})
    expected = tensor.detach().resolve_conj().contiguous()
    assert isinstance(back, dict)
    assert same(back["t"][0], expected)


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_quantized_tensors_and_buffers_of_bytes_come_back() -> None:
    values = torch.randn(3, 4)
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1, 2, 3])
    for tensor in (
        torch.quantize_per_tensor(values, 0.1, 3, torch.qint8),
        torch.quantize_per_tensor(values, 0.1, 3, torch.quint8),
        torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8),
        torch.quantize_per_channel(values, scales, zeros.float() + 0.5, 0, torch.quint8),
    ):
        back = round_trip((tensor, io.BytesIO(b"seven")))
        assert isinstance(back, tuple)
        assert str(back[0]) == str(tensor)
        assert back[0].qscheme() == tensor.qscheme()
        assert back[1].getvalue() == b"seven"


def test_shared_storage_and_repeated_tensors() -> None:
    base = torch.arange(10.0)
    state = {"all": base, "again": base, "part": base[2:4], "tail": base[8:]}
    text, tensors = encode_state(state)
    assert len(tensors) == 3
    assert sum(t.untyped_storage().nbytes() for t in tensors.values()) == 4 * (10 + 2 + 2)
    back = decode_state(text, load(save(tensors)))
    assert isinstance(back, dict)
    assert back["all"] is back["again"]
    assert same(back, state)


@pytest.mark.parametrize(
    "code",
    ["|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16", ">f8", ">u2"],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_numpy_arrays_come_back(code: str, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    array = np.arange(count).astype(code).reshape(shape)
    back = round_trip(array)
    assert same(back, array)
    assert isinstance(back, np.ndarray)
    assert back.flags.writeable


@pytest.mark.parametrize("scalar", [np.uint64(2**64 - 1), np.float32("nan"), np.bool_(True), np.complex128(1 - 2j)])
def test_numpy_scalars_come_back(scalar: np.generic) -> None:
    assert same(round_trip(scalar), scalar)


def test_random_generators_continue() -> None:
    python, legacy, modern = random.Random(1), np.random.RandomState(2), np.random.default_rng(3)
    torch_generator = torch.Generator().manual_seed(4)
    states = (python.getstate(), legacy.get_state(), modern.bit_generator.state, torch_generator.get_state())
    back = round_trip({"rng": states})
    expected = [python.random(), legacy.random(), modern.random(), torch.rand(1, generator=torch_generator).item()]
    assert isinstance(back, dict)
    first, second, third, fourth = back["rng"]
    python.setstate(first)
    legacy.set_state(second)
    modern.bit_generator.state = third
    torch_generator.set_state(fourth)
    again = [python.random(), legacy.random(), modern.random(), torch.rand(1, generator=torch_generator).item()]
    assert again == expected


def test_equal_sets_give_equal_bytes() -> None:
    assert encode_state({"s": {"b", "a", "c"}})[0] == encode_state({"s": {"c", "b", "a"}})[0]


class Point(NamedTuple):
    x: int


@pytest.mark.parametrize(
    "value",
    [
        lambda: 0,
        object(),
        print,
        Point(1),
        collections.defaultdict(list),
        bytearray(b"x"),
        range(3),
        Exception("x"),
        torch.nn.Parameter(torch.ones(1)),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.nn.Linear(1, 1),
        np.array([None]),
        np.array(["a"]),
        np.datetime64("2020-01-01"),
        np.longdouble(1),
        {object(): 1},
        "\ud800",
        {"\ud800": 1},
    ],
)
def test_other_values_are_refused_with_their_path(value: object) -> None:
    with pytest.raises(StateFormatError, match=r"at \.outer\[1\]\.inner") as caught:
        encode_state({"outer": [0, {"inner": value}]})
    assert caught.value.hint


def test_a_state_that_contains_itself() -> None:
    state: dict[str, object] = {}
    state["self"] = [state]
    with pytest.raises(StateFormatError, match="contains itself"):
        encode_state(state)


def text_of(value: object) -> bytes:
    return json.dumps({"format": "shardwise-state", "version": 1, "value": value}).encode()


def nest(depth: int) -> object:
    value: object = []
    for _ in range(depth):
        value = [value]
    return value


ONE = torch.zeros(8, dtype=torch.uint8)
COLLIDING = [[number * (2**61 - 1), 0] for number in range(1, 50_000)]

HOSTILE: list[Callable[[], bytes]] = [
    lambda: b"",
    lambda: b"[]",
    lambda: b"{}",
    lambda: b"\xff",
    lambda: b'{"format":"shardwise-state"}',
    lambda: text_of(1).replace(b'"version": 1', b'"version": 2'),
    lambda: text_of(1).replace(b"1}", b"1,}"),
    lambda: text_of(nest(80)),
    lambda: text_of(1)[:-1] + b',"x":1}',
    lambda: b'{"value":' + b"[" * 500_000,
    lambda: text_of({"$unknown": 1}),
    lambda: text_of({"$tuple": [], "x": 1}),
    lambda: text_of({"$tuple": 1}),
    lambda: text_of({"$tuple": {"a": 1}}),
    lambda: text_of({"$int": "0x10"}),
    lambda: text_of({"$int": 5}),
    lambda: text_of({"$int": ""}),
    lambda: text_of({"$int": "1_0"}),
    lambda: text_of({"$float": "nan"}),
    lambda: text_of({"$float": "zz" * 8}),
    lambda: text_of({"$complex": [1.0]}),
    lambda: text_of({"$complex": [1, 2]}),
    lambda: text_of({"$bytes": "a"}),
    lambda: text_of({"$bytes": "!!!!"}),
    lambda: text_of({"$bytes": 1}),
    lambda: text_of({"$set": [[1]]}),
    lambda: text_of({"$set": [1, 1]}),
    lambda: text_of({"$set": [1, True]}),
    lambda: text_of({"$dict": [[1]]}),
    lambda: text_of({"$dict": [[[], 1]]}),
    lambda: text_of({"$dict": [[1, 2], [1, 3]]}),
    lambda: text_of({"$dict": COLLIDING}),
    lambda: text_of({"$set": [pair[0] for pair in COLLIDING]}),
    lambda: text_of({"$deque": [[1, 2], 1]}),
    lambda: text_of({"$deque": [[], -1]}),
    lambda: text_of({"$deque": [[], True]}),
    lambda: text_of({"$deque": [[], 2**70]}),
    lambda: text_of({"$quantized": ["t", 1.0]}),
    lambda: text_of({"$quantized": ["t", "1", 0]}),
    lambda: text_of({"$quantized": ["t", 1.0, 2**40]}),
    lambda: text_of({"$quantized": ["t", "t", "t", 0]}),
    lambda: text_of({"$quantized": ["absent", 1.0, 0]}),
    lambda: text_of({"$quantized": 7}),
    lambda: text_of({"$bytesio": "?"}),
    lambda: text_of({"$bytesio": 7}),
    lambda: text_of({"$size": [-1]}),
    lambda: text_of({"$size": [True]}),
    lambda: text_of({"$dtype": "load"}),
    lambda: text_of({"$dtype": "hub"}),
    lambda: text_of({"$dtype": "os.system"}),
    lambda: text_of({"$npscalar": ["|O", "00" * 8]}),
    lambda: text_of({"$npscalar": ["<f8", "00"]}),
    lambda: text_of({"$npscalar": ["<M8[s]", "00" * 8]}),
    lambda: text_of({"$ndarray": ["|O", [1], "t"]}),
    lambda: text_of({"$ndarray": ["<f8", [2**60], "t"]}),
    lambda: text_of({"$ndarray": ["<f8", [-1], "t"]}),
    lambda: text_of({"$ndarray": ["<f8", [1], "absent"]}),
    lambda: text_of({"$ndarray": ["<f4,<f4", [1], "t"]}),
    lambda: text_of({"$ndarray": ["<f8", [0, 2**62, 2**62], "t"]}),
    lambda: text_of({"$tensor": "absent"}),
    lambda: text_of({"$tensor": None}),
    lambda: text_of({"$complex_tensor": "t"}),
    lambda: text_of("the tensor is not used"),
    lambda: b'{"format":"shardwise-state","version":1,"value":NaN}',
    lambda: b'{"format":"shardwise-state","version":1,"value":{"a":1,"a":2}}',
    lambda: b'{"format":"shardwise-state","version":1,"value":1e999}',
    lambda: b'{"format":"shardwise-state","version":1,"value":"\\ud800"}',
    lambda: b'{"format":"shardwise-state","version":1,"value":1' + b"0" * 10_000 + b"}",
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_state(number: int) -> None:
    with pytest.raises(StateFormatError) as caught:
        decode_state(HOSTILE[number](), {"t": ONE})
    assert caught.value.hint
    assert len(str(caught.value)) < 2000


@given(
    st.recursive(
        st.one_of(st.none(), st.integers(), st.floats(allow_nan=False), texts, st.sampled_from(["t", "<f8", "00" * 8])),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(
                    [
                        "$quantized",
                        "$bytesio",
                        "$int",
                        "$float",
                        "$complex",
                        "$bytes",
                        "$tuple",
                        "$set",
                        "$frozenset",
                        "$dict",
                        "$ordered_dict",
                        "$counter",
                        "$deque",
                        "$tensor",
                        "$complex_tensor",
                        "$size",
                        "$dtype",
                        "$npscalar",
                        "$ndarray",
                        "a",
                    ]
                ),
                inner,
                max_size=2,
            ),
        ),
        max_leaves=8,
    )
)
def test_fuzzed_states_raise_only_typed_errors(value: object) -> None:
    try:
        decode_state(text_of(value), {"t": ONE})
    except StateFormatError as error:
        assert error.hint  # noqa: PT017


def test_text_that_would_be_too_long_to_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = encode_state("x" * 1000)[0]
    monkeypatch.setattr("shardwise.format.state_json.MAX_STATE_BYTES", len(fits))
    assert decode_state(encode_state("x" * 1000)[0], {}) == "x" * 1000
    with pytest.raises(StateFormatError, match="at most"):
        encode_state("x" * 1001)
