#!/bin/sh
# Run the trainer with the overrides in $OVERRIDES/*.txt, in the order of the files' names: one override a line, empty
# lines and lines that begin with # left out. Of a key that stands twice the last value holds.
set -eu

for file in "${OVERRIDES:-/etc/gkd/overrides}"/*.txt; do
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in
        '' | '#'*) ;;
        *) set -- "$@" "$line" ;;
        esac
    done <"$file"
done

# The trainer answers SIGTERM with a checkpoint and exit code 0. For Kubernetes 0 means that the work is done, and a
# Job whose pod was moved to another node would end in the middle of its training: told to stop, this exits with 143.
python -m trainer.main_ppo "$@" &
trainer=$!
stopped=
trap 'stopped=1; kill -TERM "$trainer" 2>/dev/null || true' TERM
while :; do
    status=0
    wait "$trainer" || status=$?
    # a signal ends the wait, not the trainer
    kill -0 "$trainer" 2>/dev/null || break
done
if [ -n "$stopped" ] && [ "$status" -eq 0 ]; then
    echo "the trainer was told to stop and saved a checkpoint; run again, it goes on from there"
    status=143
fi
exit "$status"
