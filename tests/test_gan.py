"""GAN training: every preset resumes to the same bits wherever it was stopped, settings that cannot be are refused, several processes agree."""

import dataclasses
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from synthlit.core import Checkpoints, History, SettingError, continues, digest, load_tensors, resolve, rng
from synthlit.gan.losses import clip_weights, d_loss, g_loss, gradient_penalty
from synthlit.gan.models import FAMILIES, build_gan
from synthlit.gan.train import (
    GAN_PRESETS,
    GanConfig,
    GanGenerator,
    GanState,
    Packs,
    Shuffled,
    as_generator,
    d_objective,
    fakes,
    gan_step,
    look,
    standing_statistics,
    target,
    train_gan,
)
from synthlit.generator import load_generator
from synthlit.splits import Split

TOP = Path(__file__).parents[1]
MACHINE = dict(device="cpu", threads=1, channels_last=True)
METHODS = ("small", "default", "dcgan", "deep_dcgan", "wgan", "wgan_gp", "biggan_deep", "film_resnet")
SHAPE = (3, 32, 32)


def little(preset, **more):
    """A preset at an eighth of its width (at least what its networks allow), batch 8, 20 steps."""
    c = GAN_PRESETS[preset]
    least_g, least_d = dict(film_resnet=(16, 2), biggan_deep=(16, 16)).get(preset, (2, 2))
    widths = dict(width_g=max(least_g, c.get("width_g", 32) // 8), width_d=max(least_d, c.get("width_d", 16) // 8))
    return resolve(GanConfig, c, widths, dict(z=16, batch=8, epochs=None, steps=20, eval_every=1000, precision="fp32"), more)


def noise(number):
    """Batches of coloured noise, two of each class."""
    return torch.from_numpy(rng(0, "noise", number).integers(0, 256, (8, *SHAPE), np.uint8)), torch.arange(8) // 2


def state(preset="small", **more):
    """Fresh networks of a little preset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GanState(little(preset, **more), SHAPE, 10, MACHINE)


def stage(folder):
    """What `train_gan` needs of a stage."""
    return SimpleNamespace(
        dir=Path(folder),
        checkpoints=Checkpoints(Path(folder) / "checkpoints"),
        history=History(Path(folder) / "history.parquet"),
        track=lambda items, *a: items,
    )


def bits(s):
    """Digest of all that a step changes."""
    flat = [(k, n, t) for k, part in s.parts().items() if not k.startswith("opt") for n, t in part.state_dict().items()]
    flat += [(k, i, t) for k in ("opt_g", "opt_d") for i, m in s.parts()[k].state_dict()["state"].items() for t in m.values()]
    return digest(*[t for _, _, t in flat])


def train(folder, preset, batches=noise, **more):
    """Train a little preset for its 20 steps, from the folder's last checkpoint if there is one."""
    s = state(preset, **more)
    train_gan(s, batches, 20, stage(folder), lambda *a: None)
    return s


@pytest.mark.parametrize("preset", METHODS)
def test_stopped_after_every_step_it_ends_with_the_same_bits(preset, tmp_path):
    """Ctrl-C in each of 20 steps: the step is finished and saved, a fresh process state goes on from there."""
    whole, stops, calls = bits(train(tmp_path / "whole", preset)), 0, []

    def pressed(number):
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(number)
        return noise(number)

    for _ in range(25):
        calls.clear()
        try:
            s = train(tmp_path / "stopped", preset, pressed)
            break
        except KeyboardInterrupt as e:
            stops += 1
            assert f"after step {stops}" in str(e)
    assert stops == 20 and len(stage(tmp_path / "stopped").checkpoints.paths()) == 2
    s = train(tmp_path / "stopped", preset)
    assert bits(s) == whole


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
from test_gan import *
def deadly(number, step=int(sys.argv[3])):
    if number == step: os.kill(os.getpid(), signal.SIGKILL)
    return noise(number)
torch.set_num_threads(1)
train(sys.argv[1], sys.argv[2], deadly, eval_every=3)
"""


@pytest.mark.parametrize("preset, step", [("small", 4), ("wgan_gp", 13), ("film_resnet", 17)])
def test_killed_it_ends_with_the_same_bits(preset, step, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(TOP))
    run = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "killed"), preset, str(step), str(Path(__file__).parent)]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    saved = [int(p.stem[5:]) for p in stage(tmp_path / "killed").checkpoints.paths()]
    assert saved and saved[-1] == step // 3 * 3
    assert bits(train(tmp_path / "killed", preset, eval_every=3)) == bits(train(tmp_path / "whole", preset, eval_every=3))


TWO = """
import sys
sys.path.insert(0, sys.argv[2])
from test_gan import *
from synthlit.core import save_tensors
from synthlit.gan.train import start_processes
from synthlit.classifier import rank_and_world
torch.set_num_threads(1)
start_processes(MACHINE)
s = state("small", **PARTS)
for i in range(4): gan_step(s, noise, i, 20)
save_tensors(f"{sys.argv[1]}/rank{rank_and_world()[0]}.safetensors", {f"{k}.{n}": t for k, net in (("G", s.G), ("D", s.D)) for n, t in net.state_dict().items()})
"""
PARTS = dict(network="r3", pack=2, same_fakes=False, g=dict(group=4), d=dict(group=4), lr_g=1e-4, lr_d=1e-4, eps=1e-4)


def test_two_processes_make_the_weights_of_one(tmp_path):
    """torchrun with two CPU processes, networks without batch norm: the weights of one process that feeds its batch in two parts, up to rounding."""
    (tmp_path / "script.py").write_text(TWO)
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(TOP), GLOO_SOCKET_IFNAME="lo")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run([*run, str(Path(__file__).parent)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = [load_tensors(tmp_path / f"rank{i}.safetensors")[0] for i in (0, 1)]
    one, first = state("small", **PARTS), state("small", **PARTS)
    for i in range(4):
        gan_step(one, noise, i, 20)
    one = {f"{k}.{n}": t for k, net in (("G", one.G), ("D", one.D)) for n, t in net.state_dict().items()}
    start = {f"{k}.{n}": t for k, net in (("G", first.G), ("D", first.D)) for n, t in net.state_dict().items()}
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.allclose(a[k], one[k], atol=1e-5) for k in a)
    assert any(not torch.allclose(start[k], one[k], atol=1e-4) for k in a), "nothing moved, so nothing was shown"


@pytest.mark.parametrize("preset", METHODS)
def test_what_samples_comes_back_from_its_file(preset, tmp_path):
    s = state(preset)
    gan_step(s, noise, 0, 20)
    split = SimpleNamespace(classes=[str(i) for i in range(10)], images=torch.zeros(1, *SHAPE))
    g = as_generator(s, split, list(range(10)))
    g.save(tmp_path)
    again = load_generator(tmp_path)
    assert isinstance(again, GanGenerator) and again.digest == g.digest
    alone, among = again.sample([7], [3], seed=1), g.sample([0, 7, 7, 2], [0, 3, 4, 9], seed=1)[1:2]
    assert torch.equal(alone, among) and alone.dtype == torch.uint8 and alone.shape == (1, *SHAPE)


def test_every_family_has_features_of_more_than_one_number():
    for name in FAMILIES:
        for pack in (1, 2):
            G, D = build_gan(name, SHAPE, 10, 16, 16, 16, pack)
            maps = D.features(torch.zeros(4, *SHAPE), torch.tensor([0, 0, 1, 1]))
            last = maps[-1] if isinstance(maps, list) else maps
            assert len(last) == 4 // pack and last[0].numel() > 1, name


def test_looks_follow_the_basket():
    drawn = []
    batches = lambda n: drawn.append(n) or noise(n)  # noqa: E731
    for basket, numbers in (("same", [2, 2, 2, 2]), ("fresh", [6, 7, 8, 8])):
        s = state("wgan", d_steps=3, basket=basket)
        drawn.clear()
        looks = [look(s, batches, 2, k) for k in range(4)]
        assert drawn == numbers
        assert len({x.z.numpy().tobytes() for x in looks}) == 4, "each look has noise of its own"
    s = state("biggan_deep")
    assert (s.cfg.d_steps, s.cfg.basket, GAN_PRESETS["biggan_deep"]["batch"]) == (3, "same", 192)


def test_gafi_counts_its_steps():
    assert resolve(GanConfig, GAN_PRESETS["biggan_deep"]).total(50000) == 500 * 260
    assert resolve(GanConfig, GAN_PRESETS["wgan"]).total(40000) == 1000 * 625
    assert resolve(GanConfig, GAN_PRESETS["wgan"], dict(basket="fresh")).total(40000) == 1000 * 125


def test_smoothed_targets_and_signs():
    s = state("dcgan")
    t = torch.cat([target(s, look(s, noise, i), torch.zeros(8)) for i in range(200)])
    assert 0.7 <= t.min() < 0.71 and 0.89 < t.max() <= 0.9, "real targets within [0.7, 0.9]"
    r, f = torch.tensor([2.0, 4.0]), torch.tensor([-1.0, 3.0])
    assert d_loss(r, f, "wasserstein") == -2 and g_loss(None, f, "wasserstein") == -1
    huge = torch.tensor([50.0])
    assert d_loss(huge, -huge, "bce", 1.0) < 1e-6 < d_loss(huge, -huge, "bce", 0.8), "a fake's target is exactly 0"


def test_penalty_is_zero_for_a_unit_slope_and_leaves_the_generator_alone():
    w = nn.Parameter(torch.ones(1, 3, 32, 32) / (3 * 32 * 32) ** 0.5)
    fake = torch.zeros(4, *SHAPE, requires_grad=True)
    p = gradient_penalty(lambda x, y: (x * w).sum((1, 2, 3)), torch.ones(4, *SHAPE), fake * 1, None, torch.full((4, 1, 1, 1), 0.3))
    p.backward()
    assert p < 1e-10 and fake.grad is None and w.grad is not None


def test_lazy_penalties_come_at_every_nth_look_n_times_as_strong():
    plain, lazy = [state("small", d=dict(norm=False), r1=1.0, penalty_every=n) for n in (1, 4)]
    for step in range(8):
        l = look(plain, noise, step)
        f = fakes(plain, l)
        base = d_objective(state_like(plain, r1=0.0), l, f).item()
        a, b = [d_objective(s, l, f).item() - base for s in (plain, lazy)]
        assert b == pytest.approx(4 * a if step % 4 == 0 else 0.0, abs=1e-5), step


def state_like(s, **more):
    """The same networks under other settings."""
    other = state("small", d=dict(norm=False), **more)
    other.D.load_state_dict(s.D.state_dict())
    return other


def test_clip_holds_for_every_parameter():
    s = state("wgan")
    gan_step(s, noise, 0, 20)
    assert max(p.abs().max() for p in s.D.parameters()) <= 0.01
    net = nn.Linear(9, 9)
    clip_weights(net, 0.1)
    assert all(p.abs().max() <= 0.1 for p in net.parameters())


def test_the_average_is_a_copy_and_then_remembers():
    """GaFi's: a copy while t <= 1000, then 0.9999 of itself. Ours: grows."""
    s = state("biggan_deep")
    name, p = next((n, p) for n, p in s.G.named_parameters())
    e = dict(s.E.named_parameters())[name]
    for step, keep in ((0, 0.0), (999, 0.0), (1000, 0.9999), (5000, 0.9999)):
        old = e.clone()
        with torch.no_grad():
            p.add_(1.0)
        s.average(step)
        assert torch.allclose(e, keep * old + (1 - keep) * p, atol=1e-6), step


def test_standing_statistics_are_the_mean_over_passes():
    s = state("small")
    net = standing_statistics(s.sampler(), range(10), 7, 0)
    assert not net.training and all(int(m.num_batches_tracked) == 7 and m.momentum == 0.1 for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(standing_statistics(s.sampler(), range(10), 7, 0).norms[0].bn.running_mean, net.norms[0].bn.running_mean)


def test_standing_statistics_draw_at_addresses_only_and_only_known_labels():
    """Dropout draws nothing, and labels that were never trained stay out."""
    s, seen = state("dcgan", g=dict(kind="dcgan", norm="batch+dropout")), []
    a, b = [standing_statistics(s.sampler(), [2, 5], 5, 0).state_dict() for _ in range(2)]
    assert all(torch.equal(a[k], b[k]) for k in a)
    net = s.sampler()
    net.embed.register_forward_hook(lambda m, x, out: seen.extend(x[0].tolist()))
    standing_statistics(net, [2, 5], 5, 0)
    assert set(seen) == {2, 5}


def test_random_labels_are_of_all_trained_classes():
    s = state("dcgan", random_labels=True)
    s.labels = [1, 3, 8]
    drawn = torch.cat([look(s, noise, i).fy for i in range(60)])
    assert set(drawn.tolist()) == {1, 3, 8} and torch.bincount(drawn)[[1, 3, 8]].min() > 120


def test_parts_and_own_looks_have_addresses_of_their_own():
    """Parts hold whole packs of all classes and other numbers; a generator that moves first, without shared fakes, has noise of its own."""
    s = state("small", accumulate=2)
    whole = look(s, noise, 3)
    parts = [whole.part(i, 2, 2) for i in range(2)]
    assert [p.number for p in parts] == [6, 7] and [p.y.tolist() for p in parts] == [[0, 0, 2, 2], [1, 1, 3, 3]]
    assert torch.equal(torch.cat([p.x for p in parts]).sum(), whole.x[[0, 1, 4, 5, 2, 3, 6, 7]].sum())
    s, noises = state("film_resnet", same_fakes=False), []
    s.G.register_forward_pre_hook(lambda m, x: noises.append(x[0].clone()))
    gan_step(s, noise, 0, 20)
    assert len(noises) == 2 and not torch.equal(*noises)


def test_virtual_batch_norm_gets_its_reference(tmp_path):
    norm = dict(norm="virtualbatch", reference=12)
    whole = bits(train(tmp_path / "a", "dcgan", g=dict(kind="dcgan", **norm), d=dict(kind="dcgan", **norm)))
    assert whole == bits(train(tmp_path / "b", "dcgan", g=dict(kind="dcgan", **norm), d=dict(kind="dcgan", **norm)))


def part(n_per_class=7):
    """A small split: the value of an image is its number."""
    y = torch.arange(3).repeat_interleave(n_per_class)
    x = torch.arange(len(y), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return Split("s", x.clone(), y, ["a", "b", "c"], "d", "c")


def test_batches_by_number():
    p, packs, shuffled = part(), Packs(part(), [0, 2], 8, 2, 0), Shuffled(part(), 6, 0)
    for n in (0, 5, 100):
        x, y = packs(n)
        assert torch.equal(p.labels[x[:, 0, 0, 0].long()], y) and torch.bincount(y, minlength=3).tolist() == [4, 0, 4]
        assert (x[::2] != x[1::2]).flatten(1).any(1).all(), "no twins in a pack"
    seen = torch.cat([shuffled(i)[0][:, 0, 0, 0] for i in range(3)])
    assert len(set(seen.tolist())) == 18 and torch.equal(shuffled(1)[0], Shuffled(part(), 6, 0)(1)[0])
    assert not torch.equal(shuffled(3)[0], shuffled(0)[0]), "another order in the next pass"
    few = torch.bincount(Shuffled(part(), 50, 0)(4)[0][:, 0, 0, 0].long(), minlength=21)
    assert few.sum() == 50 and few.max() == 3 and few.min() >= 1, "a batch larger than the set shows all of it, again"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(batch=7), "multiple of gan.pack"),
        (dict(batch=8, accumulate=3), "try 12"),
        (dict(balanced=False), "gan.pack = 1"),
        (dict(random_labels=True), "gan.pack = 1"),
        (dict(smooth=[0.9, 0.7]), "the smaller first"),
        (dict(augment="color+cutout"), "did you mean 'colour'"),
        (dict(batch=400), "only 300 images"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SettingError, match=message):
        resolve(GanConfig, dict(batch=8), settings).check(dict(n_train=300))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(g=dict(norm="group")), "does not take 'norm'"),
        (dict(network="dcgan", pack=1, g=dict(norm="group")), "norm = 'group'"),
        (dict(info=1.0), "no head that reads the noise"),
        (dict(loss="relativistic", loss_g="saturating"), "keep loss_g = same"),
        (dict(loss="bce", loss_g="feature_matching", uncond=0.5), "no other term"),
        (dict(network="film", pack=2, info=1.0), "needs pack = 1"),
        (dict(network="biggan", pack=1, width_g=8, width_d=8, z=17), "equal pieces"),
    ],
)
def test_networks_that_cannot_be(settings, message):
    with pytest.raises(SettingError, match=message):
        GanState(resolve(GanConfig, settings), SHAPE, 10, MACHINE)


