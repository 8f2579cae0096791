"""Checkpoints that other tools write one file per rank, or in flat partitions: recognised, checked, opened as sources.

Nothing is unpickled: `shardwise.format.torch_archive` reads a file as data, and what its tree says is taken only where
it is of a class on a list and of the form that this class has. Tensors become pieces with their place in the files, so
that byte ranges are read as of any other source.
"""
