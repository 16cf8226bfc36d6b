#!/usr/bin/env bash
# Accelerate as the launcher, for sites that start everything with it. What is sharded is dvla's own doing (--strategy fsdp2).
#: nodes=1          machines
#: processes=8      GPUs of each
#: rank=0           which of the machines this is
#: head=127.0.0.1   the first of them
#: port=29500       a free port there
set -euo pipefail
config=$(mktemp)
cat > "$config" <<YAML
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: NO_WRAP, fsdp_reshard_after_forward: true}
num_machines: {{nodes}}
num_processes: $(( {{nodes}} * {{processes}} ))
machine_rank: {{rank}}
main_process_ip: {{head}}
main_process_port: {{port}}
mixed_precision: 'no'
YAML
exec 9< "$config"       # gone from the folder at once, and read through this; so that nothing is left to do, and signals reach the launcher
rm "$config"
exec accelerate launch --config_file /dev/fd/9 -m dvla.cli {{command}} --strategy fsdp2
