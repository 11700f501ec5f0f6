#!/bin/bash
# One node of the cluster, started by tokenreel.sbatch on each:  node.sh HEAD PORT
set -euo pipefail
head=$1 port=$2
cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}
scratch=${SLURM_TMPDIR:-/tmp}/ray-$SLURM_JOB_ID
if [ "$(hostname -s)" = "${head%%.*}" ]; then
    exec ray start --head --block --port="$port" --num-cpus="$cpus" --include-dashboard=false --temp-dir="$scratch"
fi
until (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do
    sleep 1
done
exec ray start --block --address="$head:$port" --num-cpus="$cpus"
