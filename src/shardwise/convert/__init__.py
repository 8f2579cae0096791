"""Native names and tensors to the Hugging Face hub's and back, as views, with nothing known about any model.

`derive.derive` (from transformers' rules) or `adapter.derive_from_adapter` gives a `rules.Conversion`;
`adapter.check_round_trip` makes sure that it loses nothing; `derive.for_files` puts it into the names of files to load;
`rules.to_hub` applies it to a rank's tensors. A model for which `derive.kept_out` finds no conversion needs none of
these.
"""
