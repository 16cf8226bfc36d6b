"""Processes that run `dvla` and start at once: builds and their workers fork from one that has imported everything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

# What a shard does to its worker, from the file OUT.fault: {"front/2" or "all": "kill" | "sleep" | "slow" | "break"}.
HOOKS = """
import json, os, signal, time
from dvla.cache.store.writer import CacheWriter
from dvla.errors import UserError
real = CacheWriter.write_shard
def write_shard(self, task, chunks, quarantined=()):
    file = self.path.with_name(self.path.name + ".fault")
    faults = json.loads(file.read_text()) if file.exists() else {}
    what = faults.get(f"{task.array}/{task.index}", faults.get("all"))
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "slow":
        time.sleep(0.1)
    if what == "break":
        raise UserError("the shard is broken")
    return real(self, task, asleep(chunks) if what == "sleep" else chunks, quarantined)
def asleep(chunks):
    yield next(iter(chunks))
    time.sleep(60)
CacheWriter.write_shard = write_shard
"""
# `dvla` itself, a synthetic build that waits to be killed after two shards, or a script, in a forked process and a
# session of its own.
BUILDS = """
import os, resource, sys, time
def run(ask, forkserver_state):
    import distributed.utils
    from multiprocessing import forkserver
    vars(forkserver._forkserver).update(forkserver_state, ensure_running=lambda: None)   # workers come out of it too
    distributed.utils._forkserver_preload_set = True
    os.setsid()
    handle = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    if ask.get("room"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (ask["room"], resource.RLIM_INFINITY))
    code = 0
    try:
        if "synthetic" in ask:
            from support import synthetic_cache
            synthetic_cache.build(ask["synthetic"], delay=0.002, stop_after=2, plan=synthetic_cache.make_plan(2))
            time.sleep(60)
        elif "script" in ask:
            exec(ask["script"], {})
        else:
            import dvla.cli
            sys.argv = ["dvla", *ask["arguments"]]
            dvla.cli.main()
    except SystemExit as ending:
        code = ending.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""
# Has one process import everything; builds and their workers are forked from it, so that they start in no time.
ZYGOTE = """
import builds, json, sys
from multiprocessing import forkserver, get_context, resource_tracker
fork = get_context("forkserver")
fork.set_forkserver_preload([
    "builds", "hooks", "distributed.nanny", "pyarrow.parquet", "pandas", "av", "PIL.PngImagePlugin", "pydantic.fields",
    "transformers", "transformers.models.auto.tokenization_auto", "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.siglip.modeling_siglip", "transformers.models.gemma2.modeling_gemma2",
    "dvla.stages.caching.build", "dvla.cli", "dvla.cache.readers.lerobot", "support.synthetic_cache"])
forkserver.ensure_running()
resource_tracker.ensure_running()
state = {k: v for k, v in vars(forkserver._forkserver).items() if k in ("_forkserver_address", "_forkserver_authkey")}
print(forkserver._forkserver._forkserver_pid, flush=True)
running = {}
for line in sys.stdin:
    ask = json.loads(line)
    if "wait" in ask:
        process = running.pop(ask["wait"])
        process.join()
        print(process.exitcode, flush=True)
    else:
        process = fork.Process(target=builds.run, args=(ask, state))
        process.start()
        running[process.pid] = process
        print(process.pid, flush=True)
"""


class Zygote:
    """Starts builds quickly, each in a session of its own, as a terminal would."""

    def __init__(self, folder: Path) -> None:
        (folder / "hooks.py").write_text(HOOKS)
        (folder / "builds.py").write_text(BUILDS)
        paths = [str(folder), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver",
        }
        with open(
            folder / "errors", "w"
        ) as errors:  # among them what a resource tracker says of processes that were killed
            self._process = subprocess.Popen(
                [sys.executable, "-c", ZYGOTE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self._folder, self.said = folder, ""
        self._parent, self._builds = self._number(), set()  # of builds and workers alike

    def start(self, **ask: Any) -> int:
        """Process id of a new build."""
        pid = self._ask(log=str(self._folder / "log"), **ask)
        self._builds.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """Exit code, negative for a signal; what it said, but for what it loads, is in `said`."""
        code = self._ask(wait=pid)
        self._builds.remove(pid)
        self.said = re.sub(r"(?m)^(loading|loaded) .*\n", "", (self._folder / "log").read_text())
        return code

    def run(self, **ask: Any) -> int:
        return self.wait(self.start(**ask))

    def workers(self) -> list[int]:
        """Process ids of dask workers that are alive."""
        children = map(int, Path(f"/proc/{self._parent}/task/{self._parent}/children").read_text().split())
        return [pid for pid in children if pid not in self._builds and self.alive(pid)]

    @staticmethod
    def alive(pid: int) -> bool:
        """Whether it runs: one that ended and was not waited for does not."""
        try:
            return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return False

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, **ask: Any) -> int:
        self._process.stdin.write(json.dumps(ask) + "\n")
        self._process.stdin.flush()
        return self._number()

    def _number(self) -> int:
        line = self._process.stdout.readline()
        assert line, (self._folder / "errors").read_text()
        return int(line)
