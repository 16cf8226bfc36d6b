"""Images between a robot and a policy server: bytes and milliseconds a request, and what compression does to actions.

    python benchmarks/wire.py --size 480x640 --resolution 224 --requests 40
    python benchmarks/wire.py --policy runs/demo      # a trained policy; without it random weights

The server is a process of its own on this machine, so the network's own time is not in it: at 100 Mbit/s, 1 MB takes
80 ms. Times of client and server are the processor's, medians; the round trip is the shortest. Images are synthetic:
smooth areas, edges, and a sensor's noise, which compress about as a camera's do. Actions of every form are compared
with those for images as they are taken, with the same noise; the spread is the standard deviation of each dimension
over all requests.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "tests")]

from measuring import machine  # noqa: E402

import dvla  # noqa: E402
from dvla.stages.serving.fields import ObservationReader  # noqa: E402
from dvla.stages.serving.wire import unpack  # noqa: E402

FORMS = {
    "native, raw": ("native", 90),
    "resized, raw": ("raw", 90),
    "JPEG 90": ("jpeg", 90),
    "JPEG 75": ("jpeg", 75),
    "WebP 90": ("webp", 90),
    "WebP 75": ("webp", 75),
}


def camera(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3]: smooth light, things with edges, noise of 3 of 255."""
    small = rng.integers(60, 200, (5, 7, 3), np.uint8)
    image = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    for _ in range(25):
        top, left = rng.integers(0, height), rng.integers(0, width)
        image[top : top + height // 8, left : left + width // 10] = rng.integers(0, 256, 3)
    return (image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)


def observations(about: dict[str, Any], count: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    low, high = (np.array(about["limits"]["state"][end], float) for end in ("low", "high"))
    middle, half = np.nan_to_num((low + high) / 2), np.nan_to_num((high - low) / 4)
    return [
        {
            "images": {view: camera(*size, rng) for view in about["views"]},
            "state": middle + half * rng.uniform(-1, 1, len(middle)),
            "prompt": "push the puck",
        }
        for _ in range(count)
    ]


def serve(policy: Path) -> tuple[subprocess.Popen[str], int]:
    """A server process and its port."""
    command = [sys.executable, "-m", "dvla.cli", "serve", str(policy), "--port", "0", "--device", "cpu"]
    where = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "COLUMNS": "500"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=where)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"ws://127.0.0.1:(\d+)", line):
            return process, int(found[1])
    raise SystemExit("the server did not start")


def measure(port: int, form: tuple[str, int], seen: list[dict[str, Any]]) -> tuple[dict[str, float], np.ndarray]:
    """(median bytes, CPU seconds of both sides, the shortest round trip; actions [N, T, d]) of one form."""
    times: dict[str, list[float]] = {"bytes": [], "client": [], "server": [], "trip": []}
    actions = []
    with dvla.PolicyClient(port=port, images=form[0], quality=form[1]) as client:
        reader = ObservationReader(client.metadata["views"], client.metadata["state"])
        for one in seen:
            began = time.thread_time()
            data = client.pack(one)
            packed = time.thread_time()
            reader.observation(unpack(data))
            read, asked = time.thread_time(), time.perf_counter()
            actions.append(client.infer(one)["actions"])
            trip = time.perf_counter() - asked
            for name, value in zip(times, (len(data), packed - began, read - packed, trip)):
                times[name].append(value)
    pick = {"bytes": statistics.median, "client": statistics.median, "server": statistics.median, "trip": min}
    return {name: pick[name](values) for name, values in times.items()}, np.stack(actions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, help="a run, checkpoint or export; default: random weights")
    parser.add_argument("--size", default="480x640", help="height x width of the cameras")
    parser.add_argument("--resolution", type=int, default=224, help="what the encoder of random weights sees")
    parser.add_argument("--requests", type=int, default=40)
    asked = parser.parse_args()
    height, width = map(int, asked.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        policy = asked.policy.resolve() if asked.policy else random_policy(Path(folder), asked.resolution)
        process, port = serve(policy)
        try:
            with dvla.PolicyClient(port=port) as client:
                seen = observations(client.metadata, asked.requests, (height, width))
                views, side = len(client.metadata["views"]), client.metadata["images"]["side"]
            found = {name: measure(port, form, seen) for name, form in FORMS.items()}
        finally:
            process.terminate()
            process.wait()
    print(f"{views} views of {asked.size}, encoder {side}, {asked.requests} requests; {machine()}\n")
    print("| images | bytes | client, CPU ms | server, CPU ms | round trip ms | RMS change of actions / spread |")
    print("|---|---|---|---|---|---|")
    native = found["native, raw"][1]
    spread = np.maximum(native.std(axis=(0, 1)), 1e-9)
    for name, (median, actions) in found.items():
        change = np.sqrt((((actions - native) / spread) ** 2).mean())
        milliseconds = " | ".join(f"{1e3 * median[part]:.1f}" for part in ("client", "server", "trip"))
        print(f"| {name} | {median['bytes']:,.0f} | {milliseconds} | {change:.4f} |")


def random_policy(folder: Path, resolution: int) -> Path:
    from dvla.cache.vlm.tiny_qwen3vl import make_tiny_qwen3vl
    from support.run_samples import TINY, make_run

    return make_run(folder / "run", make_tiny_qwen3vl(folder / "vlm", TINY), resolution=resolution)


if __name__ == "__main__":
    main()
