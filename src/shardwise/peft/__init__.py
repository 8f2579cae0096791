"""Adapters: which tensors they are, under which names, with which settings; fresh ones and restored ones."""
