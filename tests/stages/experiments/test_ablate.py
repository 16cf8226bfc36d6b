"""`dvla ablate`: recipes, the cells that follow from them, and the grid that runs them (by commands that stand in for
`dvla`)."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from dvla.drifting.dit import build_dit
from dvla.errors import UserError
from dvla.stages.experiments import runner
from dvla.stages.experiments.ablate import run as module
from dvla.stages.experiments.ablate.recipe import (
    Recipe,
    Variant,
    cache_of,
    cells,
    load_ablation,
    preparation,
    recipe_names,
    rows,
    slug,
)
from dvla.stages.experiments.ablate.run import ablate, begin, outline
from dvla.stages.experiments.ablate.table import document, results
from dvla.stages.training.config import TrainConfig, train_config
from support.cli_runner import Dvla, refused
from support.policy_samples import ALPHA, NOISE, make_batch, make_net
from support.toy_environment import install

RECIPE = Recipe(
    title="two",
    environments={"toy/near": 3, "toy/far": 4},
    train="--steps 10",
    eval="--replan 8",
    seeds=(0, 1),
    episodes=5,
    variants={
        "MSE": Variant(train="--loss-type mse"),
        "flow, 10": Variant(train="--loss-type flow"),
        "flow, 1": Variant(of="flow, 10", eval="--sample-steps 1"),
    },
)


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_commands_that_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their options parse and give a training's settings, which differ from row to row."""
    from dvla import cli
    from dvla.stages.training import train

    def trained(config: TrainConfig, *_: Any) -> None:
        seen.append(dataclasses.astuple(dataclasses.replace(config, out="")))
        raise UserError("seen")

    monkeypatch.setattr(train, "train", trained)
    recipe, commands = load_ablation(name), typer.main.get_command(cli.app).commands
    seen = []
    for job in preparation(recipe, Path("out"), 2):
        [command] = job.commands
        group = commands[command[0]].commands[command[1]]
        group.make_context(command[1], list(command[2:]))
    for cell in cells(recipe, Path("out")):
        for command in cell.commands:
            if command[0] == "train":
                with pytest.raises(UserError, match="^seen$"):
                    cli.run(list(command))
            else:
                commands[command[0]].make_context(command[0], list(command[1:]))
    assert len(seen) == len({repr(one) for one in seen}) > len(recipe.seeds)


def test_axes_are_combined() -> None:
    recipe = Recipe(
        "grid",
        {"toy/near": 1},
        variants={"plain": Variant()},
        axes={
            "G": {"G 1": Variant(train="--draws 1"), "G 4": Variant(train="--draws 4", cache="--tokens 4")},
            "loss": {
                "mse": Variant(train="--loss-type mse"),
                "other VLM": Variant(vlm="paligemma2", eval="--replan 2"),
            },
        },
    )
    assert list(rows(recipe)) == ["plain", "G 1, mse", "G 1, other VLM", "G 4, mse", "G 4, other VLM"]
    assert rows(recipe)["G 4, mse"] == Variant(train="--draws 4 --loss-type mse", cache="--tokens 4")
    assert rows(recipe)["G 4, other VLM"] == Variant(
        train="--draws 4", eval="--replan 2", cache="--tokens 4", vlm="paligemma2"
    )
    products = [job.products[0].relative_to("o").as_posix() for job in preparation(recipe, Path("o"), 1)]
    assert products == [
        "data/near",
        "vlm-qwen3vl",
        "vlm-paligemma2",
        "cache/manifest.json",
        "cache-g-1-other-vlm/manifest.json",
        "cache-g-4-mse/manifest.json",
        "cache-g-4-other-vlm/manifest.json",
    ]
    build = shlex.join(preparation(recipe, Path("o"), 1)[-1].commands[0])
    assert "--vlm tiny_paligemma2 --vlm-path o/vlm-paligemma2 --tokens 4 --out o/cache-g-4-other-vlm" in build


