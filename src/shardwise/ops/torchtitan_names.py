"""Llama under the names of torchtitan and of Meta's own files, and in which order rows of q and k are there.

Source: torchtitan's ``Llama3StateDictAdapter`` and transformers' ``convert_llama_weights_to_hf.py``, which describe the
same names. Both of these models rotate neighbouring rows of a head together, transformers rotates a row of a head's
first half with one of its second half. The same names are used by models that rotate as transformers does; names and
shapes do not tell, and weights in the wrong order give a model that runs and is wrong. So the caller has to say which.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shardwise.errors import MisuseError
from shardwise.format.json_file import read_json
from shardwise.ops.model_class import ModelClass
from shardwise.plan.reads import SourceTensor
from shardwise.sources.tensor_bytes import Computed, ReadBlocks, as_bytes, read_flat

#: Which rows of a head a rotary embedding turns together: neighbours, or those half a head apart.
Rope: TypeAlias = Literal["interleaved", "halves"]
ROPES: tuple[Rope, ...] = ("interleaved", "halves")

_CLASS = "LlamaForCausalLM"
_EMBEDDING = "tok_embeddings.weight"
#: Two names for one tensor are those of different releases: the first is Meta's too, the second torchtitan 0.3's.
_TOP = {
    _EMBEDDING: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.qkv_linear.wq.weight": "self_attn.q_proj.weight",
    "attention.qkv_linear.wk.weight": "self_attn.k_proj.weight",
    "attention.qkv_linear.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
#: Tables of angles, which every model computes by itself.
_TABLES = frozenset({"freqs_cis", "rope.freqs", "rope.cache"})
_ROTATED = {"self_attn.q_proj.weight": "num_attention_heads", "self_attn.k_proj.weight": "num_key_value_heads"}


@dataclass(frozen=True, slots=True)
class Renamed:
    """What was done to a model.

    Attributes:
        names: torchtitan's name of each tensor -> transformers'.
        heads: transformers' name of each tensor whose rows are put into another order -> its number of heads.
    """

    names: Mapping[str, str]
    heads: Mapping[str, int]


def has_own_names(names: Collection[str], kind: ModelClass | None) -> bool:
    """Whether tensors have torchtitan's names, and the class that a configuration names has others."""
    return _EMBEDDING in names and (kind is None or not {*kind.native, *kind.hub} & {_EMBEDDING})


def in_transformers_names(
    tensors: Mapping[str, SourceTensor], computed: Mapping[str, Computed], kind: ModelClass, rope: str | None
) -> tuple[dict[str, SourceTensor], dict[str, Computed], Renamed, str]:
    """Tensors under transformers' names, with the rows of q and k in transformers' order; ``rope`` is how it rotates.

    Returns the tensors, those of them that are computed, what was done, and a note for the report. What is not surely a
    Llama of these names, and rotates in a way that is known, is a `MisuseError`.
    """
    if kind.name != _CLASS:
        raise _refused(kind, f"what these are in a {kind.name} is not known, only in a {_CLASS}")
    found = {name: new for name in tensors if name not in _TABLES and (new := _renamed(name)) is not None}
    unknown = [name for name in tensors if name not in found and name not in _TABLES]
    absent = [name for name in kind.hub if name not in found.values()]
    extra = [name for name, new in found.items() if new not in kind.hub and new not in kind.others]
    counts = Counter(found.values())
    twice = [name for name, new in found.items() if counts[new] > 1]
    wrong = {"are not known": unknown, "are absent": absent, "are not in the configuration": extra, "are one": twice}
    for what, names in wrong.items():
        if names:
            raise _refused(kind, f"{len(names)} tensors {what}: {', '.join(names[:5])}")
    heads = {tail: _heads(kind, key, tail) for tail, key in _ROTATED.items()}
    if rope is None:
        raise MisuseError(
            "these are torchtitan's names of a Llama, as Meta's own files have them, and models of these names differ "
            "in the order of the rows of q and k, which no name or shape shows",
            path=kind.config,
            tensor=next(name for name in found if name.endswith("wq.weight")),
            hint="Say how the model that was trained rotates them: --rope interleaved (torchtitan's and Meta's Llama, "
            "neighbouring rows together) or --rope halves (as transformers does; rows stay as they are).",
        )
    renamed = {new: tensors[name]._replace(spec=tensors[name].spec._replace(name=new)) for name, new in found.items()}
    made = {new: computed[name] for name, new in found.items() if name in computed}
    reordered: dict[str, int] = {}
    for name, new in found.items() if rope == "interleaved" else ():
        for count in [count for tail, count in heads.items() if new.endswith(tail)]:
            reordered[new] = count
            made[new] = in_halves(tensors[name], count, computed.get(name))
    numbers = " and ".join(map(str, heads.values()))
    note = f"tensors have torchtitan's names; rows of q and k stay as they are ({numbers} heads), as was asked for"
    if rope == "interleaved":
        note = (
            f"tensors have torchtitan's names; rows of q_proj and k_proj ({numbers} heads) were put from neighbouring "
            "pairs into halves of each head"
        )
    return renamed, made, Renamed(found, reordered), note


def _renamed(name: str) -> str | None:
    if name in _TOP:
        return _TOP[name]
    match = _IN_LAYER.fullmatch(name)
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}" if match is not None and match[2] in _LAYER else None


def _heads(kind: ModelClass, key: str, tail: str) -> int:
    """The number of heads, which the configuration has to give and the shape has to fit."""
    config = read_json(kind.config)
    count = config.get(key) if isinstance(config, dict) else None
    if type(count) is not int or count < 1:
        raise _refused(kind, f"{kind.config.name} has no {key}")
    if "partial_rotary_factor" in str(config):
        raise _refused(kind, f"by {kind.config.name} a part of each head is rotated (partial_rotary_factor)")
    for rows in {shape[0] for name, shape in kind.hub.items() if name.endswith(tail)}:
        if rows % (2 * count):
            raise _refused(kind, f"{rows} rows of {tail} are not {count} heads of an even number of rows")
    return count


def in_halves(tensor: SourceTensor, heads: int, computed: Computed | None = None) -> Computed:
    """The rows of each head, where neighbours are a pair, with the first ones of all pairs before the second ones.

    The tensor has two dimensions, and heads of an even number of rows; ``computed`` makes its bytes where they are not
    those of a file as they lie there.
    """
    rows, columns = tensor.spec.shape

    def blocks(read: ReadBlocks) -> Iterator[memoryview]:
        flat = read_flat(tensor.spec, read(tensor) if computed is None else computed(read))
        pairs = flat[: rows * columns].view(heads, rows // heads // 2, 2, columns)
        yield as_bytes(pairs.transpose(1, 2).contiguous())

    return blocks


def _refused(kind: ModelClass, why: str) -> MisuseError:
    return MisuseError(
        f"the tensors have torchtitan's names, which cannot be made those of a {kind.name}: {why}",
        path=kind.config,
        hint="Convert it with torchtitan's own script (scripts/checkpoint_conversion/convert_to_hf.py), or name the "
        "right configuration with --config.",
    )
