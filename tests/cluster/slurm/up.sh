#!/usr/bin/env bash
# Start a SLURM of two nodes below DIRECTORY: up.sh DIRECTORY. Its configuration is linked from /etc/slurm, where it
# is found inside of jobs too (the plugin takes SLURM_CONF away there); one that is there already is not touched.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
directory=$1
host=$(hostname -s)

mkdir -p "$directory/state" "$directory"/spool/node{1,2}
chmod 755 "$directory"
sed "s|@DIRECTORY@|$directory|g; s|@HOST@|$host|g" "$here/slurm.conf" > "$directory/slurm.conf"
# Two "GPUs" per node: device files that do no harm.
printf 'NodeName=%s Name=gpu File=/dev/%s\n' node1 null node1 zero node2 null node2 zero > "$directory/gres.conf"
if [ ! -s "$directory/munge.key" ]; then
    (umask 077 && head -c 1024 /dev/urandom > "$directory/munge.key")
fi

mkdir -p /etc/slurm
for file in slurm.conf gres.conf; do
    if [ -e "/etc/slurm/$file" ]; then
        echo "there is a /etc/slurm/$file already: this machine has a SLURM of its own" >&2
        exit 1
    fi
    ln -sfn "$directory/$file" "/etc/slurm/$file"
done
munged --force --key-file="$directory/munge.key" --socket="$directory/munge.socket" \
    --pid-file="$directory/munged.pid" --seed-file="$directory/munge.seed" \
    --log-file="$directory/munged.log" --num-threads=2
slurmctld -c
slurmd -N node1
slurmd -N node2
for _ in $(seq 100); do
    if [ "$(sinfo -h -N -o %t 2>/dev/null | uniq -c | xargs)" = "2 idle" ]; then
        exit 0
    fi
    sleep 0.2
done
sinfo >&2 || true
tail -n 20 "$directory"/*.log >&2
echo "SLURM did not start" >&2
exit 1
