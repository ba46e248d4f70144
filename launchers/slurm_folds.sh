#!/bin/bash
# launchers/slurm_folds.sh FIRST-LAST[%AT_ONCE] CONFIG [section.key=value ...]      one job per fold of a run
# launchers/slurm_folds.sh RUNS_FILE                                                 one job per line of a file:
#                                             CONFIG [section.key=value ...], such as the pairs of a cross-domain study
# and a last job that writes the tables. Options of sbatch go into AULLM_SBATCH_OPTIONS.           (docs/cluster.md)
refuse() { echo "slurm_folds.sh: error: $1" >&2; exit 2; }
[ $# -ge 1 ] || refuse "give FIRST-LAST[%AT_ONCE] CONFIG [section.key=value ...], or a file with a run on each line"
if [ -f "$1" ]; then
  [ $# -eq 1 ] || refuse "$1 is a file of runs; their settings stand in it"
  export AULLM_RUNS=$1
  array=1-$(grep -c "" "$1")
  shift
else
  [ $# -ge 2 ] || refuse "no run file is given, and $1 is no file of runs"
  array=$1
  shift
  aullm-dist config "$@" > /dev/null || exit 2
fi
# Folds that are done end at once, so the same line can be given again after a failure.
here=$(dirname "$0")
id=$(sbatch --parsable --array="$array" --output=%x-%A_%a.out ${AULLM_SBATCH_OPTIONS:-} "$here/slurm.sh" "$@") || exit 2
# afterany: tables are written even where a fold failed, and say which are missing.
tables=$(sbatch --parsable --dependency="afterany:${id%%;*}" ${AULLM_SBATCH_OPTIONS:-} "$here/slurm_tables.sh" "$@") || exit 2
echo "trains: job array ${id%%;*}; writes the tables: job ${tables%%;*}"
