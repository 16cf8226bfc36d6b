"""Items of the check: what is run, where and how large, and the line that each prints.

A section is a module. Its items are functions in their order: `@item("its name")`. What an item returns is its line: a
text (PASS), or a `Number` or `Failed`; it may raise `Skipped`. An exception is a failure, and the next item runs.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from measuring import wait_for


class Number(str):
    """A measurement: NUM."""


class Failed(str):
    """FAIL."""


class Skipped(Exception):
    """SKIP: raised, with the reason, by an item that cannot run here."""


def passed(good: bool, text: str) -> str:
    """PASS or FAIL with the same text."""
    return text if good else Failed(text)


@dataclass
class Place:
    """Where the items of a section run."""

    device: torch.device
    toy: bool  # toy sizes: to see that everything runs
    work: Path  # folder for what the sections make; a later one reads what an earlier one has left
    recording: Path  # a LeRobot dataset
    source: Path  # checkout of the product
    seconds: float  # after which no further item begins
    section: str
    made: dict[str, Any] = field(default_factory=dict)  # by the items, for those after them
    began: float = field(default_factory=time.perf_counter)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, full: Any, toy: Any) -> Any:
        """One of the two."""
        return toy if self.toy else full

    def of(self, name: str) -> Any:
        """What an earlier item has made."""
        if name not in self.made:
            raise Skipped(f"an earlier item has not made the {name}")
        return self.made[name]

    def wait(self) -> None:
        """Until the device has finished its work."""
        wait_for(self.device)

    def timed(self, call: Callable[[], Any], repeats: int = 10, warm: int = 3) -> float:
        """Median seconds of a call, on a GPU by its own clock."""
        repeats, warm = self.size((repeats, warm), (2, 1))
        for _ in range(warm):
            call()
        self.wait()
        return statistics.median(self._once(call) for _ in range(repeats))

    def _once(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def rate(self, step: Callable[[], Any], count: int, warm: int = 3) -> float:
        """Calls per second by the wall clock, the work of the host included."""
        for _ in range(self.size(warm, 1)):
            step()
        self.wait()
        began = time.perf_counter()
        count = self.size(count, 2)
        for _ in range(count):
            step()
        self.wait()
        return count / (time.perf_counter() - began)

    def reset_peak(self) -> None:
        """Begin to count the memory of the GPU."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> str:
        """The most that was in use since."""
        return f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if self.cuda else "peak: no GPU"


ITEMS: list[tuple[str, str, bool, Callable[..., Any], Callable[[Place], Iterable[Any]] | None]] = []


def item(
    name: str, cuda: bool = False, each: Callable[[Place], Iterable[Any]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of a `Place` an item; `cuda`: only with a GPU; `each`: once for each of these values, which is
    its second argument and takes the place of {} in the name."""

    def register(work: Callable[..., Any]) -> Callable[..., Any]:
        ITEMS.append((work.__module__, name, cuda, work, each))
        return work

    return register


def run(module: ModuleType, place: Place) -> None:
    """All items of a module."""
    for owner, name, cuda, work, each in ITEMS:
        for values in ((),) if each is None else ((value,) for value in each(place)):
            if owner == module.__name__:
                run_item(place, name.format(*values), cuda, lambda: work(place, *values))


def run_item(place: Place, name: str, cuda: bool, work: Callable[[], Any]) -> None:
    """Run it and print its line."""
    began = time.perf_counter()
    if began - place.began > place.seconds:
        return say(place, "SKIP", name, "no time left in this section")
    if cuda and not place.cuda:
        return say(place, "SKIP", name, "needs CUDA")
    try:
        found = work()
        kind = {Number: "NUM", Failed: "FAIL"}.get(type(found), "PASS")
    except Skipped as reason:
        kind, found = "SKIP", str(reason)
    except (Exception, SystemExit) as error:
        kind, found = "FAIL", _failure(place, name, error)
    say(place, kind, name, f"{found or ''}  [{time.perf_counter() - began:.1f} s]")
    with contextlib.suppress(Exception):
        torch.cuda.empty_cache()
    return None


def say(place: Place, kind: str, name: str, text: str) -> None:
    """The line of an item, and at once: the next one may end the process."""
    print(f"{kind:4} {place.section}/{name}  {text}", flush=True)


def _failure(place: Place, name: str, error: BaseException) -> str:
    """What is printed of an exception; the whole of it goes to a file."""
    file = place.work / f"trace-{place.section}-{re.sub('[^a-z0-9]+', '-', name.lower())[:60]}.txt"
    file.write_text("".join(traceback.format_exception(error)))
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over that of `wanted`."""
    found, wanted = (x.detach().double().cpu() for x in (found, wanted))
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def tests_of(place: Place) -> None:
    """Let the product's own test helpers be imported."""
    sys.path.insert(0, str(place.source / "tests"))
