#!/usr/bin/env bash
# The workflow through a real SLURM on this machine. Where that cannot be had it says so and ends with status 0.
# Arguments go to pytest. The plugins are put into .venv-cluster/, beside which .venv/ stays as it is: with the plugin
# and SLURM's commands installed but no controller running, every start of Snakemake would wait ten seconds for one.
set -euo pipefail
cd "$(dirname "$0")/../.."

cannot() {
    echo "make test-cluster: NOT RUN: $1" >&2
    exit 0
}

[ "$(id -u)" = 0 ] || cannot "it takes root to start SLURM's daemons"
if ! command -v slurmctld > /dev/null || ! command -v slurmd > /dev/null || ! command -v munged > /dev/null; then
    command -v apt-get > /dev/null || cannot "there is neither a slurmctld nor an apt-get to install one"
    export DEBIAN_FRONTEND=noninteractive
    packages=(slurmctld slurmd slurm-client munge)
    {
        timeout 120 apt-get update -qq &&
            timeout 300 apt-get install -y -qq --no-install-recommends "${packages[@]}"
    } > /dev/null 2>&1 || cannot "Debian's packages ${packages[*]} cannot be installed"
fi

if [ ! -x .venv-cluster/bin/python ] || [ requirements-cluster.lock -nt .venv-cluster/.installed ]; then
    .venv/bin/python -m venv --clear --without-pip .venv-cluster
    site=$(.venv-cluster/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/beside.pth"
    .venv/bin/python -m pip install --quiet --no-deps --target "$site" --requirement requirements-cluster.lock ||
        cannot "the plugins of requirements-cluster.lock cannot be installed"
    touch .venv-cluster/.installed
fi

# What a killed run of this script left.
left=$(readlink /etc/slurm/slurm.conf || true)
case "$left" in /tmp/slurm-node-*/slurm.conf) tests/cluster/slurm/down.sh "${left%/slurm.conf}" && sleep 1 ;; esac
directory=$(mktemp -d /tmp/slurm-node-XXXXXX)
trap 'tests/cluster/slurm/down.sh "$directory"; sleep 1; rm -rf "$directory"' EXIT
tests/cluster/slurm/up.sh "$directory" || cannot "SLURM does not start here"
HYDRA_SLURM=$directory HYDRA_SLURM_CACHE_SECONDS=0.5 .venv-cluster/bin/python -m pytest -s tests/cluster "$@"
