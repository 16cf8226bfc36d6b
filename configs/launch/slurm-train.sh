#!/usr/bin/env bash
# Stages two and three under Slurm, one process per GPU. Before the walltime every process receives SIGTERM: training
# saves a checkpoint and exits with 130, and the job is requeued and resumes from it.
# `scancel --signal=TERM JOB` does the same at once; `scancel JOB` ends the job without saving.
#: nodes=8              machines
#: processes=8          GPUs per machine
#: cpus=12              CPU cores per GPU
#: memory=512G          memory per machine
#: partition=gpu        Slurm partition
#: walltime=04:00:00    time limit of the job, which is requeued as often as needed
#: notice=300           seconds before the walltime at which every process is told to stop
#: job=dvla             name of the job
#: port=0               a free port on the first machine; 0: one chosen by the job's number
#SBATCH --job-name={{job}}
#SBATCH --partition={{partition}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node={{processes}}
#SBATCH --gpus-per-node={{processes}}
#SBATCH --cpus-per-task={{cpus}}
#SBATCH --mem={{memory}}
#SBATCH --time={{walltime}}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={{job}}-%j.log
#SBATCH --signal=TERM@{{notice}}
set -uo pipefail
port={{port}}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((port ? port : 20000 + SLURM_JOB_ID % 10000)) OMP_NUM_THREADS=1
# srun itself starts the processes: a launcher in between would receive the signal too, and end them before they save.
srun --cpus-per-task={{cpus}} --wait=120 \
  bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' - dvla {{command}}
code=$?
# 143: the signal came while it was still loading. (`scancel JOB` ends this script too.)
if [ $code = 130 ] || [ $code = 143 ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
