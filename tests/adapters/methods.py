"""Every method of peft that the matrix tries: how an adapter is made, and what its training step needs besides."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tests.peft.models import SIZES
from torch import nn

import peft

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
#: Layers whose matrices are square, which some methods need.
SQUARE = ["q_proj", "o_proj"]
IDS = torch.tensor([[1, 5, 9, 3, 2, 8, 4, 7], [6, 1, 2, 11, 5, 3, 9, 30]])

Make = Callable[[nn.Module, Path], nn.Module]


@dataclass(frozen=True)
class Row:
    """One method, or one variant of it.

    Attributes:
        make: Adapts a base model that was loaded from a directory.
        kind: The ``PeftType``.
        family: Which base model.
        inputs: What a forward pass is given besides tokens and labels.
        whole: Whether FSDP2 may not cut the model by layers, since these share parameters.
        stages: Why pipeline stages cannot be adapted one by one; empty where they can.
        after: Called after each step, as the method's documentation says, with the model and the step's number.
        elsewhere: Where a run of one process goes on: not under FSDP2, if the method does not train there.
        following: Where the step after a restore has to be that of the run: not where a method draws numbers ahead that
            no state has, or projects gradients in hooks that FSDP2 drops.
        differs: Directories whose files are others than peft's by intent, as the page says.
    """

    make: Make
    kind: str
    family: str = "llama"
    inputs: Mapping[str, object] = field(default_factory=dict)
    whole: bool = False
    stages: str = ""
    after: Callable[[nn.Module, int], None] | None = None
    elsewhere: str = "FSDP2, 2 ranks"
    following: Literal["everywhere", "same ranks", "nowhere"] = "everywhere"
    differs: tuple[str, ...] = ()


def base(family: str) -> nn.Module:
    """A tiny random model, the same every time, which two ranks can split by heads."""
    import transformers as tf

    torch.manual_seed(7)
    if family == "qwen3_moe":
        sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes))
    if family == "gpt2":  # layers that keep their weights transposed, and biases
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=32,
                n_embd=16,
                n_layer=2,
                n_head=2,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                tie_word_embeddings=False,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    tied = family == "llama-tied"
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=tied))


FAMILIES = ("llama", "llama-tied", "qwen3_moe", "gpt2")


def _made(cls: str, **settings: object) -> Make:
    def make(model: nn.Module, scratch: Path) -> nn.Module:
        options = {"task_type": "CAUSAL_LM", **settings}
        made: nn.Module = peft.get_peft_model(model, getattr(peft, cls)(**options))
        return made

    return make


def _row(cls: str, kind: str, settings: Mapping[str, object], **more: object) -> Row:
    return Row(_made(cls, **settings), kind, **more)  # type: ignore[arg-type]


def _lora(settings: Mapping[str, object], **more: object) -> Row:
    return _row("LoraConfig", "LORA", {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **settings}, **more)


def _prompt(cls: str, kind: str, settings: Mapping[str, object], **more: object) -> Row:
    reason = "peft puts virtual tokens before the input of a whole model"
    return _row(cls, kind, {"num_virtual_tokens": 4, **settings}, stages=reason, **more)


def _eva(model: nn.Module, scratch: Path) -> nn.Module:
    config = peft.LoraConfig(
        r=4, target_modules=LINEAR, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), task_type="CAUSAL_LM"
    )
    made: nn.Module = peft.get_peft_model(model, config)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)} for _ in range(4)]
    peft.initialize_lora_eva_weights(made, batches, show_progress_bar=False, gather_distributed_inputs=False)
    return made


def _corda(model: nn.Module, scratch: Path) -> nn.Module:
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(
        r=4,
        target_modules=LINEAR,
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method="kpm"),
        task_type="CAUSAL_LM",
    )
    model.eval()
    preprocess_corda(model, config, run_model=lambda: model(input_ids=IDS))
    made: nn.Module = peft.get_peft_model(model, config)
    return made


def _lora_ga(model: nn.Module, scratch: Path) -> nn.Module:
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config = peft.LoraConfig(
        r=4, target_modules=LINEAR, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), task_type="CAUSAL_LM"
    )

    def measured() -> None:
        model(input_ids=IDS, labels=IDS).loss.backward()

    preprocess_loraga(model, config, measured)
    model.zero_grad()
    made: nn.Module = peft.get_peft_model(model, config)
    return made


def _experts(scratch: Path) -> list[str]:
    return [str(scratch / f"expert_{number}") for number in range(2)]


def _keep_experts(scratch: Path) -> None:
    for number, path in enumerate(_experts(scratch)):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", init_lora_weights=False)
        peft.get_peft_model(base("llama"), config).save_pretrained(path)


def _xlora(model: nn.Module, scratch: Path) -> nn.Module:
    model.config.use_cache = False
    paths = {str(number): path for number, path in enumerate(_experts(scratch))}
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, xlora_depth=2, xlora_size=8, adapters=paths, xlora_dropout_p=0.0
    )
    made: nn.Module = peft.get_peft_model(model, config)
    return made


def _arrow(model: nn.Module, scratch: Path) -> nn.Module:
    """A router over trained adapters, and one more that is trained."""
    from peft.tuners.lora.arrow import create_arrow_model

    config = peft.ArrowConfig(top_k=1, rng_seed=0)
    made: nn.Module = create_arrow_model(model, _experts(scratch), config)
    return made


def _two(model: nn.Module, scratch: Path) -> nn.Module:
    """Two adapters, of which the second is trained."""
    first = peft.LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", init_lora_weights=False)
    made: nn.Module = peft.get_peft_model(model, first)
    made.add_adapter("second", peft.LoraConfig(r=2, target_modules=SQUARE, task_type="CAUSAL_LM"))
    made.set_adapter("second")
    return made


def _allocate(model: nn.Module, step: int) -> None:
    model.base_model.update_and_allocate(step)


_ALL = {"target_modules": LINEAR}
_SQ = {"target_modules": SQUARE}

_SHARED = "peft's layers share parameters, of which each stage would train its own"
_ADDS = "peft adds to the loss of a whole model"

ROWS: dict[str, Row] = {
    "LoRA": _lora({}),
    "LoRA, all-linear": _lora({"target_modules": "all-linear", "exclude_modules": ["lm_head"]}),
    "LoRA, patterns of ranks and alphas": _lora(
        {"rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6}, "alpha_pattern": {"k_proj": 3}}
    ),
    "LoRA, modules_to_save": _lora({"modules_to_save": ["lm_head"]}),
    "LoRA, embeddings and head": _lora({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "LoRA, tied embeddings": _lora(
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, family="llama-tied"
    ),
    "LoRA, trainable_token_indices": _lora({"trainable_token_indices": [1, 5]}),
    "LoRA, target_parameters": _lora(
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, family="qwen3_moe"
    ),
    "LoRA, bias of layers (GPT-2)": _lora(
        {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only", "fan_in_fan_out": True}, family="gpt2"
    ),
    "LoRA, bias of all (GPT-2)": _lora(
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}, family="gpt2"
    ),
    "LoRA, lora_bias": _lora({"lora_bias": True}),
    "LoRA, layer_replication": _lora(
        {"layer_replication": [(0, 2), (1, 2)]}, whole=True, stages="peft replicates layers of a whole model's list"
    ),
    "LoRA, two adapters": Row(_two, "LORA"),
    "rsLoRA": _lora({"use_rslora": True}),
    "DoRA": _lora({"use_dora": True}),
    "PiSSA": _lora({"init_lora_weights": "pissa"}),
    "PiSSA, fast": _lora({"init_lora_weights": "pissa_niter_4"}),
    "OLoRA": _lora({"init_lora_weights": "olora"}),
    "EVA": Row(_eva, "LORA", stages="peft measures inputs of layers in passes through a whole model"),
    "CorDA": Row(_corda, "LORA", stages="peft measures inputs of layers in passes through a whole model"),
    "LoRA-GA": Row(_lora_ga, "LORA", stages="peft measures gradients in passes through a whole model"),
    "LoftQ": _lora({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}),
    "LoRA, orthogonal": _lora({"init_lora_weights": "orthogonal"}),
    "LoRA, gaussian": _lora({"init_lora_weights": "gaussian"}),
    "MiCA": _lora({"init_lora_weights": "mica"}),
    "aLoRA": _lora(
        {"alora_invocation_tokens": [9, 3]},
        stages="peft looks for the tokens in the input of a whole model",
    ),
    "QALoRA": _lora({"use_qalora": True, "qalora_group_size": 4}),
    "BD-LoRA": _lora(
        {
            "use_bdlora": {
                "target_modules_bd_a": ["q_proj", "k_proj", "v_proj"],
                "target_modules_bd_b": ["o_proj"],
                "nblocks": 2,
            }
        }
    ),
    "VeLoRA": _lora({"velora_config": {"num_groups": 4}}),
    "KaSA": _lora({"kasa_config": {}}),
    "MonteCLoRA": _lora({"monteclora_config": {}}, following="nowhere"),
    "Arrow": Row(_arrow, "LORA", stages="peft's router has nothing to train"),
    "AdaLoRA": _row(
        "AdaLoraConfig",
        "ADALORA",
        {**_ALL, "init_r": 4, "target_r": 2, "total_step": 8, "tinit": 0, "tfinal": 4, "deltaT": 1},
        after=_allocate,
        whole=True,
        stages=_ADDS,
        elsewhere="DDP, 2 ranks",
        differs=(".",),
    ),
    "AdaLoRA, ranks not yet allocated": _row(
        "AdaLoraConfig",
        "ADALORA",
        {**_ALL, "init_r": 4, "target_r": 2, "total_step": 100, "tinit": 50},
        whole=True,
        stages=_ADDS,
    ),
    "AdaMSS": _row("AdamssConfig", "ADAMSS", {**_ALL, "r": 8, "num_subspaces": 2, "subspace_rank": 1}),
    "AdaMSS, subspaces allocated": _row(
        "AdamssConfig",
        "ADAMSS",
        {
            **_ALL,
            "r": 8,
            "num_subspaces": 2,
            "subspace_rank": 1,
            "use_asa": True,
            "asa_target_subspaces": 4,
            "init_warmup": 0,
            "final_warmup": 4,
            "mask_interval": 1,
        },
        after=_allocate,
    ),
    "BOFT": _row("BOFTConfig", "BOFT", {**_SQ, "boft_block_size": 4}),
    "BEFT": _row("BeftConfig", "BEFT", {"target_modules": ["v_proj"]}),
    "C3A": _row("C3AConfig", "C3A", {**_SQ, "block_size": 8}),
    "DEFT": _row("DeftConfig", "DEFT", {**_ALL, "r": 4}),
    "DeLoRA": _row("DeloraConfig", "DELORA", {**_ALL, "r": 4}),
    "FourierFT": _row("FourierFTConfig", "FOURIERFT", {**_SQ, "n_frequency": 16}),
    "FRoD": _row("FrodConfig", "FROD", _SQ),
    "GLoRA": _row("GloraConfig", "GLORA", {**_ALL, "r": 4}),
    "GraLoRA": _row("GraloraConfig", "GRALORA", {**_ALL, "r": 4, "gralora_k": 2}),
    "HiRA": _row("HiraConfig", "HIRA", {**_ALL, "r": 4}),
    "HRA": _row("HRAConfig", "HRA", {**_ALL, "r": 4}),
    "IA3": _row("IA3Config", "IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "Lily": _row("LilyConfig", "LILY", {**_ALL, "r": 4}, whole=True, stages=_SHARED),
    "LN tuning": _row("LNTuningConfig", "LN_TUNING", {"target_modules": ["norm", "input_layernorm"]}),
    "LoHa": _row("LoHaConfig", "LOHA", {**_ALL, "r": 4}),
    "LoKr": _row("LoKrConfig", "LOKR", {**_ALL, "r": 4}),
    "LoKr, decompose_both": _row("LoKrConfig", "LOKR", {**_SQ, "r": 1, "decompose_both": True}),
    "MiSS": _row("MissConfig", "MISS", {**_ALL, "r": 4}),
    "MiSS, bat": _row("MissConfig", "MISS", {**_SQ, "r": 4, "init_weights": "bat"}),
    "OFT": _row("OFTConfig", "OFT", {**_ALL, "r": 0, "oft_block_size": 4}),
    "OFT, shared blocks": _row("OFTConfig", "OFT", {**_ALL, "r": 0, "oft_block_size": 4, "block_share": True}),
    "OSF": _row("OSFConfig", "OSF", _SQ, following="same ranks"),
    "PEANuT": _row("PeanutConfig", "PEANUT", {**_ALL, "r": 4}),
    "Poly": _row(
        "PolyConfig",
        "POLY",
        {**_ALL, "r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 2},
        inputs={"task_ids": torch.tensor([0, 1])},
        stages="peft takes the tasks from the inputs of a whole model",
    ),
    "PSOFT": _row("PsoftConfig", "PSOFT", {**_ALL, "r": 4}),
    "PVeRA": _row("PveraConfig", "PVERA", {**_SQ, "r": 4, "sample_at_inference": False}),
    "RandLora": _row("RandLoraConfig", "RANDLORA", {**_SQ, "r": 4, "randlora_dropout": 0.0}),
    "RoAd": _row("RoadConfig", "ROAD", {**_SQ, "group_size": 8}),
    "Shadow": _row(
        "ShadowConfig",
        "SHADOW",
        {"target_modules": r".*\.layers\.\d+$", "r": 4, "shadow_dropout": 0.0, "shadow_num_attention_heads": 4},
        whole=True,
        stages="peft runs its shadow model beside a whole model",
    ),
    "SHiRA": _row("ShiraConfig", "SHIRA", {**_SQ, "r": 2}),
    "Supertuning": _row("SupertuningConfig", "SUPERTUNING", {**_SQ, "sparsity": 0.9}),
    "TinyLoRA": _row("TinyLoraConfig", "TINYLORA", {**_ALL, "u": 4}, whole=True, stages=_SHARED),
    "Trainable tokens": _row("TrainableTokensConfig", "TRAINABLE_TOKENS", {"token_indices": [1, 5]}),
    "UniLoRA": _row("UniLoraConfig", "UNILORA", {**_ALL, "r": 4, "theta_d_length": 64}, whole=True, stages=_SHARED),
    "VBLoRA": _row(
        "VBLoRAConfig",
        "VBLORA",
        {**_ALL, "r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2},
        whole=True,
        stages=_SHARED,
    ),
    "VeRA": _row("VeraConfig", "VERA", {**_SQ, "r": 4}),
    "VeRA, projections not saved": _row("VeraConfig", "VERA", {**_SQ, "r": 4, "save_projection": False}),
    "WaveFT": _row("WaveFTConfig", "WAVEFT", {**_SQ, "n_frequency": 16}),
    "X-LoRA": Row(
        _xlora,
        "XLORA",
        stages="peft runs a whole model twice to scale its adapters",
        differs=(".", "0", "1"),
    ),
    "Adaption prompt": _row(
        "AdaptionPromptConfig",
        "ADAPTION_PROMPT",
        {"adapter_len": 4, "adapter_layers": 2},
        stages="peft counts adapter_layers from the end of the model that it sees",
    ),
    "Prompt tuning": _prompt("PromptTuningConfig", "PROMPT_TUNING", {}),
    "Multitask prompt tuning": _prompt(
        "MultitaskPromptTuningConfig",
        "MULTITASK_PROMPT_TUNING",
        {"num_tasks": 2},
        inputs={"task_ids": torch.tensor([0, 1])},
    ),
    "P-tuning": _prompt("PromptEncoderConfig", "P_TUNING", {"encoder_hidden_size": 8}),
    "Prefix tuning": _prompt("PrefixTuningConfig", "PREFIX_TUNING", {}),
    "Prefix tuning, projected": _prompt(
        "PrefixTuningConfig", "PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 8}
    ),
    "CPT": _row(
        "CPTConfig",
        "CPT",
        {
            "cpt_token_ids": [1, 2, 3, 4],
            "cpt_mask": [1, 1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 2, 4],
            "opt_projection_epsilon": 0.2,
            "opt_projection_format_epsilon": 0.2,
            "opt_weighted_loss_type": "decay",
        },
        inputs={"input_type_mask": torch.full_like(IDS, 4)},
        stages="peft puts virtual tokens before the input of a whole model",
    ),
    "Cartridge": _prompt("CartridgeConfig", "CARTRIDGE", {}),
}


def build(name: str, root: Path, seed: int, model: nn.Module | None = None) -> nn.Module:
    """An adapted model whose trained values depend on the seed.

    Args:
        name: Of `ROWS`.
        root: Where the bases are.
        seed: Of peft's own beginning.
        model: What to adapt, for a model that is spread already, or a part of it.
    """
    row = ROWS[name]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return row.make(opened(row.family, root) if model is None else model, root)


def opened(family: str, root: Path) -> nn.Module:
    """A base as transformers loads it, once in a process or in that which it was forked from."""
    from transformers import AutoModelForCausalLM

    if (family, root) not in _OPENED:
        _OPENED[family, root] = AutoModelForCausalLM.from_pretrained(root / family)
    return copy.deepcopy(_OPENED[family, root])


_OPENED: dict[tuple[str, Path], nn.Module] = {}


def keep_bases(root: Path) -> None:
    """Write the bases, and the adapters that routers choose from."""
    for family in FAMILIES:
        if not (root / family).exists():
            base(family).save_pretrained(root / family)
    if not (root / "expert_1").exists():
        _keep_experts(root)
