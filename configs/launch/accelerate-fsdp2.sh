#!/usr/bin/env bash
# Accelerate as the launcher, for sites that require it. Sharding is done by dvla itself (--strategy fsdp2).
#: nodes=1          machines
#: processes=8      GPUs per machine
#: rank=0           rank of this machine
#: head=127.0.0.1   address of the first machine
#: port=29500       a free port on the first machine
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
# The file is read through descriptor 9 and deleted at once: nothing is left behind, and signals reach the launcher.
exec 9< "$config"
rm "$config"
exec accelerate launch --config_file /dev/fd/9 -m dvla.cli {{command}} --strategy fsdp2
