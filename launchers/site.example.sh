# A copy of this file as launchers/site.sh, or elsewhere with AULLM_SITE=path, is read by the job scripts.
# Account, partition, time, memory and GPUs are sbatch's own options, or its variables:
#   SBATCH_ACCOUNT=mygroup SBATCH_PARTITION=gpu sbatch --nodes=4 --gpus-per-node=4 --time=12:00:00 launchers/slurm.sh ...

# A job has no login shell: load what the processes need.
# module load cuda
# . .venv/bin/activate

# A container instead: put in front of every command that runs inside of it.
# export AULLM_CONTAINER="apptainer exec --nv --bind $PWD /path/to/image.sif"

# More options of srun, and processes per node where they are not one per GPU.
# export AULLM_SRUN_OPTIONS="--cpu-bind=none"
# export AULLM_PROCESSES_PER_NODE=4

# Network: which interfaces NCCL and gloo take; `srun aullm-dist doctor --distributed` says what there is.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
