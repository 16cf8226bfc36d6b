"""Stage two from the cache against the same step on a batch in memory, on the live VLM, and on lerobot's DataLoader.

    python benchmarks/train.py                                                  # scaled down for two CPU cores
    python benchmarks/train.py --device cuda --vlm full --size base --precision bf16 --compile --draws 1,4,8 --batch 64

- resident: one batch stays on the device, so nothing is read: the ceiling.
- cache: `dvla train`'s loader, at the same step.
- live, images in memory: the frozen VLM encodes the batch's images at every step; they were decoded in advance.
- live, decoding: each image is first decoded from its video, in the training process.
- lerobot: `DataLoader(LeRobotDataset)` with worker processes decodes the same videos, for the same encoder.

All ways train the same network on the same samples' tables with the training loop's own step (forward, backward,
clip, AdamW, EMA), in one process, in turn. lerobot's writer records the dataset (two cameras, h264), `dvla cache
build` caches it. The VLM has random weights; "full" has the sizes of Qwen3-VL-2B's tower, "scaled" the same
architecture with about the same cost relative to the tiny policy (FLOPs per sample are printed). FLOPs are 2·m·n·k
for every matrix product, attention included, counted by torch over one forward and backward pass of the policy;
TFLOP/s and MFU are those of the policy alone, over the device's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import QWEN3VL_2B, machine, ratios, spread, tower, turns, wait_for
from read_episodes import CAMERAS, FPS, record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dvla.batch import FeatureBatch
from dvla.cache.loader.live import LiveFeatures, with_tokens
from dvla.cache.loader.loader import Loader, gather
from dvla.cache.loader.provenance import sources_of
from dvla.cache.loader.sample import Draws, Sample
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.encoder import VisionLanguageEncoder
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.observations import encode_observations
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
from dvla.common.mp4 import quiet_libav
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.context import Session
from dvla.stages.training.loop import train_step
from dvla.stages.training.parallel.replicas import Replicas
from dvla.stages.training.parallel.world import World
from dvla.stages.training.setup import kernel_threads, prepare, share_network
from dvla.stages.training.step import batch_loss, noise_generator
from dvla.stages.training.train import policy_net

TOWERS = {"scaled": tower(10), "full": tower(**QWEN3VL_2B)}
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "A40": 150, "L40S": 362}  # dense bf16, from data sheets
WAYS = ("resident", "cache", "live, images in memory", "live, decoding", "lerobot")
WARM_UP = {"resident": 3, "cache": 3}  # unmeasured steps per turn; 1 for the slow ways
FIELDS = """name: bench
match: []
embodiment: gripper_joint
action: &map
- {fields: ["arm_joint_{0..5}_pos"]}
- {field: gripper_open}
state: *map
"""


class Bench:
    """The dataset, its cache, the encoder, and the ways to make batches from them."""

    def __init__(self, work: Path, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        vision = TOWERS[args.vlm]
        vision = dataclasses.replace(vision, vision_depth=args.vlm_blocks or vision.vision_depth)
        self.source, self.fields = work / f"rec{args.pixels}-{args.episodes}x{args.frames}", work / "bench.yaml"
        vlm = work / f"vlm-{args.vlm}-{vision.vision_depth}"
        if not self.source.exists():
            quiet_libav()
            record(self.source, args.pixels, args.episodes, args.frames, "h264")
        self.fields.write_text(FIELDS)
        if not vlm.exists():
            make_tiny_qwen3vl(vlm, vision)
        spec = EncoderSpec(str(vlm), resolution=448)
        out, began = work / f"cache-{self.source.name}-{vlm.name}", time.perf_counter()
        build(BuildConfig((str(self.source),), spec, out, 32, None, args.device, str(self.fields)))
        self.cache = Cache.open(out)
        print(
            f"{self.cache.frames} frames × {len(CAMERAS)} cameras of {args.pixels} px; "
            f"cache {self.cache.manifest['bytes'] / 2**20:.0f} MiB, {self.cache.tokens} × {self.cache.width} an image, "
            f"ready in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        self.encoder: VisionLanguageEncoder = load_encoder(spec, args.device)
        image = torch.zeros(1, args.pixels, args.pixels, 3, dtype=torch.uint8, device=self.device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.encoder.encode_images(image)
        self.vlm_flops = counter.get_total_flops() * len(CAMERAS)  # per sample

    @contextlib.contextmanager
    def samples(self, way: str) -> Iterator[tuple[Iterator[Sample], Callable[[], float]]]:
        """(samples with features on the device, seconds waited for the loader so far)."""
        args = self.args
        common = {"batch_size": args.batch, "threads": args.threads, "device": self.device}
        if way == "lerobot":
            with self._lerobot() as samples:
                yield samples, lambda: 0.0
            return
        with Loader(self.cache, features=way in ("resident", "cache"), **common) as loader:
            if way == "resident":
                yield itertools.repeat(next(loader)), lambda: 0.0
            elif way == "cache":
                yield loader, lambda: loader.wait_seconds
            else:
                live = LiveFeatures(
                    self.encoder,
                    self.cache,
                    sources_of(self.cache),
                    memory_gib=0.0 if way.endswith("decoding") else 64.0,
                )
                if not way.endswith("decoding"):
                    for row in range(self.cache.frames):
                        for view in range(len(CAMERAS)):
                            live.frame(0, row, view)
                encode = torch.no_grad()(live)
                encoded = (dataclasses.replace(sample, batch=encode(sample.batch)) for sample in loader)
                yield encoded, lambda: loader.wait_seconds

    @contextlib.contextmanager
    def _lerobot(self) -> Iterator[Iterator[Sample]]:
        """lerobot's DataLoader as its training script sets it up; tables and text come from the cache for all ways."""
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        args = self.args
        dataset = LeRobotDataset(
            "dvla/bench",
            root=self.source,
            video_backend=args.video_backend,
            delta_timestamps={"action": [i / FPS for i in range(16)]},
        )
        sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=1 << 24)
        loader = torch.utils.data.DataLoader(
            dataset, args.batch, sampler=sampler, num_workers=args.workers, pin_memory=self.device.type == "cuda"
        )

        def encoded(item: dict[str, Any]) -> Sample:
            rows = item["index"].numpy()
            batch = gather(self.cache, np.zeros(len(rows), np.int64), rows, 16, features=False).to(self.device)
            views = [
                (item[f"observation.images.{c}"] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
                for c in CAMERAS
            ]  # [B,H,W,3]
            with torch.no_grad():
                found = encode_observations(self.encoder, list(zip(*views)), ["move"] * len(rows))
            none = np.zeros(len(rows), np.int64)
            visible, there = [self.encoder.visible("move")] * len(rows), np.ones((len(rows), 1), bool)
            batch = with_tokens(batch, torch.stack(found)[:, None], self.cache, visible, there)
            return Sample(batch, Draws(none, rows, none, none, none, none), 0, len(rows))

        items = iter(loader)
        try:
            yield map(encoded, items)
        finally:
            del items  # ends its processes, so that they do not decode while other ways are measured


def measure(bench: Bench, session: Session, shared: Replicas, way: str, steps: int) -> tuple[float, float]:
    """(steps/s, share of the time spent waiting for the loader) of one turn."""
    with bench.samples(way) as (samples, waited):
        for step in range(WARM_UP.get(way, 1)):
            train_step(session, shared, samples, step)
        wait_for(bench.device)
        began, before = time.perf_counter(), waited()
        for step in range(steps):
            train_step(session, shared, samples, step)
        wait_for(bench.device)
        elapsed = time.perf_counter() - began
        return steps / elapsed, (waited() - before) / elapsed


def flops(session: Session, batch: FeatureBatch) -> int:
    """FLOPs of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        batch_loss(session.net, batch, session.config, noise_generator(0, 0, 0, session.world.device)).total.backward()
    return counter.get_total_flops()


def compare(bench: Bench, draws: int) -> None:
    """Print one table: every way, in turn, `repeats` times."""
    args = bench.args
    config = TrainConfig(
        str(bench.cache.path),
        "",
        model_size=args.size,
        batch_size=args.batch,
        draws=draws,
        threads=args.threads,
        device=args.device,
        precision=args.precision,
        compile=args.compile,
        cpu_threads=args.cpu_threads,
    )
    torch.manual_seed(0)
    session = Session(
        config, bench.cache, policy_net(config, bench.cache).to(bench.device), {}, world=World(bench.device)
    )
    with bench.samples("resident") as (samples, _):
        work = flops(session, next(samples).batch)
    prepare(session)  # its kernels, and compilation
    shared = share_network(session)
    session.net.train()
    ways = [w for w in WAYS if w in args.ways]
    rates: dict[str, list[float]] = {way: [] for way in ways}
    waits: dict[str, list[float]] = {way: [] for way in ways}
    for _, way in turns(ways, args.repeats):
        rate, wait = measure(bench, session, shared, way, args.steps if way in WAYS[:2] else args.live_steps)
        rates[way].append(rate)
        waits[way].append(wait)
    parameters = sum(p.numel() for p in session.net.parameters())
    peak = next(
        (t for name, t in PEAK_TFLOPS.items() if bench.device.type == "cuda" and name in torch.cuda.get_device_name()),
        None,
    )
    print(
        f"\n{args.size} ({parameters / 1e6:.1f} M parameters), batch {args.batch}, {draws} noise samples, "
        f"{args.precision}{', compiled' if args.compile else ''}; {work / args.batch / 1e9:.3g} GFLOP per sample, "
        f"the VLM's {bench.vlm_flops / 1e9:.4g}\n"
    )
    print(
        "| way | steps/s | samples/s | × resident | speedup from the cache | waiting for the loader | TFLOP/s |"
        + (" MFU |" if peak else "")
    )
    print("|---|---|---|---|---|---|---|" + ("---|" if peak else ""))
    for way in ways:
        median = statistics.median(rates[way])
        cells = [
            way,
            f"{median:.3g}",
            f"{median * args.batch:.4g}",
            _ratio(rates[way], rates.get("resident")),
            _ratio(rates.get("cache"), rates[way]),
            f"{statistics.median(waits[way]):.1%}" if way == "cache" else "",
            f"{median * work / 1e12:.3g}",
        ]
        print(f"| {' | '.join(cells + ([f'{median * work / 1e12 / peak:.1%}'] if peak else []))} |", flush=True)


def _ratio(top: list[float] | None, bottom: list[float] | None) -> str:
    return "" if top is None or bottom is None else spread(ratios(top, bottom))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--keep", type=Path, help="folder for recording, checkpoint and cache; default: a temporary one"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--size", default="tiny", help="size of the policy: tiny, small, base or large")
    parser.add_argument(
        "--vlm", choices=TOWERS, default="scaled", help="the tower: one for a CPU, or that of Qwen3-VL-2B"
    )
    parser.add_argument("--vlm-blocks", type=int, default=0, help="blocks of the tower; default: all")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--draws", default="4", help="noise samples per observation, one table for each, e.g. 1,4,8")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=224, help="side of the recorded images")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--frames", type=int, default=24, help="frames per episode")
    parser.add_argument("--threads", type=int, default=2, help="threads of dvla's loader")
    parser.add_argument("--workers", type=int, default=2, help="processes of lerobot's DataLoader")
    parser.add_argument("--video-backend", default="pyav", help="video backend of lerobot: pyav or torchcodec")
    parser.add_argument(
        "--cpu-threads",
        type=int,
        default=1,
        help="threads of torch's CPU kernels: 1 leaves the other core to reading, as a GPU leaves all cores",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps per turn, resident and from the cache")
    parser.add_argument("--live-steps", type=int, default=2, help="timed steps per turn, with the VLM")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{machine(args.device)}; VLM: {args.vlm}, random weights")
    with tempfile.TemporaryDirectory() as temporary, kernel_threads(args.cpu_threads if args.device == "cpu" else 0):
        bench = Bench(args.keep or Path(temporary), args)
        for draws in map(int, args.draws.split(",")):
            compare(bench, draws)


if __name__ == "__main__":
    main()
