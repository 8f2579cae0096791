"""Saves and loads of other libraries beside ours: each in processes of its own, in turns, on the same bytes."""
