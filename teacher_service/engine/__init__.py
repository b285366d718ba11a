"""Engines: what turns token ids into logprobs."""
