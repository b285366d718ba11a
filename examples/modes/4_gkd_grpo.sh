#!/usr/bin/env bash
# GKD + GRPO: the policy gradient and the divergence over all four responses of each prompt. Needs start_teacher.sh
# running.
# Expect actor/loss = actor/pg_loss + 0.5 * actor/teacher_kl_loss and gkd/select_ratio 1.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec python3 -m "$MODULE" \
  --config-path=config \
  --config-name=ppo_trainer \
  actor_rollout_ref.model.path="$MODELS/student_start" \
  actor_rollout_ref.actor.use_teacher_kl_loss=true \
  actor_rollout_ref.actor.gkd_only_mode=false \
  actor_rollout_ref.actor.teacher_kl_coef=0.5 \
  actor_rollout_ref.teacher.server_ip="$TEACHER_HOST" \
  actor_rollout_ref.teacher.server_port="$TEACHER_PORT" \
  actor_rollout_ref.rollout.n=4 \
  algorithm.adv_estimator=grpo \
  data.train_files="$MODELS/data/train.parquet" \
  trainer.total_epochs=2 \
  "${small[@]}" "$@"
