#!/bin/bash
# sbatch [--nodes=N] [sbatch options] launchers/slurm.sh CONFIG [section.key=value ...]        (docs/cluster.md)
# sbatch ... launchers/slurm.sh sweep CONFIG [CONFIG ...] --out FOLDER [--seeds SEED ...] [section.key=value ...]
# Trains with --resume auto, and starts itself again after a time limit or a failure that had trained a step.
# In a job array each task trains the fold of its number, or the run on that line of the file $AULLM_RUNS.
#SBATCH --job-name=aullm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append

refuse() { echo "slurm.sh: error: $1" >&2; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || refuse "SLURM_JOB_ID is not set; start with sbatch launchers/slurm.sh CONFIG"
# What a site needs (modules, virtual environment, container, network): see launchers/site.example.sh.
site=${AULLM_SITE:-launchers/site.sh}
[ ! -e "$site" ] || . "$site" || refuse "$site failed"
if [ -n "${AULLM_RUNS:-}" ]; then
  read -ra words < <(sed -n "${SLURM_ARRAY_TASK_ID:-1}p" "$AULLM_RUNS")
  set -- "${words[@]}"
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  set -- "$@" "data.fold=$SLURM_ARRAY_TASK_ID"
fi
[ $# -gt 0 ] || refuse "no run file is given; sbatch launchers/slurm.sh CONFIG [section.key=value ...]"
arguments=(--config "$@")
if [ "$1" = sweep ]; then
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || refuse "a sweep is one job, not an array of jobs"
  arguments=(--sweep "${@:2}")
fi
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

signal=
trap 'signal=${signal:-USR1}; kill -USR1 "$srun"' USR1
trap 'signal=TERM' TERM
# Expanded inside of the task: in this script every node would be the first one.
srun --kill-on-bad-exit=1 ${AULLM_SRUN_OPTIONS:-} bash -c 'exec ${AULLM_CONTAINER:-} torchrun \
  --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
  --nproc-per-node="${AULLM_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
  --master-addr="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}" \
  --master-port="$MASTER_PORT" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=300 \
  -m aullm_dist.train --resume auto --offline "$@"' task "${arguments[@]}" &
srun=$!
# A trapped signal ends wait, not srun.
while :; do wait "$srun"; status=$?; kill -0 "$srun" 2>/dev/null || break; done

if ${AULLM_CONTAINER:-} aullm-dist requeue --status="$status" --signal="$signal" -- "$@"; then
  # SLURM ends this script by SIGTERM; one that lived on would end the next life of the job with its own exit code.
  trap - TERM USR1
  scontrol requeue "$SLURM_JOB_ID" && exec sleep 10
fi
exit "$status"
