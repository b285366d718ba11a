#!/bin/sh
# Wait until all arguments are there: a path (/models/teacher/config.json), or a port that accepts (host:port).
# For init containers, so that pods wait in the order in which things come, instead of failing in turns.
set -eu

# The first process of a container has no default action for SIGTERM: deleting the pod would take its whole grace period.
trap 'exit 143' TERM INT

is_there() {
    case $1 in
    /*) [ -e "$1" ] ;;
    *) python -c '
import socket
import sys

host, _, port = sys.argv[1].rpartition(":")
try:
    socket.create_connection((host, int(port)), timeout=2).close()
except OSError as exc:
    sys.exit(str(exc))
' "$1" ;;
    esac
}

for one in "$@"; do
    until is_there "$one"; do
        echo "waiting for $one"
        # in the background, since a trap waits for a command in the foreground
        sleep "${WAIT_PERIOD_S:-5}" &
        wait $!
    done
    echo "$one is there"
done
