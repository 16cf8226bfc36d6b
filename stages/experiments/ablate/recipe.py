"""Recipes of `dvla ablate`: what is recorded, cached, trained and evaluated, as the commands a user would type.

A recipe is YAML (configs/ablations); its fields are those of `Recipe`. The table has a row for each of its `variants`, and one for each
combination of the values of its `axes`. Everything lies in one folder:

    OUT/recipe.json                           what the folder was begun with
    OUT/data/<task>  OUT/vlm-<arch>           demonstrations; toy VLM, where the recipe asks for one
    OUT/cache  OUT/cache-<variant>            feature caches; a variant that changes features has its own
    OUT/runs/<variant>-<seed>                 trainings
    OUT/eval/<variant>-<seed>                 evaluations; also references-<seed> (expert, random) and blind-<seed>
    OUT/logs/<cell>.log                       what the commands printed
    OUT/results.json  OUT/table.md            written anew after every cell
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ....cache.store.manifest import MANIFEST
from ....common.config import configs_dir, from_mapping, load_yaml
from ....errors import UserError, unknown
from ..runner import words

OWN = {
    "record": ("--env", "--episodes", "--out"),
    "cache": ("--out", "--append", "--update"),
    "train": ("--from-cache", "--out", "--seed", "--blind", "--dry-run", "--stop-after", "--init"),
    "eval": ("--env", "--episodes", "--out", "--seed", "--blind", "--compare", "--baselines"),
}
"""Options of the commands that a recipe cannot give."""
REFERENCES = ("expert", "random")


@dataclass(frozen=True)
class Variant:
    """One row of the table: what it has besides the common settings."""

    train: str = ""  # options of `dvla train`
    eval: str = ""  # options of `dvla eval`
    of: str | None = (
        None  # the variant whose trained policy this one evaluates, with other `eval` options; it then trains nothing
    )
    cache: str = ""  # options of `dvla cache build`: a cache of its own
    vlm: str | None = None  # another toy VLM than the recipe's: a cache of its own


@dataclass(frozen=True)
class Recipe:
    """What is compared, on what."""

    title: str  # of the table
    environments: dict[str, int]  # simulated task → demonstrations
    variants: dict[str, Variant] = field(default_factory=dict)  # row → its settings
    axes: dict[str, dict[str, Variant]] = field(
        default_factory=dict
    )  # axis → value → settings: a row for each combination
    record: str = ""  # options of `dvla data record`
    vlm: str | None = "qwen3vl"  # architecture of a toy VLM to make; null: `cache` says which VLM
    cache: str = ""  # options of `dvla cache build`
    train: str = ""  # options of every `dvla train`
    eval: str = ""  # options of every `dvla eval`
    blind: str | None = ""  # further options of the trainings of the blind baseline; null: no blind baseline
    seeds: tuple[int, ...] = (0, 1, 2)  # of training, and of the evaluation's starts
    episodes: int = 50  # unseen starts per task and seed


@dataclass(frozen=True)
class Cell:
    """One training and the evaluations of what it trained, or evaluations alone."""

    name: str  # of the log
    commands: tuple[tuple[str, ...], ...]  # in their order
    products: tuple[Path, ...]  # evaluation folders; the cell is done when all are there


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return tuple(sorted(p.stem for p in (configs_dir() / "ablations").glob("*.yaml")))


def load_ablation(name_or_file: str, changes: Mapping[str, Any] | None = None, train: str = "") -> Recipe:
    """A recipe, a YAML file or a shipped one by name, with `changes` of its fields (None: not given) and further options of every training.

    `UserError` for an unknown name or field, or a recipe without sense.
    """
    if name_or_file.endswith((".yaml", ".yml")):
        values = load_yaml(Path(name_or_file))
    elif name_or_file in recipe_names():
        values = load_yaml(configs_dir() / "ablations" / f"{name_or_file}.yaml")
    else:
        raise unknown("recipe", name_or_file, recipe_names())
    recipe = from_mapping(
        Recipe, {**values, **{k: v for k, v in (changes or {}).items() if v is not None}}, name_or_file
    )
    recipe = replace(recipe, train=f"{recipe.train} {train}".strip())
    _check(recipe)
    return recipe


def rows(recipe: Recipe) -> dict[str, Variant]:
    """Name → settings of every row: the variants, then the combinations of the axes' values."""
    out = dict(recipe.variants)
    for combination in itertools.product(*(axis.items() for axis in recipe.axes.values())) if recipe.axes else ():
        name = ", ".join(name for name, _ in combination)
        if name in out:
            raise UserError(f"the recipe has two rows '{name}'")
        own = [one for _, one in combination]
        vlms = [one.vlm for one in own if one.vlm is not None]
        train, evaluation, cache = (
            " ".join(filter(None, (getattr(one, kind) for one in own))) for kind in ("train", "eval", "cache")
        )
        out[name] = Variant(train, evaluation, None, cache, vlms[-1] if vlms else None)
    return out


