"""A distillation trainer on verl: GRPO, GKD, or both, with the teacher behind a network."""
