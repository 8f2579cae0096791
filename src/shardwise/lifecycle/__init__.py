"""Names, publication, pointers, retention, resolving, preemption: policies and local files, no tensors."""
