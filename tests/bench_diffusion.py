"""Equal CPU time for both diffusion networks on Fashion-MNIST: `python tests/bench_diffusion.py SECONDS [field=value ...]`.

One thread; each network trains for so many seconds of CPU time, its rate falling to zero over them. Then the loss on val (of the moving average, at fixed
noise) and how fast it draws. More fields of `DiffusionConfig` change both, e.g. `lr=2e-3`; `FIELD=A,B` tries two values instead of the two networks.
"""

import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SYNTHLIT_QUIET", "1")
import torch
import yaml

from synthlit.core import resolve
from synthlit.diffusion import DIFFUSION_PRESETS, DiffusionConfig, DiffusionState, as_diffusion, diffusion_step, judged_loss
from synthlit.gan.train import Packs, Shuffled
from synthlit.networks import size_of
from synthlit.splits import SPLITS_PRESETS, SplitsConfig, cut_data, load_data

MACHINE = dict(device="cpu", threads=1, channels_last=True)
UNET = dict(network="unet", layers=1)


def bench(seconds: float, train, val, settings: dict) -> str:
    """A row: what `seconds` of CPU time give."""
    cfg = resolve(DiffusionConfig, DIFFUSION_PRESETS["small"], settings)
    s = DiffusionState(cfg, train.images.shape[1:], 10, MACHINE)
    batches, step, spent, start = Shuffled(train, cfg.batch, 0), 0, 0.0, time.process_time()
    while spent < seconds:
        done = spent / seconds
        diffusion_step(s, batches, step, max(cfg.warmup + 1, round(step / done) if done > 0.02 else 10**6))
        step, spent = step + 1, time.process_time() - start
    loss = judged_loss(s, Packs(val, list(range(10)), 2000, 1, 0)(0))
    g, start = as_diffusion(s, train.classes, train.images.shape[1:], list(range(10))), time.process_time()
    g.sample(torch.arange(128) % 10, torch.arange(128))
    return f"{size_of(s.net):>11,} parameters {step:>6} steps   loss on val {loss:.4f}   {128 / (time.process_time() - start):.0f} images/s"


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = {k: v.split(",") for k, v in (a.split("=") for a in sys.argv[2:])}
    fan = next((k for k, v in asked.items() if len(v) > 1), "")
    same = {k: yaml.safe_load(v[0]) for k, v in asked.items() if k != fan}
    rows = {f"{fan}={v}": {fan: yaml.safe_load(v)} for v in asked[fan]} if fan else {"lean": {}, "unet": UNET}
    cfg = resolve(SplitsConfig, SPLITS_PRESETS["fashion_mnist"])
    cut = cut_data(load_data(cfg), cfg)
    for name, own in rows.items():
        print(f"{name:16}", bench(float(sys.argv[1]), cut["train"], cut["val"], same | own), flush=True)
