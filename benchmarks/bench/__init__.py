"""Benchmarks of saves and loads, as ratios to raw parallel input and output measured in the same run."""
