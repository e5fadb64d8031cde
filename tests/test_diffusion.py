"""Diffusion: what the objectives promise, the same bits wherever training was stopped, images at addresses, settings that cannot be are refused."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_gan import stage

from synthlit.core import SettingError, continues, digest, load_json, load_tensors, open_stage, randn, resolve, rng
from synthlit.diffusion import (
    DIFFUSION_PRESETS,
    SAMPLERS,
    Denoiser,
    DiffusionConfig,
    DiffusionGenerator,
    DiffusionState,
    as_diffusion,
    clock_of,
    covered,
    denoise,
    diffusion_step,
    grid_of,
    image_of,
    levels,
    min_snr,
    move,
    noised,
    passes,
    real_guidance_step,
    run_diffusion,
    shots_of,
    steps_left,
    train_diffusion,
    wanted,
    work_diffusion,
)
from synthlit.generator import latents, load_generator
from synthlit.splits import Split, kshot, load_split

MACHINE = dict(device="cpu", threads=1, channels_last=True)
SHAPE = (1, 8, 8)
OBJECTIVES = ("noise", "v", "flow")
WAYS = {  # what is trained to be stopped
    "lean flow": dict(),
    "lean v": dict(objective="v", snr_gamma=5.0, dropout=0.2, accumulate=2),
    "unet noise": dict(objective="noise", schedule="linear", network="unet", channels=[8, 16], attention=4, snr_gamma=5.0, flip=True, decay=False),
}


def little(**more):
    """A small model for 8x8 images, 12 steps."""
    few = dict(channels=[8, 16], batch=8, steps=12, warmup=2, eval_every=1000, n_eval=4, sample_steps=3)
    return resolve(DiffusionConfig, few, more)


def noise(number):
    """Batches of noise, two of each class."""
    return torch.from_numpy(rng(0, "noise", number).integers(0, 256, (8, *SHAPE), np.uint8)), torch.arange(8) // 2


def state(**more):
    return DiffusionState(little(**more), SHAPE, 10, MACHINE)


def generator(**more):
    """A generator after a few steps, so that no layer is as it was made."""
    s = state(ema=0.5, lr=1e-2, **more)
    for i in range(4):
        diffusion_step(s, noise, i, 12)
    return as_diffusion(s, [str(c) for c in range(10)], SHAPE, list(range(10)))


def bits(s):
    """Digest of all that a step changes."""
    flat = [t for net in (s.net, s.E) for t in net.state_dict().values()]
    return digest(*flat, *[t for m in s.opt.state_dict()["state"].values() for t in m.values()])


def train(folder, batches=noise, **more):
    """Train a little model for its 12 steps, from the folder's last checkpoint if there is one."""
    s = state(**more)
    train_diffusion(s, batches, 12, stage(folder), lambda *a: None)
    return s


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_targets_lead_back_to_the_image(objective, schedule):
    x, e = randn((4, *SHAPE), 0, "x"), randn((4, *SHAPE), 0, "e")
    a, s = levels(objective, schedule)
    for i in (1, 10, 300, 700, 950, 999):
        z = a[i] * x + s[i] * e
        assert torch.allclose(image_of(z, wanted(x, e, a[i], s[i], objective), a[i], s[i], objective), x, atol=2e-3)


def test_targets_are_what_the_papers_say():
    x, e, a, s = randn(5, 0, "x"), randn(5, 0, "e"), 0.6, 0.8
    assert torch.equal(wanted(x, e, a, s, "noise"), e)
    assert torch.allclose(wanted(x, e, a, s, "v"), 0.6 * e - 0.8 * x)
    h = 1e-3  # flow: the velocity of z at t = s
    assert torch.allclose(wanted(x, e, 1 - s, s, "flow"), (((1 - s - h) * x + (s + h) * e) - ((1 - s) * x + s * e)) / h, atol=1e-3)


@pytest.mark.parametrize("objective, schedule", [("flow", "cosine"), ("v", "cosine"), ("noise", "linear")])
def test_schedules_begin_at_the_image_and_end_at_noise(objective, schedule):
    a, s = levels(objective, schedule)
    assert len(a) == 1001 and (a[0], s[0]) == (1, 0) and s[-1] > 0.9999 and a[-1] < 0.01
    snr = (a[1:-1] / s[1:-1]) ** 2
    assert (np.diff(snr) < 0).all() and snr[0] > 1e3 and snr[-1] < 1e-3
    if objective != "flow":
        assert np.allclose(a**2 + s**2, 1)


