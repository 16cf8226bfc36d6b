"""docs/images/rollouts.gif: scripted experts of the demo's two tasks, and both experts of the wall with two ways.

python benchmarks/expert_gif.py --out docs/images/rollouts.gif
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dvla.stages.simulation.envs import make_environment

# Title, environment and initial state of each panel; from an odd one the expert passes the wall on the right.
PANELS = (
    ("press the button", "metaworld/button-press-topdown-v3", 0),
    ("open the drawer", "metaworld/drawer-open-v3", 0),
    ("around the wall: left", "metaworld/reach-wall-two-ways", 0),
    ("or right", "metaworld/reach-wall-two-ways", 1),
)
EVERY, HOLD, GAP = 4, 6, 6  # control steps between frames, frames that hold the end, pixels between panels


def episode(name: str, start: int, size: int) -> list[np.ndarray]:
    """Frames uint8 [size, size, 3] of one expert episode of the training split, the last one included."""
    environment = make_environment(name, "train", 0, size)
    environment.reset(start, False)
    frames, done = [environment.image("corner2")], False
    while not done:
        result = environment.step(environment.expert_action(), False)
        done = result.done or result.success
        if done or environment.steps % EVERY == 0:
            frames.append(environment.image("corner2"))
    environment.close()
    return frames


def side_by_side(episodes: list[list[np.ndarray]]) -> list[Image.Image]:
    """One row of panels per time; an episode that has ended shows its last frame."""
    length, size = max(map(len, episodes)) + HOLD, episodes[0][0].shape[0]
    white = np.full((size, GAP, 3), 255, np.uint8)
    rows = []
    for at in range(length):
        panels = [frames[min(at, len(frames) - 1)] for frames in episodes]
        rows.append(np.concatenate([piece for panel in panels for piece in (white, panel)][1:], axis=1))
    images = [Image.fromarray(row) for row in rows]
    for image in images:
        for i, (title, _, _) in enumerate(PANELS):
            ImageDraw.Draw(image).text((i * (size + GAP) + 8, 6), title, "white", ImageFont.load_default(size / 15))
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=208, help="side of a panel in pixels")
    parser.add_argument("--colors", type=int, default=256, help="colors of the palette that all frames share")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = side_by_side([episode(name, start, args.size) for _, name, start in PANELS])
    palette = rows[len(rows) // 2].quantize(args.colors)
    first, *others = [row.quantize(palette=palette, dither=Image.Dither.NONE) for row in rows]
    first.save(args.out, save_all=True, append_images=others, duration=80, loop=0)
    print(f"{args.out}: {len(rows)} frames, {args.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
