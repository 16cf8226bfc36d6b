"""Stage three's step: the live VLM frozen, with LoRA, with LoRA on a split cache (`--boundary n`); and stage two's.

    python benchmarks/finetune.py                         # scaled down for two CPU cores: 24 blocks of width 256
    python benchmarks/finetune.py --device cuda --vlm full --size base --precision bf16 --batch 32 --threads 8

- cached: the features come from the cache; no VLM.
- frozen-live: the whole tower encodes the images at every step, and none of it is trained.
- LoRA-live: with LoRA in all of its blocks.
- LoRA-live, last n: with LoRA in the last n blocks only; all of them run.
- LoRA-split: the same LoRA, on a cache of the input of these n blocks; only they run.

Every step is the training loop's own (features, forward, backward, clip, AdamW, EMA) on the same samples, in one
process, in turn; images are decoded in advance and stay in memory, which favors the live ways. Before the clock
starts, features and gradients of LoRA-split are compared with those of LoRA-live, last n. The VLM has random weights;
at the scaled size, attention has about the share of a block's work that it has in Qwen3-VL-2B at 448 pixels (0.13 of
the rest). FLOPs are 2·m·n·k for every matrix product, counted by torch over a forward and backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from measuring import QWEN3VL_2B, machine, ratios, spread, tower, turns, wait_for
from read_episodes import CAMERAS, record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train import FIELDS

from dvla.batch import FeatureBatch
from dvla.cache.loader.live import LiveFeatures
from dvla.cache.loader.loader import Loader, gather
from dvla.cache.loader.provenance import sources_of
from dvla.cache.store.cache import Cache
from dvla.cache.vlm.load import load_encoder
from dvla.cache.vlm.lora import add_lora, lora_parameters
from dvla.cache.vlm.spec import EncoderSpec, LoraSpec
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
from dvla.stages.training.stage_three.split import SplitFeatures
from dvla.stages.training.step import batch_loss, noise_generator
from dvla.stages.training.train import policy_net

TOWERS = {"scaled": (224, tower(24)), "full": (448, tower(**QWEN3VL_2B))}  # resolution and tower
CACHED, FROZEN, LORA, LAST, SPLIT = WAYS = ("cached", "frozen-live", "LoRA-live", "LoRA-live, last n", "LoRA-split")
# Relative, of features and gradients: float16 lies between the halves; bfloat16 rounds by itself.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}


@dataclass
class Way:
    """One way to train: its session and what its steps update."""

    session: Session
    shared: Replicas
    flops: float = 0.0  # of a step, forward and backward


class Bench:
    """The recording, both caches and a session of each way."""

    def __init__(self, work: Path, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        resolution, vision = TOWERS[args.vlm]
        vision = replace(vision, vision_depth=args.blocks or vision.vision_depth)
        quiet_libav()
        record(work / "rec", args.pixels, args.episodes, args.frames, "h264")
        (work / "bench.yaml").write_text(FIELDS)
        self.spec = EncoderSpec(str(make_tiny_qwen3vl(work / "vlm", vision)), resolution=resolution)
        self.caches = {}
        for name, spec in (("features", self.spec), ("split", replace(self.spec, boundary=args.boundary))):
            began = time.perf_counter()
            build(BuildConfig((str(work / "rec"),), spec, work / name, 32, None, args.device, str(work / "bench.yaml")))
            cache = self.caches[name] = Cache.open(work / name)
            print(
                f"{name}: {cache.frames} frames × {len(CAMERAS)} cameras, {cache.tokens} × {cache.width} per image, "
                f"{cache.manifest['bytes'] / 2**20:.0f} MiB, built in {time.perf_counter() - began:.0f} s",
                flush=True,
            )
        self.ways = {name: self._way(name) for name in WAYS}

    def _way(self, name: str) -> Way:
        args, cache = self.args, self.caches["split" if name == SPLIT else "features"]
        config = TrainConfig(
            str(cache.path),
            "",
            model_size=args.size,
            batch_size=args.batch,
            draws=args.draws,
            threads=args.threads,
            device=args.device,
            precision=args.precision,
            cpu_threads=args.cpu_threads,
        )
        torch.manual_seed(0)
        session = Session(
            config, cache, policy_net(config, self.caches["features"]).to(self.device), {}, world=World(self.device)
        )
        with torch.no_grad():  # an untrained network's gates are zero, so no gradient would reach the VLM
            for p in session.net.parameters():
                p.add_(0.02 * torch.randn_like(p))
        if name != CACHED:
            encoder = load_encoder(self.spec, args.device)
            session.live = name != SPLIT
            session.features = (
                LiveFeatures(encoder, cache, sources_of(cache), memory_gib=64.0)
                if session.live
                else SplitFeatures(encoder, cache)
            )
            if name != FROZEN:
                add_lora(
                    encoder,
                    LoraSpec(r=args.r, targets=args.targets, last_n_blocks=None if name == LORA else args.boundary),
                )
                session.adapter = dict(lora_parameters(encoder))
            if session.live:
                for row in range(cache.frames):
                    for view in range(len(CAMERAS)):
                        session.features.frame(0, row, view)
        prepare(session)
        shared = share_network(session)
        session.net.train()
        return Way(session, shared)

    def batch(self, name: str) -> FeatureBatch:
        """The first samples, as a step of this way sees them."""
        session = self.ways[name].session
        rows = np.arange(self.args.batch) % session.cache.frames
        horizon = session.net.config.dit.horizon
        given = gather(session.cache, np.zeros_like(rows), rows, horizon, features=not session.live)
        return session.features(given.to(self.device))

    def loss(self, name: str) -> torch.Tensor:
        """The loss of these samples, with the same noise for all ways."""
        session = self.ways[name].session
        return batch_loss(session.net, self.batch(name), session.config, noise_generator(0, 0, 0, self.device)).total

    def loader(self, name: str) -> Loader:
        """The samples of this way."""
        session, args = self.ways[name].session, self.args
        return Loader(
            session.cache,
            batch_size=args.batch,
            threads=args.threads,
            features=not session.live,
            device=self.device,
        )


def require_same(bench: Bench) -> None:
    """`AssertionError` unless the split cache gives the features and gradients of the live tower, for nonzero B."""
    dtype = next(bench.ways[SPLIT].session.features.encoder.vision.parameters()).dtype
    found = {}
    for name in (LAST, SPLIT):
        session, generator = bench.ways[name].session, torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in session.adapter.values():
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
        gradients = torch.autograd.grad(bench.loss(name), list(session.adapter.values()))
        found[name] = bench.batch(name).tokens.detach().float(), torch.cat([g.flatten().float() for g in gradients])
    errors = [((ours - live).norm() / live.norm()).item() for live, ours in zip(found[LAST], found[SPLIT])]
    print(f"split against live, relative: features {errors[0]:.1e}, LoRA's gradient {errors[1]:.1e}", flush=True)
    assert max(errors) < TOLERANCE[dtype], errors


def count_flops(bench: Bench) -> None:
    """Set the FLOPs of a step of each way."""
    for name, way in bench.ways.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            bench.loss(name).backward()
        way.flops = counter.get_total_flops()
        for p in way.session.parameters().values():
            p.grad = None


def measure(bench: Bench, name: str) -> float:
    """Steps/s of one turn."""
    way, steps = bench.ways[name], bench.args.steps if name in (CACHED, SPLIT) else bench.args.live_steps
    with bench.loader(name) as samples:
        for step in range(bench.args.warm_up):
            train_step(way.session, way.shared, samples, step)
        wait_for(bench.device)
        began = time.perf_counter()
        for step in range(steps):
            train_step(way.session, way.shared, samples, step)
        wait_for(bench.device)
        return steps / (time.perf_counter() - began)


def show(bench: Bench, rates: dict[str, list[float]]) -> None:
    args, blocks = bench.args, bench.ways[SPLIT].session.features.encoder.blocks
    print(
        f"\n{args.size} policy, batch {args.batch}, {args.draws} noise samples, {args.precision}; LoRA r {args.r}, "
        f"{args.targets}; n = {args.boundary} of {blocks} blocks\n"
    )
    print("| way | steps/s | samples/s | GFLOP per sample | × LoRA-live | by FLOPs | × LoRA-live, last n |")
    print("|---|---|---|---|---|---|---|")
    for name in bench.ways:
        median, flops = statistics.median(rates[name]), bench.ways[name].flops
        numbers = (median, median * args.batch, flops / args.batch / 1e9)
        against = [spread(ratios(rates[name], rates[base])) for base in (LORA, LAST)]
        cells = [name.replace("last n", f"last {args.boundary}"), *(f"{number:.3g}" for number in numbers)]
        print(f"| {' | '.join([*cells, against[0], f'{bench.ways[LORA].flops / flops:.3g}', against[1]])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--vlm", choices=TOWERS, default="scaled", help="the tower: one for a CPU, or that of Qwen3-VL-2B"
    )
    parser.add_argument("--blocks", type=int, default=0, help="blocks of the tower; default: 24")
    parser.add_argument("--boundary", type=int, default=4, help="n, the number of last blocks with LoRA")
    parser.add_argument("--r", type=int, default=16, help="rank of LoRA")
    parser.add_argument("--targets", choices=["attention", "all-linear"], default="attention", help="layers with LoRA")
    parser.add_argument("--size", default="tiny", help="size of the policy: tiny, small, base or large")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="precision of the policy; the VLM's is float32 on a CPU, bfloat16 on CUDA",
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--draws", type=int, default=4, help="noise samples per observation")
    parser.add_argument("--pixels", type=int, default=224, help="side of the recorded images")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--frames", type=int, default=24, help="frames per episode")
    parser.add_argument("--threads", type=int, default=2, help="threads of the loader")
    parser.add_argument("--cpu-threads", type=int, default=0, help="threads of torch's CPU kernels; 0: torch's own")
    parser.add_argument("--steps", type=int, default=12, help="timed steps per turn, from the caches")
    parser.add_argument("--live-steps", type=int, default=3, help="timed steps per turn, with the whole VLM")
    parser.add_argument("--warm-up", type=int, default=1, help="unmeasured steps per turn")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{machine(args.device)}; VLM: {args.vlm}, random weights", flush=True)
    with tempfile.TemporaryDirectory() as temporary, kernel_threads(args.cpu_threads if args.device == "cpu" else 0):
        bench = Bench(Path(temporary), args)
        require_same(bench)
        count_flops(bench)
        rates: dict[str, list[float]] = {name: [] for name in bench.ways}
        for repeat, name in turns(bench.ways, args.repeats):
            rates[name].append(measure(bench, name))
            print(f"  repeat {repeat + 1}: {name} {rates[name][-1]:.3g} steps/s", flush=True)
        show(bench, rates)


if __name__ == "__main__":
    main()
