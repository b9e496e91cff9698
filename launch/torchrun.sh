#!/usr/bin/env bash
# torchrun.sh N SCRIPT [ARGUMENTS]: runs a Python script on N ranks of this host under torchrun; needs no MPI.
# For several hosts set TORCHRUN_ARGS, e.g. "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29400".
set -euo pipefail
ranks=$1
shift
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
# shellcheck disable=SC2086  # TORCHRUN_ARGS is a list
exec torchrun ${TORCHRUN_ARGS:---standalone} --nproc-per-node "$ranks" "$@"
