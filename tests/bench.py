"""Our speed beside a public peer, measured in the same run (`make bench`). Nothing is asserted: the table says what this machine says."""

import os
import threading
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import psutil
import torch

from synthlit.augment import shift_flip
from synthlit.classifier import CPU, to_device
from synthlit.core import rng
from synthlit.metrics import frechet_distance, prdc

WIDTH = (34, 44, 12, 12, 8)


def row(*cells):
    """One line of the table."""
    print("".join(f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, WIDTH))), flush=True)


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


def bench_input(n: int = 10000, batch: int = 128):
    """Classifier input: random shift and flip, to floats in [-1, 1], in batches, one epoch of 28 x 28 grey images."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms as T

    images = torch.from_numpy(rng(0, "bench.images").integers(0, 256, (n, 1, 28, 28)).astype(np.uint8))
    labels = torch.zeros(n, dtype=torch.int64)

    class InMemory(Dataset):
        """As torchvision's MNIST hands out its images: from an array, through PIL."""

        transform = T.Compose([T.RandomCrop(28, padding=1), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(0.5, 0.5)])

        def __len__(self):
            return n

        def __getitem__(self, i):
            return self.transform(Image.fromarray(images[i, 0].numpy())), labels[i]

    def ours():
        order = torch.from_numpy(rng(0, "classifier.order").permutation(n))
        for step, rows in enumerate(order.split(batch)):
            to_device(shift_flip(images[rows], 1, True, rng(0, "augment", step)), CPU), labels[rows]

    def theirs():
        for _ in DataLoader(InMemory(), batch, shuffle=True, num_workers=0):
            pass

    a, b = best_of(ours), best_of(theirs)
    row("classifier input, images/s", "torchvision transforms, DataLoader, 0 workers", f"{n / a:,.0f}", f"{n / b:,.0f}", f"{b / a:.1f}x")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio: how many times faster, or smaller, ours is\n")
    row("what", "beside", "ours", "peer", "ratio")
    bench_frechet(2000, 512)
    bench_frechet(2000, 2048)
    bench_prdc(5000)
    bench_input()
