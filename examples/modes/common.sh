# What the five commands share: where models and data lie, and what a small machine needs. Sourced, not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -x .venv/bin/python ]]; then PATH="$PWD/.venv/bin:$PATH"; fi

MODELS=${MODELS:-runs/models} # what `python -m examples.sort_digits.pretrain --output-dir` wrote
TEACHER_HOST=${TEACHER_HOST:-127.0.0.1}
TEACHER_PORT=${TEACHER_PORT:-15555}
MODULE=${MODULE:-trainer.main_ppo} # verl.trainer.main_ppo works too

if [[ ! -d $MODELS/teacher ]]; then
  python3 -m examples.sort_digits.pretrain --output-dir "$MODELS"
fi
MODELS=$(realpath "$MODELS") # Ray's workers have working directories of their own

# The task's sizes, and a machine without an accelerator. Leave these out on a cluster.
small=(
  trainer.device=cpu
  data.train_batch_size=32
  data.max_prompt_length=24
  data.max_response_length=8
  actor_rollout_ref.actor.ppo_mini_batch_size=16
  actor_rollout_ref.actor.optim.lr=1e-3
  actor_rollout_ref.rollout.max_model_len=32
  trainer.total_training_steps=20
  trainer.default_local_dir=checkpoints/modes
  trainer.resume_mode=disable
)