def test_sizes_that_cannot_be():
    for network, shape in (("pair", (1, 30, 30)), ("dcgan", (1, 30, 30)), ("biggan_deep", (3, 28, 28)), ("pair", (3, 32, 28))):
        with pytest.raises(SettingError):
            GanState(resolve(GanConfig, dict(network=network, pack=1)), shape, 10, MACHINE)


def test_another_architectures_checkpoint_is_refused(tmp_path):
    train(tmp_path, "small")
    with pytest.raises(SettingError, match="width_g|another"):
        train(tmp_path, "small", width_g=8)


def test_penalty_with_batch_norm_warns():
    with pytest.warns(UserWarning, match="batch norm in the discriminator"):
        GanState(little("dcgan", gp=10.0), SHAPE, 10, MACHINE)


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path):
    train(tmp_path, "small")
    s, broken = state("small", eval_every=1), lambda n: (noise(n)[0], noise(n)[1])
    with torch.no_grad():
        next(s.G.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="smaller lr_g"):
        train_gan(s, broken, 20, stage(tmp_path / "new"), lambda *a: None)


def test_networks_that_are_lost_are_not_kept(tmp_path):
    """A loss that is no number between two logged steps: found before the checkpoint, which is the one before."""
    batches, s = noise, state("small", eval_every=60)

    def broken(number):
        if number == 55:
            with torch.no_grad():
                next(s.G.parameters()).fill_(float("nan"))
        return batches(number)

    with pytest.raises(FloatingPointError, match="at step 60"):
        train_gan(s, broken, 100, stage(tmp_path), lambda *a: None)
    assert not stage(tmp_path).checkpoints.paths() and [r["step"] for r in stage(tmp_path).history.rows] == [50]


