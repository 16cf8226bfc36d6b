"""One section of the check; benchmarks/gpu_check.sh runs all of them. Prints one line an item:

PASS section/item  what was found        FAIL section/item  why
NUM  section/item  numbers               SKIP section/item  why

PYTHONPATH=benchmarks python -m gpu_check core --device cpu --toy --work DIR --recording DATASET
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
import warnings
from pathlib import Path

import torch

from dvla.common.device import pick_device

from .items import Place, run, say

SECTIONS = {
    "prepare": ("checkpoints",),
    "core": ("numbers", "attention"),
    "steps": ("steps",),
    "encoder": ("encoder",),
    "build": ("build",),
    "loader": ("loader",),
    "finetune": ("finetune",),
    "latency": ("latency",),
    "commands": ("commands",),
    "ranks": ("ranks",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes: to see that everything runs")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the sections make")
    parser.add_argument("--recording", type=Path, required=True, help="a LeRobot dataset of benchmarks/read_episodes")
    parser.add_argument("--seconds", type=float, default=120, help="after which no further item begins")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(min(16, os.cpu_count() or 1))
    args.work.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).resolve().parents[2]
    device = pick_device(args.device)
    work, recording = args.work.resolve(), args.recording.resolve()
    place = Place(device, args.toy, work, recording, source, args.seconds, args.section)
    for name in SECTIONS[args.section]:
        try:
            module = importlib.import_module(f"gpu_check.{name}")
        except Exception as error:  # the other sections run
            say(place, "FAIL", "import", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
            continue
        run(module, place)
    print(f"---- {args.section}: {time.perf_counter() - place.began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
