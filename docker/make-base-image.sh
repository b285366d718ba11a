#!/usr/bin/env bash
# Make a stand-in for the images' base where no registry is reachable: a minimal Debian with its own Python, and with
# the certificates that this machine trusts beside Debian's. Root only: debootstrap makes device nodes.
#   docker/make-base-image.sh [NAME]
set -euo pipefail

image=${1:-python:3.11-slim-bookworm}
suite=bookworm # its Python is 3.11, the version that the locks are for

refuse() {
    echo "$1" >&2
    exit 1
}
[ "$(id -u)" = 0 ] || refuse "this is user $(id -u), but debootstrap makes device nodes: run it as root"
for program in debootstrap docker; do
    command -v "$program" >/dev/null || refuse "$program is missing: apt-get install debootstrap docker.io"
done

# The mirror that this machine's own packages come from, in either form of apt's sources.
mirror=$({ cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null || true; } |
    awk '/^URIs: *http/ && $2 ~ /debian\/?$/ { print $2; exit }
         /^deb / { for (i = 2; i < NF; i++) if ($i ~ /^http.*\/debian\/?$/) { print $i; exit } }')
[ -n "$mirror" ] || refuse "apt's sources name no Debian mirror over HTTP: this needs one, on Debian or beside its packages"

root=$(mktemp -d)
# An interrupted debootstrap leaves the kernel's own file systems mounted there.
trap 'umount --lazy "$root/proc" "$root/sys" 2>/dev/null || true; rm -rf --one-file-system "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python-is-python3,python3,python3-pip,python3-venv \
    "$suite" "$root" "$mirror" >"$root.log" 2>&1 ||
    { tail -n 20 "$root.log" >&2; rm -f "$root.log"; refuse "debootstrap failed; its last lines stand above"; }
rm -f "$root.log"

for certificate in /usr/local/share/ca-certificates/*.crt; do
    if [ -f "$certificate" ]; then cp "$certificate" "$root/usr/local/share/ca-certificates/"; fi
done
env --unset TMPDIR chroot "$root" update-ca-certificates >/dev/null # in there it is no folder
# Debian keeps pip from changing the system's Python; in an image there is nobody else to protect.
rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/* "$root"/var/log/*

tar -C "$root" -c . | docker import --change 'CMD ["python3"]' - "$image" >/dev/null
echo "$image: $(docker image inspect --format '{{.Size}}' "$image" | numfmt --to=si)B"
