#!/usr/bin/env bash
# mpirun.sh N SCRIPT [ARGUMENTS]: runs a Python script on N ranks under whichever mpirun is on the PATH.
# More arguments for mpirun itself (hosts, say) go into MPIRUN_ARGS.
set -euo pipefail
ranks=$1
shift

# Open MPI: allow root (containers), and more ranks than cores. The ofi byte-transfer layer takes a second to
# start, and only serves fabrics that want one-sided transfers.
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}
export OMPI_MCA_btl=${OMPI_MCA_btl:-^ofi}

# Ranks on one host share its cores between them.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

# shellcheck disable=SC2086  # MPIRUN_ARGS is a list
exec mpirun ${MPIRUN_ARGS:-} -n "$ranks" python "$@"
