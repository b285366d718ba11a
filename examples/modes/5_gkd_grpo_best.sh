#!/usr/bin/env bash
# GKD + GRPO with selection: the teacher scores the two best of each prompt's four responses. Needs start_teacher.sh
# running.
# Expect gkd/select_ratio 0.5, gkd/select_strategy 2 (best) and half of example 4's gkd/scored_tokens.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec python3 -m "$MODULE" \
  --config-path=config \
  --config-name=ppo_trainer \
  actor_rollout_ref.model.path="$MODELS/student_start" \
  actor_rollout_ref.actor.use_teacher_kl_loss=true \
  actor_rollout_ref.actor.gkd_only_mode=false \
  actor_rollout_ref.actor.teacher_kl_coef=0.5 \
  actor_rollout_ref.actor.gkd_select_strategy=best \
  actor_rollout_ref.actor.gkd_select_k=2 \
  actor_rollout_ref.teacher.server_ip="$TEACHER_HOST" \
  actor_rollout_ref.teacher.server_port="$TEACHER_PORT" \
  actor_rollout_ref.rollout.n=4 \
  algorithm.adv_estimator=grpo \
  data.train_files="$MODELS/data/train.parquet" \
  trainer.total_epochs=2 \
  "${small[@]}" "$@"