def test_rows_that_differ_in_training_alone_share_a_cache() -> None:
    small, other = "--tokens 4", "--loss-type mse"
    table = {"a": Variant(cache=small), "b": Variant(cache=small, train=other), "c": Variant(cache="--tokens 1")}
    recipe = dataclasses.replace(RECIPE, variants={"plain": Variant(train=other), **table})
    assert [cache_of(recipe, Path("o"), name).name for name in recipe.variants] == [
        *("cache", "cache-a", "cache-a", "cache-c")
    ]
    built = [job.name for job in preparation(recipe, Path("o"), 1) if job.commands[0][0] == "cache"]
    assert built == ["cache", "cache-a", "cache-c"]


def test_cells_follow_the_seeds() -> None:
    found = cells(RECIPE, Path("o"))
    assert [cell.name for cell in found] == [
        f"{name}-{seed}" for seed in (0, 1) for name in ("references", "blind", "mse", "flow-10")
    ]
    train, ten, one = found[3].commands
    assert shlex.join(train) == "train --from-cache o/cache --steps 10 --loss-type flow --seed 0 --out o/runs/flow-10-0"
    assert (
        ten[:2] == one[:2] == ("eval", "o/runs/flow-10-0") and "--sample-steps" in one and "--sample-steps" not in ten
    )
    assert found[3].products == (Path("o/eval/flow-10-0"), Path("o/eval/flow-1-0"))
    # Every policy of a seed meets the same starts; the baselines run in cells of their own.
    evaluations = [c for cell in found for c in cell.commands if c[0] == "eval"]
    assert {shlex.join(c[c.index("--episodes") : c.index("--seed")]) for c in evaluations} == {"--episodes 5"}
    assert all(c[c.index("--baselines") + 1] == "none" and c[c.index("--seed") + 1] == c[-1][-1] for c in evaluations)
    assert "--blind" in found[1].commands[0] and "--blind" not in found[2].commands[0]
    assert [c.name for c in cells(dataclasses.replace(RECIPE, blind=None), Path("o"))][:2] == ["references-0", "mse-0"]
    assert cells(RECIPE, Path("o"), "caches/mine")[2].commands[0][2] == "caches/mine"
    own = dataclasses.replace(RECIPE, variants={"a": Variant(cache="--tokens 4")})
    with pytest.raises(UserError, match="'a' has a cache of its own"):
        cells(own, Path("o"), "caches/mine")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variants": {}}, "0 variants"),
        ({"seeds": [1, 1]}, "must be different"),
        ({"episodes": 0}, "0 episodes"),
        ({"variantz": {}}, "did you mean 'variants'"),
        ({"train": "--seed 3"}, "--seed is set by `dvla ablate` itself"),
        ({"eval": "--out x"}, "--out is set by"),
        ({"blind": "--from-cache=x"}, "--from-cache is set by"),
        ({"variants": {"a": {"train": "--loss-type 'mse"}}}, "No closing quotation"),
        ({"variants": {"a": {"trian": ""}}}, "did you mean 'train'"),
        ({"variants": {"a b": {}, "A-B": {}}}, "the same as that of 'a b'"),
        ({"variants": {"blind": {}}}, "needs another name"),
        ({"variants": {"a": {"of": "bb"}, "b": {}}}, "did you mean 'b'"),
        ({"variants": {"a": {"of": "b", "train": "--steps 1"}, "b": {}}}, "eval options only"),
        ({"vlm": None}, "name one with --vlm"),
        ({"environments": {"x/a": 1, "y/a": 1}}, "two tasks have the same name"),
        ({"environments": {"x/a": "many"}}, "expected int"),
    ],
)
def test_recipes_without_sense_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = {"title": "t", "environments": {"toy/near": 1}, "variants": {"a": {}}, **changes}
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load_ablation(str(tmp_path / "r.yaml"))


