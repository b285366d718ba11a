#!/usr/bin/env bash
# The teacher of the other scripts, until Ctrl-C. Expect "ready" with its addresses after half a minute.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec python3 -m teacher_service serve --model "$MODELS/teacher" \
  --grpc-port "$TEACHER_PORT" --http-port "$((TEACHER_PORT + 1))" \
  --max-model-len 64 --kv-cache-bytes $((64 * 2 ** 20)) "$@"
