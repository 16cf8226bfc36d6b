#!/usr/bin/env bash
# One machine, one process per GPU. The processes meet at localhost: the name of a machine need not resolve.
#: processes=8      GPUs of this machine
set -euo pipefail
exec torchrun --standalone --local-addr localhost --nproc-per-node {{processes}} -m dvla.cli {{command}}