def test_unknown_recipe() -> None:
    with pytest.raises(UserError, match="did you mean 'baselines'"):
        load_ablation("baseline")
    assert load_ablation("baselines", {"seeds": [4], "episodes": None}, "--steps 7").train.endswith("--steps 7")
    assert slug("Flow, 10 passes (λ 0.1)") == "flow-10-passes-0.1"


# --- the grid -------------------------------------------------------------------------------------------------------

STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
out = pathlib.Path(words[-1])
with open(out.parent.parent / "called.txt", "a") as file:
    file.write(" ".join(words) + "\\n")
if (out.parent.parent / f"break-{out.name}").exists():
    print("it broke")
    sys.exit(2)
if (out.parent.parent / "wait").exists():
    import time
    time.sleep(60)
if words[0] == "train":
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({"cache": "c", "out": "o", "batch_size": 8, "accumulate": 1}))
    with open(out / "log.jsonl", "w") as log:
        for step, held_out in ((1, {}), (10, {"eval/mse": 0.5})):
            line = {"step": step, "samples_per_second": 16.0, "loss": 1.0, "mse": 1.0, "wait_share": 0.0, **held_out}
            log.write(json.dumps(line) + "\\n")
elif words[0] == "eval":
    seed = int(words[words.index("--seed") + 1])
    wins = {"mse": 0, "flow-10": 4, "flow-1": 2, "blind": 1, "expert": 5, "random": 0, "more": 5}
    for name in ("expert", "random") if "--compare" in words else (None,):
        won = wins[name or out.name.rsplit("-", 1)[0]]
        row = {"successes": [1] * won + [0] * (5 - won), "success": won / 5, "ci95": [0, 1], "episodes": 5,
               "mean_return": 1.5, "ms_per_action": 2.0, "ms_per_chunk": None if name else 9.0}
        folder = out / name if name else out
        folder.mkdir(parents=True)
        (folder / "part").write_text(json.dumps({"tasks": {"toy/near": row, "toy/far": row}, "seconds": 3.0}))
        (folder / "part").rename(folder / "summary.json")       # whole or not at all, as `dvla eval` writes it
elif words[:2] == ["cache", "build"]:
    out.mkdir(parents=True)
    (out / "manifest.json").write_text("{}")
else:
    out.mkdir(parents=True)
"""


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where grids run by commands that stand in for `dvla` and note their words in called.txt."""
    install(monkeypatch)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(runner, "command_line", lambda command: [sys.executable, "-S", str(script), *command])
    monkeypatch.setattr(runner, "POLL", 0.02)
    return tmp_path / "run"


def called(out: Path) -> list[str]:
    lines = (out / "called.txt").read_text().splitlines() if (out / "called.txt").exists() else []
    (out / "called.txt").unlink(missing_ok=True)
    return lines


def run(out: Path, recipe: Recipe = RECIPE, jobs: int = 2) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return ablate(recipe, out, jobs, None, lambda line, **_: said.append(line)), said


def test_a_grid_runs_once_and_its_table_pools_the_seeds(grid: Path) -> None:
    found, said = run(grid)
    words = called(grid)
    assert sum(line.startswith("train") for line in words) == 6 and sum(line.startswith("eval") for line in words) == 10
    row = found["rows"]["flow, 10"]
    assert (
        row["tasks"]["toy/near"]["success"] == 0.8
        and row["tasks"]["toy/near"]["episodes"] == 10
        and row["tasks"]["toy/far"]["by_seed"] == {"0": 0.8, "1": 0.8}
    )
    assert row["tasks"]["toy/near"]["ci95"] == pytest.approx([0.490, 0.943], abs=1e-3)  # Wilson's, 8 of 10
    assert (
        row["steps_per_second"] == 2.0
        and row["train_seconds"] == {"0": 5.0, "1": 5.0}
        and row["held_out_mse"] == {"0": 0.5, "1": 0.5}
    )
    assert list(found["rows"]) == ["MSE", "flow, 10", "flow, 1", "blind", "expert", "random"]
    table = (grid / "table.md").read_text()
    assert table == document(found) and json.loads((grid / "results.json").read_text()) == found
    assert (
        "| flow, 1 | 40% (17 – 69; 40 / 40) | 40% (17 – 69; 40 / 40) | 40% | 9.0 | 2.00 | – | – | see flow, 10 | 0, 1 |"
        in table
    )
    assert sum("of 8 cells" in line for line in said) == 8
    # Again: nothing is left to do, and the numbers are read from the folder.
    again, said = run(grid)
    assert again == found and called(grid) == [] and said == ["8 of 8 cells were already complete"]


