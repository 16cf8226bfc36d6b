#!/usr/bin/env bash
# Several machines without a scheduler: run the same script on each. Any may be restarted; the others wait for it.
#: nodes=8          machines
#: processes=8      GPUs per machine
#: head=node0       a machine that all others can reach
#: port=29500       a free port on that machine
#: job=dvla         name of the run, the same on all machines
set -euo pipefail
exec torchrun --nnodes {{nodes}} --nproc-per-node {{processes}} --max-restarts 3 --rdzv-id {{job}} \
  --rdzv-backend c10d --rdzv-endpoint {{head}}:{{port}} -m dvla.cli {{command}}
