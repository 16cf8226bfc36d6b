"""The hub card of a cache."""

from __future__ import annotations

from .... import __version__
from ....cache.loader.provenance import choice_of
from ....cache.store.cache import Cache
from ....cache.vlm.spec import features_in_words
from ...policy.card import data_section, front_matter, license_of


def cache_card(cache: Cache, repo: str) -> str:
    """README.md of a cache on the hub, "owner/name"."""
    attributes = [{"license": "", "control_hz": 0.0, **d.attributes, "name": d.name} for d in cache.datasets]
    encoder = cache.fingerprint.get("encoder", {})
    head = {"tags": ["robotics", "dvla", "feature-cache"], **license_of([a["license"] for a in attributes])}
    return "\n".join(
        [
            f"{front_matter(head)}# {repo.rsplit('/', 1)[-1]}",
            "",
            f"Features of a frozen vision-language model ({encoder.get('vlm', 'unnamed')}, "
            f"{features_in_words(encoder)}, {cache.tokens} of width {cache.width} per image) and "
            f"unified actions of {cache.frames} frames: a cache of dvla {__version__}, in Zarr v3.",
            "",
            data_section(attributes),
            *[f"\nOf {d.name}: {chosen}." for d in cache.datasets if (chosen := choice_of(cache, d.name))],
            "",
            "## Use",
            "",
            "```",
            f"dvla train --from-cache {repo} --out run",
            f"dvla cache pull {repo} --out cache",
            "```",
            "",
        ]
    )
