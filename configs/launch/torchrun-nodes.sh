#!/usr/bin/env bash
# Several machines without a scheduler: run the same script on each of them. Any of them may be restarted; the others wait for it.
#: nodes=8          machines
#: processes=8      GPUs of each
#: head=node0       a machine that all of them reach
#: port=29500       a free port there
#: job=dvla         name of the run, the same everywhere
set -euo pipefail
exec torchrun --nnodes {{nodes}} --nproc-per-node {{processes}} --rdzv-backend c10d --rdzv-endpoint {{head}}:{{port}} --rdzv-id {{job}} --max-restarts 3 -m dvla.cli {{command}}
