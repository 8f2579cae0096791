"""Saving: what a model, an adapter and a whole checkpoint write, and publishing it."""
