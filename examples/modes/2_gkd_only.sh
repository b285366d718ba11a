#!/usr/bin/env bash
# GKD only: pure distillation on the student's own responses. Needs start_teacher.sh running.
# Expect actor/teacher_kl_loss to fall from about 2.4 nats per token; no reward, no pg_loss; data/is_on_policy 1.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec python3 -m "$MODULE" \
  --config-path=config \
  --config-name=ppo_trainer \
  actor_rollout_ref.model.path="$MODELS/student_start" \
  actor_rollout_ref.actor.use_teacher_kl_loss=true \
  actor_rollout_ref.actor.gkd_only_mode=true \
  actor_rollout_ref.actor.teacher_kl_coef=1.0 \
  actor_rollout_ref.teacher.server_ip="$TEACHER_HOST" \
  actor_rollout_ref.teacher.server_port="$TEACHER_PORT" \
  actor_rollout_ref.rollout.n=1 \
  data.train_files="$MODELS/data/train.parquet" \
  trainer.total_epochs=2 \
  "${small[@]}" "$@"
