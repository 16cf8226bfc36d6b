"""A server's counters and timings, as Prometheus text (exposition format 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter, deque

import numpy as np

WINDOW = 4096  # latest values, of which percentiles are taken

COUNTS = {
    "requests": "answers from a forward pass",
    "queued": "answers from the rest of a chunk",
    "batches": "forward passes",
    "malformed": "messages that were refused",
    "failed": "requests that the policy could not answer",
    "timeouts": "requests that were not answered in time",
    "vanished": "requests whose client had disconnected",
    "slow": "clients disconnected because they did not read",
    "full": "connections refused because too many were open",
    "unauthorised": "connections refused for a missing or wrong token, or for the name they asked for",
}
TIMES = {
    "queue": "waiting for the forward pass",
    "encode": "images and text to features",
    "dit": "network forward pass",
    "total": "from a complete message to its packed answer",
}


class Metrics:
    """Counters since the server started, and the latest seconds of each part; thread-safe."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter({name: 0 for name in COUNTS})
        self.clients = 0
        self._lock = threading.Lock()
        self._seconds = {name: deque[float](maxlen=WINDOW) for name in TIMES}
        self._sums = {name: [0, 0.0] for name in TIMES}  # count and sum since the start

    def took(self, part: str, seconds: float) -> None:
        with self._lock:
            self._seconds[part].append(seconds)
            self._sums[part][0] += 1
            self._sums[part][1] += seconds

    def text(self) -> str:
        lines = ["# HELP dvla_clients connected now", "# TYPE dvla_clients gauge", f"dvla_clients {self.clients}"]
        for name, help in COUNTS.items():
            lines += [
                f"# HELP dvla_{name}_total {help}",
                f"# TYPE dvla_{name}_total counter",
                f"dvla_{name}_total {self.counts[name]}",
            ]
        for name, help in TIMES.items():
            lines += [
                f"# HELP dvla_{name}_seconds {help}; percentiles of the latest {WINDOW}",
                f"# TYPE dvla_{name}_seconds summary",
            ]
            with self._lock:
                seconds, (count, total) = list(self._seconds[name]), self._sums[name]
            if seconds:
                for q, value in zip((0.5, 0.99), np.percentile(seconds, (50, 99))):
                    lines.append(f'dvla_{name}_seconds{{quantile="{q}"}} {value:.6f}')
            lines += [f"dvla_{name}_seconds_count {count}", f"dvla_{name}_seconds_sum {total:.6f}"]
        return "\n".join(lines) + "\n"
