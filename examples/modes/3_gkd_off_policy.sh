#!/usr/bin/env bash
# GKD only with off-policy mixing: of the questions, 70 % are answered by the student, 30 % by the data.
# Needs start_teacher.sh running.
# Expect data/is_on_policy 1 1 1 0 1 1 0 1 1 0 and so on, and a lower actor/teacher_kl_loss in the off-policy steps.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec python3 -m "$MODULE" \
  --config-path=config \
  --config-name=ppo_trainer \
  actor_rollout_ref.model.path="$MODELS/student_start" \
  actor_rollout_ref.actor.use_teacher_kl_loss=true \
  actor_rollout_ref.actor.gkd_only_mode=true \
  actor_rollout_ref.teacher.server_ip="$TEACHER_HOST" \
  actor_rollout_ref.teacher.server_port="$TEACHER_PORT" \
  trainer.enable_off_policy=true \
  trainer.gkd_lambda=0.7 \
  data.train_files="$MODELS/data/train.parquet" \
  data.off_policy_files="$MODELS/data/train.parquet" \
  trainer.total_epochs=2 \
  "${small[@]}" "$@"
