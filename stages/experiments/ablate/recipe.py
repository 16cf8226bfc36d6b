"""Recipes of `dvla ablate`: what is recorded, cached, trained and evaluated, as the commands a user would type.

A recipe is YAML (configs/ablations); its fields are those of `Recipe`. The table has a row for each of its `variants`,
and one for each combination of the values of its `axes`. Everything lies in one folder:

    OUT/recipe.json                           what the folder was begun with
    OUT/data/<task>  OUT/vlm-<arch>           demonstrations; toy VLM, where the recipe asks for one
    OUT/cache  OUT/cache-<variant>            feature caches; variants that change features have their own
    OUT/runs/<variant>-<seed>                 training runs
    OUT/eval/<variant>-<seed>                 evaluations; also references-<seed> (expert, random) and blind-<seed>
    OUT/logs/<cell>.log                       output of the commands
    OUT/results.json  OUT/table.md            rewritten after every cell
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ....cache.store.manifest import MANIFEST
from ....common.config import from_mapping, load_shipped, shipped
from ....errors import UserError, unknown
from ..runner import Command, Job, options, split_options

RESERVED = {
    "record": ("--env", "--episodes", "--out"),
    "cache": ("--out", "--append", "--update"),
    "train": ("--from-cache", "--out", "--seed", "--blind", "--dry-run", "--stop-after", "--init"),
    "eval": ("--env", "--episodes", "--out", "--seed", "--blind", "--compare", "--baselines"),
}
"""Options of the commands that a recipe cannot set."""
REFERENCES = ("expert", "random")


@dataclass(frozen=True)
class Variant:
    """One row of the table: what it has besides the common settings."""

    train: str = ""  # options of `dvla train`
    eval: str = ""  # options of `dvla eval`
    of: str | None = None  # the variant whose trained policy this one evaluates, with other `eval` options
    cache: str = ""  # options of `dvla cache build`: a cache of its own
    vlm: str | None = None  # another toy VLM than the recipe's: a cache of its own


@dataclass(frozen=True)
class Recipe:
    """What is compared, on what."""

    title: str  # of the table
    environments: dict[str, int]  # simulated task → demonstrations
    variants: dict[str, Variant] = field(default_factory=dict)  # row → its settings
    # axis → value → settings: a row for each combination
    axes: dict[str, dict[str, Variant]] = field(default_factory=dict)
    record: str = ""  # options of `dvla data record`
    vlm: str | None = "qwen3vl"  # architecture of a toy VLM to make; null: `cache` says which VLM
    cache: str = ""  # options of `dvla cache build`
    train: str = ""  # options of every `dvla train`
    eval: str = ""  # options of every `dvla eval`
    blind: str | None = ""  # further options for training the blind baseline; null: no blind baseline
    seeds: tuple[int, ...] = (0, 1, 2)  # of training, and of the held-out initial states
    episodes: int = 50  # held-out initial states per task and seed


def recipe_names() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return shipped("ablations")


def load_ablation(name_or_file: str, changes: Mapping[str, Any] | None = None, train: str = "") -> Recipe:
    """A recipe, from a YAML file or a shipped one by name.

    Args:
        changes: values in place of the recipe's own, by field; None: not given.
        train: further options of every training.

    Raises:
        UserError: for an unknown name or field, or a recipe that contradicts itself.
    """
    values = load_shipped("ablations", name_or_file) | {k: v for k, v in (changes or {}).items() if v is not None}
    recipe = from_mapping(Recipe, values, name_or_file)
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
            f"the recipe has {len(table)} variants, {len(recipe.environments)} environments, {len(recipe.seeds)} seeds "
            f"and {recipe.episodes} episodes; at least 1 of each is needed"
        )
    if len(set(recipe.seeds)) != len(recipe.seeds) or min(recipe.seeds) < 0:
        raise UserError(f"seeds {list(recipe.seeds)}: they must be different and at least 0")
    if recipe.vlm is None and "--vlm" not in recipe.cache:
        raise UserError("the recipe makes no toy VLM (vlm: null), so its cache options must name one with --vlm")
    if len({_task(env) for env in recipe.environments}) < len(recipe.environments):
        raise UserError(
            f"environments {', '.join(recipe.environments)}: two tasks have the same name in different simulators; "
            "keep one of them in the recipe"
        )
    for kind in RESERVED:
        _options(kind, getattr(recipe, kind))
    _options("train", recipe.blind or "")
    taken: dict[str, str] = {}
    for name, variant in table.items():
        for kind in ("train", "eval", "cache"):
            _options(kind, getattr(variant, kind))
        at = slug(name)
        if not at or at == "blind" or at == "references" or at in taken:
            raise UserError(
                f"variant '{name}' needs another name: as a folder it would be '{at}'"
                + (f", the same as that of '{taken[at]}'" if at in taken else "")
            )
        taken[at] = name
        if variant.of is None:
            continue
        if variant.of not in table:
            raise unknown(f"variant that '{name}' is of", variant.of, list(table))
        if variant.train or variant.cache or variant.vlm or table[variant.of].of:
            raise UserError(
                f"variant '{name}' is of '{variant.of}': it evaluates what '{variant.of}' trains, so it may have eval "
                f"options only, and '{variant.of}' may not be of another variant"
            )


def _task(env: str) -> str:
    """A task without its simulator, as a folder."""
    return slug(env.partition("/")[2])


def _options(kind: str, text: str) -> Command:
    return split_options(f"the recipe's {kind} options", text, RESERVED[kind], "dvla ablate")


def preparation(recipe: Recipe, out: Path, workers: int) -> list[Job]:
    """The jobs that make demonstrations, toy VLMs and caches, in order."""
    data = {env: out / "data" / _task(env) for env in recipe.environments}
    jobs = []
    for env, count in recipe.environments.items():
        where = options(workers=workers, out=data[env])
        command = ("data", "record", *options(env=env, episodes=count), *_options("record", recipe.record), *where)
        jobs.append(Job(data[env].name, (command,), products=(data[env],)))
    common = {} if recipe.blind is None else {out / "cache": Variant()}  # the blind baseline's
    caches = common | {cache_of(recipe, out, name): variant for name, variant in rows(recipe).items()}
    for arch in dict.fromkeys(arch for variant in caches.values() if (arch := variant.vlm or recipe.vlm)):
        folder = out / f"vlm-{arch}"
        jobs.append(Job(folder.name, (("vlm", "tiny", *options(arch=arch, out=folder)),), products=(folder,)))
    for folder, variant in caches.items():
        arch = variant.vlm or recipe.vlm
        vlm = options(vlm=f"tiny_{arch}", vlm_path=out / f"vlm-{arch}") if arch else ()
        own = (*vlm, *_options("cache", recipe.cache), *_options("cache", variant.cache), "--out", str(folder))
        command = ("cache", "build", *map(str, data.values()), *own)
        jobs.append(Job(folder.name, (command,), products=(folder / MANIFEST,)))
    return jobs


def cache_of(recipe: Recipe, out: Path, name: str) -> Path:
    """The cache that a row is trained from, shared by rows with the same cache options and named after the first."""
    table = rows(recipe)
    own = table[name].cache, table[name].vlm
    first = next(row for row, variant in table.items() if (variant.cache, variant.vlm) == own)
    return out / (f"cache-{slug(first)}" if any(own) else "cache")


def cells(recipe: Recipe, out: Path, from_cache: str | None = None) -> list[Job]:
    """One job per training and its evaluations: for each seed the references, the blind baseline, the variants."""
    table = rows(recipe)
    if from_cache is not None and (own := [name for name, v in table.items() if v.cache or v.vlm]):
        raise UserError(f"--from-cache {from_cache}: variant '{own[0]}' has a cache of its own; leave --from-cache out")

    def evaluated(name: str) -> Path:
        return out / "eval" / name

    def evaluate(policy: Command, name: str, seed: int, extra: str) -> Command:
        common = options(env=[*recipe.environments], episodes=recipe.episodes, seed=seed, baselines="none")
        own = (*_options("eval", recipe.eval), *_options("eval", extra))
        return ("eval", *policy, *common, *own, "--out", str(evaluated(name)))

    def cell(name: str, seed: int, cache: Path, extra: Command, evaluations: dict[str, str]) -> Job:
        """Train `name`, then evaluate it for every row in `evaluations`, row → its own options of `dvla eval`."""
        run = out / "runs" / f"{name}-{seed}"
        train = ("train", "--from-cache", from_cache or str(cache), *_options("train", recipe.train), *extra)
        found = {f"{slug(row)}-{seed}": own for row, own in evaluations.items()}
        return Job(
            run.name,
            (
                (*train, *options(seed=seed, out=run)),
                *(evaluate((str(run),), name, seed, own) for name, own in found.items()),
            ),
            products=tuple(map(evaluated, found)),
        )

    jobs = []
    for seed in recipe.seeds:
        references = f"references-{seed}"
        both = evaluate(("expert", "--compare", "random"), references, seed, "")
        jobs.append(Job(references, (both,), products=(evaluated(references),)))
        if recipe.blind is not None:
            blind = ("--blind", *_options("train", recipe.blind))
            jobs.append(cell("blind", seed, out / "cache", blind, {"blind": ""}))
        for name, variant in table.items():
            if variant.of is None:
                shown = {name: variant.eval, **{other: v.eval for other, v in table.items() if v.of == name}}
                extra = _options("train", variant.train)
                jobs.append(cell(slug(name), seed, cache_of(recipe, out, name), extra, shown))
    return jobs
