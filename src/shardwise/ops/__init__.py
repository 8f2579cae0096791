"""Offline work on checkpoints, by one process: verify, inspect, consolidate. Returns data, never prints."""
