"""The whole build against the encoder alone on the same images, and its memory as the corpus grows.

    python benchmarks/cache_build.py                 # one thread encodes: as with a GPU, another core is free to decode
    python benchmarks/cache_build.py --threads 2

"Encoder alone" receives decoded images in the same batches as the build and rounds to float16. The build decodes
h264, encodes, writes and syncs; the time of its shards is also listed without its start (libraries, checkpoint,
tables, source hashes). Memory is measured for each size in a process of its own. The tower is small with random
weights at the real image size, slow enough on a CPU that encoding is the bottleneck.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import machine, ratios, spread, tower, turns
from read_episodes import record

from dvla.cache.readers import open_source
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.observations import to_float16
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig

BATCH = 32
TOWER = tower()


def recording(root: Path, size: int, episodes: int, frames: int) -> Path:
    """A LeRobot dataset with two cameras. Its robot type is one that a shipped config describes."""
    if not root.exists():
        record(root, size, episodes, frames, "h264")
    return root


def config(source: Path, vlm: Path, out: Path, batch_size: int = BATCH) -> BuildConfig:
    return BuildConfig(
        (str(source),), EncoderSpec(str(vlm), resolution=448, dtype="float32"), out, batch_size, 256, "cpu", str(FIELDS)
    )


FIELDS = Path(tempfile.gettempdir()) / f"dvla-bench-{os.getpid()}.yaml"


def write_fields() -> None:
    """A config that maps the recording's seven numbers to joints."""
    FIELDS.write_text("name: bench\nmatch: []\nembodiment: gripper_joint\naction:\n- {drop: 7}\nstate:\n- {drop: 7}\n")


def decoded(source: Path, batch_size: int = BATCH) -> list[np.ndarray]:
    """The batches of the build's encoder, uint8 [≤BATCH,H,W,3]: none crosses an episode's end."""
    opened, batches = open_source(str(source), str(FIELDS)), []
    for number in opened.episode_ids:
        for view in opened.load(number).views:
            images = np.stack(list(view.frames()))
            batches += [images[at : at + batch_size] for at in range(0, len(images), batch_size)]
    return batches


def encoder_alone(vlm: Path, batches: list[np.ndarray]) -> float:
    encoder = load_encoder(EncoderSpec(str(vlm), resolution=448, dtype="float32"), "cpu")
    with torch.inference_mode():
        encoder.encode_images(torch.from_numpy(batches[0][:1]))
        began = time.perf_counter()
        for batch in batches:
            to_float16(encoder.encode_images(torch.from_numpy(batch)), "alone")
    return time.perf_counter() - began


def overhead(source: Path, vlm: Path, work: Path, repeats: int) -> None:
    batches = decoded(source)
    images = sum(map(len, batches))
    rows: dict[str, list[float]] = {"encoder alone": [], "build": [], "its shards": [], "encoding in the build": []}
    for repeat, name in turns(("build", "encoder alone"), repeats):
        if name == "encoder alone":
            rows[name].append(encoder_alone(vlm, batches))
            continue
        shutil.rmtree(work / "cache", ignore_errors=True)
        report = build(config(source, vlm, work / "cache"))
        timing = report.timing
        rows[name].append(report.seconds)
        rows["encoding in the build"].append(timing.encode)
        rows["its shards"].append(timing.encode + timing.decode_wait + timing.write_wait)
        print(
            f"  repeat {repeat + 1}: build {report.seconds:.2f} s: encoding {timing.encode:.2f} s, waiting for images "
            f"{timing.decode_wait:.2f} s, for the disk {timing.write_wait:.2f} s",
            flush=True,
        )
    print(f"\n{images} images of {batches[0].shape[1]} px\n")
    print("| | seconds | images/s | × encoder alone (median, min – max) |\n|---|---|---|---|")
    for name, taken in rows.items():
        median, times = statistics.median(taken), spread(ratios(taken, rows["encoder alone"]), ".3f")
        print(f"| {name} | {median:.2f} | {images / median:.1f} | {times} |")


def memory(sources: list[Path], vlm: Path, work: Path) -> None:
    """Peak resident memory of a whole build, in a process that does nothing else."""
    print("\n| frames | cache | peak memory | seconds |\n|---|---|---|---|")
    for source in sources:
        out = work / f"memory-{source.name}"
        code = (
            "import resource, sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
            "import cache_build as b; from pathlib import Path\n"
            "b.FIELDS = Path(sys.argv[5])\n"
            "r = b.build(b.config(*map(Path, sys.argv[2:5])))\n"
            "print(r.frames, r.bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, r.seconds)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(source), str(vlm), str(out), str(FIELDS)],
            capture_output=True,
            text=True,
            check=True,
        )
        frames, nbytes, peak, seconds = (float(x) for x in done.stdout.split())
        print(f"| {frames:.0f} | {nbytes / 2**20:.0f} MiB | {peak / 2**10:.0f} MiB | {seconds:.1f} |", flush=True)
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for recordings and model; default: a temporary one")
    parser.add_argument("--size", type=int, default=224, help="side of the recorded images in pixels")
    parser.add_argument("--episodes", type=int, default=2, help="episodes; four times as many for the memory")
    parser.add_argument("--frames", type=int, default=60, help="frames per episode")
    parser.add_argument("--threads", type=int, default=1, help="threads of the encoder")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        vlm = work / "vlm"
        if not vlm.exists():
            make_tiny_qwen3vl(vlm, TOWER)
        write_fields()
        try:
            small, large = (
                recording(work / f"rec{args.size}-{n}", args.size, n, args.frames)
                for n in (args.episodes, 4 * args.episodes)
            )
            overhead(small, vlm, Path(temporary), args.repeats)
            memory([small, large], vlm, Path(temporary))
        finally:
            FIELDS.unlink()


if __name__ == "__main__":
    main()