def test_a_collapsed_training_goes_on_when_told_never_to_stop():
    """The error says `gan.collapse = 0 never stops`: that must not throw the training away."""
    old, new = dataclasses.asdict(GanConfig()), GanConfig(collapse=0.0)
    was, now = [dict(settings=c, code="x") for c in (old, dataclasses.asdict(new))]
    assert continues(was, now, new)
    assert not continues(was, dict(settings=dataclasses.asdict(GanConfig(z=8)), code="x"), GanConfig(z=8))


def test_the_script_that_trains_every_preset_for_real_runs(tmp_path, monkeypatch):
    """`make presets` takes hours, so its rows are tried here with two steps of two small ones, and a row goes on where it was."""
    import presets_on_real_data as p

    images = torch.from_numpy(rng(0, "images").integers(0, 256, (64, 3, 32, 32), dtype=np.uint8))
    split = Split("train", images, torch.arange(64) % 10, [str(i) for i in range(10)], "", "")
    monkeypatch.setattr(p, "split_of", lambda data, part: (split, MACHINE))
    assert {preset for preset, *_ in p.rows(200).values()} == set(METHODS)
    for preset in ("small", "dcgan"):
        few = dict(width_g=8, width_d=8, batch=8)
        row = p.train(preset, "cifar10", few, 2, tmp_path / preset)
        assert row["steps"] == 2 and row["moved"] > 0
