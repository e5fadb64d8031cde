"""LoRA with distribution matching: what moves and what does not, the terms beside their definitions, resumed and dealt out to the same bits, weights that other
tools read, and refusals."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from synthlit.captions import image_digests
from synthlit.core import (
    Checkpoints,
    History,
    SettingError,
    load_json,
    load_tensors,
    randn,
    read_manifest,
    resolve,
    run_machine,
    save_tensors,
    small_stage,
)
from synthlit.data import DataError
from synthlit.folders import load_pipeline, read_lora
from synthlit.generator import load_generator
from synthlit.lora import (
    LORA_PRESETS,
    QKVO,
    Feed,
    Latents,
    LoraConfig,
    LoraState,
    Texts,
    base_of,
    captions_for,
    class_mmd,
    cropped,
    dm_share,
    dm_term,
    encoder_folder,
    feed_of,
    go_on_from,
    image_features,
    judge,
    lora_step,
    lora_weights,
    new_lora,
    noise_schedule,
    objective,
    own_captions,
    packed_order,
    put_weights,
    rate,
    residuals,
    snr_weights,
    tokens_for,
    train_lora,
)
from synthlit.splits import load_split

TOP = Path(__file__).parents[1]
SMALL = dict(steps=4, batch=4, eval_every=2, n_val=8, shown=1, lr=1e-3)


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """Splits and an untrained pipeline as a generator."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    run_machine(folder, device="cpu", threads=1, channels_last=False)
    small_stage(folder, "splits")
    small_stage(folder, "text2image")
    return folder


@pytest.fixture(scope="module")
def parts(run):
    return SimpleNamespace(**{p: load_split(run / "splits", p) for p in ("train", "val")})


@pytest.fixture(scope="module")
def adapted(run):
    """The stage, run once: with the image token, all the rest as small as it can be."""
    small_stage(run, "lora", "adapted", {"generator": "text2image"}, **SMALL, token=True, dm=0.5)
    return run / "adapted"


def asked(**settings):
    return resolve(LoraConfig, SMALL, settings)


def begun(run, parts, **settings):
    """(state, feed) of a training from the untrained pipeline."""
    cfg = asked(**settings)
    g = base_of(run / "text2image", "cpu", cfg)
    s = LoraState(g.pipe, cfg, image_features(encoder_folder(cfg, g)) if cfg.dm_form == "mmd" else None)
    latents = Latents(s.pipe.vae, parts.train.images, g.size, cfg.crop, cfg.flip, cfg.cache_gb * 1e9, cfg.seed)
    texts = Texts(s.pipe, own_captions(g, parts.train, cfg.without), cfg.cache_gb * 1e9)
    return s, Feed(latents, texts, parts.train.labels, cfg, len(s.abar))


def numbers(s) -> torch.Tensor:
    return torch.cat([v.flatten() for v in lora_weights(s.unet).values()])


def trained(run, parts, steps=2, **settings):
    s, feed = begun(run, parts, **settings)
    for i in range(steps):
        lora_step(s, feed, i, steps)
    return numbers(s)


def as_stage(folder, track=lambda items, total, start=0, desc="": items):
    """What `train_lora` needs of a stage."""
    return SimpleNamespace(dir=folder, track=track, history=History(folder / "history.parquet"), checkpoints=Checkpoints(folder / "checkpoints"))


def test_dm_term_is_its_definition():
    """2.3 of the facts: (1/d)|sum w r|^2, over the batch as a sum."""
    u = randn((5, 3, 4, 4), 0, "u")
    d = 48
    total = sum(u[i].flatten() for i in range(5))
    assert torch.allclose(dm_term(u, "published"), (total**2).sum() / d)
    assert torch.allclose(dm_term(u, "mean"), ((total / 5) ** 2).sum() / d)
    pairs = sum((u[i] * u[j]).sum() for i in range(5) for j in range(5) if i != j) / d / 20
    assert torch.allclose(dm_term(u, "unbiased"), pairs, atol=1e-6)


