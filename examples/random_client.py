"""A robot of random images and states that asks a policy server what to do: where a client of your own begins.

dvla serve RUN --port 8000
python examples/random_client.py --port 8000 --steps 20
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import numpy as np

import dvla
from dvla.errors import UserError


def observation(about: dict[str, Any], instruction: str, rng: np.random.Generator) -> dict[str, Any]:
    """What a robot would see: an image of each view and its state, in the order that the server names."""
    images = {view: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for view in about["views"]}
    return {"images": images, "state": rng.normal(0, 0.1, len(about["state"])), "prompt": instruction}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=10, help="observations to send")
    parser.add_argument("--instruction", default="push the button")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, milliseconds = np.random.default_rng(args.seed), []
    try:
        with dvla.PolicyClient(args.host, args.port, token=os.environ.get("DVLA_TOKEN")) as client:
            print(client)
            print("actions:", ", ".join(client.metadata["actions"]))
            client.reset()
            for step in range(args.steps):
                began = time.perf_counter()
                actions = client.infer(observation(client.metadata, args.instruction, rng))["actions"]
                milliseconds.append(1e3 * (time.perf_counter() - began))
                print(f"step {step}: {list(np.shape(actions))}, first {np.round(np.ravel(actions)[:4], 3)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(milliseconds)} answers, median {np.median(milliseconds):.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
