#!/bin/bash
# Submitted by launchers/slurm_folds.sh behind its array: writes the tables of what was trained.
#SBATCH --job-name=aullm-tables
#SBATCH --nodes=1
#SBATCH --ntasks=1
site=${AULLM_SITE:-launchers/site.sh}
[ ! -e "$site" ] || . "$site" || { echo "slurm_tables.sh: error: $site failed" >&2; exit 2; }
status=0
while read -ra run; do
  folder=$(${AULLM_CONTAINER:-} aullm-dist config "${run[@]}" | sed -n 's/^  output: //p')
  ${AULLM_CONTAINER:-} aullm-dist evaluate "$folder" || status=$?
done < <(if [ -n "${AULLM_RUNS:-}" ]; then cat "$AULLM_RUNS"; else echo "$@"; fi)
exit $status
