"""The whole build against the encoder alone on the same pictures, and its memory as the corpus grows.

    python benchmarks/cache_build.py                        # one thread encodes: as with a GPU, another core is free to decode
    python benchmarks/cache_build.py --threads 2

"Encoder alone" is given decoded pictures in the very batches of the build and rounds to float16. The build decodes h264, encodes, writes
and syncs. Its start (libraries, checkpoint, tables, hashes of the source) and its shards are told apart. Memory: each size in a process of
its own. The tower is a small one with random weights at the real picture size, slow enough on a CPU that encoding binds.
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
from read_episodes import record

from dvla.cache.readers import open_source
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.observations import to_float16
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig

BATCH = 32
TOWER = TinySpec(vision_depth=6, vision_width=256, vision_heads=4, out_width=512, text_layers=1, vocabulary=512)


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
            pictures = np.stack(list(view.frames()))
            batches += [pictures[at : at + batch_size] for at in range(0, len(pictures), batch_size)]
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
    pictures, rows = (
        sum(map(len, batches)),
        {"encoder alone": [], "build": [], "of it shards": [], "encoding in the build": []},
    )
    for repeat in range(repeats):
        for name in ("build", "encoder alone")[:: 1 if repeat % 2 else -1]:
            if name == "encoder alone":
                rows[name].append(encoder_alone(vlm, batches))
                continue
            shutil.rmtree(work / "cache", ignore_errors=True)
            report = build(config(source, vlm, work / "cache"))
            timing = report.timing
            rows[name].append(report.seconds)
            rows["encoding in the build"].append(timing.encode)
            rows["of it shards"].append(timing.encode + timing.decode_wait + timing.write_wait)
            print(
                f"  repeat {repeat + 1}: build {report.seconds:.2f} s: encode {timing.encode:.2f}, waiting for pictures {timing.decode_wait:.2f}, for the "
                f"disk {timing.write_wait:.2f}",
                flush=True,
            )
    print(
        f"\n{pictures} pictures of {batches[0].shape[1]} px\n\n| | seconds | pictures/s | × encoder alone (median, min – max) |\n|---|---|---|---|"
    )
    for name, taken in rows.items():
        ratios = [t / alone for t, alone in zip(taken, rows["encoder alone"])]
        median = statistics.median(taken)
        print(
            f"| {name} | {median:.2f} | {pictures / median:.1f} | {statistics.median(ratios):.3f} ({min(ratios):.3f} – {max(ratios):.3f}) |"
        )


def memory(sources: list[Path], vlm: Path, work: Path) -> None:
    """Peak resident memory of a whole build, by a process that does nothing else."""
    print("\n| frames | cache | peak memory | seconds |\n|---|---|---|---|")
    for source in sources:
        out = work / f"memory-{source.name}"
        code = (
            "import resource, sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]); import cache_build as b; from pathlib import Path\n"
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
    parser.add_argument("--size", type=int, default=224, help="side of the recorded pictures, pixels")
    parser.add_argument("--episodes", type=int, default=2, help="of the corpus; four times as many for the memory")
    parser.add_argument("--frames", type=int, default=60, help="of an episode")
    parser.add_argument("--threads", type=int, default=1, help="of the encoder")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{os.cpu_count()} cores, {args.threads} threads encode, load {os.getloadavg()[0]:.2f}")
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
