"""Our GAN step beside a plain PyTorch loop over the same networks, measured in the same run (`make bench`). Nothing is asserted."""

import functools
import os
import subprocess
import sys
import threading
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from bench import InMemory, best_of, keep, row

from synthlit.core import resolve, rng
from synthlit.gan.dcgan import Conv2d, ConvTranspose2d, DCGANDiscriminator
from synthlit.gan.models import build_gan
from synthlit.gan.train import GAN_PRESETS, GanConfig, GanState, Shuffled, gan_step


def of(preset: str, width: int) -> GanConfig:
    """A preset of the study at another width."""
    return resolve(GanConfig, GAN_PRESETS[preset], dict(width_g=width, width_d=width, epochs=None))


def usual(net):
    """The same network as it is usually written: torch's own layers, the label map as a further channel of every image, nothing in place."""
    own = {Conv2d: torch.nn.Conv2d, ConvTranspose2d: torch.nn.ConvTranspose2d}
    for m in net.modules():
        for mine, torchs in own.items():
            if isinstance(m, mine):
                m.forward = functools.partial(torchs.forward, m)
        if isinstance(m, torch.nn.LeakyReLU):
            m.inplace = False
    if isinstance(net, DCGANDiscriminator):
        net.first = lambda x, y: net.blocks[0](torch.cat([x, net.embed(y).view(-1, 1, *net.shape[1:])], 1))
    return net


class Plain:
    """The usual loop: one after the other, default layout and optimiser, a sigmoid and BCE; or a critic with a penalty, as the study published it or clean."""

    def __init__(self, cfg: GanConfig, published: bool):
        G, D = build_gan(cfg.network, (3, 32, 32), 10, cfg.width_g, cfg.width_d, cfg.z, 1, cfg.g, cfg.d)
        self.G, self.D, self.cfg, self.published = usual(G), usual(D), cfg, published
        self.opts = [torch.optim.Adam(n.parameters(), r, (0.5, 0.9)) for n, r in ((G, cfg.lr_g), (D, cfg.lr_d))]

    def penalty(self, x, fake, y):
        mix = torch.rand(len(x), 1, 1, 1)
        between = mix * x + (1 - mix) * (fake if self.published else fake.detach())
        between = between if self.published else between.requires_grad_()
        g = torch.autograd.grad(self.D(between, y).sum(), between, create_graph=True)[0]
        return 10 * ((g.flatten(1).norm(2, 1) - 1) ** 2).mean()

    def discriminator(self, x, y):
        fake = self.G(torch.randn(len(x), self.cfg.z), y)
        real, other = self.D(x, y), self.D(fake.detach(), y)
        if self.cfg.gp:
            loss = other.mean() - real.mean() + self.penalty(x, fake, y)
        else:
            wanted = torch.empty(len(x)).uniform_(0.7, 0.9)
            loss = F.binary_cross_entropy(real.sigmoid(), wanted) + F.binary_cross_entropy(other.sigmoid(), torch.zeros(len(x)))
        self.opts[1].zero_grad()
        loss.backward()
        self.opts[1].step()
        return fake

    def step(self, x, y):
        for _ in range(self.cfg.d_steps):
            fake = self.discriminator(x, y)
        if self.cfg.gp or self.published:
            fake = self.G(torch.randn(len(x), self.cfg.z), y)
        score = self.D(fake, y)
        self.opts[0].zero_grad()
        (-score.mean() if self.cfg.gp else F.binary_cross_entropy(score.sigmoid(), torch.full((len(x),), 0.8))).backward()
        self.opts[0].step()