@pytest.mark.parametrize("n", [2, 8, 24])
def test_dm_term_zero_and_b_squared(n):
    r = (8 * randn((n // 2, 64), 0, "r")).round() / 8  # so that sums are exact
    assert dm_term(torch.cat([r, -r]), "published") == dm_term(torch.cat([r, -r]), "mean") == 0
    one = r[:1].square().mean()
    assert torch.allclose(dm_term(r[:1].expand(n, -1), "published"), n**2 * one)
    assert all(torch.allclose(dm_term(r[:1].expand(n, -1), f), one) for f in ("mean", "unbiased"))


@pytest.mark.parametrize("form", ["mean", "unbiased"])
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_our_forms_do_not_know_in_how_many_parts(form, parts):
    """Value and gradient of twelve residuals, whole, and as so many processes would share them."""
    u = randn((12, 40), 1, "u")
    whole, shared = u.clone().requires_grad_(), u.clone().requires_grad_()
    dm_term(whole, form).backward()
    for p in shared.chunk(parts):
        dm_share(p, u.sum(0), form, 12).backward()
    assert torch.allclose(whole.grad, shared.grad, atol=1e-7)


def test_only_unbiased_expects_the_same_for_every_batch():
    free = {
        f: [sum(dm_term(randn((n, 32), i, "free", n), f).item() for i in range(400)) / 400 for n in (2, 16)]
        for f in ("published", "mean", "unbiased")
    }
    assert free["published"][1] > 6 * free["published"][0] and free["mean"][1] < free["mean"][0] / 6
    assert all(abs(v) < 0.02 for v in free["unbiased"])


def test_min_snr_weights(run):
    abar, kind = noise_schedule(load_generator(run / "text2image").pipe.scheduler)
    snr, w = abar / (1 - abar), snr_weights(abar, 5.0)
    assert kind == "epsilon" and (w[snr <= 5] == 1).all() and torch.allclose(w[snr > 5], 5 / snr[snr > 5]) and 0 < (snr > 5).sum() < len(snr)
    assert torch.allclose(snr_weights(abar, 5.0, "v_prediction"), snr.clamp(max=5) / (snr + 1)) and (snr_weights(abar, 0.0) == 1).all()


def test_weights_are_those_of_diffusers(run):
    """SNR as diffusers computes it, weights as its training scripts make them."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    pipe = load_generator(run / "text2image").pipe
    scheduler, t = DDPMScheduler.from_config(pipe.scheduler.config), torch.arange(0, 1000, 7)
    snr = compute_snr(scheduler, t)
    theirs = torch.stack([snr, 5.0 * torch.ones_like(t)], dim=1).min(dim=1)[0] / snr
    assert torch.allclose(snr_weights(noise_schedule(pipe.scheduler)[0][t], 5.0), theirs, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_residuals_are_those_of_diffusers(run, parts, kind):
    """Noisy latents and targets beside the scheduler's own."""
    from diffusers import DDPMScheduler

    s, feed = begun(run, parts)
    s.kind = kind
    p, (theirs,) = feed(0, 1)[0], [DDPMScheduler.from_config(s.pipe.scheduler.config, prediction_type=kind)]
    r, out, x = residuals(s, p)
    assert torch.allclose(x, theirs.add_noise(p.x, p.noise, p.t), atol=1e-5)
    target = p.noise if kind == "epsilon" else theirs.get_velocity(p.x, p.noise, p.t)
    assert torch.allclose(r, out - target, atol=1e-5)


def test_class_mmd():
    f, y, one = randn((60, 8), 0, "f"), torch.arange(60) % 3, torch.ones(60)
    assert abs(class_mmd(f, f, y, one)) < 1e-6
    swapped = f.clone()
    swapped[y == 0], swapped[y == 1] = f[y == 1] + 2, f[y == 0] - 2
    assert class_mmd(f, swapped, y, one) > class_mmd(f, randn((60, 8), 1, "f"), y, one) + 0.1  # all classes together hide less
    half = torch.cat([torch.ones(30), torch.zeros(30)])  # what has no weight does not count
    other = torch.cat([f[:30], f[30:] + 9])
    assert abs(class_mmd(f, other, y, half)) < 1e-6
    assert class_mmd(f[:3], f[:3] + 1, y[:3], one[:3]) == 0  # one image of a class has no pair


def test_lora_touches_q_k_v_out_and_nothing_else(run, parts):
    s, feed = begun(run, parts, dm=0.5, snr_gamma=0.0)
    before = {k: v.clone() for k, v in s.unet.state_dict().items()}
    others = {k: v.clone() for m in (s.pipe.vae, s.pipe.text_encoder) for k, v in m.state_dict().items()}
    for i in range(3):
        lora_step(s, feed, i, 3)
    changed = {k for k, v in s.unet.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(".lora_" in k for k in changed)
    assert {next(e for e in QKVO if f".{e}.lora_" in k) for k in changed} == set(QKVO)
    attention = [m for m in s.unet.modules() if type(m).__name__ == "Attention"]
    assert len(lora_weights(s.unet)) == len(attention) * 4 * 2 and all(v.shape[0] == 4 or v.shape[1] == 4 for v in lora_weights(s.unet).values())
    assert all(torch.equal(v, others[k]) for m in (s.pipe.vae, s.pipe.text_encoder) for k, v in m.state_dict().items())
    assert sum(p.numel() for p in s.unet.parameters() if p.requires_grad) == numbers(s).numel() == sum(p.numel() for p in s.moving)


def test_off_is_the_base_bit_for_bit(run, adapted):
    g, base = load_generator(adapted), load_generator(run / "text2image")
    y, i = torch.arange(6), torch.arange(6)
    same = g.altered(tokens=None)
    assert torch.equal(same.sample(y, i, lora_scale=0.0), base.sample(y, i)) and not torch.equal(same.sample(y, i, lora_scale=1.0), base.sample(y, i))
    unet = base.pipe.unet
    x, t, text = randn((2, 4, 4, 4), 0, "x"), torch.tensor([1, 900]), randn((2, 16, 64), 0, "text")
    predict = lambda: unet(x, t, encoder_hidden_states=text).sample
    with torch.no_grad():
        plain = predict()
        new_lora(unet, 4)
        assert torch.equal(predict(), plain)  # before the first update
        for p in unet.parameters():
            p.add_(0.1) if p.requires_grad else None
        assert not torch.equal(predict(), plain)
        unet.disable_adapters()
        assert torch.equal(predict(), plain)


@pytest.mark.parametrize("more", [{}, dict(dm=1.0, dm_form="mean"), dict(dm=1.0, dm_form="unbiased"), dict(flip=True, noise_offset=0.1)])
def test_accumulated_is_the_large_batch(run, parts, more):
    whole = trained(run, parts, batch=8, **more)
    assert all(torch.allclose(whole, trained(run, parts, batch=8 // k, accumulate=k, **more), atol=2e-5) for k in (2, 8))


def test_published_form_depends_on_the_parts(run, parts):
    more = dict(dm=1.0, dm_form="published")
    assert (trained(run, parts, batch=8, **more) - trained(run, parts, batch=2, accumulate=4, **more)).abs().max() > 1e-4


TWO = """
import sys, torch
from pathlib import Path
from synthlit.core import load_json, resolve, save_tensors
from synthlit.gan.train import start_processes
from synthlit.classifier import rank_and_world
from synthlit.lora import *
from synthlit.splits import load_split
run, out = map(Path, sys.argv[1:3])
torch.set_num_threads(1)
start_processes(dict(device='cpu'))
train = load_split(run/'splits', 'train')
cfg = resolve(LoraConfig, load_json(out/'cfg.json'))
g = base_of(run/'text2image', 'cpu', cfg)
s = LoraState(g.pipe, cfg)
latents, texts = Latents(s.pipe.vae, train.images, g.size, 'centre', False, 1e9, 0), Texts(s.pipe, own_captions(g, train, cfg.without), 1e9)
feed = Feed(latents, texts, train.labels, cfg, len(s.abar))
for i in range(2): lora_step(s, feed, i, 2)
save_tensors(out/f'rank{rank_and_world()[0]}.safetensors', lora_weights(s.unet))
"""


def test_two_processes_make_the_weights_of_one(run, parts, tmp_path):
    """torchrun with two CPU processes: a `mean` training comes out as alone, up to rounding."""
    from dataclasses import asdict

    from synthlit.core import save_json

    cfg = asked(batch=8, dm=1.0, dm_form="mean")
    save_json(tmp_path / "cfg.json", asdict(cfg))
    (tmp_path / "script.py").write_text(TWO)
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(TOP), GLOO_SOCKET_IFNAME="lo", HF_HUB_OFFLINE="1")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        str(tmp_path / "script.py"),
        str(run),
        str(tmp_path),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = [torch.cat([v.flatten() for v in load_tensors(tmp_path / f"rank{i}.safetensors")[0].values()]) for i in (0, 1)]
    assert torch.equal(a, b) and torch.allclose(a, trained(run, parts, batch=8, dm=1.0, dm_form="mean"), atol=2e-5)


class Killed(Exception):
    pass


def test_killed_at_every_step_it_resumes_to_the_same_bits(run, parts, tmp_path):
    """In the middle of an epoch, with everything on that draws numbers."""
    more = dict(
        flip=True, noise_offset=0.1, dm=0.5, dm_form="mean", accumulate=2, batch=2, schedule="cosine", warmup=1, size=8, save_every=1, eval_every=100
    )

    def course(folder, at=None):
        def track(items, total, start=0, desc=""):
            for i in items:
                if i == at:
                    raise Killed
                yield i

        s, feed = begun(run, parts, **more)
        train_lora(s, feed, 4, as_stage(folder, track), lambda step: None)
        return s

    whole = course(tmp_path / "whole")
    for at in (1, 2, 3):
        with pytest.raises(Killed):
            course(tmp_path / str(at), at)
        again = course(tmp_path / str(at))
        assert torch.equal(numbers(again), numbers(whole))
        assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in zip(again.opt.state.values(), whole.opt.state.values(), strict=True))


def test_checkpoint_limit(run, parts, tmp_path):
    s, feed = begun(run, parts, checkpoints=1, save_every=1, eval_every=100)
    stage = as_stage(tmp_path)
    train_lora(s, feed, 3, stage, lambda step: None)
    assert [p.name for p in stage.checkpoints.paths()] == ["step-000000003.safetensors"]


def test_looking_changes_nothing(run, parts):
    """A look at val and pictures in the middle, or not: the same weights."""
    out = []
    for look in (False, True):
        s, feed = begun(run, parts)
        g = base_of(run / "text2image", "cpu", s.cfg).altered(lora=lora_weights(s.unet))
        g.pipe = s.pipe
        for i in range(2):
            if look:
                first = judge(s, feed, 5)
                assert judge(s, feed, 5) == first
                with s.drawing():
                    assert torch.equal(g.sample([1, 2], [0, 0]), g.sample([1, 2], [0, 0]))
            lora_step(s, feed, i, 2)
        out.append(numbers(s))
    assert torch.equal(*out)


def test_the_stage(run, adapted, parts):
    r, m, rows = load_json(adapted / "result.json"), read_manifest(adapted), History(adapted / "history.parquet").rows
    assert (
        r["steps"] == 4
        and r["layers"] * 2 == len(load_tensors(adapted / "pytorch_lora_weights.safetensors")[0])
        and r["val_loss"] < r["before"]["val_loss"]
    )
    assert [x["step"] for x in rows if x["val_loss"] is not None] == [0, 2, 4] and len([*(adapted / "pictures").glob("*.png")]) == 3
    assert set(read_manifest(run / "text2image")["saw"]) | set(parts.train.saw) == set(m["saw"]) and m["cuts"]
    g = load_generator(adapted)
    assert g.digest == r["digest"] != load_generator(run / "text2image").digest and len(g.lora) == 2 * r["layers"]
    assert g.tokens is not None and g.tokens.shape == (len(parts.train), 64)  # trained with the token, it draws with it
    assert not any("base_layer" in k or k.startswith("unet.conv") for k in g.state()[0])  # never the base's own weights


def test_stock_diffusers_reads_the_weights(run, adapted):
    """`load_lora_weights` of the folder, without synthlit: the U-Net says what ours says."""
    pipe, g = load_pipeline(run / "text2image" / "pipeline"), load_generator(adapted)
    x, t, text = randn((2, 4, 4, 4), 0, "x"), torch.tensor([1, 900]), randn((2, 16, 64), 0, "text")
    predict = lambda unet: unet(x, t, encoder_hidden_states=text).sample
    with torch.no_grad():
        plain = predict(pipe.unet)
        pipe.load_lora_weights(adapted, weight_name="pytorch_lora_weights.safetensors")
        theirs = predict(pipe.unet)
        g.sample([0], [0], lora_scale=1.0)
        assert torch.equal(theirs, predict(g.pipe.unet)) and not torch.allclose(theirs, plain, atol=1e-6)
        pipe.unload_lora_weights()
        assert torch.equal(predict(pipe.unet), plain)


def test_stock_diffusers_writes_what_we_read(run, parts, adapted, tmp_path):
    """And back: a file of `save_lora_weights` is a place to go on from."""
    from diffusers import StableDiffusionPipeline

    weights = load_tensors(adapted / "pytorch_lora_weights.safetensors")[0]
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers={k.removeprefix("unet."): v for k, v in weights.items()})
    s, _ = begun(run, parts)
    go_on_from(s, load_generator(run / "text2image"), str(tmp_path))
    assert all(torch.equal(v, weights[k]) for k, v in lora_weights(s.unet).items()) and set(read_lora(tmp_path)) == set(weights)


def test_token_takes_the_last_place(run, parts, tmp_path):
    cfg = asked(token=True)
    g = base_of(run / "text2image", "cpu", cfg)
    stage = SimpleNamespace(dir=tmp_path, device="cpu", track=lambda items, total, start=0, desc="": items)
    s = LoraState(g.pipe, cfg)
    feed = feed_of(cfg, g, s, parts.val, "val", stage)
    plain, rows = Texts(s.pipe, captions_for(cfg, g, parts.val, "val", stage), 1e9), torch.tensor([3, 1, 4])
    got = feed.texts(rows)
    assert torch.equal(got[:, :-1], plain(rows)[:, :-1]) and not torch.equal(got[:, -1], plain(rows)[:, -1])
    assert torch.equal(got[:, -1], tokens_for(cfg, g, parts.val, "val", stage)[rows])
    mixed = torch.tensor([2, 0, 1])  # by the image, not by its place
    assert torch.equal(tokens_for(cfg, g, parts.val.take(mixed), "other", stage), tokens_for(cfg, g, parts.val, "val", stage)[mixed])


def test_tokens_of_another_tower_are_refused(run, parts, tmp_path):
    cfg = asked(token=True)
    g = base_of(run / "text2image", "cpu", cfg).altered(labels=parts.train.labels, tokens=torch.ones(len(parts.train), 64))
    stage = SimpleNamespace(dir=tmp_path, device="cpu", track=lambda items, total, start=0, desc="": items)
    with pytest.raises(SettingError, match="another image tower"):
        tokens_for(cfg, g, parts.train, "train", stage)


def test_captions_by_image(run, parts, tmp_path):
    g, train = load_generator(run / "text2image"), parts.train
    stage = SimpleNamespace(dir=tmp_path, device="cpu")
    file, keys = tmp_path / "captions.json", image_digests(train.images)
    file.write_text(json.dumps({k: f"words {i}" for i, k in enumerate(keys)}))
    got = captions_for(asked(captions=str(file)), g, train, "train", stage)
    assert got[7] == f"photo of {train.classes[train.labels[7]]}, words 7" and len(got) == len(train)
    assert (
        captions_for(asked(captions=str(file)), g, parts.val, "val", stage)[0] == f"{parts.val.classes[parts.val.labels[0]]}, photo"
    )  # of its class
    file.write_text(json.dumps({k: "words" for k in keys[3:]}))
    with pytest.raises(DataError, match=r"training images have no caption, the first is image 0"):
        captions_for(asked(captions=str(file)), g, train, "train", stage)
    assert own_captions(g, train, ", best quality")[0] == f"{train.classes[train.labels[0]]}, photo"  # what asks for quality is left out


@pytest.mark.parametrize("room", [1e9, 0.0])
def test_long_captions_are_counted_and_cut(run, parts, room):
    g = load_generator(run / "text2image")
    t = Texts(g.pipe, ["3, photo", "photo of " * 40], room)
    assert t.cut == 1 and t(torch.tensor([0, 1])).shape[1] == g.pipe.tokenizer.model_max_length


@pytest.mark.parametrize("room", [1e9, 0.0])
def test_kept_or_computed_it_is_the_same(run, parts, room):
    s, feed = begun(run, parts, cache_gb=room / 1e9, flip=True)
    assert feed.latents.kept == feed.texts.kept == (room > 0)
    p = feed(3, 1)[0]
    q = begun(run, parts, flip=True)[1](3, 1)[0]
    assert (
        torch.allclose(p.x, q.x, atol=1e-4) and torch.allclose(p.text, q.text, atol=1e-5) and torch.equal(p.noise, q.noise) and torch.equal(p.t, q.t)
    )


def test_crops():
    x = torch.arange(64).view(1, 1, 8, 8).byte()
    at = lambda a, mirror=False: ((cropped(x, 4, torch.tensor([[a, a]]), torch.tensor([mirror])) + 1) * 127.5).round().byte()
    assert (
        torch.equal(at(0.0)[0, 0], x[0, 0, :4, :4])
        and torch.equal(at(0.999)[0, 0], x[0, 0, 4:, 4:])
        and torch.equal(at(0.5)[0, 0], x[0, 0, 2:6, 2:6])
    )
    assert torch.equal(at(0.0, True)[0, 0], x[0, 0, :4, :4].flip(1)) and at(0.0).shape == (1, 3, 4, 4)
    shrunk = (cropped(x, 4, None, torch.tensor([False])) + 1) * 127.5
    assert shrunk.shape == (1, 3, 4, 4) and (shrunk[0, 0] - x.float().view(4, 2, 4, 2).mean((1, 3))).abs().max() < 3  # all of the image, not a part
    assert torch.equal(cropped(x, 8, None, torch.tensor([False]))[0, 0], x[0, 0] / 127.5 - 1)


def test_a_batch_is_dealt_to_processes_in_whole_packs(monkeypatch):
    monkeypatch.setattr("synthlit.lora.rank_and_world", lambda: (0, 3))
    with pytest.raises(SettingError, match=r"lora.batch = 8: must be a multiple of lora.pack x processes = 6"):
        LoraConfig(batch=8, pack=2).check({})
    LoraConfig(batch=12, pack=2).check({})


def test_orders():
    y = torch.tensor([0] * 5 + [1] * 7 + [2] * 2)
    assert sorted(packed_order(y, 1, 0, 0)) == list(range(14)) and (packed_order(y, 1, 0, 0) != packed_order(y, 1, 0, 1)).any()
    packs = y[packed_order(y, 2, 0, 0)].view(-1, 2)
    assert (packs[:, 0] == packs[:, 1]).all() and set(packed_order(y, 2, 0, 0)) == set(range(14))


def test_every_image_is_used_once_an_epoch(run, parts):
    _, feed = begun(run, parts, batch=8, accumulate=2)
    per = len(parts.train) // 16
    seen = torch.cat([feed.rows(i) for i in range(per)])
    assert len(seen.unique()) == len(seen) == per * 16 and not torch.equal(feed.rows(0), feed.rows(per))
    small = Feed(feed.latents, feed.texts, parts.train.labels[:3], feed.cfg, 1000)
    assert torch.bincount(small.rows(0), minlength=3).min() >= 5  # a set smaller than a step


def test_rates():
    c = asked(lr=1.0, warmup=10, schedule="cosine")
    assert rate(c, 0, 110) == 0.1 and rate(c, 9, 110) == 1 and rate(c, 60, 110) == pytest.approx(0.5) and rate(c, 109, 110) < 1e-3
    assert rate(asked(lr=1.0, schedule="linear"), 25, 100) == 0.75 and rate(asked(lr=1.0), 99, 100) == 1


@pytest.mark.parametrize(
    "more", [dict(precision="bf16"), dict(checkpointing=True), dict(dm=1.0, dm_form="mmd", pack=2), dict(dm=0.003, dm_form="published")]
)
def test_each_way_trains(run, parts, more):
    s, feed = begun(run, parts, **more)
    before = numbers(s)
    out = lora_step(s, feed, 0, 2)
    assert all(torch.isfinite(v) for v in out.values()) and not torch.equal(before, numbers(s)) and all(p.dtype == torch.float32 for p in s.moving)


def test_gradient_checkpointing_is_the_same_training(run, parts):
    assert torch.allclose(trained(run, parts), trained(run, parts, checkpointing=True), atol=1e-6)


def test_the_term_lowers_what_it_names(run, parts):
    """The same images and noise: with the term the residuals of the next step have less in common."""
    after = []
    for dm in (0.0, 3.0):
        s, feed = begun(run, parts, steps=12, batch=8, lr=5e-3, dm=dm, dm_form="unbiased")
        for i in range(12):
            lora_step(s, feed, i, 12)
        after.append(judge(s, feed, 64))
    assert after[1]["val_dm"] < after[0]["val_dm"]


def test_a_loss_that_is_no_number_stops(run, parts, tmp_path):
    s, feed = begun(run, parts, eval_every=100, save_every=1)
    feed.noise = lambda shape, step: torch.full(shape, float("nan") if step == 2 else 0.5)
    stage = as_stage(tmp_path)
    with pytest.raises(FloatingPointError, match="update 3; the checkpoint of update 2 is kept"):
        train_lora(s, feed, 4, stage, lambda step: None)
    assert all(torch.isfinite(v).all() for v in stage.checkpoints.load()[1]["lora"].values())


def test_lora_of_another_base_is_refused(run, parts, adapted, tmp_path):
    s, _ = begun(run, parts)
    g, weights = load_generator(run / "text2image"), lora_weights(s.unet)
    save_tensors(tmp_path / "pytorch_lora_weights.safetensors", weights, dict(weights="of another"))
    with pytest.raises(SettingError, match="trained on another base model"):
        go_on_from(s, g, str(tmp_path))
    for bad in ({k: v[..., :1] for k, v in weights.items()}, {k.replace("down_blocks.0", "down_blocks.7"): v for k, v in weights.items()}):
        with pytest.raises(DataError, match="another base model, rank or other targets"):
            put_weights(s.unet, bad)
    go_on_from(s, g, str(adapted))
    assert all(torch.equal(v, load_tensors(adapted / "pytorch_lora_weights.safetensors")[0][k]) for k, v in lora_weights(s.unet).items())


def test_only_a_plain_pipeline_is_adapted(run, adapted):
    with pytest.raises(SettingError, match="has a LoRA already"):
        base_of(adapted, "cpu", asked())
    from synthlit.generator import fit_floor

    train = load_split(run / "splits", "train")
    other = run / "floor"
    fit_floor(train.images, train.labels, train.classes, 1, 8).save(other)
    shutil.copy(run / "text2image" / "manifest.json", other)
    with pytest.raises(SettingError, match="adapts a text-to-image pipeline"):
        base_of(other, "cpu", asked())
    shutil.rmtree(other)


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(rank=0), "rank = 0: must be at least 1"),
        (dict(targets=[]), "must not be empty"),
        (dict(dm=-1.0), "dm = -1.0"),
        (dict(dm_form="sum"), "published"),
        (dict(epochs=2), "either steps or epochs"),
        (dict(batch=6, pack=4), "multiple of lora.pack"),
        (dict(dm=1.0, dm_form="mmd"), "at least 2 of them must meet"),
        (dict(dm=1.0, dm_form="unbiased", batch=1), "at least 2 images"),
        (dict(token=True), "token = true needs one"),
        (dict(prompts="a|b|c"), "one for each class at most"),
        (dict(snr_gama=5.0), "snr_gamma"),
        (dict(lr=0.0), "lr = 0.0"),
    ],
)
def test_settings_that_cannot_be(bad, says):
    with pytest.raises(SettingError, match=says):
        resolve(LoraConfig, bad).check(dict(image_encoder=False, trained=2))


def test_unknown_targets_are_refused(run):
    unet = load_generator(run / "text2image").pipe.unet
    for target in ("to_kay", "q", "o_q", "to_out"):
        with pytest.raises(SettingError, match=f"no layer {target!r}"):
            new_lora(unet, 4, ["to_q", target])
    new_lora(unet, 4, ["attn2.to_k"])  # an ending may be longer: cross-attention alone
    assert all(".attn2.to_k.lora_" in k for k in lora_weights(unet))
    with pytest.raises(SettingError, match="has a LoRA already"):
        new_lora(unet, 4)


def test_wrong_sizes_are_refused(run):
    with pytest.raises(SettingError, match="multiples of 4"):
        small_stage(run, "lora", "odd", {"generator": "text2image"}, **SMALL, size=18)


def test_no_network_is_touched(run, monkeypatch):
    def refuse(*a, **k):
        raise AssertionError("the network was asked")

    for f in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, f, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    small_stage(run, "lora", "offline", {"generator": "text2image"}, **SMALL | dict(steps=1), token=True, dm=0.1, dm_form="mmd", pack=2)
    assert read_manifest(run / "offline")["stage"] == "lora"


def test_published_values():
    c = resolve(LoraConfig, LORA_PRESETS["published"])
    want = dict(
        rank=4, snr_gamma=5.0, dm=0.003, dm_form="published", token=True, batch=8, epochs=100, steps=None, lr=1e-4, schedule="constant", flip=True
    )
    want |= dict(
        crop="shrink", beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, clip=1.0, noise_offset=0.0, accumulate=1, save_every=500, seed=42
    )
    assert {k: getattr(c, k) for k in want} == want and c.targets == list(QKVO)
    assert all(f.name in (TOP / "nbs" / "04b_lora.ipynb").read_text() for f in fields(LoraConfig))
    for p in LORA_PRESETS.values():
        resolve(LoraConfig, p).check({})


def test_published_term_has_the_published_weight(run, parts):
    """The whole loss of 2.3: L_den + 0.003 * (1/d)|sum w r|^2 over the batch."""
    s, feed = begun(run, parts, dm=0.003, dm_form="published")
    p = feed(0, 1)[0]
    with torch.no_grad():
        loss, den, dm = objective(s, p, 1, None)
        r = residuals(s, p)[0].flatten(1)
    a = s.abar[p.t]
    w = torch.minimum(a / (1 - a), torch.tensor(5.0)) / (a / (1 - a))
    d = r.shape[1]
    assert torch.allclose(den, (w * (r**2).sum(1) / d).mean()) and torch.allclose(dm, ((w[:, None] * r).sum(0) ** 2).sum() / d)
    assert torch.allclose(loss, den + 0.003 * dm)
