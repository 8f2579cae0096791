"""Names of records: of those that a save writes beside a model, for resuming and for making the export later."""

from __future__ import annotations

#: Name of the metadata file in a directory of ``torch.distributed.checkpoint``.
DCP_METADATA_NAME = ".metadata"

#: The directory of notes, in a checkpoint's ``model``.
METADATA_DIR = ".hf_metadata"

#: The directory of files of single ranks, in a component's directory; readers of the component ignore it.
PER_RANK_DIR = "per_rank"

#: Name in the file -> number of the base model's file that has the tensor.
FILE_INDEX = "fqn_to_file_index_mapping.json"
#: Name in the file -> dtype in the base model.
FILE_DTYPES = "fqn_to_dtype_mapping.json"
#: Name in the file -> dtype in memory, where the export has another.
NATIVE_DTYPES = "native_dtypes.json"
#: Names of the base model's tensors that were carried over.
PASSED_THROUGH = "passed_through.json"
#: Names of tensors that shards hold for a resume and the model's class keeps out of its files.
KEPT_OUT = "kept_out.json"
#: Names of saved tensors that are no part of the exported model: a value head around it, a running average's counter.
APART = "apart.json"
#: Ties by configuration with both tensors saved, each under its own name: name -> the name it is tied to.
LOOSE_TIES = "loose_ties.json"
#: Settings with which a later export equals the one that the save would have made: see `EXPORT_KEYS`.
EXPORT = "export.json"
#: ``stem`` of file names, ``max_file_bytes``, the ``base`` model's place, its ``files`` in the order of numbers, and
#: the names of its tensors to carry over (``carried``).
EXPORT_KEYS = ("stem", "max_file_bytes", "base", "files", "carried")

#: Files that readers of an export do not need.
NOTES = frozenset({FILE_INDEX, FILE_DTYPES, NATIVE_DTYPES, PASSED_THROUGH, KEPT_OUT, APART, LOOSE_TIES, EXPORT})

#: Directory beside a model's tensors for state of its modules that is not tensors.
ASIDE_DIR = "module_state"