def test_rows_and_seeds_may_be_added_but_not_changed(grid: Path) -> None:
    run(grid, dataclasses.replace(RECIPE, seeds=(0,), variants={"MSE": RECIPE.variants["MSE"]}))
    called(grid)
    found, _ = run(grid)
    assert "out/runs/mse-0" not in " ".join(called(grid)) and found["rows"]["MSE"]["seeds"] == [0, 1]
    changed = {**RECIPE.variants, "MSE": Variant(train="--loss-type mse --draws 1")}
    for recipe, words in [
        (dataclasses.replace(RECIPE, episodes=6), "episodes: folder has 5, you requested 6"),
        (dataclasses.replace(RECIPE, train="--steps 20"), "train: folder has --steps 10, you requested --steps 20"),
        (dataclasses.replace(RECIPE, variants=changed), "rows.MSE.train: folder has --loss-type mse, you requested"),
    ]:
        with pytest.raises(UserError, match=words):
            begin(recipe, grid, None)
    # A row that is left out now may not come back as something else.
    begin(dataclasses.replace(RECIPE, variants={"flow, 10": RECIPE.variants["flow, 10"]}), grid, None)
    with pytest.raises(UserError, match="rows.MSE.train"):
        begin(dataclasses.replace(RECIPE, variants=changed), grid, None)


def test_what_fails_is_named_and_the_rest_is_run(grid: Path) -> None:
    grid.mkdir()
    (grid / "data").mkdir()
    (grid / "break-mse-0").touch()
    begin(RECIPE, tmp := grid.parent / "other", None)
    assert (tmp / "recipe.json").exists()
    with pytest.raises(UserError, match="holds other files"):
        run(grid)
    (grid / "break-mse-0").rename(tmp / "break-mse-0")
    with pytest.raises(
        UserError, match="1 of 8 cells failed; see .*logs, then rerun the same command to resume. Failed: mse-0"
    ):
        run(tmp)
    found = results(RECIPE, tmp, {})
    assert found["rows"]["MSE"]["seeds"] == [1] and found["rows"]["flow, 1"]["seeds"] == [0, 1]
    assert "it broke" in (tmp / "logs" / "mse-0.log").read_text()
    (tmp / "break-mse-0").unlink()
    called(tmp)
    found, said = run(tmp)
    assert (
        [line.split()[0] for line in called(tmp)] == ["train", "eval"]
        and "7 of 8 cells were already complete" in said
        and found["rows"]["MSE"]["seeds"] == [0, 1]
    )


def test_a_failed_preparation_stops_the_grid(grid: Path) -> None:
    begin(RECIPE, grid, None)
    (grid / "break-far").touch()
    with pytest.raises(UserError, match="dvla data record failed with exit code 2"):
        run(grid)
    assert [line.split()[0] for line in called(grid)] == ["data", "data"]
    (grid / "break-far").unlink()
    run(grid)
    assert "toy/near" not in called(grid)[0]  # recorded before


