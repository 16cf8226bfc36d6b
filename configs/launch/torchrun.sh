#!/usr/bin/env bash
# One machine, a process per GPU.
#: processes=8      GPUs of the machine
set -euo pipefail
exec torchrun --standalone --nproc-per-node {{processes}} -m dvla.cli {{command}}
