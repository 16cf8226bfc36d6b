#!/usr/bin/env bash
# Stages two and three under Slurm. Before the walltime training saves and ends with 130; the job is queued again and goes on from there.
#: nodes=8              machines
#: processes=8          GPUs of each
#: cpus=96              processors of each
#: memory=512G          memory of each
#: partition=gpu        queue
#: walltime=04:00:00    of one turn; any number of them may follow
#: job=dvla             name of the job
#: port=29500           a port that is free on the first machine
#SBATCH --job-name={{job}}
#SBATCH --partition={{partition}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={{processes}}
#SBATCH --cpus-per-task={{cpus}}
#SBATCH --mem={{memory}}
#SBATCH --time={{walltime}}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={{job}}-%j.log
#SBATCH --signal=B:TERM@300
set -uo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes {{nodes}} --nproc-per-node {{processes}} --rdzv-backend c10d \
  --rdzv-endpoint "$head:{{port}}" --rdzv-id "$SLURM_JOB_ID" -m dvla.cli {{command}} &
step=$!
leaving=0
trap 'leaving=1; kill -TERM $step' TERM     # the shell waits for srun, which passes the signal on to every process
wait $step; code=$?
while [ "$leaving" = 1 ] && kill -0 $step 2>/dev/null; do wait $step; code=$?; done
if [ "$leaving" = 1 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit $code
