"""Runnable examples. `sort_digits` is the task of the demo, the tests and the benchmarks."""
