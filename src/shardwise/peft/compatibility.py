"""Whether other tools would open an adapter correctly: peft, which has to, and vLLM, which may not."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from shardwise.errors import AdapterError
from shardwise.peft.check import adapted_modules
from shardwise.peft.models import is_peft_adapted
from shardwise.peft.names import named_modules
from shardwise.stateful_wrappers.wrapping import adapted_model, bare_model
from shardwise.upstream import peft as upstream

if TYPE_CHECKING:
    from peft import PeftConfig

#: The highest ``max_lora_rank`` that may be set, and the one that is set. Source: vLLM, ``vllm/config/lora.py``.
_VLLM_RANKS = (16, 512)

#: Ends of tensors' names that vLLM knows, the last two to pass over. Source: its ``parse_fine_tuned_lora_name`` and
#: ``is_base_embedding_weights``.
_VLLM_TENSORS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".embed_tokens.base_layer.weight",
    ".lm_head.base_layer.weight",
)


def check_opens(
    parts: Sequence[nn.Module], adapter_name: str, names: Iterable[str], settings: Mapping[str, object]
) -> None:
    """Check that peft, given a base model and the adapter's settings, would adapt the modules that have tensors. Local.

    peft reads the settings alone, the content of ``adapter_config.json``. It skips tensors without a module in them,
    with a warning, and a module without saved tensors would start from its initial values. ``names`` are those of all
    ranks.
    """
    if importlib.util.find_spec("peft") is None:
        return
    config = _config(adapter_name, settings)
    targets = getattr(config, "target_modules", None)
    if settings.get("peft_type") != "LORA" or not targets:
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    parents = tuple(str(p).rpartition(".")[0] for p in getattr(config, "target_parameters", None) or ())
    owners = adapted_modules(names)
    for owner in sorted(owners):
        beside = any(f".{owner}".endswith(f".{parent}") for parent in parents)
        if not beside and not config.ensure_weight_tying and not check_target_module_exists(config, owner):
            raise _unlike(adapter_name, owner, "has tensors, and the settings give peft no adapter for it")
    if not is_peft_adapted(parts):
        return
    leaves = None if isinstance(targets, str) else {str(target).rpartition(".")[2] for target in targets}
    for part in parts:
        for name in _base_modules(bare_model(adapted_model(part))):
            if name in owners or (leaves is not None and name.rpartition(".")[2] not in leaves):
                continue
            if check_target_module_exists(config, name):
                raise _unlike(adapter_name, name, "has no tensors, and by the settings peft would adapt it")


def _config(adapter_name: str, settings: Mapping[str, object]) -> Any:
    from peft import PeftConfig

    try:
        with warnings.catch_warnings(action="ignore"):
            config: PeftConfig = PeftConfig.from_peft_type(**settings)
    except Exception as error:  # peft's own checks of what a configuration may say
        raise AdapterError(
            f"peft does not take the settings of the adapter {adapter_name!r}: {type(error).__name__}: {error}",
            hint="Correct the adapter's configuration (model.peft_config), which adapter_config.json is made of.",
        ) from error
    return config


def _unlike(adapter_name: str, module: str, what: str) -> AdapterError:
    return AdapterError(
        f"peft would open the adapter {adapter_name!r} as another one: {module!r} {what}",
        tensor=module,
        hint="Let target_modules (and exclude_modules, layers_to_transform) name the modules that are adapted, in full "
        "where they differ between layers or stages.",
    )


def _base_modules(model: nn.Module) -> Iterator[str]:
    """Names of the modules that the base model has, but for those that peft's wrappers hold."""
    layer, copy = upstream.layer_class(), upstream.copy_class()
    below: list[str] = []
    for name, module in named_modules(model):
        if any(name.startswith(f"{wrapper}.") for wrapper in below[-1:]):
            if isinstance(module, layer) or not name.endswith(".base_layer"):
                continue
            name = name.removesuffix(".base_layer")
        elif isinstance(module, (layer, copy)):
            below.append(name)
            if isinstance(module, copy):
                continue
        yield name


def vllm_limits(names: Iterable[str], settings: Mapping[str, object], *, has_extra: bool) -> list[str]:
    """The parts of an adapter that vLLM does not serve, and why; empty where it serves all. Pure.

    Source: vLLM's ``PEFTHelper``, ``LoRAConfig`` and ``parse_fine_tuned_lora_name``. ``has_extra`` says whether tensors
    are trained beside the adapter.
    """
    kind = str(settings.get("peft_type"))
    if kind != "LORA":
        return [f"peft_type is {kind}, and it serves LORA alone"]
    out: list[str] = []
    if settings.get("use_dora"):
        out.append("use_dora: it does not apply magnitudes")
    if saved := settings.get("modules_to_save"):
        out.append(f"modules_to_save ({saved}): it loads no whole modules")
    if settings.get("bias") not in (None, "none"):
        out.append(f"bias is {settings['bias']!r}, and has to be 'none'")
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if settings.get(key)]
    if patterns:
        out.append(f"{' and '.join(patterns)}: it scales every module by the one r and lora_alpha")
    rank = settings.get("r")
    default, highest = _VLLM_RANKS
    if isinstance(rank, int) and rank > default:
        out.append(
            f"r is {rank}: {f'set max_lora_rank, {default} by default' if rank <= highest else f'over {highest}'}"
        )
    strange = sorted(name for name in names if not name.endswith(_VLLM_TENSORS))
    if strange and not settings.get("modules_to_save") and not settings.get("use_dora"):
        out.append(f"{len(strange)} tensors are no factors, {strange[0]} among them")
    if has_extra:
        out.append("tensors are trained beside the adapter, in a file that it does not read")
    return out
