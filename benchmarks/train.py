"""Stage two from the cache against the same step on a batch in memory, on the frozen live VLM, and on lerobot's own DataLoader.

    python benchmarks/train.py                                                  # scaled down for two CPU cores
    python benchmarks/train.py --device cuda --vlm full --size base --precision bf16 --compile --draws 1,4,8 --batch 64 --threads 8 --steps 100

- resident: one batch stays on the device, so nothing is read: the ceiling.
- cache: `dvla train`'s loader, at the same step.
- live, pictures in memory: the frozen VLM encodes the batch's pictures at every step; they were decoded before.
- live, decoding: each picture is decoded from its video first, in the training process.
- lerobot: `DataLoader(LeRobotDataset)` with worker processes decodes the same videos; its pictures go through the same encoder.

All ways train the same network on the same samples' tables with the training loop's own step (forward, backward, clip, AdamW, EMA), in one
process, in turn. The dataset is recorded by lerobot's writer (two cameras, h264) and cached by `dvla cache build`. The VLM has random weights;
"full" has the sizes of Qwen3-VL-2B's tower, "scaled" is a tower of the same architecture that stands to the tiny policy about as the full one to
the base policy (FLOPs a sample are printed). FLOPs are 2·m·n·k for every product of matrices, those of attention included, counted by torch
over one forward and backward pass of the policy; TFLOP/s and MFU are of the policy alone, over the device's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from read_episodes import CAMERAS, FPS, record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dvla.batch import FeatureBatch
from dvla.cache.loader.live import LiveFeatures
from dvla.cache.loader.loader import Loader, gather
from dvla.cache.loader.provenance import sources_of
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.encoder import VisionLanguageEncoder
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.observations import encode_observations
from dvla.cache.vlm.spec import EncoderSpec
from dvla.cache.vlm.tiny_qwen3vl import TinySpec, make_tiny_qwen3vl
from dvla.common.mp4 import quiet_libav
from dvla.stages.caching.build import build
from dvla.stages.caching.config import BuildConfig
from dvla.stages.training.config import TrainConfig
from dvla.stages.training.context import Session
from dvla.stages.training.dry_run import optimiser_step
from dvla.stages.training.parallel.world import World
from dvla.stages.training.setup import kernel_threads, prepare, share_network
from dvla.stages.training.step import noise_generator, training_step
from dvla.stages.training.train import policy_net

TOWERS = {
    "scaled": TinySpec(vision_depth=10, vision_width=256, vision_heads=4, out_width=512, text_layers=1, vocabulary=512),
    "full": TinySpec(
        vision_depth=24,
        vision_width=1024,
        vision_heads=16,
        position_grid=48,
        out_width=2048,
        text_layers=1,
        vocabulary=512,
    ),
}
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "A40": 150, "L40S": 362}  # dense bf16, from the makers' sheets
WAYS = ("resident", "cache", "live, pictures in memory", "live, decoding", "lerobot")
WARM_UP = {"resident": 3, "cache": 3}  # steps before the clock starts, at every turn; 1 of the slow ways
FIELDS = """name: bench
match: []
embodiment: gripper_joint
action: &map
- {fields: ["arm_joint_{0..5}_pos"]}
- {field: gripper_open}
state: *map
"""


class Bench:
    """The dataset, its cache, the encoder, and the ways to make batches of it."""

    def __init__(self, work: Path, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        tower = TOWERS[args.vlm]
        tower = dataclasses.replace(tower, vision_depth=args.vlm_blocks or tower.vision_depth)
        self.source, self.fields = work / f"rec{args.pixels}-{args.episodes}x{args.frames}", work / "bench.yaml"
        vlm = work / f"vlm-{args.vlm}-{tower.vision_depth}"
        if not self.source.exists():
            quiet_libav()
            record(self.source, args.pixels, args.episodes, args.frames, "h264")
        self.fields.write_text(FIELDS)
        if not vlm.exists():
            make_tiny_qwen3vl(vlm, tower)
        spec = EncoderSpec(str(vlm), resolution=448)
        out, began = work / f"cache-{self.source.name}-{vlm.name}", time.perf_counter()
        build(BuildConfig((str(self.source),), spec, out, 32, None, args.device, str(self.fields)))
        self.cache = Cache.open(out)
        print(
            f"{self.cache.frames} frames × {len(CAMERAS)} cameras of {args.pixels} px; cache {self.cache.manifest['bytes'] / 2**20:.0f} MiB, "
            f"{self.cache.tokens} × {self.cache.width} a picture, ready in {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        self.encoder: VisionLanguageEncoder = load_encoder(spec, args.device)
        picture = torch.zeros(1, args.pixels, args.pixels, 3, dtype=torch.uint8, device=self.device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.encoder.encode_images(picture)
        self.vlm_flops = counter.get_total_flops() * len(CAMERAS)  # a sample

    @contextlib.contextmanager
    def batches(self, way: str) -> Iterator[tuple[Callable[[], FeatureBatch], Callable[[], float]]]:
        """(the next batch on the device, seconds waited for the loader so far)."""
        args = self.args
        common = {"batch_size": args.batch, "threads": args.threads, "device": self.device}
        if way == "lerobot":
            with self._lerobot() as following:
                yield following, lambda: 0.0
            return
        with Loader(self.cache, features=way in ("resident", "cache"), **common) as loader:
            if way == "resident":
                batch = next(loader)
                yield lambda: batch, lambda: 0.0
            elif way == "cache":
                yield lambda: next(loader), lambda: loader.wait_seconds
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
                nobody = np.zeros(args.batch, bool)

                def encoded() -> FeatureBatch:
                    with torch.no_grad():
                        return live(next(loader), nobody)

                yield encoded, lambda: loader.wait_seconds

    @contextlib.contextmanager
    def _lerobot(self) -> Iterator[Callable[[], FeatureBatch]]:
        """lerobot's DataLoader as its training script sets it up, with action windows; tables and text come from the cache for all ways."""
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        args = self.args
        dataset = LeRobotDataset(
            "dvla/bench",
            root=self.source,
            video_backend=args.video_backend,
            delta_timestamps={"action": [i / FPS for i in range(16)]},
        )
        sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=1 << 24)
        loader = [
            iter(
                torch.utils.data.DataLoader(
                    dataset,
                    args.batch,
                    sampler=sampler,
                    num_workers=args.workers,
                    pin_memory=self.device.type == "cuda",
                )
            )
        ]

        def following() -> FeatureBatch:
            item = next(loader[0])
            rows = item["index"].numpy()
            batch = gather(self.cache, np.zeros(len(rows), np.int64), rows, 16, features=False).to(self.device)
            views = [
                (item[f"observation.images.{c}"] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
                for c in CAMERAS
            ]  # [B,H,W,3]
            with torch.no_grad():
                tokens = torch.stack(
                    encode_observations(self.encoder, list(zip(*views)), ["move"] * len(rows))
                )  # [B,V,K,D]
            view_id = (
                torch.arange(len(CAMERAS), device=self.device)
                .repeat_interleave(self.cache.tokens)
                .expand(len(rows), -1)
                .contiguous()
            )
            return batch.replace(
                tokens=tokens.flatten(1, 2),
                text=batch.text.to(tokens.dtype),
                view_id=view_id,
                frame_id=torch.zeros_like(view_id),
                token_mask=torch.ones_like(view_id, dtype=torch.bool),
            )

        try:
            yield following
        finally:
            loader.clear()  # ends its processes, so that they do not decode while others are measured


def measure(
    bench: Bench, session: Session, trained: tuple[Any, list[torch.Tensor]], way: str, steps: int
) -> tuple[float, float]:
    """(steps/s, share of the time spent waiting for the loader) of one turn."""

    def wait() -> None:
        if bench.device.type == "cuda":
            torch.cuda.synchronize()

    with bench.batches(way) as (following, waited):
        for step in range(WARM_UP.get(way, 1)):
            optimiser_step(session, *trained, following, step)
        wait()
        began, before = time.perf_counter(), waited()
        for step in range(steps):
            optimiser_step(session, *trained, following, step)
        wait()
        elapsed = time.perf_counter() - began
        return steps / elapsed, (waited() - before) / elapsed


def flops(session: Session, batch: FeatureBatch) -> int:
    """Of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        training_step(
            session.net, batch, session.config, noise_generator(0, 0, 0, session.world.device)
        ).total.backward()
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
    with bench.batches("resident") as (following, _):
        work = flops(session, following())
    prepare(session)  # its kernels, and compilation
    shared = share_network(session)
    trained = shared, [p.detach().clone() for p in shared.named.values()]
    session.net.train()
    ways = [w for w in WAYS if w in args.ways]
    rates: dict[str, list[float]] = {way: [] for way in ways}
    waits: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(args.repeats):
        for way in ways[:: 1 if repeat % 2 else -1]:
            rate, wait = measure(bench, session, trained, way, args.steps if way in WAYS[:2] else args.live_steps)
            rates[way].append(rate)
            waits[way].append(wait)
    parameters = sum(p.numel() for p in session.net.parameters())
    peak = next(
        (t for name, t in PEAK_TFLOPS.items() if bench.device.type == "cuda" and name in torch.cuda.get_device_name()),
        None,
    )
    print(
        f"\n{args.size} ({parameters / 1e6:.1f} M parameters), batch {args.batch}, {draws} draws, {args.precision}{', compiled' if args.compile else ''}; "
        f"{work / args.batch / 1e9:.3g} GFLOP a sample, the VLM's {bench.vlm_flops / 1e9:.4g}\n"
    )
    print(
        "| way | steps/s | samples/s | × resident | the cache is faster by | waiting for the loader | TFLOP/s |"
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
    if top is None or bottom is None:
        return ""
    each = [a / b for a, b in zip(top, bottom)]
    return f"{statistics.median(each):.3g} ({min(each):.3g} – {max(each):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--keep", type=Path, help="folder for recording, checkpoint and cache; default: a temporary one"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--size", default="tiny", help="of the policy: tiny, small, base or large")
    parser.add_argument(
        "--vlm", choices=TOWERS, default="scaled", help="the tower: one for a CPU, or that of Qwen3-VL-2B"
    )
    parser.add_argument("--vlm-blocks", type=int, default=0, help="its transformer blocks; default: all")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--draws", default="4", help="noise draws per observation, one table for each, e.g. 1,4,8")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=224, help="side of the recorded pictures")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--frames", type=int, default=24, help="of an episode")
    parser.add_argument("--threads", type=int, default=2, help="of dvla's loader")
    parser.add_argument("--workers", type=int, default=2, help="processes of lerobot's DataLoader")
    parser.add_argument("--video-backend", default="pyav", help="of lerobot: pyav or torchcodec")
    parser.add_argument(
        "--cpu-threads",
        type=int,
        default=1,
        help="of torch's CPU kernels: 1 leaves the other core to reading, as a GPU leaves all",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed at a turn, resident and from the cache")
    parser.add_argument("--live-steps", type=int, default=2, help="timed at a turn, with the VLM")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}; {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}, torch {torch.__version__}; "
        f"VLM: {args.vlm}, random weights"
    )
    with tempfile.TemporaryDirectory() as temporary, kernel_threads(args.cpu_threads if args.device == "cpu" else 0):
        bench = Bench(args.keep or Path(temporary), args)
        for draws in map(int, args.draws.split(",")):
            compare(bench, draws)


if __name__ == "__main__":
    main()
