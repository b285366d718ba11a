"""Measurements: each writes a JSON file to `benchmarks/results/`. Not part of the tests."""
