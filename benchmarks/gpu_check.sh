#!/usr/bin/env bash
# Everything that wants a GPU, in at most BUDGET seconds (480), one line an item, never stopping at the first failure.
#
#   bash gpu_check.sh                          on a machine with a GPU: CUDA, full size
#   DRY=1 bash gpu_check.sh                    anywhere: CPU, toy size, to see that everything runs
#   SECTIONS="core steps" bash gpu_check.sh    only these (core steps commands encoder build loader latency finetune ranks)
#
# PY: the interpreter. OUT (gpu_check_out): log and tracebacks. WORK (gpu_check_work): what the sections make.
# In a checkout it runs the checkout; in the folder that `make gpu-bundle` makes, what lies beside it: dvla.tar.gz,
# wheels/ and recording/. Ends with code 1 where an item failed.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
BUDGET=${BUDGET:-480} DRY=${DRY:-0} PY=${PY:-python3}
OUT=$(realpath -m "${OUT:-gpu_check_out}") WORK=$(realpath -m "${WORK:-gpu_check_work}")
began=$(date +%s)
mkdir -p "$OUT" "$WORK"
rm -f "$WORK"/trace-*.txt
exec > >(tee "$OUT/gpu_check.log") 2>&1
log=$!

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
recording=${RECORDING:-$here/recording}
if [ -f "$here/dvla.tar.gz" ]; then
  site=$WORK/site source=$WORK/source
  mkdir -p "$site" "$source"
  for wheel in "$here"/wheels/*.whl; do
    "$PY" -m zipfile -e "$wheel" "$site" || echo "FAIL setup/wheels  $(basename "$wheel") cannot be unpacked"
  done
  tar -xzf "$here/dvla.tar.gz" -C "$source"
  ln -sfn "$source" "$site/dvla"       # the package lies in the repository's root
  export PYTHONPATH=$site:$source/benchmarks${PYTHONPATH:+:$PYTHONPATH}
  echo "product: $(cat "$here/revision")"
else
  export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
  if [ ! -d "$recording" ]; then
    recording=$WORK/recording
    [ -d "$recording" ] || "$PY" -m gpu_check.recording "$recording" || echo "FAIL setup/recording  install dvla[lerobot], or set RECORDING"
  fi
fi
if [ "$DRY" = 0 ]; then
  device=(--device cuda)
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "FAIL setup/nvidia-smi  no GPU found; DRY=1 runs on a CPU"
  limits="core:100 steps:110 commands:100 encoder:80 build:35 loader:65 latency:70 finetune:80 ranks:60"
else
  device=(--device cpu --toy)
  limits="core:600 steps:600 commands:900 encoder:600 build:300 loader:300 latency:600 finetune:600 ranks:300"
  BUDGET=${DRY_BUDGET:-3600}
fi
echo "set up in $(($(date +%s) - began)) s; $(nproc) cores"

section() {  # section NAME SECONDS: as long as there is time
  local name=$1 most=$2 rest=$((BUDGET - ($(date +%s) - began))) code
  if [ "$rest" -lt 20 ]; then echo "SKIP $name/all  no time left ($rest s)"; return; fi
  [ "$most" -le "$rest" ] || most=$rest
  timeout -k 5 "$((most + 15))" "$PY" -m gpu_check "$name" "${device[@]}" --work "$WORK" --recording "$recording" --seconds "$most"
  code=$?
  [ "$code" = 0 ] || echo "FAIL $name/section  ended with code $code$([ "$code" != 124 ] || echo ' (time)')"
}

chosen=" ${SECTIONS:-core steps commands encoder build loader latency finetune ranks} "
prepare=
if [[ "$chosen" =~ (encoder|build|latency|finetune) ]]; then     # on the CPU, beside the first sections
  section prepare 120 > "$OUT/prepare.log" 2>&1 &
  prepare=$!
fi
for each in $limits; do
  case "$chosen" in *" ${each%:*} "*) section "${each%:*}" "${each#*:}" ;; esac
done
[ -z "$prepare" ] || { wait "$prepare"; cat "$OUT/prepare.log"; }
cat "$WORK"/trace-*.txt > "$OUT/traces.txt" 2>/dev/null

count() { grep -c "^$1" "$OUT/gpu_check.log"; }
failed=$(count FAIL)
echo
echo "== $(count PASS) PASS, $failed FAIL, $(count NUM) numbers, $(count SKIP) skipped, $(($(date +%s) - began)) s"
grep '^FAIL' "$OUT/gpu_check.log" | cut -c1-400
exec >&- 2>&-
wait "$log" 2>/dev/null       # until all of it is in the log
[ "$failed" = 0 ]
