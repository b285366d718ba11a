"""The fast route through vLLM: only response rows are scored, in the worker, and stay arrays all the way."""
