#!/usr/bin/env bash
# Stage one as one Slurm job on one machine, a worker per GPU. (`dvla cache build --slurm` asks Slurm for a job per worker instead.)
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
#SBATCH --signal=B:TERM@300
set -uo pipefail
dvla {{command}} --workers {{processes}} &
build=$!
leaving=0
trap 'leaving=1; kill -TERM $build' TERM
wait $build; code=$?
while [ "$leaving" = 1 ] && kill -0 $build 2>/dev/null; do wait $build; code=$?; done
if [ "$leaving" = 1 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit $code