def test_min_snr_weights():
    a, s = torch.tensor(np.array(levels("noise", "cosine")))[:, 1:-1]
    snr = (a / s) ** 2
    w = min_snr(a, s, "noise", 5.0)
    assert (w[snr <= 5] == 1).all() and torch.allclose(w[snr > 5], 5 / snr[snr > 5])
    assert torch.allclose(min_snr(a, s, "v", 5.0), snr.clamp(max=5) / (snr + 1))
    a, s = torch.tensor(np.array(levels("flow", "")))[:, 1:-1]
    assert torch.allclose(min_snr(a, s, "flow", 5.0) / s**2, ((a / s) ** 2).clamp(max=5)), "the loss of the image is capped at gamma"
    assert all((min_snr(a, s, o, 0.0) == 1).all() for o in OBJECTIVES)


def test_weighted_losses_of_one_error_agree():
    """The same wrong image costs the same under every objective of one schedule."""
    x, e, wrong, a, s = randn(50, 0, "x"), randn(50, 0, "e"), randn(50, 0, "w"), torch.tensor(0.8), torch.tensor(0.6)
    z, costs = a * x + s * e, []
    for objective in ("noise", "v"):
        answer = wanted(wrong, (z - a * wrong) / s, a, s, objective)
        costs.append(((answer - wanted(x, e, a, s, objective)).pow(2).mean() * min_snr(a, s, objective, 5.0)).item())
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_stopped_after_every_step_it_ends_with_the_same_bits(way, tmp_path):
    whole, stops, calls = bits(train(tmp_path / "whole", **WAYS[way])), 0, []

    def pressed(number):
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(number)
        return noise(number)

    for _ in range(15):
        calls.clear()
        try:
            s = train(tmp_path / "stopped", pressed, **WAYS[way])
            break
        except KeyboardInterrupt as e:
            stops += 1
            assert f"after step {stops}" in str(e)
    assert stops == 12 and len(stage(tmp_path / "stopped").checkpoints.paths()) == 2
    assert bits(train(tmp_path / "stopped", **WAYS[way])) == whole == bits(s)


@pytest.mark.parametrize("step", range(1, 12))
def test_dead_in_any_step_it_ends_with_the_same_bits(step, tmp_path):
    """The process dies within a step: the next one goes on from the last checkpoint, every third step here."""

    def deadly(number):
        if number == step:
            raise SystemExit(1)
        return noise(number)

    with pytest.raises(SystemExit):
        train(tmp_path / "a", deadly, eval_every=3)
    saved = [int(p.stem[5:]) for p in stage(tmp_path / "a").checkpoints.paths()]
    assert (saved[-1] if saved else 0) == step // 3 * 3
    assert bits(train(tmp_path / "a", eval_every=3)) == bits(train(tmp_path / "b", eval_every=3))


def test_parts_of_a_batch_make_the_update_of_the_whole():
    nets = [state(accumulate=n, clip=0.0, ema=0.0) for n in (1, 4)]
    before = torch.cat([p.detach().flatten().clone() for p in nets[0].net.parameters()])
    losses = [diffusion_step(s, noise, 0, 12).item() for s in nets]
    a, b = [torch.cat([p.grad.flatten() for p in s.net.parameters()]) for s in nets]
    assert torch.allclose(a, b, atol=1e-5) and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in nets[0].net.parameters()]))


def test_what_a_step_sees():
    """Levels spread evenly, labels hidden in the asked share, everything the same at the same address."""
    s, x, y = state(), randn((400, *SHAPE), 0, "x"), torch.arange(400) % 10
    d, again, other = [noised(s, x, y, "test", n, 0.25) for n in (0, 0, 1)]
    assert all(torch.equal(p, q) for p, q in zip(d, again)) and not torch.equal(d.z, other.z)
    assert torch.equal((d.clock * 400 / 1000).floor(), torch.arange(400.0)), "one level in each of 400 equal parts"
    assert 70 < (d.y == 10).sum() < 130 and torch.equal(d.y[d.y != 10], y[d.y != 10])
    for objective in ("noise", "v"):
        clock = noised(state(objective=objective), x, y, "test", 0, 0.0).clock
        assert 0 <= clock.min() and clock.max() <= 999 and torch.equal(clock, clock.round()), "whole numbers, as a table has them"


