#!/usr/bin/env bash
# Stage one as one Slurm job on one machine, one worker per GPU. (`dvla cache build --slurm` submits one job per worker
# instead.) Five minutes before the walltime the build receives SIGTERM and exits with 130; the job is requeued and
# builds what is missing. `scancel JOB` ends it.
#: processes=8          GPUs, one worker each
#: cpus=96              CPU cores
#: memory=256G          memory
#: partition=gpu        Slurm partition
#: walltime=12:00:00    time limit of the job, which is requeued as often as needed
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
#SBATCH --signal=TERM@300
set -uo pipefail
srun --cpus-per-task={{cpus}} dvla {{command}} --workers {{processes}}
code=$?
if [ $code = 130 ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
