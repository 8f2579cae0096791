"""Every private or undocumented name of another library that shardwise depends on, each once, with the reason.

A name is written as it is reached. ``torch.nn.Module()._parameters`` is an attribute of an instance that is made
without arguments, ``@dtensor._spec`` one of an object in `EXAMPLES`. ``torch.optim.lr_scheduler:_last_lr`` is a word
that a module's source has to contain: what libraries set on instances, write into files, or pass by keyword. The tests
in ``tests/upstream`` look each of them up in the installed release, and compare the list with the code of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Name(NamedTuple):
    """A name that a library may drop without notice.

    Attributes:
        path: How it is reached; what is in front of the first dot is the library, or an example.
        why: What it is for, and why nothing documented does.
        kind: Name of the type that it has to be of or a subclass of; empty for a word in a source.
        takes: Parameters that it has to have, where it is called with these.
        optional: Whether shardwise does without it where a release lacks it.
    """

    path: str
    why: str
    kind: str = ""
    takes: tuple[str, ...] = ()
    optional: bool = False


_TREE = "torch's own listing of state takes three times as long, and calls hooks that have to be looked at first"
_HOOKS = "whether a hook changes what is saved or loaded shows nowhere else"
_OWN_STATE = "one module's own state, without that of the modules below it"
_DTENSOR = "the public attributes record gradients, wait for collectives, or take ten times as long for each tensor"
_NAMES = "it stands in the names of a wrapped module's tensors, and has to come out of them"
_QUANTIZED = "no public function makes one from integers that are there already"
_SCHEDULES = "a key of schedulers' states, which are put together from those of several pipeline stages"
_RULES = "how files name and cut what models hold is in rules that only transformers' own loader is meant to read"
_META = "whether a class loads an export is asked of the library's own loader, without memory"
_LAYERS = "which modules are an adapter's is known from their classes alone"
_DCP = "DCP's files name it, and are read without unpickling"

TORCH_MODULES = (
    Name("torch.nn.Module()._parameters", _TREE, "dict"),
    Name("torch.nn.Module()._buffers", _TREE, "dict"),
    Name("torch.nn.Module()._modules", _TREE, "dict"),
    Name("torch.nn.Module()._non_persistent_buffers_set", "which buffers are not part of the state", "set"),
    Name("torch.nn.Module()._state_dict_hooks", _HOOKS, "dict"),
    Name("torch.nn.Module()._state_dict_pre_hooks", _HOOKS + "; FSDP2's puts sharded parameters back", "dict"),
    Name("torch.nn.Module()._load_state_dict_pre_hooks", _HOOKS, "dict"),
    Name("torch.nn.Module()._load_state_dict_post_hooks", "they are called where tensors were read directly", "dict"),
    Name("torch.nn.Module._save_to_state_dict", _OWN_STATE, "function", ("destination", "prefix", "keep_vars")),
    Name(
        "torch.nn.Module._load_from_state_dict",
        _OWN_STATE,
        "function",
        ("state_dict", "prefix", "local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs"),
    ),
    Name("torch.nn.Module._version", "noted beside a module's state, and handed back to it", "int"),
    Name(
        "torch.nn.Module().state_dict()._metadata",
        "versions travel beside the state, as torch's own loading asks",
        "dict",
    ),
    Name(
        "torch.nn.Module._apply",
        "parameters of a meta model get memory in place, ties and DTensors among them",
        "function",
        ("fn",),
    ),
    Name("torch.nn.modules.module._IncompatibleKeys", "what load_state_dict answers and post-hooks are given", "type"),
    Name("torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX", "the name of extra state among a module's entries", "str"),
    Name("torch.nn.modules.batchnorm._NormBase", "its loading only copies once all of its tensors are there", "type"),
    Name("torch.nn.modules.activation:_reset_parameters", "nn.MultiheadAttention gives its initial values by it"),
    Name("torch._dynamo.eval_frame:_orig_mod", _NAMES),
    Name(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:_checkpoint_wrapped_module",
        _NAMES + "; its hooks are known by their module",
    ),
    Name("torch.distributed.fsdp._common_utils:_fsdp_wrapped_module", _NAMES),
    Name(
        "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
        "FSDP1 is refused where it was imported, and not imported for that",
        "type",
    ),
    Name(
        "torch.distributed._composable.replicate.DDP",
        "replicate() puts a class made from it in front of a module's own",
        "type",
    ),
)

TORCH_TENSORS = (
    Name("@dtensor._local_tensor", _DTENSOR, "Tensor"),
    Name("@dtensor._spec", _DTENSOR, "DTensorSpec"),
    Name("@dtensor._spec.mesh", _DTENSOR, "DeviceMesh"),
    Name(
        "torch.distributed.device_mesh.DeviceMesh._get_root_mesh",
        "names of the dimensions around a sliced mesh",
        "function",
    ),
    Name("@dtensor._spec.placements", _DTENSOR, "tuple"),
    Name("@dtensor._spec.tensor_meta.shape", _DTENSOR, "Size"),
    Name("torch.distributed.tensor._dtensor_spec.DTensorSpec", "what a DTensor is made from", "type"),
    Name(
        "torch.distributed.tensor.placement_types._StridedShard",
        "several mesh dimensions that cut one tensor dimension",
        "type",
    ),
    Name(
        "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
        "the region that DCP would record",
        "function",
        ("global_shape", "mesh", "placements"),
    ),
    Name(
        "torch.distributed._functional_collectives.AsyncCollectiveTensor", "a result that may not have come yet", "type"
    ),
    Name(
        "torch.distributed._functional_collectives.AsyncCollectiveTensor.trigger_wait",
        "its memory is read once it has come",
        "function",
    ),
    Name("torch.nn.parameter.is_lazy", "a parameter without a shape", "function", ("param",)),
    Name(
        "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
        "a tensor that consists of others",
        "function",
        ("t",),
    ),
    Name(
        "torch.Tensor._make_wrapper_subclass",
        "a tensor with a shape and no memory; torch's notes on extending use it",
        "builtin_function_or_method",
    ),
    Name("torch.empty(1).untyped_storage()._cdata", "identifies storages without memory", "int"),
    Name("torch._C.DisableTorchFunctionSubclass", "reads a subclass's memory whatever functions it overrides", "type"),
    Name("torch._neg_view", "memory that is read with the opposite sign", "builtin_function_or_method"),
    Name("torch._make_per_tensor_quantized_tensor", _QUANTIZED, "builtin_function_or_method"),
    Name("torch._make_per_channel_quantized_tensor", _QUANTIZED, "builtin_function_or_method"),
)

TORCH_DISPATCH = (
    Name("torch._ops.OpOverload", "what a dispatch mode is given", "type"),
    Name("torch.ops.aten.add_.Tensor._schema.name", "which operation runs", "str"),
    Name(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "random initial values are drawn by name; torch's notes on extending use it",
        "type",
    ),
    Name(
        "torch.utils._pytree.tree_map", "tensors anywhere among an operation's arguments", "function", ("func", "tree")
    ),
    Name("torch.ops.aten._unsafe_view", "what conversion rules end in, to be traced", "OpOverloadPacket"),
    Name("torch.ops.aten._reshape_alias", "what conversion rules end in, to be traced", "OpOverloadPacket"),
    Name("torch.ops.aten._to_copy", "what conversion rules end in, to be traced", "OpOverloadPacket"),
    Name("torch.ops._c10d_functional", "a module that communicates to give its state is refused", "_OpNamespace"),
    Name("torch.ops._c10d_functional_autograd", "the same", "_OpNamespace"),
    Name(
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "a .bin file's shapes and offsets are read without its values",
        "type",
    ),
    Name("torch.serialization:_checkpoint_offset", "where in a .bin file a tensor lies"),
)

TORCH_DISTRIBUTED = (
    Name(
        "torch.distributed.distributed_c10d._get_default_store",
        "missing or lost ranks are distinguished by keys",
        "function",
    ),
    Name("torch._C._distributed_c10d.Store", "the type of that store", "type"),
    *(
        Name(
            f"torch.distributed.ProcessGroup.{method}",
            "works after destroy_process_group(), for saves in the background",
            "builtin_function_or_method",
        )
        for method in ("allgather", "broadcast", "allreduce", "alltoall_base", "send", "recv")
    ),
)

_RANKS = "what files with one rank's DTensors call it"

TORCH_CHECKPOINT = (
    Name(
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        _DCP,
        "type",
        ("relative_path", "offset", "length", "transform_descriptors"),
    ),
    Name("torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING", _DCP, "type"),
    Name("torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING", _DCP, "type"),
    Name("torch.serialization._get_layout", _DCP, "function"),
    Name("torch.distributed.tensor._api:_local_tensor", _RANKS),
    Name("torch.distributed.tensor._api:_spec", _RANKS),
    Name("torch.distributed.tensor.placement_types:_StridedShard", _RANKS),
)

TORCH_OPTIM = (
    *(
        Name(f"@optimizer.{hooks}", "an optimizer with hooks is saved by its own code", "dict")
        for hooks in (
            "_optimizer_state_dict_pre_hooks",
            "_optimizer_state_dict_post_hooks",
            "_optimizer_load_state_dict_pre_hooks",
            "_optimizer_load_state_dict_post_hooks",
        )
    ),
    Name("torch.optim.lr_scheduler:_last_lr", _SCHEDULES),
    Name("torch.optim.lr_scheduler:_step_count", _SCHEDULES),
    Name("torch.optim.lr_scheduler:_milestones", _SCHEDULES),
    Name("torch.optim.lr_scheduler:_schedulers", _SCHEDULES),
)

PYTHON = (
    Name(
        "threading._register_atexit",
        "a save in the background ends before executors close",
        "function",
        ("func",),
        True,
    ),
    Name("numpy.random.RandomState()._bit_generator", "the state of one of numpy's old generators", "object"),
)

TRANSFORMERS = (
    Name(
        "transformers.modeling_utils.PreTrainedModel._auto_class",
        "code of one's own travels with a checkpoint",
        "object",
    ),
    Name(
        "transformers.modeling_utils.PreTrainedModel._tied_weights_keys",
        "names of one tensor, whatever is configured",
        "object",
    ),
    Name("transformers.modeling_utils:all_tied_weights_keys", "names of one tensor, as configured"),
    Name(
        "transformers.modeling_utils.PreTrainedModel._keys_to_ignore_on_load_missing",
        "names that a file may lack",
        "object",
    ),
    Name(
        "transformers.modeling_utils.PreTrainedModel._keys_to_ignore_on_load_unexpected",
        "names that a file may have",
        "object",
    ),
    Name(
        "transformers.modeling_utils.PreTrainedModel._keys_to_ignore_on_save", "names that a file has to lack", "object"
    ),
    Name(
        "transformers.modeling_utils.PreTrainedModel._keep_in_fp32_modules",
        "the dtypes in which a base model is loaded",
        "object",
    ),
    Name(
        "transformers.modeling_utils.PreTrainedModel._keep_in_fp32_modules_strict",
        "the dtypes in which a base model is loaded",
        "object",
    ),
    Name("transformers.initialization:_is_hf_initialized", "which tensors initialisation leaves alone"),
    Name("transformers.configuration_utils:_name_or_path", "a path of this machine, which no checkpoint has to name"),
    Name("transformers.generation.configuration_utils:_from_model_config", "where a generation config came from"),
    Name(
        "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING",
        "the classes that open a configuration; the other tables are looked up likewise",
        "_LazyAutoMapping",
    ),
    Name(
        "transformers.core_model_loading.convert_and_load_state_dict_in_model",
        _META,
        "function",
        ("model", "state_dict", "load_config"),
    ),
    Name("transformers.modeling_utils.LoadStateDictConfig", _META, "type", ("device_map", "weight_mapping")),
    Name(
        "transformers.modeling_utils.PreTrainedModel.mark_tied_weights_as_initialized",
        _META,
        "function",
        ("loading_info",),
    ),
    Name(
        "transformers.modeling_utils.PreTrainedModel.tie_weights",
        _META,
        "function",
        ("missing_keys", "recompute_mapping"),
    ),
    Name(
        "transformers.modeling_utils.PreTrainedModel._adjust_missing_and_unexpected_keys",
        _META,
        "function",
        ("loading_info",),
    ),
    Name("transformers.initialization.no_init_weights", _META, "function"),
    Name("transformers.initialization.no_tie_weights", _META, "function"),
    Name("transformers.initialization.meta_device_safe_creation_ops", _META, "function"),
)

TRANSFORMERS_RULES = (
    Name("transformers.conversion_mapping.get_model_conversion_mapping", _RULES, "function", ("model", "add_legacy")),
    Name("transformers.core_model_loading.WeightConverter", _RULES, "type"),
    Name("transformers.core_model_loading.WeightRenaming", _RULES, "type"),
    Name("transformers.core_model_loading.PrefixChange", _RULES, "type"),
    Name("transformers.core_model_loading.dot_natural_key", _RULES, "function", ("s",)),
    Name("transformers.core_model_loading:_weight_conversions", _RULES),
    Name(
        "transformers.modeling_utils:_checkpoint_conversion_mapping",
        "renamings of classes from before there were rules",
        optional=True,
    ),
    Name("transformers.core_model_loading.WeightConverter.reverse_transform", _RULES, "function"),
    Name("transformers.core_model_loading.WeightConverter.rename_source_key", _RULES, "function", ("source_key",)),
    Name(
        "transformers.core_model_loading.WeightConverter.add_tensor",
        _RULES,
        "function",
        ("target_key", "source_key", "source_pattern", "future"),
    ),
    Name(
        "transformers.core_model_loading.WeightConverter.convert", _RULES, "function", ("layer_name", "model", "config")
    ),
    Name("transformers.core_model_loading:operations", _RULES),
    Name("transformers.core_model_loading:source_patterns", _RULES),
    Name("transformers.core_model_loading:compiled_sources", _RULES),
    Name("transformers.core_model_loading:scope_prefix", _RULES),
    Name("transformers.core_model_loading:full_layer_name", _RULES),
)

PEFT = (
    Name("peft.tuners.tuners_utils.BaseTuner", _LAYERS, "type"),
    Name("peft.tuners.tuners_utils.BaseTunerLayer", _LAYERS, "type"),
    Name(
        "peft.tuners.tuners_utils.BaseTunerLayer._all_available_adapter_names",
        "layers name their adapters in several stores",
        "function",
    ),
    Name("peft.utils.other.AuxiliaryTrainingWrapper", _LAYERS, "type"),
    Name("peft.tuners.trainable_tokens.TrainableTokensLayer", _LAYERS, "type"),
    Name("peft.tuners.adaption_prompt.AdaptedAttention", _LAYERS, "type"),
    Name("peft.tuners.lora.ParamWrapper", _LAYERS, "type"),
    Name("peft.tuners.lora.layer:_did_swap_in_out_features", "how a factor of an expert parameter is laid out"),
    Name("peft.tuners.lora.model:tied_adapter", "what a layer was made from has no memory", optional=True),
    Name("peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING", "adapters begin by peft's own code, one module at a time", "dict"),
    Name("peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING", "what peft assumes where a setting is absent", "dict"),
    Name(
        "peft.tuners.lora.LoraModel._create_and_replace",
        "adapters begin by peft's own code, one module at a time",
        "function",
        ("lora_config", "adapter_name", "target", "target_name", "parent", "current_key"),
    ),
    Name("accelerate.hooks:_hf_hook", "hooks of the real module are not a stand-in's"),
)

DIFFUSERS = (
    Name(
        "diffusers.models.modeling_utils.ModelMixin",
        "the base of its models is looked for where it was imported",
        "type",
    ),
    Name("diffusers.configuration_utils:_internal_dict", "a frozen configuration can only be replaced"),
    Name("diffusers.configuration_utils:_class_name", "the entry that names a configuration's class"),
)

HUGGINGFACE_HUB = (
    Name(
        "huggingface_hub.file_download.repo_folder_name",
        "the name of a model's folder in a cache",
        "function",
        ("repo_id", "repo_type"),
    ),
    Name("huggingface_hub.hub_mixin.ModelHubMixin", "the mixin is looked for where it was imported", "type"),
    Name("huggingface_hub.hub_mixin:_hub_mixin_config", "the arguments that rebuild a model"),
)

SENTENCE_TRANSFORMERS = (
    Name(
        "sentence_transformers.base.model:_get_model_config",
        "the settings beside its modules",
        optional=True,
    ),
)

_TRAINER = "no callback or public method stands where the Trainer writes and reads its checkpoints"

_RUN_EPOCH = ("epoch", "epochs_trained", "steps_trained_in_current_epoch")

TRANSFORMERS_TRAINER = (
    Name("transformers.Trainer._run_epoch", "which epoch a checkpoint is of", "function", _RUN_EPOCH),
    Name("transformers.Trainer._save_checkpoint", _TRAINER, "function", ("model", "trial")),
    Name("transformers.Trainer._load_from_checkpoint", _TRAINER, "function", ("resume_from_checkpoint", "model")),
    Name("transformers.Trainer._load_optimizer_and_scheduler", _TRAINER, "function", ("checkpoint",)),
    Name("transformers.Trainer._load_scaler", _TRAINER, "function", ("checkpoint",)),
    Name("transformers.Trainer._load_rng_state", _TRAINER, "function", ("checkpoint",)),
    Name("transformers.Trainer._load_best_model", _TRAINER, "function"),
    Name("transformers.Trainer._save", "a subclass that overrides it would never see it called", "function"),
    Name("transformers.Trainer._save_optimizer_and_scheduler", "likewise", "function"),
    Name("transformers.Trainer._save_scaler", "likewise", "function"),
    Name("transformers.Trainer._save_rng_state", "likewise", "function"),
)

_PREPARED = "no public attribute lists what save_state would save"

ACCELERATE = (
    Name("accelerate.accelerator:_models", _PREPARED),
    Name("accelerate.accelerator:_optimizers", _PREPARED),
    Name("accelerate.accelerator:_schedulers", _PREPARED),
    Name("accelerate.accelerator:_dataloaders", _PREPARED),
    Name("accelerate.accelerator:_custom_objects", _PREPARED),
)

#: By module of this package: the names that it reads.
BY_MODULE: Mapping[str, tuple[Name, ...]] = {
    "torch_modules": TORCH_MODULES,
    "torch_tensors": TORCH_TENSORS,
    "torch_dispatch": TORCH_DISPATCH,
    "torch_distributed": TORCH_DISTRIBUTED,
    "torch_checkpoint": TORCH_CHECKPOINT,
    "torch_optim": TORCH_OPTIM,
    "python": PYTHON,
    "transformers": TRANSFORMERS,
    "transformers_rules": TRANSFORMERS_RULES,
    "transformers_trainer": TRANSFORMERS_TRAINER,
    "accelerate": ACCELERATE,
    "peft": PEFT,
    "diffusers": DIFFUSERS,
    "huggingface_hub": HUGGINGFACE_HUB,
    "sentence_transformers": SENTENCE_TRANSFORMERS,
}

ALL: tuple[Name, ...] = tuple(name for names in BY_MODULE.values() for name in names)


def _dtensor() -> object:
    """Wants a process group."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(torch.zeros(2), init_device_mesh("cpu", (1,)), [Replicate()])


def _optimizer() -> object:
    import torch

    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


#: Objects whose attributes are on the list.
EXAMPLES: Mapping[str, Callable[[], object]] = {"dtensor": _dtensor, "optimizer": _optimizer}
