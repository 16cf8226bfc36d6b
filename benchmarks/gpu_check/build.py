"""Section build: a cache from the recording, end to end, and its check against the live encoder."""

from __future__ import annotations

from dvla.stages.caching.build import build as build_cache
from dvla.stages.caching.config import BuildConfig
from dvla.stages.caching.upkeep.verify import verify as verify_cache

from .checkpoints import fields, spec
from .items import Number, Place, item, passed


def _batches(place: Place) -> tuple[int, ...]:
    return tuple(place.size((64, 128), (8,)))


@item("cache build end to end, batch {}", each=_batches)
def build(place: Place, batch: int) -> str:
    place.reset_peak()
    out, stride = place.work / f"cache-{batch}", place.size(1, 25)
    source, config = (str(place.recording),), str(fields(place))
    report = build_cache(
        BuildConfig(source, spec(place), out, batch, None, str(place.device), config, frame_stride=stride)
    )
    place.made["cache"] = out
    taken = report.timing
    rates = [taken.images / max(x, 1e-9) for x in (report.seconds, taken.encode)]
    return Number(
        f"{taken.images} images in {report.seconds:.1f} s ({rates[0]:.0f}/s); encoding {taken.encode:.2f} s "
        f"({rates[1]:.0f}/s), waiting for images {taken.decode_wait:.2f}, for the disk {taken.write_wait:.2f}; "
        f"bottleneck: {taken.bottleneck}; {place.peak()}"
    )


@item("cache verify --live")
def verify(place: Place) -> str:
    problems, live = verify_cache(place.of("cache"), live=place.size(16, 4), device=str(place.device))
    found = f"relative difference {live.relative:.1e}, largest {live.largest:.1e}" if live else "no live check"
    return passed(not problems, f"{found}; {'; '.join(problems) or 'no problems'}")
