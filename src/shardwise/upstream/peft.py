"""Private and undocumented names of peft, and of what accelerate puts into modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from shardwise.upstream.python import class_of

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner as BaseTuner  # noqa: PLC0414
    from torch import nn

#: Prefix of the attributes that accelerate puts into modules.
ACCELERATES = "_hf_"


def is_imported() -> bool:
    """Whether peft was imported, without which no model is adapted with it."""
    return "peft" in sys.modules


#: The base of the layers that peft puts around others.
layer_class = partial(class_of, "peft.tuners.tuners_utils", "BaseTunerLayer")

#: The base of what adapts a whole model.
tuner_class = partial(class_of, "peft.tuners.tuners_utils", "BaseTuner")

#: The base of what peft puts around a module whose copy is trained, or whose tokens are.
copy_class = partial(class_of, "peft.utils.other", "AuxiliaryTrainingWrapper")

#: The layer that trains some rows of an embedding.
tokens_class = partial(class_of, "peft.tuners.trainable_tokens", "TrainableTokensLayer")

#: The layer through which LoRA adapts a parameter directly.
parameter_wrapper_class = partial(class_of, "peft.tuners.lora", "ParamWrapper")


def attention_classes() -> tuple[type, ...]:
    """The classes that adaption prompts put around attention, which is their child ``model``."""
    from peft.tuners.adaption_prompt import AdaptedAttention
    from torch.nn import Module

    return tuple(cls for cls in AdaptedAttention.__mro__[:-1] if issubclass(cls, Module) and cls is not Module)


def tuner_of(kind: object) -> type[BaseTuner] | None:
    """The class that adapts models with a method (``peft_type``); ``None`` where none does."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    return cast("type[BaseTuner] | None", PEFT_TYPE_TO_TUNER_MAPPING.get(kind))


def config_class_of(method: str) -> type | None:
    """The class of a method's configuration, by the method's name; ``None`` where there is none."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return next((cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(kind.value) == method), None)


def model_class_of(task: object) -> Callable[..., Any]:
    """The class of the models that peft makes for a task; the general one where it has none."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    return cast("Callable[..., Any]", MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, PeftModel))


def forget_origin(module: nn.Module) -> None:
    """Drop the tensors of another layer that a layer of LoRA was made from, and that it keeps for no later use."""
    given = vars(module).get("kwargs")
    if isinstance(module, layer_class()) and isinstance(given, dict):
        given.pop("tied_adapter", None)


def has_adapter(module: nn.Module, name: str) -> bool:
    """Whether a module is one of peft's layers with an adapter of this name."""
    return isinstance(module, layer_class()) and name in cast(Any, module)._all_available_adapter_names()


def swaps_in_out(wrapper: nn.Module) -> bool:
    """Whether a layer around a parameter reads its two last dimensions as (out, in) where others are (in, out)."""
    return bool(getattr(wrapper, "_did_swap_in_out_features", False))


def watched_tuner(
    tuner: type[BaseTuner],
    before: Callable[[nn.Module, str], None],
    after: Callable[[nn.Module, nn.Module, str], None],
) -> Callable[..., nn.Module]:
    """A tuner's class that calls ``before`` with each module and its path, and ``after`` also with what replaced it."""

    def create(self: Any, *args: Any, **kwargs: Any) -> None:
        names = ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        target, parent, leaf, path = (given[n] for n in ("target", "parent", "target_name", "current_key"))
        before(target, path)
        cast(Any, tuner)._create_and_replace(self, *args, **kwargs)
        after(target, parent.get_submodule(leaf), path)

    return cast("Callable[..., nn.Module]", type(tuner.__name__, (tuner,), {"_create_and_replace": create}))
