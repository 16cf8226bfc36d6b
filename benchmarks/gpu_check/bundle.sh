#!/usr/bin/env bash
# bundle.sh FOLDER PYTHON UV: what travels to a machine with a GPU and no network, as a folder and as FOLDER.tar:
# the product, wheels that a machine with torch and transformers lacks (Python 3.12, Linux x86-64), a small recording.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$(realpath -m "$1") python=$2 uv=$3
most=60 # MB
rm -rf "$out"
mkdir -p "$out/wheels"
cp "$root/benchmarks/gpu_check.sh" "$out"
git -C "$root" archive HEAD -- . ':!docs' ':!docker' ':!tests/golden' | gzip -9 > "$out/dvla.tar.gz"
git -C "$root" log -1 --format='%h %cs' > "$out/revision"
names="av zarr numcodecs donfig google-crc32c msgspec webdataset braceexpand dask distributed tblib zict locket partd tornado"
names="$names websockets pydantic pydantic-core annotated-types typing-inspection typing-extensions"
pins=()
for name in $names; do pins+=("$(grep -E "^$name==" "$root/constraints-py312.txt")"); done
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${tag}_x86_64"); done
"$uv" tool run --quiet pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --dest "$out/wheels" "${pins[@]}"
PYTHONPATH=$root/benchmarks "$python" -m gpu_check.recording "$out/recording" > /dev/null
tar -cf "$out.tar" -C "$(dirname "$out")" "$(basename "$out")"
size=$(($(stat -c %s "$out.tar") / 1000000))
if [ "$size" -ge $most ]; then echo "error: $out.tar has $size MB; it must stay below $most" >&2; exit 1; fi
echo "$out.tar: $size MB. On the machine with the GPU: tar -xf $(basename "$out").tar && bash $(basename "$out")/gpu_check.sh"
