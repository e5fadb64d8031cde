"""Train every GAN preset some steps on CIFAR-10 and Fashion-MNIST at its published size (`make presets STEPS=200`; hours on one core).

Each row (a preset on a data set) runs in a process of its own, so that its peak memory is its own. It checks that all losses are finite and that
what samples has changed. A row that is done is kept in runs/presets/result.json, one that was stopped goes on from its checkpoint, and
`make presets` with the same number of steps goes on with what is missing.
"""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SYNTHLIT_QUIET", "1")
import torch

from synthlit.core import Checkpoints, load_json, open_stage, randn, resolve, run_machine, save_json
from synthlit.gan.train import GAN_PRESETS, GanConfig, GanState, gan_step, new_batches, set_reference
from synthlit.splits import SPLITS_PRESETS, SplitsConfig, load_split, run_splits

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "presets"
DATA = dict(  # folder -> preset of the splits; 28 pixels for ours, padded to the published 32 for the others
    cifar10="cifar10", fashion_mnist="fashion_mnist", fashion_mnist_32="gafi_fashion_mnist"
)
LITTLE = dict(width_g=32, width_d=32, batch=48)
ROWS = [  # name, preset, settings, steps (None: as asked)
    *((p, p, {}, None) for p in ("small", "default", "dcgan", "deep_dcgan", "wgan", "wgan_gp", "film_resnet")),
    ("biggan_deep, width 32, batch 48", "biggan_deep", LITTLE, None),
    ("biggan_deep", "biggan_deep", {}, 3),
]


def rows(steps: int) -> dict:
    """Key -> (preset, data set, settings, steps) of all rows."""
    found = {}
    for name, preset, settings, n in ROWS:
        for data in ("cifar10", "fashion_mnist" if preset == "small" else "fashion_mnist_32"):
            found[f"{name} | {data} | {n or steps}"] = preset, data, settings, n or steps
    return found


def split_of(data: str, part: str):
    """A part of a data set's splits, which are made once in a run folder of their own."""
    run = FOLDER / data
    run_machine(run, "cpu", 1, True)
    if not (run / "splits" / "manifest.json").exists():
        run_splits(open_stage("splits", resolve(SplitsConfig, SPLITS_PRESETS[DATA[data]]), run))
    return load_split(run / "splits", part), run_machine(run)


def ready(preset: str, data: str, settings: dict) -> tuple:
    """(state, batches) of a preset, as the stage makes them."""
    cfg = resolve(GanConfig, GAN_PRESETS[preset], settings)
    split, machine = split_of(data, cfg.data)
    cfg.check(dict(n_train=len(split)))
    s = GanState(cfg, split.images.shape[1:], len(split.classes), machine)
    batches = new_batches(cfg, split, list(range(len(split.classes))), cfg.batch, "cpu")
    set_reference(s, batches)
    return s, batches


def samples(s: GanState) -> torch.Tensor:
    """Images of a fixed noise, one per class."""
    with torch.no_grad():
        return s.sampler()(randn((len(s.labels), s.G.z), 0, "presets"), torch.tensor(s.labels))


def measure(preset: str, data: str, settings: dict, steps: int) -> dict:
    """CPU seconds of one step: the second, unless already the first takes long; of few and dear ones from an eighth of the batch."""
    part = 8 if steps < 10 else 1
    s, batches = ready(preset, data, dict(settings, batch=GAN_PRESETS[preset]["batch"] // part) if part > 1 else settings)
    for step in range(2):
        start = time.process_time()
        gan_step(s, batches, step, steps)
        if (spent := time.process_time() - start) > 2:
            break
    return dict(step=spent * part)


def train(preset: str, data: str, settings: dict, steps: int, folder: Path) -> dict:
    """The row: steps with finite losses, from the last checkpoint on; what samples must have changed."""
    s, batches = ready(preset, data, settings)
    first, points = samples(s), Checkpoints(folder)
    done, kept = points.load()
    if kept:
        s.load(kept["gan"])
    spent, mark = (kept["spent"] if kept else 0.0), time.process_time()
    for step in range(done, steps):
        losses = [x.item() for x in gan_step(s, batches, step, steps)]
        assert all(map(torch.isfinite, torch.tensor(losses))), f"step {step}: losses {losses}"
        if (step + 1) % 20 == 0 or step + 1 == steps:
            spent, mark = spent + time.process_time() - mark, time.process_time()
            points.save(step + 1, dict(gan=s.state(), spent=spent, losses=losses))
            print(f"  step {step + 1}", file=sys.stderr, flush=True)
    losses = losses if done < steps else kept["losses"]
    moved = (samples(s) - first).abs().mean().item()
    assert all(p.isfinite().all() for p in s.G.parameters()) and moved > 0, f"what samples has not changed in {steps} steps"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for p in points.paths():
        p.unlink()
    return dict(steps=steps, cpu_seconds=spent, loss_d=losses[0], loss_g=losses[1], peak_mb=peak, moved=moved)


def child(what: str, key: str, steps: int) -> dict:
    """Run `measure` or `train` of a row in a process of its own."""
    out = FOLDER / "child.json"
    out.unlink(missing_ok=True)
    subprocess.run([sys.executable, __file__, str(steps), what, key], check=True)
    return load_json(out)


def line(key: str, r: dict) -> str:
    name, data, _ = key.split(" | ")
    return (
        f"{name:32} {data:17} {r['steps']:5} steps {r['cpu_seconds']:8.0f} CPU s   loss_d {r['loss_d']:8.3f}   loss_g {r['loss_g']:8.3f}   "
        f"peak {r['peak_mb']:5.0f} MB   pixels moved by {r['moved']:.3f}"
    )


def main(steps: int):
    """Measure what is missing, say how long it will take, and do it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "result.json"
    result = load_json(path) if path.exists() else {}
    missing = {k: row for k, row in rows(steps).items() if "cpu_seconds" not in result.get(k, {})}
    for k in missing:
        if k not in result:
            result[k] = child("measure", k, steps)
            save_json(path, result)
    cost = {k: result[k]["step"] * row[3] for k, row in missing.items()}
    for k in rows(steps):
        if k not in missing:
            print(line(k, result[k]), flush=True)
    for k in sorted(cost, key=cost.get):
        print(f"to do: {k:58} {result[k]['step']:8.2f} CPU s a step, about {cost[k] / 60:6.1f} CPU min", flush=True)
    print(f"about {sum(cost.values()) / 3600:.1f} CPU hours on one core, from cheap to dear\n", flush=True)
    for k in sorted(cost, key=cost.get):
        result[k] |= child("train", k, steps)
        save_json(path, result)
        print(line(k, result[k]), flush=True)


if __name__ == "__main__":
    steps, *row = sys.argv[1:] or ["200"]
    if row:
        what, key = row
        preset, data, settings, n = rows(int(steps))[key]
        where = FOLDER / "rows" / re.sub(r"\W+", "-", key)
        save_json(FOLDER / "child.json", measure(preset, data, settings, n) if what == "measure" else train(preset, data, settings, n, where))
    else:
        main(int(steps))
