"""End-effector paths of policies in metaworld/reach-wall-two-ways, seen from above: one panel per policy.

python benchmarks/two_ways.py runs/baselines/runs/{mse,drifting,hybrid}-0 --out paths.png
python benchmarks/two_ways.py "runs/baselines/runs/flow-10-passes-0@1" --out one_pass.png       # with 1 pass per action
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from dvla.stages.policy.policy import Policy
from dvla.stages.simulation.envs import make_environment, metaworld_two_ways

TASK = "metaworld/reach-wall-two-ways"
GREEN, RED = "#009E73", "#D55E00"


def paths(
    run: str, steps: int | None, episodes: int, replan: int, seed: int
) -> list[tuple[np.ndarray, bool, np.ndarray]]:
    """(hand positions [T,2] in meters, solved, goal position [2]) per episode, initial states 0, 1, … of split eval."""
    policy = Policy.from_pretrained(run, environment=TASK, seed=seed, steps=steps)
    env, found = make_environment(TASK, "eval", seed), []
    for start in range(episodes):
        observation, done, solved = env.reset(start, policy.needs_images), False, False
        path = [observation.state[:2]]
        while not done:
            chunk = policy.act_batch([observation])[0][:replan]
            for i, action in enumerate(chunk):
                result = env.step(action, policy.needs_images and i == len(chunk) - 1)
                path.append(result.observation.state[:2])
                observation, done, solved = (
                    result.observation,
                    result.done or bool(result.info["touched"]),
                    result.success,
                )
                if done:
                    break
        found.append((np.array(path), solved, np.array(env.start_vector[3:5])))
    env.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; RUN@N acts in N passes")
    parser.add_argument("--names", help="titles of the panels, separated by semicolons")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--replan", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(2.6 * len(given.runs), 2.9), layout="constrained")
    names = given.names.split(";") if given.names else [Path(run).name for run in given.runs]
    (x, y, _), half = metaworld_two_ways.WALL, metaworld_two_ways.WALL_HALF_WIDTH
    for axis, name, run in zip(figure.subplots(1, len(given.runs), sharey=True, squeeze=False)[0], names, given.runs):
        run, _, steps = run.partition("@")
        episodes = paths(run, int(steps) if steps else None, given.episodes, given.replan, given.seed)
        axis.add_patch(Rectangle((x - half, y - 0.01), 2 * half, 0.02, color="#666666"))
        for path, solved, goal in episodes:
            axis.plot(*path.T, color=GREEN if solved else RED, linewidth=1, alpha=0.7)
            axis.plot(*goal, "o", color="#CC0000", markersize=3)
        won = sum(solved for _, solved, _ in episodes)
        beside = [
            path[path[:, 1] >= y][0, 0] for path, _, _ in episodes if path[-1, 1] >= y
        ]  # x where the wall is passed
        axis.set(
            title=f"{name}\n{won} of {len(episodes)}",
            xlim=(-0.3, 0.3),
            ylim=(0.53, 0.95),
            aspect="equal",
            xlabel="x (m)",
        )
        print(
            f"{name}: {won} of {len(episodes)} solved; passed the wall on the left {sum(at < 0 for at in beside)} "
            f"times, on the right {sum(at > 0 for at in beside)} times",
            flush=True,
        )
    figure.axes[0].set_ylabel("y (m)")
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
