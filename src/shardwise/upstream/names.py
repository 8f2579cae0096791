"""Every private or undocumented name of another library that shardwise depends on, each once, with the reason.

A name is written as it is reached. ``torch.nn.Module()._parameters`` is an attribute of an instance that is made
without arguments, ``@dtensor._spec`` one of an object of the tests. ``torch.optim.lr_scheduler:_last_lr`` is a word
that a module's source has to contain: what libraries set on instances, write into files, or pass by keyword. The tests
in ``tests/upstream`` look each of them up in the installed release, and compare the list with the code of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Name(NamedTuple):
    """A name that a library may drop without notice."""

    path: str  #: How it is reached; what is in front of the first dot is the library, or an example.
    why: str  #: What it is for, and why nothing documented does.
    kind: str = ""  #: Name of the type that it has to be of or a subclass of; empty for a word in a source.
    takes: tuple[str, ...] = ()  #: Parameters that it has to have, where it is called with these.
    optional: bool = False  #: Whether shardwise does without it where a release lacks it.


def _called(place: str, why: str, **methods: str) -> tuple[Name, ...]:
    """Functions of one place that serve one purpose, each with the parameters that it has to have."""
    return tuple(Name(f"{place}.{name}", why, "function", tuple(takes.split())) for name, takes in methods.items())


def _several(start: str, why: str, names: str, kind: str = "") -> tuple[Name, ...]:
    """Several names that begin alike and serve one purpose."""
    return tuple(Name(start + name, why, kind) for name in names.split())


_TREE = "torch's own listing of state takes three times as long, and calls hooks that have to be looked at first"
_HOOKS = "whether a hook changes what is saved or loaded shows nowhere else"
_OWN_STATE = "one module's own state, without that of the modules below it"
_DTENSOR = "the public attributes record gradients, wait for collectives, or take ten times as long for each tensor"
_NAMES = "it stands in the names of a wrapped module's tensors, and has to come out of them"
_QUANTIZED = "no public function makes one from integers that are there already"
_HOOKED = "an optimizer with hooks is saved by its own code"
_SCHEDULES = "a key of schedulers' states, which are put together from those of several pipeline stages"
_TRACED = "what conversion rules end in, to be traced"
_MESSAGES = "a module that communicates to give its state is refused"
_RULES = "how files name and cut what models hold is in rules that only transformers' own loader is meant to read"
_META = "whether a class loads an export is asked of the library's own loader, without memory"
_LAYERS = "which modules are an adapter's is known from their classes alone"
_BEGIN = "adapters begin by peft's own code, one module at a time"
_DCP = "DCP's files name it, and are read without unpickling"
_RANKS = "what files with one rank's DTensors call it"
_LATER = "works after destroy_process_group(), for saves in the background"
_FLOAT32 = "the dtypes in which a base model is loaded"
_TRAINER = "no callback or public method stands where the Trainer writes and reads its checkpoints"
_OVERRIDDEN = "a subclass that overrides it would never see it called"
_PREPARED = "no public attribute lists what save_state would save"

_BUILT_IN = "builtin_function_or_method"

_MODULE = "torch.nn.Module"
_DIST = "torch.distributed"
_PYTHON_DISPATCH = "torch.utils._python_dispatch"
_COLLECTIVE = "torch.distributed._functional_collectives.AsyncCollectiveTensor"
_PRETRAINED = "transformers.modeling_utils.PreTrainedModel"
_AUTO = "transformers.models.auto.modeling_auto"
_LOADING = "transformers.core_model_loading"
_TUNERS = "peft.tuners"

#: By module of this package: the names that it reads.
BY_MODULE: Mapping[str, tuple[Name, ...]] = {
    "torch_modules": (
        *_several(f"{_MODULE}()", _TREE, "._parameters ._buffers ._modules", "dict"),
        Name(f"{_MODULE}()._non_persistent_buffers_set", "which buffers are not part of the state", "set"),
        Name(f"{_MODULE}()._state_dict_hooks", _HOOKS, "dict"),
        Name(f"{_MODULE}()._state_dict_pre_hooks", _HOOKS + "; FSDP2's puts sharded parameters back", "dict"),
        Name(f"{_MODULE}()._load_state_dict_pre_hooks", _HOOKS, "dict"),
        Name(f"{_MODULE}()._load_state_dict_post_hooks", "they are called where tensors were read directly", "dict"),
        *_called(
            _MODULE,
            _OWN_STATE,
            _save_to_state_dict="destination prefix keep_vars",
            _load_from_state_dict="state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs",
        ),
        Name(f"{_MODULE}._version", "noted beside a module's state, and handed back to it", "int"),
        Name(f"{_MODULE}().state_dict()._metadata", "versions beside the state, as torch's loading asks", "dict"),
        *_called(_MODULE, "parameters of a meta model get memory in place, ties and DTensors among them", _apply="fn"),
        Name("torch.nn.modules.module._IncompatibleKeys", "what load_state_dict answers, for post-hooks", "type"),
        Name("torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX", "the name of extra state among the entries", "str"),
        Name("torch.nn.modules.batchnorm._NormBase", "its loading copies only once all its tensors are there", "type"),
        Name("torch.nn.modules.activation:_reset_parameters", "nn.MultiheadAttention gives its initial values by it"),
        Name("torch._dynamo.eval_frame:_orig_mod", _NAMES),
        Name(f"{_DIST}.algorithms._checkpoint.checkpoint_wrapper:_checkpoint_wrapped_module", _NAMES),
        Name("torch.distributed.fsdp._common_utils:_fsdp_wrapped_module", _NAMES),
        Name(f"{_DIST}.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel", "FSDP1 is refused", "type"),
        Name("torch.distributed._composable.replicate.DDP", "replicate() puts a class made from it in front", "type"),
        *_several("@optimizer._optimizer_", _HOOKED, "state_dict_pre_hooks state_dict_post_hooks", "dict"),
        *_several("@optimizer._optimizer_load_", _HOOKED, "state_dict_pre_hooks state_dict_post_hooks", "dict"),
        *_several("torch.optim.lr_scheduler:", _SCHEDULES, "_last_lr _step_count _milestones _schedulers"),
        Name("torch.optim.lbfgs:prev_loss", "ranks may differ in it: it is set before it is read"),
    ),
    "torch_tensors": (
        Name("@dtensor._local_tensor", _DTENSOR, "Tensor"),
        Name("@dtensor._spec", _DTENSOR, "DTensorSpec"),
        Name("@dtensor._spec.mesh", _DTENSOR, "DeviceMesh"),
        Name("@dtensor._spec.placements", _DTENSOR, "tuple"),
        Name("@dtensor._spec.tensor_meta.shape", _DTENSOR, "Size"),
        *_called(f"{_DIST}.device_mesh.DeviceMesh", "the dimensions around a sliced mesh", _get_root_mesh=""),
        Name("torch.distributed.tensor._dtensor_spec.DTensorSpec", "what a DTensor is made from", "type"),
        Name(f"{_DIST}.tensor.placement_types._StridedShard", "mesh dimensions that cut one tensor dimension", "type"),
        *_called(
            "torch.distributed.tensor._utils",
            "the region that DCP would record",
            compute_local_shape_and_global_offset="global_shape mesh placements",
        ),
        Name(_COLLECTIVE, "a result that may not have come yet", "type"),
        *_called(_COLLECTIVE, "its memory is read once it has come", trigger_wait=""),
        *_called("torch.nn.parameter", "a parameter without a shape", is_lazy="param"),
        *_called(_PYTHON_DISPATCH, "a tensor that consists of others", is_traceable_wrapper_subclass="t"),
        Name("torch.Tensor._make_wrapper_subclass", "has a shape and no memory; torch's notes use it", _BUILT_IN),
        Name("torch.empty(1).untyped_storage()._cdata", "identifies storages without memory", "int"),
        Name("torch._C.DisableTorchFunctionSubclass", "reads a subclass's memory whatever it overrides", "type"),
        Name("torch._neg_view", "memory that is read with the opposite sign", _BUILT_IN),
        *_several("torch._make_per_", _QUANTIZED, "tensor_quantized_tensor channel_quantized_tensor", _BUILT_IN),
    ),
    "torch_dispatch": (
        Name("torch._ops.OpOverload", "what a dispatch mode is given", "type"),
        Name("torch.ops.aten.add_.Tensor._schema.name", "which operation runs", "str"),
        Name(f"{_PYTHON_DISPATCH}.TorchDispatchMode", "initial values are drawn by name; torch's notes use it", "type"),
        *_called("torch.utils._pytree", "tensors anywhere among an operation's arguments", tree_map="func tree"),
        *_several("torch.ops.aten.", _TRACED, "_unsafe_view _reshape_alias _to_copy", "OpOverloadPacket"),
        *_several("torch.ops.", _MESSAGES, "_c10d_functional _c10d_functional_autograd", "_OpNamespace"),
        Name("torch._subclasses.fake_tensor.FakeTensorMode", "a .bin file is looked at without its values", "type"),
        Name("torch.serialization:_checkpoint_offset", "where in a .bin file a tensor lies"),
    ),
    "torch_distributed": (
        *_called(f"{_DIST}.distributed_c10d", "keys tell missing ranks from lost ones", _get_default_store=""),
        Name("torch._C._distributed_c10d.Store", "the type of that store", "type"),
        *_several(f"{_DIST}.ProcessGroup.", _LATER, "allgather broadcast allreduce alltoall_base send recv", _BUILT_IN),
        Name(
            f"{_DIST}.checkpoint.filesystem._StorageInfo",
            _DCP,
            "type",
            ("relative_path", "offset", "length", "transform_descriptors"),
        ),
        Name(f"{_DIST}.checkpoint.metadata._MEM_FORMAT_ENCODING", _DCP, "type"),
        Name("torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING", _DCP, "type"),
        *_called("torch.serialization", _DCP, _get_layout=""),
        *_several("torch.distributed.tensor.", _RANKS, "_api:_local_tensor _api:_spec placement_types:_StridedShard"),
    ),
    "python": (
        Name("threading._register_atexit", "a save ends before executors close", "function", ("func",), True),
        Name("numpy.random.RandomState()._bit_generator", "the state of one of numpy's old generators", "object"),
    ),
    "transformers": (
        Name(f"{_PRETRAINED}._auto_class", "code of one's own travels with a checkpoint", "object"),
        Name(f"{_PRETRAINED}._tied_weights_keys", "names of one tensor, whatever is configured", "object"),
        Name("transformers.modeling_utils:all_tied_weights_keys", "names of one tensor, as configured"),
        Name(f"{_PRETRAINED}._keys_to_ignore_on_load_missing", "names that a file may lack", "object"),
        Name(f"{_PRETRAINED}._keys_to_ignore_on_load_unexpected", "names that a file may have", "object"),
        Name(f"{_PRETRAINED}._keys_to_ignore_on_save", "names that a file has to lack", "object"),
        *_several(f"{_PRETRAINED}._keep_in_fp32_", _FLOAT32, "modules modules_strict", "object"),
        Name("transformers.initialization:_is_hf_initialized", "which tensors initialisation leaves alone"),
        Name("transformers.configuration_utils:_name_or_path", "a path of this machine, which no file has to name"),
        Name("transformers.generation.configuration_utils:_from_model_config", "where a generation config came from"),
        Name(f"{_AUTO}.MODEL_FOR_CAUSAL_LM_MAPPING", "the classes that open a configuration", "_LazyAutoMapping"),
        *_called(_LOADING, _META, convert_and_load_state_dict_in_model="model state_dict load_config"),
        Name("transformers.modeling_utils.LoadStateDictConfig", _META, "type", ("device_map", "weight_mapping")),
        *_called(_PRETRAINED, _META, mark_tied_weights_as_initialized="loading_info"),
        *_called(_PRETRAINED, _META, tie_weights="missing_keys recompute_mapping"),
        *_called(_PRETRAINED, _META, _adjust_missing_and_unexpected_keys="loading_info"),
        *_called("transformers.initialization", _META, no_init_weights="", no_tie_weights=""),
        *_called("transformers.initialization", _META, meta_device_safe_creation_ops=""),
        *_called("transformers.conversion_mapping", _RULES, get_model_conversion_mapping="model add_legacy"),
        *_several(f"{_LOADING}.", _RULES, "WeightConverter WeightRenaming PrefixChange", "type"),
        *_called(_LOADING, _RULES, dot_natural_key="s"),
        *_called(f"{_LOADING}.WeightConverter", _RULES, reverse_transform="", rename_source_key="source_key"),
        *_called(f"{_LOADING}.WeightConverter", _RULES, add_tensor="target_key source_key source_pattern future"),
        *_called(f"{_LOADING}.WeightConverter", _RULES, convert="layer_name model config"),
        *_several(f"{_LOADING}:", _RULES, "_weight_conversions operations source_patterns compiled_sources"),
        *_several(f"{_LOADING}:", _RULES, "scope_prefix full_layer_name"),
        Name("transformers.modeling_utils:_checkpoint_conversion_mapping", "renamings of before", optional=True),
    ),
    "transformers_trainer": (
        *_called(
            "transformers.Trainer",
            "which epoch a checkpoint is of",
            _run_epoch="epoch epochs_trained steps_trained_in_current_epoch",
        ),
        *_called("transformers.Trainer", _TRAINER, _save_checkpoint="model trial", _load_best_model=""),
        *_called("transformers.Trainer", _TRAINER, _load_from_checkpoint="resume_from_checkpoint model"),
        *_called("transformers.Trainer", _TRAINER, _load_optimizer_and_scheduler="checkpoint"),
        *_called("transformers.Trainer", _TRAINER, _load_scaler="checkpoint", _load_rng_state="checkpoint"),
        *_several("transformers.Trainer.", _OVERRIDDEN, "_save _save_optimizer_and_scheduler", "function"),
        *_several("transformers.Trainer.", _OVERRIDDEN, "_save_scaler _save_rng_state", "function"),
    ),
    "peft": (
        *_several(f"{_TUNERS}.tuners_utils.", _LAYERS, "BaseTuner BaseTunerLayer", "type"),
        *_called(f"{_TUNERS}.tuners_utils.BaseTunerLayer", "names are in many stores", _all_available_adapter_names=""),
        Name("peft.utils.other.AuxiliaryTrainingWrapper", _LAYERS, "type"),
        Name(f"{_TUNERS}.trainable_tokens.TrainableTokensLayer", _LAYERS, "type"),
        Name(f"{_TUNERS}.adaption_prompt.AdaptedAttention", _LAYERS, "type"),
        Name(f"{_TUNERS}.lora.ParamWrapper", _LAYERS, "type"),
        Name(f"{_TUNERS}.lora.layer:_did_swap_in_out_features", "how a factor of an expert parameter is laid out"),
        Name(f"{_TUNERS}.lora.model:tied_adapter", "what a layer was made from has no memory", optional=True),
        Name("peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING", _BEGIN, "dict"),
        Name("peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING", "what peft assumes where a setting is absent", "dict"),
        *_called(
            f"{_TUNERS}.lora.LoraModel",
            _BEGIN,
            _create_and_replace="lora_config adapter_name target target_name parent current_key",
        ),
        Name("accelerate.hooks:_hf_hook", "hooks of the real module are not a stand-in's"),
    ),
    "hugging_face": (
        *_several("accelerate.accelerator:", _PREPARED, "_models _optimizers _schedulers _dataloaders _custom_objects"),
        Name("diffusers.models.modeling_utils.ModelMixin", "the base of its models, where it was imported", "type"),
        Name("diffusers.configuration_utils:_internal_dict", "a frozen configuration can only be replaced"),
        Name("diffusers.configuration_utils:_class_name", "the entry that names a configuration's class"),
        *_called("huggingface_hub.file_download", "a model's folder in a cache", repo_folder_name="repo_id repo_type"),
        Name("huggingface_hub.hub_mixin.ModelHubMixin", "the mixin is looked for where it was imported", "type"),
        Name("huggingface_hub.hub_mixin:_hub_mixin_config", "the arguments that rebuild a model"),
        Name("sentence_transformers.base.model:_get_model_config", "the settings beside its modules", optional=True),
    ),
}

ALL: tuple[Name, ...] = tuple(name for names in BY_MODULE.values() for name in names)