class Part:
    """What `Shuffled` needs of a split."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)


def ours(cfg: GanConfig, images, labels):
    """A few steps of ours from uint8 images in memory."""
    s, batches = (
        GanState(cfg, (3, 32, 32), 10, dict(device="cpu", threads=torch.get_num_threads(), channels_last=True)),
        Shuffled(Part(images, labels), cfg.batch, 0),
    )
    return lambda: [gan_step(s, batches, i, 1000) for i in range(len(images) // cfg.batch)]


def theirs(cfg: GanConfig, images, labels, published: bool, workers=None):
    """The same number of steps of the plain loop, from floats in memory or from its `DataLoader`."""
    p, x = Plain(cfg, published), images.float().div(127.5).sub(1)
    if workers is None:
        return lambda: [p.step(a, b) for a, b in zip(x.split(cfg.batch), labels.split(cfg.batch)) if len(a) == cfg.batch]
    loader = torch.utils.data.DataLoader(InMemory(images, labels), cfg.batch, shuffle=True, num_workers=workers, drop_last=True)
    return lambda: [p.step(a, b) for a, b in loader]


def bench_gan(preset: str, width: int, steps: int):
    """Images per second of whole steps, beside the clean loop, the published one, and the clean one with its loader at its best."""
    cfg = of(preset, width)
    n = cfg.batch * steps
    images = torch.from_numpy(rng(0, "bench.images").integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))
    labels = torch.from_numpy(rng(0, "bench.labels").integers(0, 10, n))
    a, what = best_of(ours(cfg, images, labels), 4), f"{preset}, {width} features, images/s"
    for name, published, workers in (
        ("clean", False, None),
        ("published form", True, None),
        ("clean, DataLoader 0", False, 0),
        ("clean, DataLoader 2", False, 2),
    ):
        b = best_of(theirs(cfg, images, labels, published, workers), 4)
        row(what, f"plain loop, {name}", f"{n / a:,.0f}", f"{n / b:,.0f}", f"{b / a:.2f}x")
    memory = [fresh(preset, width, who) for who in ("ours", "theirs")]
    row("  peak memory above the start, MB", "plain loop, clean", f"{memory[0]:.0f}", f"{memory[1]:.0f}", f"{memory[1] / max(memory[0], 1):.2f}x")


def fresh(preset: str, width: int, who: str) -> float:
    """Peak memory of two steps in a process of its own, MB above what was there when they began."""
    done = subprocess.run([sys.executable, __file__, "memory", preset, str(width), who], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


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


def memory_of(preset: str, width: int, who: str):
    """Print what `fresh` asks for."""
    torch.set_num_threads(1)
    cfg = of(preset, width)
    images, labels = torch.zeros(cfg.batch * 2, 3, 32, 32, dtype=torch.uint8), torch.arange(cfg.batch * 2) % 10
    torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))
    print(peak(ours(cfg, images, labels) if who == "ours" else theirs(cfg, images, labels, False)))


def profile(preset: str, width: int):
    """Where the time of our step goes."""
    cfg = of(preset, width)
    images, labels = torch.zeros(cfg.batch * 3, 3, 32, 32, dtype=torch.uint8), torch.zeros(cfg.batch * 3, dtype=torch.long)
    run = ours(cfg, images, labels)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        run()
    ops = sorted(p.key_averages(), key=lambda o: -o.self_cpu_time_total)
    total = sum(o.self_cpu_time_total for o in ops)
    for o in ops[:8]:
        row(f"{preset}, {width} features, share of time", o.key[:43], f"{100 * o.self_cpu_time_total / total:.1f} %", "", "")


def main(threads: int):
    """All rows at a number of threads."""
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio: how many times faster, or smaller, ours is\n")
    row("what", "beside", "ours", "peer", "ratio")
    for preset, width, steps in (("dcgan", 16, 8), ("dcgan", 64, 3), ("wgan_gp", 16, 4), ("wgan_gp", 64, 2)):
        bench_gan(preset, width, steps)
    for preset, width in (("dcgan", 16), ("dcgan", 64), ("wgan_gp", 64)) if threads == 1 else ():
        profile(preset, width)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["memory"]:
        memory_of(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        for threads in [int(t) for t in sys.argv[1:]] or [1]:
            main(threads)
        keep("bench_gan")
