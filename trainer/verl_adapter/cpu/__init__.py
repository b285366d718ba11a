"""verl on a machine without an accelerator: development, CI and the demo. Active only with `trainer.device=cpu`."""
