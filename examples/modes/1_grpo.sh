#!/usr/bin/env bash
# Pure GRPO, the baseline: no teacher is needed or contacted.
# Expect actor/pg_loss and critic/score/mean in each step's line and no gkd/ metric; the score hardly moves in 20 steps.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec python3 -m "$MODULE" \
  --config-path=config \
  --config-name=ppo_trainer \
  actor_rollout_ref.model.path="$MODELS/student_start" \
  actor_rollout_ref.actor.use_teacher_kl_loss=false \
  actor_rollout_ref.rollout.n=4 \
  data.train_files="$MODELS/data/train.parquet" \
  trainer.total_epochs=2 \
  "${small[@]}" "$@"