def test_an_interruption_ends_the_cells_at_work(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("near", "far"):
        (grid / "data" / name).mkdir(parents=True)
    (grid / "vlm-qwen3vl").mkdir()
    (grid / "cache").mkdir()
    (grid / "cache" / "manifest.json").write_text("{}")
    begin(RECIPE, grid, None)
    (grid / "wait").touch()
    began, beginnings, popen = time.monotonic(), [], runner.subprocess.Popen

    def watched(*given: Any, **named: Any) -> Any:
        beginnings.append(popen(*given, **named))
        if len(beginnings) == 2:
            raise KeyboardInterrupt
        return beginnings[-1]

    monkeypatch.setattr(runner.subprocess, "Popen", watched)
    with pytest.raises(KeyboardInterrupt):
        run(grid)
    beginnings[1].kill()
    assert beginnings[0].poll() is not None and time.monotonic() - began < 50
    # The folder is free again, and the whole grid is still to do.
    monkeypatch.setattr(runner.subprocess, "Popen", popen)
    (grid / "wait").unlink()
    assert list(run(grid)[0]["rows"])[0] == "MSE"


def test_one_at_a_time_in_a_folder(grid: Path) -> None:
    begin(RECIPE, grid, None)
    with module._alone(grid), pytest.raises(UserError, match="another process is working"):
        run(grid)


def test_the_command(grid: Path, dvla: Dvla, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        json.dumps(
            {
                "title": "two",
                "environments": {"toy/near": 3, "toy/far": 4},
                "seeds": [0],
                "episodes": 5,
                "variants": {"MSE": {"train": "--loss-type mse"}},
            }
        )
    )
    shown = dvla("ablate", tmp_path / "r.yaml", "--out", grid, "--print")
    assert (
        shown.code == 0
        and "dvla train --from-cache" in shown.out
        and "3 cells: 2 trainings, 40 rollouts; 0 done" in shown.out
        and not grid.exists()
    )
    refused(dvla("ablate", tmp_path / "r.yaml", "--out", grid, "--table"), "holds no results")
    refused(dvla("ablate", tmp_path / "r.yaml", "--out", grid, "--jobs", "0"), "--jobs is 0")
    done = dvla("ablate", tmp_path / "r.yaml", "--out", grid)
    assert done.code == 0 and "table.md" in done.out and "two" in done.out
    (grid / "table.md").unlink()
    again = dvla("ablate", tmp_path / "r.yaml", "--out", grid, "--table")
    assert again.code == 0 and again.out.startswith("**two**") and (grid / "table.md").read_text() in again.out
    assert "done" in dvla("ablate", tmp_path / "r.yaml", "--out", grid, "--print").out
    refused(
        dvla("ablate", tmp_path / "r.yaml", "--out", grid, "--train", "--steps 4"), "begun with another recipe", "train"
    )
    refused(dvla("ablate", "lamda"), "did you mean 'lambda'")


def test_the_estimate_comes_from_finished_cells(grid: Path) -> None:
    assert outline(RECIPE, grid, 2, None)[1].startswith("8 cells: 6 trainings, 120 rollouts; 0 done. How long")
    run(grid, dataclasses.replace(RECIPE, seeds=(0,)))
    steps, line = outline(RECIPE, grid, 2, None)
    assert "4 done. A finished cell took" in line and [state for _, state, _ in steps].count("done") == 4 + 4


# --- the embodiment token -------------------------------------------------------------------------------------------


def test_without_its_token_the_embodiment_changes_nothing() -> None:
    batch = make_batch()
    other = dataclasses.replace(batch, embodiment=(batch.embodiment + 1) % 7)
    for token in (True, False):
        net = make_net(embodiment_token=token)
        assert torch.equal(net(batch, NOISE, ALPHA), net(other, NOISE, ALPHA)) != token
    counts = [sum(p.numel() for p in build_dit("tiny", embodiment_token=token).parameters()) for token in (True, False)]
    assert counts[0] - counts[1] == 7 * 192
    with pytest.raises(UserError, match="dit.embodiment_token is 1; it must be true or false"):
        train_config(None, {"cache": "c", "out": "o", "dit.embodiment_token": 1})
