#!/usr/bin/env bash
# Stage one as one Slurm job on one machine, one worker per GPU. (`dvla cache build --slurm` submits one job per worker
# instead.) Before the walltime the build receives SIGTERM and exits with 130; the job is requeued and builds what is
# missing. `scancel JOB` ends it.
#: processes=8          GPUs, one worker each
#: cpus=96              CPU cores
#: memory=256G          memory
#: partition=gpu        Slurm partition
#: walltime=12:00:00    time limit of the job, which is requeued as often as needed
#: notice=300           seconds before the walltime at which the build is told to stop
#: job=dvla-cache       name of the job
#SBATCH --job-name={{job}}
#SBATCH --partition={{partition}}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={{processes}}
#SBATCH --cpus-per-task={{cpus}}
#SBATCH --mem={{memory}}
#SBATCH --time={{walltime}}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={{job}}-%j.log
#SBATCH --signal=TERM@{{notice}}
set -uo pipefail
srun --cpus-per-task={{cpus}} dvla {{command}} --workers {{processes}}
code=$?
# 143: the signal came while it was still loading. (`scancel JOB` ends this script too.)
if [ $code = 130 ] || [ $code = 143 ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
