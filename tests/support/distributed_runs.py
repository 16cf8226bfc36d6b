"""Trainings in several processes, for test_train_distributed.py, started by `python -m torch.distributed.run`.

The argument is a JSON list of runs, each a training configuration with optional "stop_after", "signal" (a rank and a
step: that rank gets SIGTERM when it has done the step) and "finetune" (the configuration of stage three around it).
Every process does all of them in turn; rank 0 writes what each reported to `OUT.report`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dvla.common.config import from_mapping
from dvla.errors import UserError
from dvla.stages.training import loop
from dvla.stages.training import train as train_module
from dvla.stages.training.config import FinetuneConfig, TrainConfig
from dvla.stages.training.parallel.world import leave
from dvla.stages.training.stage_three.finetune import finetune


def one(job: dict[str, Any]) -> dict[str, Any]:
    stop_after, when, said, steps = job.pop("stop_after", None), job.pop("signal", None), [], []
    stage_three = job.pop("finetune", None)
    step = loop.batch_loss

    def counted(*args: Any) -> Any:
        steps.append(1)
        if when is not None and [dist.get_rank(), len(steps)] == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    loop.batch_loss = counted
    try:
        if stage_three is not None:
            report, _ = finetune(
                from_mapping(FinetuneConfig, {**stage_three, "train": job}), say=said.append, stop_after=stop_after
            )
        else:
            report = train_module.train(from_mapping(TrainConfig, job), say=said.append, stop_after=stop_after)
        return {"step": report.step, "interrupted": report.interrupted, "said": said}
    except UserError as error:
        return {"error": str(error)}
    finally:
        loop.batch_loss = step


def in_two_processes(jobs: list[dict[str, Any]]) -> None:
    """Run this script on `jobs` in two processes, started by torchrun; the answers to a job are in OUT.report."""
    options = ["--standalone", "--local-addr=localhost", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, __file__, json.dumps(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in json.loads(sys.argv[1]):
        out = Path(job["out"])
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, one(job))
        if dist.get_rank() == 0:
            out.with_name(out.name + ".report").write_text(json.dumps(answers))
    leave()