def test_the_average_grows_its_memory():
    s = state(ema=0.999)
    p, e = next(s.net.parameters()), next(s.E.parameters())
    for step, keep in ((0, 0.1), (90, 0.91), (10**6, 0.999)):
        old = e.clone()
        with torch.no_grad():
            p.add_(1.0)
        s.average(step)
        assert torch.allclose(e, keep * old + (1 - keep) * p, atol=1e-5), step
    s = state(ema=0.0)
    diffusion_step(s, noise, 0, 12)
    assert all(torch.equal(a, b) for a, b in zip(s.net.parameters(), s.E.parameters()))


@pytest.mark.parametrize("network", ["lean", "unet"])
@pytest.mark.parametrize(
    "shape, patch, channels", [(SHAPE, 1, [8, 16]), ((1, 28, 28), 2, [8, 8]), ((3, 32, 32), 2, [8, 16, 16]), ((3, 64, 64), 4, [8, 8])]
)
def test_networks_keep_the_shape(network, shape, patch, channels):
    net = Denoiser(shape, 5, network, channels, 1, patch, 0, 0.0)
    z = randn((3, *shape), 0, "z")
    out = net(z, torch.tensor([0.0, 10.0, 999.0]), torch.tensor([0, 4, 5]))
    assert out.shape == z.shape and out.isfinite().all()


def test_unet_is_that_of_diffusers():
    from diffusers import UNet2DModel

    net = Denoiser((3, 32, 32), 10, "unet", [16, 32], 1, 2, 8, 0.1)
    assert isinstance(net.net, UNet2DModel) and net.net.config.num_class_embeds == 11 and net.net.config.in_channels == 12
    assert net.net.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D"), "attention where maps are small enough"


def test_every_preset_fits_the_side_it_is_for():
    sides = dict(tiny=8, digits=8, px8=8, small=28, fashion_mnist=28, mnist=28, px28=28, px32=32, cifar10=32, px64=64, smoke=8)
    assert set(sides) == set(DIFFUSION_PRESETS)
    for name, side in sides.items():
        cfg = resolve(DiffusionConfig, DIFFUSION_PRESETS[name])
        cfg.check(dict(n_train=50000, shape=(3, side, side)))
        with torch.device("meta"):
            assert Denoiser((3, side, side), 10, **cfg.made()).shape == (3, side, side)


