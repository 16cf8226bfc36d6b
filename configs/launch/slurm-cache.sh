#!/usr/bin/env bash
# Stage one as one Slurm job on one machine, a worker per GPU. (`dvla cache build --slurm` asks Slurm for a job per worker instead.) Five minutes before the
# walltime the build gets SIGTERM and ends with 130; the job is queued again and makes what is missing. `scancel JOB` ends it.
#: processes=8          GPUs, and workers
#: cpus=96              processors
#: memory=256G          memory
#: partition=gpu        queue
#: walltime=12:00:00    of one turn; any number of them may follow
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
