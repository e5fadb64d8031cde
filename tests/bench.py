"""Our speed beside a public peer, measured in the same run (`make bench`). Nothing is asserted: the table says what this machine says.

The measures have a table of their own: tests/bench_metrics.py.
"""

import os
import platform
import re
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T

from synthlit.augment import Augment, augment_batch
from synthlit.classifier import ClassifierConfig, Training, epoch_order
from synthlit.core import resolve, rng, save_json
from synthlit.networks import build_net

WIDTH = (34, 44, 12, 12, 8)


ROWS: list = []


def row(*cells):
    """One line of the table."""
    ROWS.append(dict(zip(("what", "beside", "ours", "peer", "ratio", "threads"), (*cells, torch.get_num_threads()))))
    print("".join(f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, WIDTH))), flush=True)


def keep(name: str):
    """Keep the table for nbs/results/speed.ipynb."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    machine = dict(cpu=names[0] if names else platform.processor(), cores=os.cpu_count(), torch=torch.__version__, python=platform.python_version())
    folder = Path(__file__).parents[1] / "nbs" / "results" / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / f"{name}.json", dict(machine=machine, rows=ROWS))


def best_of(f, least: float = 1.0) -> float:
    """Seconds of the fastest call, of at least one and as many as fit in `least` seconds."""
    times = []
    while sum(times) < least:
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


class InMemory(torch.utils.data.Dataset):
    """As torchvision's own data sets hand out their images: from an array, through PIL and one transform after the other."""

    def __init__(self, images, labels):
        side = images.shape[2]
        self.images, self.labels = images.permute(0, 2, 3, 1).squeeze(3).numpy(), labels
        self.transform = T.Compose(
            [T.RandomCrop(side, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.5] * images.shape[1], [0.5] * images.shape[1])]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


CROP = dict(shift=4, flip=True)


def ours_input(images, labels, batch: int):
    """One epoch of floats from a tensor."""
    for step, rows in enumerate(torch.from_numpy(epoch_order(0, 0, len(images))).split(batch)):
        yield augment_batch(images[rows], Augment(**CROP), 0, step), labels[rows]


def ours_training(images, labels, batch: int, network: str, width):
    """Steps of `Training`, as `train_classifier` makes them, with a recipe that asks for no more than the peer does."""
    plain = dict(network=network, width=width, batch=batch, ema=0.0, smoothing=0.0, schedule="constant", weight_decay=0.0, optimizer="sgd", **CROP)
    machine = dict(device="cpu", threads=torch.get_num_threads(), channels_last=True)
    t = Training(resolve(ClassifierConfig, plain), images.shape[1:], list(range(10)), machine)
    order = torch.from_numpy(epoch_order(0, 0, len(images))).split(batch)
    return lambda: [t.step(images[rows], labels[rows], i, len(order)) for i, rows in enumerate(order)]


def step_on(net):
    """One SGD step in the usual form."""
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)

    def step(x, y):
        opt.zero_grad(set_to_none=True)
        F.cross_entropy(net(x.contiguous(memory_format=torch.channels_last)), y).backward()
        opt.step()

    return step


def bench_input(name: str, shape: tuple, what: str, network: str = "", width=None, n: int = 5000, batch: int = 128):
    """Classifier input (crop of the image padded by 4, flip, to [-1, 1]), alone or with training steps of one network; the peer's loader with 0, 1 and 2 workers."""
    images = torch.from_numpy(rng(0, "bench.images").integers(0, 256, (n, *shape), dtype=np.uint8))
    labels = torch.from_numpy(rng(0, "bench.labels").integers(0, 10, n))
    step = step_on(build_net(network, shape[0], 10, width).to(memory_format=torch.channels_last)) if network else lambda x, y: None

    def peer(workers):
        loader = torch.utils.data.DataLoader(InMemory(images, labels), batch, shuffle=True, num_workers=workers)
        return best_of(lambda: [step(x, y) for x, y in loader])

    ours = ours_training(images, labels, batch, network, width) if network else lambda: list(ours_input(images, labels, batch))
    a, seconds = best_of(ours), {w: peer(w) for w in (0, 1, 2)}
    workers = min(seconds, key=seconds.get)
    if not network:  # workers are further processes: without any, it is one core beside one core
        row(f"{name} {what}, one core", "torchvision, PIL, 0 workers", f"{n / a:,.0f}", f"{n / seconds[0]:,.0f}", f"{seconds[0] / a:.2f}x")
    row(
        f"{name} {what}, images/s",
        f"torchvision, PIL, {workers} workers (best)",
        f"{n / a:,.0f}",
        f"{n / seconds[workers]:,.0f}",
        f"{seconds[workers] / a:.2f}x",
    )


def main(threads: int):
    """All rows at a number of threads."""
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio: how many times faster, or smaller, ours is\n")
    row("what", "beside", "ours", "peer", "ratio")
    for name, shape in (("28x28x1", (1, 28, 28)), ("32x32x3", (3, 32, 32))):
        if threads == 1:
            bench_input(name, shape, "input alone")
        bench_input(name, shape, "+ step, fast", "fast", n=1280)
        bench_input(name, shape, "+ step, resnet20", "resnet20", 16, n=640)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for threads in [int(t) for t in sys.argv[1:]] or [1]:
        main(threads)
    keep("bench")
