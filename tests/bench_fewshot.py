"""Steps per second of few-shot fine-tuning beside a loop that builds its loader each epoch, as the reference does, measured in the same run.

Nothing is asserted. `python tests/bench_fewshot.py [threads ...]` writes nbs/results/speed/bench_fewshot.json.
"""

import os
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
import torch.nn.functional as F
from bench import keep, row
from PIL import Image
from torchvision import transforms as T

from synthlit.core import resolve, rng
from synthlit.fewshot import decay_rows, grouped
from synthlit.gan.film import trainable
from synthlit.gan.models import build_gan
from synthlit.gan.train import GAN_PRESETS, GanConfig, GanState, Shuffled, gan_step

SHAPE, CLASSES, K, NOVEL = (3, 32, 32), 47, 5, 10  # EMNIST, 5 shots: 50 supports, two steps an epoch
MODES = dict(linear="embed", embed="embed", all="all")  # generator: discriminator; the first is the published choice


def supports() -> tuple:
    """uint8 images and labels of the novel classes."""
    images = rng(0, "bench.images").integers(0, 256, (K * NOVEL, *SHAPE), dtype=np.uint8)
    return torch.from_numpy(images), torch.arange(CLASSES - NOVEL, CLASSES).repeat_interleave(K)


class Part:
    """What `Shuffled` needs of a split."""

    def __init__(self):
        self.images, self.labels = supports()

    def __len__(self):
        return len(self.labels)


class Views(torch.utils.data.Dataset):
    """PIL images with so many random views of each, as the reference's data set gives four of which one is used."""

    def __init__(self, views: int):
        images, self.labels = supports()
        self.images, self.views = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images], views
        self.transform = T.Compose([T.RandomRotation(0), T.RandomResizedCrop(SHAPE[1], scale=(1.0, 1.0)), T.ToTensor(), T.Normalize(0.5, 0.5)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return [self.transform(self.images[i]) for _ in range(self.views)][0], self.labels[i]


def config(width_g: int, width_d: int) -> GanConfig:
    return resolve(GanConfig, GAN_PRESETS["film_resnet"], dict(width_g=width_g, width_d=width_d, epochs=None, batch=32))


def ours(cfg: GanConfig, mode_g: str, mode_d: str):
    """A function that takes n steps of ours, supports in memory."""
    s, batches = (
        GanState(cfg, SHAPE, CLASSES, dict(device="cpu", threads=torch.get_num_threads(), channels_last=True)),
        Shuffled(Part(), cfg.batch, 0),
    )
    s.set_optimizers(grouped(s.G, mode_g, cfg.weight_decay_g, False), grouped(s.D, mode_d, cfg.weight_decay_d, False))
    for opt in (s.opt_g, s.opt_d):
        opt.register_step_pre_hook(decay_rows)
    return lambda n: [gan_step(s, batches, i, 10**6) for i in range(n)]


class Reference:
    """The published form: a parameter list is handed to the optimiser, all others still receive gradients, and every epoch builds its loader."""

    def __init__(self, cfg: GanConfig, mode_g: str, mode_d: str, workers: int, views: int):
        self.G, self.D = build_gan("film", SHAPE, CLASSES, cfg.width_g, cfg.width_d, cfg.z)
        self.cfg, self.workers, self.data = cfg, workers, Views(views)
        self.opts = [torch.optim.AdamW(trainable(n, m), 2e-4, (0.9, 0.9), weight_decay=1e-6) for n, m in ((self.G, mode_g), (self.D, mode_d))]

    def step(self, x, y):
        bce = lambda score, to: F.binary_cross_entropy_with_logits(score, torch.full_like(score, to))
        z = torch.randn(len(x), self.cfg.z)
        fake = self.G(z, y)
        h = self.D.features(fake)
        self.G.zero_grad()
        (bce(self.D.score(h, y), 1.0) + F.mse_loss(self.D.posterior(h)[0], z)).backward()
        self.opts[0].step()
        self.D.zero_grad()
        h = self.D.features(fake.detach())
        (0.5 * (bce(self.D(x, y), 1.0) + bce(self.D.score(h, y), 0.0)) + F.mse_loss(self.D.posterior(h)[0], z)).backward()
        self.opts[1].step()

    def __call__(self, n: int):
        done = 0
        while done < n:
            for x, y in torch.utils.data.DataLoader(self.data, self.cfg.batch, shuffle=True, num_workers=self.workers):
                self.step(x, y)
                done += 1


def pace(f, steps: int, times: int = 3) -> float:
    """Steps per second of the fastest of a few runs."""
    f(2)
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        f(steps)
        taken.append(time.perf_counter() - start)
    return steps / min(taken)


def main(threads: int):
    """All rows at a number of threads."""
    torch.set_num_threads(threads)
    row("what", "beside", "ours", "peer", "ratio")
    for (width_g, width_d), modes, steps in (((64, 16), ("linear", "embed", "all"), 6), ((16, 2), ("linear", "embed"), 10)):
        cfg = config(width_g, width_d)
        for mode_g in modes:
            mode_d = MODES[mode_g]
            a, what = pace(ours(cfg, mode_g, mode_d), steps), f"{mode_g}/{mode_d}, widths {width_g}/{width_d}, steps/s"
            for workers, views in ((0, 1), (0, 4), (2, 4), (8, 4)):
                b = pace(Reference(cfg, mode_g, mode_d, workers, views), steps, 2)
                row(what, f"new loader an epoch, workers {workers}, views {views}", f"{a:.2f}", f"{b:.2f}", f"{a / b:.1f}x")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for threads in [int(t) for t in sys.argv[1:]] or [1]:
        main(threads)
    keep("bench_fewshot")
