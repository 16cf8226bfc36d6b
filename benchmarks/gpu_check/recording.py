"""A small LeRobot recording for the check, without the noise that makes a video large; needs lerobot.

PYTHONPATH=benchmarks python -m gpu_check.recording OUT [--size 480] [--episodes 8] [--frames 100]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from read_episodes import record

from dvla.common.mp4 import quiet_libav


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--size", type=int, default=480, help="side of its images")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--frames", type=int, default=100, help="frames per episode")
    args = parser.parse_args()
    quiet_libav()
    record(args.out, args.size, args.episodes, args.frames, "h264", noise=0.0)


if __name__ == "__main__":
    main()
