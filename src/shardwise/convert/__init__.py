"""Native names and tensors to the Hugging Face hub's and back, as views, with nothing known about any model.

`derive` (from transformers' rules) or `derive_from_adapter` gives a `Conversion`; `check_round_trip` makes sure that it
loses nothing; `for_files` puts it into the names of files to load; `to_hub` applies it to a rank's tensors. A model
for which `kept_out` finds no conversion needs none of these.
"""

from shardwise.convert.adapter import (
    StateDictAdapter,
    adapter_of,
    check_adapter,
    check_round_trip,
    conversion_of,
    derive_for,
    derive_from_adapter,
)
from shardwise.convert.derive import derive, identity, kept_out
from shardwise.convert.files import for_files
from shardwise.convert.mapping import rename, revert
from shardwise.convert.rules import (
    Computed,
    Conversion,
    Converted,
    HeldGroup,
    HubPart,
    HubTensor,
    NativeSpec,
    to_hub,
)

__all__ = [
    "Computed",
    "Conversion",
    "Converted",
    "HeldGroup",
    "HubPart",
    "HubTensor",
    "NativeSpec",
    "StateDictAdapter",
    "adapter_of",
    "check_adapter",
    "check_round_trip",
    "conversion_of",
    "derive",
    "derive_for",
    "derive_from_adapter",
    "for_files",
    "identity",
    "kept_out",
    "rename",
    "revert",
    "to_hub",
]
