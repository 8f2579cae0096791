"""Codecs: safetensors headers, weight indexes, manifests, JSON state, DCP metadata. Pure bytes, no tensors moved."""
