#!/usr/bin/env bash
# Stages two and three under Slurm, a process per GPU. Five minutes before the walltime every process gets SIGTERM: training saves and ends with 130,
# and the job is queued again and goes on from there. `scancel --signal=TERM JOB` does the same at once; `scancel JOB` ends it without a save.
#: nodes=8              machines
#: processes=8          GPUs of each
#: cpus=12              processors for each GPU
#: memory=512G          memory of each machine
#: partition=gpu        queue
#: walltime=04:00:00    of one turn; any number of them may follow
#: job=dvla             name of the job
#: port=29500           a port that is free on the first machine
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
#SBATCH --signal=TERM@300
set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT={{port}} OMP_NUM_THREADS=1
# srun itself starts the processes: a launcher between them would get the signal too, and end them before they have saved
srun --cpus-per-task={{cpus}} --wait=120 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' - dvla {{command}}
code=$?
if [ $code = 130 ]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
