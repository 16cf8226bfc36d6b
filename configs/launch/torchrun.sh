#!/usr/bin/env bash
# One machine, one process per GPU.
#: processes=8      GPUs of this machine
set -euo pipefail
exec torchrun --standalone --nproc-per-node {{processes}} -m dvla.cli {{command}}
