#!/usr/bin/env bash
# Stop what up.sh started: down.sh DIRECTORY.
set -uo pipefail
directory=$1
ours() {
    [ "$(readlink /etc/slurm/slurm.conf)" = "$directory/slurm.conf" ]
}
if ours && [ -S "$directory/munge.socket" ]; then
    timeout 10 scancel --user root 2>/dev/null
    sleep 1
fi
for daemon in slurmd-node1 slurmd-node2 slurmctld munged; do
    if [ -s "$directory/$daemon.pid" ]; then
        kill "$(cat "$directory/$daemon.pid")" 2>/dev/null
    fi
done
# Without a configuration SLURM's commands fail at once, where with one they would wait for a controller.
if ours; then
    rm -f /etc/slurm/slurm.conf /etc/slurm/gres.conf
fi
exit 0