DIALS = [
    dict(),
    dict(steps=1),
    dict(sampler="euler", steps=5),
    dict(sampler="heun", guidance=2.0),
    dict(sampler="ancestral", std=1.2),
    dict(std=[0.9, 1.3]),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dials", DIALS, ids=str)
def test_an_image_does_not_depend_on_its_batch(objective, dials):
    g = generator(objective=objective)
    alone, among = g.sample([7], [3], seed=1, **dials), g.sample([0, 7, 7, 2] * 20, [0, 3, 4, 9] * 20, seed=1, **dials)
    assert alone.dtype == torch.uint8 and alone.shape == (1, *SHAPE)
    assert torch.equal(alone[0], among[1]) and torch.equal(alone[0], among[77]) and not torch.equal(among[1], among[2])
    assert not torch.equal(alone, g.sample([7], [3], seed=2, **dials))


def test_guidance_off_is_the_plain_conditional_model():
    g = generator()
    y, i = torch.arange(10), torch.zeros(10, dtype=torch.int64)
    plain = g.sample(y, i)
    assert torch.equal(plain, g.sample(y, i, guidance=1.0)) and torch.equal(plain, g.sample(y, i, guidance=0.0))
    z = randn((10, *SHAPE), 0, "z")
    with torch.no_grad():
        out, free = [g.net(z, torch.full((10,), 500.0), labels) for labels in (y, torch.full_like(y, 10))]
        assert torch.equal(g.answer(z, 500, y, 1.0), out)
        assert torch.allclose(g.answer(z, 500, y, 3.0), free + 3 * (out - free)) and not torch.equal(out, free)


def test_it_comes_back_from_its_file(tmp_path):
    for more in (dict(), dict(network="unet", channels=[8, 16], attention=4, objective="v")):
        g = generator(sampler="heun", guidance=1.5, **more)
        g.save(tmp_path)
        again = load_generator(tmp_path)
        assert isinstance(again, DiffusionGenerator) and again.digest == g.digest
        assert again.dials == dict(steps=3, sampler="heun", guidance=1.5, std=1.0, shots=None, strength=None)
        assert torch.equal(again.sample([1, 2], [0, 5]), g.sample([1, 2], [0, 5])) and again.flops == g.flops > 0
    assert DiffusionGenerator.dials["steps"] == 10, "dials of one model are not those of another"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_perfect_network_gives_the_image_back(objective, sampler, steps):
    """One image, known: whatever the way, one arrives at it, and the levels on the way are those of the schedule."""
    x, e = randn((2, *SHAPE), 0, "x").clamp(-1, 1), randn((2, *SHAPE), 0, "e")
    grid = grid_of(objective, "cosine", steps)
    assert len(grid) == steps + 1 and grid[0][0] == 1000 and grid[-1] == (0, 1, 0)
    assert torch.allclose(denoise(lambda z, i: x, e, grid, sampler, lambda i: randn(x.shape, 0, "n", i)), x)
    if sampler == "euler" and steps > 1:
        a, s = grid[1][1:]
        assert torch.allclose(move(grid[0][1] * x + grid[0][2] * e, x, grid[0], grid[1]), a * x + s * e, atol=1e-4)


def test_samplers_are_those_of_diffusers():
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    table = dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")
    e, fresh = randn((2, *SHAPE), 0, "e"), [randn((2, *SHAPE), 0, "n", i) for i in range(20)]
    answer = lambda z, t: torch.sin(z + t / 300) / 3 + z / 2  # noqa: E731

    def theirs(scheduler, **more):
        z = e
        scheduler.set_timesteps(20)
        for i, t in enumerate(scheduler.timesteps):
            z = scheduler.step(answer(z, t), t, z, **{k: v[i] if isinstance(v, list) else v for k, v in more.items()}).prev_sample
        return z

    def ours(sampler):
        grid = grid_of("v", "cosine", 20)
        return denoise(lambda z, i: image_of(z, answer(z, clock_of(grid[i][0], "v")), *grid[i][1:], "v"), e, grid, sampler, lambda i: fresh[i])

    ddim = lambda: DDIMScheduler(**table, clip_sample=False)  # noqa: E731
    assert torch.allclose(ours("ddim"), theirs(ddim()), atol=1e-4)
    assert torch.allclose(ours("ancestral"), theirs(ddim(), eta=1.0, variance_noise=fresh), atol=1e-3)
    dpm = DPMSolverMultistepScheduler(**table, final_sigmas_type="zero", euler_at_final=True)
    assert torch.allclose(ours("multistep"), theirs(dpm), atol=1e-4)


@pytest.mark.parametrize("objective", ["noise", "v"])
@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_steps_are_those_of_ddpm(objective, clip):
    """100 of 1,000 steps as published: DDPM's posterior with its smaller variance, estimates cut to [-1, 1] or not."""
    from diffusers import DDPMScheduler

    kind = dict(noise="epsilon", v="v_prediction")[objective]
    theirs = DDPMScheduler(beta_schedule="linear", prediction_type=kind, timestep_spacing="trailing", clip_sample=clip)
    theirs.set_timesteps(100)
    answer = lambda z, t: torch.sin(z + t / 300) / 3 + z / 2  # noqa: E731
    z = e = randn((2, *SHAPE), 0, "e")
    chance, again = [torch.Generator().manual_seed(0) for _ in range(2)]
    for t in theirs.timesteps:
        z = theirs.step(answer(z, t), t, z, generator=chance).prev_sample
    grid, fresh = grid_of(objective, "linear", 100), [torch.randn(2, *SHAPE, generator=again) for _ in range(100)]

    def estimate(x, i):
        out = image_of(x, answer(x, clock_of(grid[i][0], objective)), *grid[i][1:], objective)
        return out.clamp(-1, 1) if clip else out

    assert torch.allclose(denoise(estimate, e, grid, "ancestral", lambda i: fresh[i]), z, atol=1e-3)


def test_guidance_is_the_same_of_every_answer():
    """eps_u + 3 (eps_c - eps_u) is what guiding v or u gives."""
    z, free, told, (a, s) = randn(9, 0, "z"), randn(9, 0, "f"), randn(9, 0, "t"), (0.6, 0.8)
    noise_in = lambda x: (z - a * x) / s  # noqa: E731
    for objective in ("v", "noise"):
        mixed = image_of(z, free + 3 * (told - free), a, s, objective)
        each = [noise_in(image_of(z, out, a, s, objective)) for out in (free, told)]
        assert torch.allclose(noise_in(mixed), each[0] + 3 * (each[1] - each[0]), atol=1e-4)


# --- from real images


def some_real(per_class=4):
    """`per_class` images of noise of each of ten classes, as a split."""
    x = torch.from_numpy(rng(0, "real").integers(0, 256, (10 * per_class, *SHAPE), np.uint8))
    y = torch.arange(10).repeat(per_class)
    return Split("toy/train", x, y, [str(c) for c in range(10)], digest(x, y), "cut")


def test_the_published_table():
    assert [real_guidance_step(n) for n in (16, 8, 4, 2, 1)] == [15, 20, 35, 40, 50]
    assert [real_guidance_step(n) for n in (3, 5, 12, 100)] == [37, 30, 17, 15]
    steps = [real_guidance_step(n) for n in range(1, 40)]
    assert steps == sorted(steps, reverse=True)
    with pytest.raises(SettingError, match="at least 1"):
        real_guidance_step(0)


def test_whole_steps_of_a_strength():
    assert all(steps_left(100, k / 100) == k for k in range(1, 100)), "floats of 0.29 and its like are a little too small"
    assert steps_left(30, 0.75) == 22 and steps_left(30, None) == steps_left(30, 1.0) == 30


def test_shots_are_nested_and_of_their_class():
    real = some_real(20)
    picks = {k: shots_of(real, k, 0).view(10, k) for k in (1, 2, 4, 16)}
    for k in (1, 2, 4):
        assert torch.equal(picks[k], picks[16][:, :k])
    assert (real.labels[picks[16]] == torch.arange(10)[:, None]).all() and len(picks[16].unique()) == 160
    assert not torch.equal(picks[4], shots_of(real, 4, 1).view(10, 4))
    assert torch.equal(shots_of(real, 4, 0, [7, 3]), picks[4][[3, 7]].flatten())
    assert torch.equal(picks[4].flatten(), torch.from_numpy(kshot(real.labels, 4, 0))), "those on which others train"
    less = real.take(torch.nonzero((real.labels != 6) | (torch.arange(200) < 30))[:, 0])
    with pytest.raises(SettingError, match="shots = 4: class 6 has only 3 training images, the fewest of all; at most 3"):
        shots_of(less, 4, 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_begins_at_the_noised_real_image(objective, monkeypatch):
    """x = a x_ref + s eps at the level of the step; exactly as many from each real image; only the last steps are done."""
    g, real = generator(objective=objective), some_real()
    h = g.guided(real.take(shots_of(real, 4, 0)))
    seen = []
    monkeypatch.setattr("synthlit.diffusion.denoise", lambda est, z, grid, sampler, noise: seen.append((z, grid)) or z.clamp(-1, 1))
    h.sample([3] * 8, range(8), steps=100, shots=4, seed=2)
    z, grid = seen.pop()
    whole = grid_of(objective, "cosine", 100)
    assert grid == whole[65:] and len(grid) - 1 == 35
    refs = torch.stack([h.images[h.rows[3][i % 4]] for i in range(8)]).float() / 127.5 - 1
    e = (z[:8] - grid[0][1] * refs) / grid[0][2]
    assert torch.allclose(e, latents(torch.full((8,), 3), torch.arange(8), 64, 2).view(8, *SHAPE), atol=1e-4)
    h.sample([3] * 64, range(64), shots=2, strength=0.25, steps=8)
    z, grid = seen.pop()
    assert len(grid) == 3, "the strength that is said counts"


def test_real_guidance_has_addresses(tmp_path):
    g, real = generator(), some_real()
    h = g.guided(real.take(shots_of(real, 4, 0)))
    for more in (dict(shots=2), dict(strength=0.4, sampler="ancestral", guidance=3.0)):
        alone, among = h.sample([7], [3], seed=1, steps=10, **more), h.sample([0, 7, 7, 2] * 20, [0, 3, 4, 9] * 20, seed=1, steps=10, **more)
        assert torch.equal(alone[0], among[1]) and torch.equal(alone[0], among[77]) and not torch.equal(among[1], among[2])
    assert torch.equal(h.sample([7], [3]), g.sample([7], [3])) and torch.equal(h.sample([7], [3], strength=1.0), g.sample([7], [3]))
    assert torch.equal(h.sample([7], [3], steps=20, shots=4), h.sample([7], [3], steps=20, strength=0.35))
    h.save(tmp_path)
    again = load_generator(tmp_path)
    assert again.digest == h.digest != g.digest and torch.equal(again.sample([7], [3], shots=4, steps=10), h.sample([7], [3], shots=4, steps=10))
    assert (h.kept, h.guides({}), h.guides(dict(shots=2)), h.guides(dict(strength=0.5)), g.guides({})) == (4, 0, 20, 40, 0)
    with pytest.raises(SettingError, match="took 4 real images of each class along"):
        h.sample([0], [0], shots=5)
    with pytest.raises(SettingError, match="leaves no step to do: take at least steps = 20"):
        h.sample([0], [0], strength=0.05)
    assert h.guided(None).digest == g.digest


def test_real_images_of_another_shape_are_cut_to_the_middle():
    x = torch.zeros(1, 1, 8, 20)
    x[..., 6:14] = torch.arange(8.0)
    assert torch.equal(covered(x, (8, 8))[0, 0], torch.arange(8.0).expand(8, 8))
    assert covered(torch.ones(2, 3, 10, 30), (16, 16)).shape == (2, 3, 16, 16) and covered(torch.ones(1, 3, 16, 16), (8, 12)).shape == (1, 3, 8, 12)
    circle = ((torch.arange(30) - 14.5).square() + (torch.arange(20)[:, None] - 9.5).square() < 49).float()[None, None]
    c = covered(circle, (10, 10))[0, 0] > 0.5
    assert abs(int(c.any(0).sum()) - int(c.any(1).sum())) <= 1, "a circle stays one"
    g = generator()
    real = Split("toy/train", torch.zeros(10, 1, 8, 14, dtype=torch.uint8), torch.arange(10), g.classes, "x", "cut")
    assert g.guided(real).images.shape == (10, *SHAPE)


def test_presets_that_are_one():
    assert DIFFUSION_PRESETS["small"] is DIFFUSION_PRESETS["fashion_mnist"] and not DIFFUSION_PRESETS["mnist"]["flip"]


def test_passes_are_counted():
    assert [passes(s, 5) for s in ("euler", "multistep", "heun")] == [5, 5, 9]
    for sampler in SAMPLERS:
        asked = []
        denoise(lambda z, i, asked=asked: asked.append(i) or z, randn((1, *SHAPE), 0, "e"), grid_of("flow", "", 4), sampler, lambda i: 0.0)
        assert len(asked) == passes(sampler, 4)
    g = generator()
    real = some_real()
    h = g.guided(real.take(shots_of(real, 4, 0)))
    h.dials = {**h.dials, "steps": 6, "sampler": "euler", "strength": 0.5}
    assert h.flops == g.flops, "three steps each"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(batch=400), "only 300 images"),
        (dict(batch=64, accumulate=3), "try 66"),
        (dict(warmup=2000), "only 2000 steps"),
        (dict(attention=8), "network = unet"),
        (dict(guidance=0.5), "nearest is 1"),
        (dict(guidance=2.0, label_drop=0.0), "label_drop = 0.1"),
        (dict(patch=2, channels=[32, 64, 64]), "multiples of 8"),
        (dict(snr_gamma=0.1), "usually 5"),
        (dict(snr_gamma=0.5, objective="noise"), "usually 5"),
        (dict(shots=40), "smallest class of the training split has 30"),
        (dict(objective="epsilon"), "objective = 'epsilon'"),
        (dict(sampler="multi_step"), "did you mean 'multistep'"),
        (dict(sample_steps=0), "sample_steps = 0"),
        (dict(channel=[8]), "did you mean 'channels'"),
        (dict(channels=[]), "must not be empty"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SettingError, match=message):
        resolve(DiffusionConfig, settings).check(dict(n_train=300, shape=(1, 28, 28), smallest=30))


@pytest.mark.parametrize(
    "dials, message",
    [
        (dict(steps=0), "steps = 0"),
        (dict(steps=2.5), "whole number"),
        (dict(sampler="eulr"), "did you mean 'euler'"),
        (dict(guidance=-1.0), "nearest is 1"),
        (dict(std=0), "positive"),
        (dict(truncation=2), "unknown dial"),
        (dict(guidance=0.5), "nearest is 1"),
        (dict(strength=0.5), "took no real images along"),
        (dict(shots=2), "took 0 real images of each class along"),
        (dict(strength=1.5), "strength = 1.5"),
    ],
)
def test_dials_that_cannot_be(dials, message):
    with pytest.raises(SettingError, match=message):
        generator().sample([0], [0], **dials)


def test_classes_it_never_saw_are_refused():
    g = generator()
    g.trained = [1, 2]
    with pytest.raises(SettingError, match=r"classes \[5\]"):
        g.sample([1, 5], [0, 0])


def test_another_architectures_checkpoint_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(SettingError, match="another architecture"):
        train(tmp_path, channels=[8, 32])


def test_a_loss_that_is_no_number_stops_and_is_not_kept(tmp_path):
    s = state(eval_every=5)

    def broken(number):
        if number == 7:
            with torch.no_grad():
                next(s.net.parameters()).fill_(float("nan"))
        return noise(number)

    with pytest.raises(FloatingPointError, match="at step 10; the checkpoint of step 5 is kept. Try a smaller diffusion.lr"):
        train_diffusion(s, broken, 12, stage(tmp_path), lambda *a: None)
    assert [int(p.stem[5:]) for p in stage(tmp_path).checkpoints.paths()] == [5]


def test_more_steps_go_on_where_the_rate_is_constant():
    was, more = [resolve(DiffusionConfig, dict(decay=False, steps=n)) for n in (1000, 2000)]
    as_dict = lambda c: dict(settings=dict(vars(c)), code="x")  # noqa: E731
    assert continues(as_dict(was), as_dict(more), more)
    falling = [resolve(DiffusionConfig, dict(steps=n)) for n in (1000, 2000)]
    assert not continues(*map(as_dict, falling), falling[1])


def test_the_stage_from_splits_to_generator(tmp_path):
    """The whole stage, small: run alone, stopped in between, finished; the folder holds what a GAN's holds."""
    cfg = resolve(
        DiffusionConfig, DIFFUSION_PRESETS["tiny"], dict(channels=[8, 16], steps=20, eval_every=10, n_eval=3, sample_steps=2, keep_every=10, warmup=2)
    )
    st = open_stage("diffusion", cfg)
    result = run_diffusion(st)
    assert result["digest"] == load_generator(st.dir).digest and result["best_step"] in (10, 20) and result["trained"] == list(range(10))
    assert (st.dir / "film.png").exists() and load_generator(st.dir / "last").sample([3], [0]).shape == (1, 8, 8, 1)[:1] + (1, 8, 8)
    assert len(list((st.dir / "steps").iterdir())) == 2 and load_json(st.dir / "manifest.json")["saw"]
    rows = [r for r in st.history.rows if r.get("frechet") is not None]
    assert len(rows) == 2 and all(np.isfinite([r["val_loss"], r["train_loss"], r["coverage"]]).all() for r in rows)
    assert load_tensors(Path(st.dir) / "generator.safetensors")[1]["made"]["dials"]["steps"] == 2
    bare = load_generator(st.dir)
    trained = (st.dir / "checkpoints").stat().st_mtime_ns
    more = open_stage("diffusion", replace(cfg, shots=2), st.run)  # the same training, with real images to begin at
    guided = run_diffusion(more)
    g, train = load_generator(more.dir), load_split(st.run / "splits", "train")
    assert guided["references"] == 20 and guided["digest"] == g.digest != bare.digest and (more.dir / "checkpoints").stat().st_mtime_ns == trained
    assert torch.equal(g.images, train.images[shots_of(train, 2, 0)]) and torch.equal(g.sample([3], [0]), bare.sample([3], [0]))
    assert all(load_generator(p.parent).kept == 2 for p in more.dir.glob("**/generator.safetensors"))
    assert run_diffusion(open_stage("diffusion", cfg, st.run))["digest"] == bare.digest


def test_work_is_estimated_before_it_is_done():
    cfg = resolve(DiffusionConfig, DIFFUSION_PRESETS["small"])
    work = work_diffusion(cfg, dict(n_train=50000, classes=10, shape=(1, 28, 28)))
    assert work["diffusion"] == cfg.steps * cfg.batch and work["denoise"] >= cfg.n_eval * 10 and work["disk"] > 1e6
    assert SimpleNamespace(**work)