def slug(name: str) -> str:
    """A row's name as part of a path."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _check(recipe: Recipe) -> None:
    table = rows(recipe)
    if not table or not recipe.environments or not recipe.seeds or recipe.episodes < 1:
        raise UserError(
            f"the recipe has {len(table)} variants, {len(recipe.environments)} environments, {len(recipe.seeds)} seeds and "
            f"{recipe.episodes} episodes; at least 1 of each is needed"
        )
    if len(set(recipe.seeds)) != len(recipe.seeds) or min(recipe.seeds) < 0:
        raise UserError(f"seeds {list(recipe.seeds)}: they must be different and at least 0")
    if recipe.vlm is None and "--vlm" not in recipe.cache:
        raise UserError("the recipe makes no toy VLM (vlm: null), so its cache options must name one with --vlm")
    if len({_task(env) for env in recipe.environments}) < len(recipe.environments):
        raise UserError(
            f"environments {', '.join(recipe.environments)}: two of one name in different simulators cannot be in one recipe"
        )
    for kind in OWN:
        _words(kind, getattr(recipe, kind))
    _words("train", recipe.blind or "")
    taken: dict[str, str] = {}
    for name, variant in table.items():
        for kind in ("train", "eval", "cache"):
            _words(kind, getattr(variant, kind))
        at = slug(name)
        if not at or at == "blind" or at == "references" or at in taken:
            raise UserError(
                f"variant '{name}' needs another name: as a folder it would be '{at}'"
                + (f", like that of '{taken[at]}'" if at in taken else "")
            )
        taken[at] = name
        if variant.of is None:
            continue
        if variant.of not in table:
            raise unknown(f"variant that '{name}' is of", variant.of, list(table))
        if variant.train or variant.cache or variant.vlm or table[variant.of].of:
            raise UserError(
                f"variant '{name}' is of '{variant.of}': it takes what that one trains, so it has eval options only, and that one trains"
            )


def _task(env: str) -> str:
    """A task without its simulator, as a folder."""
    return slug(env.partition("/")[2])


def _words(kind: str, text: str) -> tuple[str, ...]:
    return words(f"the recipe's {kind} options", text, OWN[kind], "dvla ablate")


def preparation(recipe: Recipe, out: Path, workers: int) -> list[tuple[Path, tuple[str, ...]]]:
    """(product, command) of demonstrations, toy VLMs and caches, in order; the command is due where the product is missing."""
    steps: list[tuple[Path, tuple[str, ...]]] = []
    data = {env: out / "data" / _task(env) for env in recipe.environments}
    for env, count in recipe.environments.items():
        steps.append(
            (
                data[env],
                (
                    "data",
                    "record",
                    "--env",
                    env,
                    "--episodes",
                    str(count),
                    *_words("record", recipe.record),
                    "--workers",
                    str(workers),
                    "--out",
                    str(data[env]),
                ),
            )
        )
    wanted = [Variant(), *rows(recipe).values()] if recipe.blind is not None else list(rows(recipe).values())
    for arch in dict.fromkeys(arch for v in wanted if (arch := v.vlm or recipe.vlm)):
        steps.append((out / f"vlm-{arch}", ("vlm", "tiny", "--arch", arch, "--out", str(out / f"vlm-{arch}"))))
    built: dict[Path, tuple[str, ...]] = {}
    common = {} if recipe.blind is None else {out / "cache": Variant()}  # the blind baseline's
    for folder, variant in [*common.items(), *((cache_of(recipe, out, name), v) for name, v in rows(recipe).items())]:
        arch = variant.vlm or recipe.vlm
        vlm = ("--vlm", f"tiny_{arch}", "--vlm-path", str(out / f"vlm-{arch}")) if arch else ()
        built.setdefault(
            folder,
            (
                "cache",
                "build",
                *(str(path) for path in data.values()),
                *vlm,
                *_words("cache", recipe.cache),
                *_words("cache", variant.cache),
                "--out",
                str(folder),
            ),
        )
    return steps + [(folder / MANIFEST, command) for folder, command in built.items()]


def cache_of(recipe: Recipe, out: Path, name: str) -> Path:
    """The cache that a row is trained from."""
    variant = rows(recipe)[name]
    own = variant.cache or variant.vlm
    return out / (f"cache-{slug(name)}" if own else "cache")


def cells(recipe: Recipe, out: Path, from_cache: str | None = None) -> list[Cell]:
    """All cells, seed by seed: the references, the blind baseline, then the variants in the recipe's order."""
    table, envs = rows(recipe), [word for env in recipe.environments for word in ("--env", env)]
    if from_cache is not None and (own := [name for name, v in table.items() if v.cache or v.vlm]):
        raise UserError(f"--from-cache {from_cache}: variant '{own[0]}' has a cache of its own; leave --from-cache out")

    def evaluate(policy: tuple[str, ...], folder: Path, seed: int, options: str) -> tuple[str, ...]:
        return (
            "eval",
            *policy,
            *envs,
            "--episodes",
            str(recipe.episodes),
            "--seed",
            str(seed),
            "--baselines",
            "none",
            *_words("eval", recipe.eval),
            *_words("eval", options),
            "--out",
            str(folder),
        )

    def train(cache: str, run: Path, seed: int, options: tuple[str, ...]) -> tuple[str, ...]:
        return (
            "train",
            "--from-cache",
            cache,
            *_words("train", recipe.train),
            *options,
            "--seed",
            str(seed),
            "--out",
            str(run),
        )

    found = []
    for seed in recipe.seeds:
        folder = out / "eval" / f"references-{seed}"
        found.append(
            Cell(f"references-{seed}", (evaluate(("expert", "--compare", "random"), folder, seed, ""),), (folder,))
        )
        if recipe.blind is not None:
            run, folder = out / "runs" / f"blind-{seed}", out / "eval" / f"blind-{seed}"
            cache = from_cache or str(out / "cache")
            found.append(
                Cell(
                    f"blind-{seed}",
                    (
                        train(cache, run, seed, ("--blind", *_words("train", recipe.blind))),
                        evaluate((str(run),), folder, seed, ""),
                    ),
                    (folder,),
                )
            )
        for name, variant in table.items():
            if variant.of is not None:
                continue
            run = out / "runs" / f"{slug(name)}-{seed}"
            shown = {name: variant, **{other: v for other, v in table.items() if v.of == name}}
            folders = {one: out / "eval" / f"{slug(one)}-{seed}" for one in shown}
            trained = train(from_cache or str(cache_of(recipe, out, name)), run, seed, _words("train", variant.train))
            found.append(
                Cell(
                    run.name,
                    (trained, *(evaluate((str(run),), folders[one], seed, v.eval) for one, v in shown.items())),
                    tuple(folders.values()),
                )
            )
    return found
