"""Our speed beside a public peer, measured in the same run (`make bench`). Nothing is asserted: the table says what this machine says."""

import os
import platform
import re
import sys
import threading
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T

from synthlit.augment import Augment, augment_batch
from synthlit.classifier import ClassifierConfig, Training, epoch_order
from synthlit.core import resolve, rng, save_json
from synthlit.metrics import frechet_distance, prdc
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


def features(n: int, d: int) -> tuple:
    """Two sets of correlated features, n x d."""
    r = rng(0, "bench", d)
    mix = r.standard_normal((d, d)) / d**0.5
    return [(r.standard_normal((n, d)) @ mix + shift).astype(np.float32) for shift in (0, 0.1)]


def peer_frechet(x, y) -> float:
    """pytorch-fid's distance between the same features."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    moments = [m for z in (x, y) for m in (z.mean(0), np.cov(z, rowvar=False))]
    return float(calculate_frechet_distance(*moments))


def bench_frechet(n: int, d: int):
    """Fréchet distance, from features to the number."""
    x, y = features(n, d)
    value = {}
    ours = best_of(lambda: value.update(ours=frechet_distance(x, y)))
    theirs = best_of(lambda: value.update(theirs=peer_frechet(x, y)))
    row(f"Fréchet distance, {n} x {d}, s", "pytorch_fid calculate_frechet_distance", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}x")
    row("  its value", "", f"{value['ours']:.6g}", f"{value['theirs']:.6g}", "")


def full_prdc(real, fake, k: int = 5) -> dict:
    """Precision, recall, density and coverage from whole distance matrices, as the `prdc` package writes it."""
    from sklearn.metrics import pairwise_distances

    radius = [np.partition(pairwise_distances(z), k, axis=1)[:, k] for z in (real, fake)]
    d = pairwise_distances(real, fake)
    return dict(
        precision=(d < radius[0][:, None]).any(0).mean(),
        recall=(d < radius[1]).any(1).mean(),
        density=(d < radius[0][:, None]).sum(0).mean() / k,
        coverage=(d.min(1) < radius[0]).mean(),
    )


def peak(f) -> float:
    """MB above what was there before, at most, while f runs."""
    process, stop, seen = psutil.Process(), threading.Event(), []

    def watch():
        while not stop.wait(0.002):
            seen.append(process.memory_info().rss)

    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    f()
    stop.set()
    thread.join()
    return max(max(seen, default=before) - before, 0) / 1e6


def bench_prdc(n: int, d: int = 64):
    """Time and memory, blockwise and with whole matrices."""
    x, y = features(n, d)
    prdc(x[:100], y[:100]), full_prdc(x[:100], y[:100])
    memory = peak(lambda: prdc(x, y)), peak(lambda: full_prdc(x, y))
    ours, theirs = best_of(lambda: prdc(x, y)), best_of(lambda: full_prdc(x, y))
    row(f"PRDC, {n} x {d}, s", "whole matrices (scikit-learn, NumPy)", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}x")
    row("  peak memory, MB", "", f"{memory[0]:.0f}", f"{memory[1]:.0f}", f"{memory[1] / max(memory[0], 1):.1f}x")


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
    if threads == 1:
        bench_frechet(2000, 512)
        bench_frechet(2000, 2048)
        bench_prdc(5000)
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
