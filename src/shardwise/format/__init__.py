"""Codecs: safetensors headers, weight indexes, manifests, JSON state, DCP metadata. Pure bytes, no tensors moved.

What reads a file raises ``CheckpointNotFoundError`` where nothing is there, and ``StorageError`` where the file system
refuses.
"""
