"""CPU time of a step of every GAN in a parameter file, and how many steps a budget gives each: `python tests/gan_pace.py FILE.yaml SECONDS`.

For comparisons at equal CPU time, such as nbs/params/gan_study_cpu.yaml. One thread, steps of all entries taken in turn, so that what else the machine
does hits all alike; the median of eight rounds after two to warm up. Steps are rounded down to a multiple of four (four evaluations each).
"""

import os
import statistics
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SYNTHLIT_QUIET", "1")
import numpy as np
import torch

from synthlit.core import rng
from synthlit.gan.train import GanConfig, GanState, gan_step, new_batches, set_reference
from synthlit.plan import plan, read_params
from synthlit.splits import Split, data_facts

ROUNDS, WARM = 8, 2


def ready(cfg: GanConfig, shape: tuple, machine: dict) -> tuple:
    """(state, batches) of an entry, on random images."""
    images = torch.from_numpy(rng(0, "pace").integers(0, 256, (1000, *shape), dtype=np.uint8))
    split = Split("train", images, torch.arange(1000) % 10, [str(i) for i in range(10)], "", "")
    s = GanState(cfg, shape, 10, machine)
    batches = new_batches(cfg, split, list(range(10)), cfg.batch, "cpu")
    set_reference(s, batches)
    return s, batches


def paces(file: str) -> dict:
    """Entry -> CPU seconds of a step, one row for all seeds of an entry."""
    nodes = plan(params := read_params(file))
    shape = data_facts(next(n.cfg for n in nodes if n.stage == "splits"))["shape"]
    machine = dict(device="cpu", threads=1, channels_last=bool(params.get("machine", {}).get("channels_last", True)))
    states = {n.entry: ready(n.cfg, shape, machine) for n in nodes if n.stage == "gan"}
    spent: dict = {k: [] for k in states}
    for step in range(WARM + ROUNDS):
        for k, (s, batches) in states.items():
            start = time.process_time()
            gan_step(s, batches, step, 1000)
            spent[k].append(time.process_time() - start)
    return {k: statistics.median(v[WARM:]) for k, v in spent.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, pace in paces(sys.argv[1]).items():
        print(f"{name:24} {1000 * pace:8.0f} ms a step   steps: {int(float(sys.argv[2]) / pace) // 4 * 4}", flush=True)
