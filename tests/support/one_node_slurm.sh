#!/usr/bin/env bash
# A Slurm of one node on this machine, started by hand, to try `dvla launch slurm-…` and `dvla cache build --slurm`.
# usage, as root: one_node_slurm.sh [COMMAND…]     runs COMMAND (default: a shell) beside it, then ends Slurm and its jobs
#   Debian or Ubuntu: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge (`make slurm` does so)
#   CPUS=2 CPUs of the node; partition gpu, with CPUS GPUs that exist by name only; a requeued job waits 5 s
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "error: run this as root" >&2; exit 1; }
for program in munged slurmctld slurmd sinfo; do
  command -v "$program" > /dev/null || { echo "error: $program is missing; run: make slurm" >&2; exit 1; }
done
cpus=${CPUS:-2} host=$(hostname -s) folder=$(mktemp -d /tmp/one-node-slurm.XXXXXX)
chmod 755 "$folder"
mkdir "$folder"/{state,spool}
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
cat > "$folder/slurm.conf" <<CONF
ClusterName=one-node
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=5
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$(free -m | awk '/^Mem:/ {print $2 - 512}') Gres=gpu:$cpus State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
seq -f "$folder/gpu%g" 0 $((cpus - 1)) | xargs touch
echo "Name=gpu File=$folder/gpu[0-$((cpus - 1))]" > "$folder/gres.conf"
# newer ones need cgroups for slurmd itself, which containers often lack; older ones do not know the word
case $(slurmd -V) in *" 2"[0-3].*) ;; *) echo "CgroupPlugin=disabled" > "$folder/cgroup.conf" ;; esac
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
export SLURM_CONF=$folder/slurm.conf
end() {
  scancel --quiet --user=root 2> /dev/null || true
  for _ in $(seq 100); do [ -n "$(squeue --noheader 2> /dev/null)" ] || break; sleep 0.1; done
  for daemon in slurmd slurmctld munge; do
    pid=$(cat "$folder/$daemon.pid" 2> /dev/null) || continue
    kill "$pid" 2> /dev/null || true
    for _ in $(seq 50); do [ -e "/proc/$pid/exe" ] || break; sleep 0.1; done
  done
  rm -rf "$folder"
}
trap end EXIT
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
  --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
slurmctld && slurmd || { tail -n 5 "$folder"/slurm*.log >&2; exit 1; }
for _ in $(seq 100); do
  [ "$(sinfo --noheader --format=%T 2> /dev/null)" != idle ] || { "${@:-bash}"; exit; }
  sleep 0.2
done
tail -n 5 "$folder"/slurm*.log >&2
echo "error: the node is not ready after 20 s; see the lines above" >&2
exit 1
