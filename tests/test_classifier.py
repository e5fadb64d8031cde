"""Training a classifier: resumed in the middle of an epoch, streamed, shared among cores and processes; optimisers and augmentation beside their references."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synthlit.augment import Augment, affine, augment_batch, crop_box, shift_flip
from synthlit.classifier import (
    CLASSIFIER_PRESETS,
    CPU,
    ClassifierConfig,
    Crew,
    Fixed,
    Training,
    learning_rate,
    new_optimizer,
    train_classifier,
    update,
)
from synthlit.core import Checkpoints, SettingError, load_tensors, resolve, rng, save_table
from synthlit.data import DataError, encode, load_arrays, subsets
from synthlit.networks import NETWORKS, build_net, cifar_resnet, size_of
from synthlit.splits import SplitsConfig, cut_data, load_data
from synthlit.stream import stream

TOP = Path(__file__).resolve().parent.parent
QUICK = dict(network="small", width=4, batch=32, epochs=2, shift=1)
SMALL = dict(realfake=dict(network="small", warmup=0.5, precision="fp32"))  # where a recipe's own network is too large for a test


@pytest.fixture(scope="module")
def digits():
    return cut_data(load_data(SplitsConfig()), SplitsConfig())


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


class Killed(Exception):
    pass


def stop_at(n):
    def track(it, total, start, desc):
        for i in it:
            if i == n:
                raise Killed
            yield i

    return track


def weights(c) -> list:
    return list(c.net.state_dict().values())


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize(
    "name, channels, classes, width, n", [("resnet20", 3, 10, 64, 4286026), ("resnet20", 3, 100, 64, 4309156), ("resnet18", 3, 10, None, 11173962)]
)
def test_parameter_counts(name, channels, classes, width, n):
    assert size_of(build_net(name, channels, classes, width)) == n


def test_timm_by_name():
    """ResNet-50 with ten classes has the parameters that others count; features are what the head is given; a misspelt name is helped."""
    pytest.importorskip("timm")
    net = build_net("timm:resnet50", 3, 10).eval()
    x = torch.randn(1, 3, 32, 32)
    assert size_of(net) == 23528522 and torch.allclose(net.head(net.features(x)), net(x))
    with pytest.raises(SettingError, match="did you mean 'resnet50'"):
        build_net("timm:resnet5O", 3, 10)


@pytest.mark.parametrize("name", [*NETWORKS, "resnet14", "resnet32", "resnet44", "resnet56"])
def test_networks_take_all_sizes_and_channels(name):
    for channels, side in ((1, 8), (1, 28), (3, 32), (3, 64)):
        net = build_net(name, channels, 7, 4)
        x = torch.randn(2, channels, side, side)
        assert net(x).shape == (2, 7) and torch.allclose(net.eval().head(net.features(x)), net(x), atol=1e-6)


def test_option_a_resnet_matches_a_plain_reading():
    """The forward pass of the CIFAR ResNet, written out once more without modules."""
    net = cifar_resnet(3, 10, 4, 14).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    p, x = dict(net.state_dict()), torch.randn(2, 3, 32, 32)

    def cbn(h, name, stride=1):
        h = F.conv2d(h, p[f"{name}.0.weight"], stride=stride, padding=1)
        return F.batch_norm(h, *[p[f"{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")])

    h = cbn(x, "body.0").relu()
    for b in range(1, 7):
        stride = 2 if b in (3, 5) else 1
        f = cbn(cbn(h, f"body.{b}.f.0", stride).relu(), f"body.{b}.f.1")
        if stride == 2:
            h = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, h.shape[1] // 2, h.shape[1] // 2))
        h = (f + h).relu()
    assert torch.allclose(net(x), F.linear(h.mean((2, 3)), p["head.weight"], p["head.bias"]), atol=1e-5)


@pytest.mark.parametrize("lr", [0.1, 0.001])
def test_sgdw_decays_by_the_weight_alone(lr):
    """1e-4 of the weight each step whatever the rate, before a Nesterov step as torch makes it without decay."""
    r = ClassifierConfig(optimizer="sgdw", lr=lr, weight_decay=1e-4)
    a, b = nn.Linear(5, 3), nn.Linear(5, 3)
    b.load_state_dict(a.state_dict())
    ours, plain = new_optimizer(a, r), torch.optim.SGD(b.parameters(), lr, momentum=0.9, nesterov=True)
    for i in range(5):
        for p, q in zip(a.parameters(), b.parameters()):
            p.grad = q.grad = torch.from_numpy(rng(i, "g").standard_normal(tuple(p.shape), dtype=np.float32))
        update(ours, a, r, lr)
        with torch.no_grad():
            for q in b.parameters():
                q.mul_(1 - 1e-4)
        plain.step()
    assert all(torch.allclose(p, q, rtol=0, atol=1e-7) for p, q in zip(a.parameters(), b.parameters()))


def test_multistep_is_torchs():
    r = resolve(ClassifierConfig, CLASSIFIER_PRESETS["gafi"])
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], r.lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, [m - 1 for m in r.milestones], r.gamma)
    for epoch in range(r.epochs):
        assert learning_rate(epoch * 10, r.epochs * 10, r) == pytest.approx(opt.param_groups[0]["lr"])
        opt.step(), schedule.step()


def test_realfake_is_timms():
    """The published recipe is timm's training script: its schedule, its optimiser and what it does not decay, beside timm itself."""
    pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    r = resolve(ClassifierConfig, CLASSIFIER_PRESETS["realfake"], dict(network="small"))
    net = build_net("small", 3, 10, 4)
    theirs = create_optimizer_v2(net, "sgd", r.lr, r.weight_decay, r.momentum)
    ours, names = new_optimizer(net, r), {id(p): n for n, p in net.named_parameters()}
    decays = lambda opt: {names[id(p)]: g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    assert decays(ours) == decays(theirs) and len(set(decays(ours).values())) == 2
    assert all(g["nesterov"] and g["momentum"] == 0.9 for g in ours.param_groups + theirs.param_groups)
    course = dict(num_epochs=200, decay_milestones=[50, 100, 150], decay_rate=0.2, warmup_epochs=5, warmup_lr=1e-5)
    schedule, _ = create_scheduler_v2(theirs, "multistep", **course)  # its other defaults are those of the training script
    for epoch in range(r.epochs):
        schedule.step(epoch)
        assert learning_rate(epoch * 10, r.epochs * 10, r) == pytest.approx(theirs.param_groups[0]["lr"])


def test_realfake_has_the_published_values():
    r = resolve(ClassifierConfig, CLASSIFIER_PRESETS["realfake"])
    published = dict(network="timm:resnet50", optimizer="sgd", momentum=0.9, weight_decay=5e-4, schedule="multistep", gamma=0.2, lr=0.1, epochs=200)
    published |= dict(batch=512, smoothing=0.1, warmup=5.0, flip=True, crop_area=0.08, jitter=0.4, mixup=0.0, cutmix=0.0, keep="last")
    assert {k: getattr(r, k) for k in published} == published


@pytest.mark.parametrize("optimizer", ["sgd", "sgdw", "adam", "adamw"])
def test_biases_and_norms_do_not_decay(optimizer):
    """Without gradients only decay moves, and with `decays: weights` it moves nothing of one dimension."""
    r = ClassifierConfig(optimizer=optimizer, weight_decay=0.1, decays="weights")
    net = build_net("small", 1, 10, 4)
    for p in net.parameters():
        p.data.add_(0.5)
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in net.parameters()]
    update(new_optimizer(net, r), net, r, 0.1)
    assert [torch.equal(a, b) for a, b in zip(before, net.parameters())] == [p.ndim == 1 for p in net.parameters()]


@pytest.mark.parametrize("recipe", ["fast", "gafi", "fewshot", "realfake"])
def test_recipes_train_and_resume(recipe, digits):
    """Each recipe at a small width: killed in the middle of an epoch, the weights are those of an undisturbed training."""
    r = resolve(ClassifierConfig, CLASSIFIER_PRESETS[recipe], dict(width=4, epochs=2, batch=64), SMALL.get(recipe, {}))
    train, val = digits["train"], digits["val"]
    args = (Fixed(train.images[:400], train.labels[:400]), r, train.classes, 12, val)
    whole = train_classifier(*args)

    def resumed(tmp, at):
        ck = Checkpoints(tmp)
        with pytest.raises(Killed):
            train_classifier(*args, checkpoints=ck, every=2, track=stop_at(at))
        return train_classifier(*args, checkpoints=ck, every=2)

    import tempfile

    assert all(equal(whole, resumed(tempfile.mkdtemp(), at)) for at in (3, 8))


def test_killed_at_every_step(digits, tmp_path):
    r, train = resolve(ClassifierConfig, QUICK), digits["train"]
    args = (Fixed(train.images[:100], train.labels[:100]), r, train.classes, 8)
    whole = train_classifier(*args)
    for at in range(1, 8):
        ck = Checkpoints(tmp_path / str(at))
        with pytest.raises(Killed):
            train_classifier(*args, checkpoints=ck, every=1, track=stop_at(at))
        assert equal(whole, train_classifier(*args, checkpoints=ck, every=1)), at


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_streamed_training_is_killed_and_resumed(kind, digits, tmp_path):
    """A training from files equals one from memory, bit by bit; from either it goes on in the middle of an epoch."""
    x, y = digits["train"].images[:200].numpy(), digits["train"].labels[:200].numpy()
    if kind == "files":
        for i, (a, c) in enumerate(zip(x, y)):
            p = tmp_path / "data" / "train" / str(c) / f"{i:04}.png"
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_bytes(encode(a))
    else:
        for s in range(2):
            rows = slice(s * 100, s * 100 + 100)
            save_table(tmp_path / "data" / f"train-{s}.parquet", dict(image=[dict(bytes=encode(a), path=None) for a in x[rows]], label=y[rows]))
    source, classes = stream(tmp_path / "data", channels=1, workers=2)
    r = resolve(ClassifierConfig, QUICK)
    whole = train_classifier(source, r, classes, 12)
    ck = Checkpoints(tmp_path / "ck")
    with pytest.raises(Killed):
        train_classifier(source, r, classes, 12, checkpoints=ck, every=4, track=stop_at(9))
    assert equal(whole, train_classifier(source, r, classes, 12, checkpoints=ck, every=4))
    if kind == "files":  # the same order of the same images; files are sorted by class, so the memory must be too
        order = np.concatenate([np.flatnonzero(y == c) for c in range(10)])
        assert equal(whole, train_classifier(Fixed(torch.from_numpy(x[order]), torch.from_numpy(y[order])), r, classes, 12))


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_a_subset_of_imagenet_is_streamed(kind, tmp_path):
    x = rng(0, "x").integers(0, 256, (48, 3, 8, 8), dtype=np.uint8)
    names = sorted([*(r["wnid"] for r in subsets()["imagewoof"]["classes"]), "n00000000", "n99999999"])
    if kind == "files":
        for i, a in enumerate(x):
            p = tmp_path / "imagenet" / names[i % 12] / f"{i:03d}.png"
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_bytes(encode(a))
    else:
        info = {"huggingface": json.dumps(dict(info=dict(features=dict(label=dict(names=names)))))}
        for s in range(2):
            cells, label = [dict(bytes=encode(a), path=None) for a in x[s * 24 : s * 24 + 24]], [i % 12 for i in range(24)]
            save_table(tmp_path / "imagenet" / f"train-{s}.parquet", pa.table(dict(image=cells, label=label)).replace_schema_metadata(info))
    want = load_arrays(f"{tmp_path}/imagenet:imagewoof")
    source, classes = stream(f"{tmp_path}/imagenet:imagewoof", workers=0)
    (images, labels), *_ = source.batches(np.arange(40), 40)
    assert classes == want["classes"] and len(source) == 40 == len(want["train"][1])
    assert np.array_equal(images.numpy(), want["train"][0]) and np.array_equal(labels.numpy(), want["train"][1])


def test_streams_name_what_is_wrong(tmp_path, capsys):
    x = rng(0, "x").integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    for i, a in enumerate(x):
        p = tmp_path / "mine" / "ab"[i % 2] / f"{i}.png"
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(encode(a[:1] if i == 3 else a))
    everything = lambda **how: list(stream(tmp_path / "mine", **how)[0].batches(np.arange(6), 6))
    assert everything(workers=0)[0][0].shape == (6, 3, 8, 8) and not capsys.readouterr().out
    with pytest.raises(DataError, match="a/0.png has colour"):
        everything(workers=0, channels=1)
    (tmp_path / "mine" / "b" / "5.png").write_bytes(encode(x[0][:, :7]))
    for workers in (0, 1):
        with pytest.raises(DataError, match="b/5.png has 8×7 pixels, the first image 8×8"):
            everything(workers=workers)
    assert everything(workers=0, size=8)[0][0].shape == (6, 3, 8, 8)
    (tmp_path / "mine" / "b" / "5.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="b/5.png cannot be read as an image"):
        everything(workers=0)
    np.savez(tmp_path / "all.npz", train_images=x[:, 0], train_labels=[0, 1] * 3)
    with pytest.raises(DataError, match="all.npz is no folder of images or shards"):
        stream(tmp_path / "all.npz")
    for p in (tmp_path / "mine").glob("*/*.png"):
        p.write_bytes(encode(x[0][:1]))
    stream(tmp_path / "mine", workers=0)
    assert capsys.readouterr().out.count("grey images are made RGB") == 1


SCRIPT = """
import sys, torch
from synthlit.classifier import *
from synthlit.core import resolve, save_tensors
from synthlit.splits import SplitsConfig, cut_data, load_data
torch.set_num_threads(1)
train = cut_data(load_data(SplitsConfig()), SplitsConfig())["train"]
r = resolve(ClassifierConfig, dict(network="small", width=4, batch=64, epochs=1))
c = train_classifier(Fixed(train.images, train.labels), r, train.classes, 10)
save_tensors(f"{sys.argv[1]}/rank{rank_and_world()[0]}.safetensors", {k: v for k, v in c.net.state_dict().items() if "running" not in k and "num" not in k})
"""


def test_two_processes_make_the_weights_of_two_shares(digits, tmp_path):
    """torchrun with two CPU processes: both ranks hold the same weights, and they are those of one process with two shares (up to rounding)."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(TOP), GLOO_SOCKET_IFNAME="lo")
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        "0",
        "--standalone",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = [load_tensors(tmp_path / f"rank{i}.safetensors")[0] for i in (0, 1)]
    train, r = digits["train"], resolve(ClassifierConfig, dict(network="small", width=4, batch=64, epochs=1))
    one = train_classifier(Fixed(train.images, train.labels), r, train.classes, 10, machine=dict(CPU, threads=2)).net.state_dict()
    first = train_classifier(Fixed(train.images, train.labels), r, train.classes, 10).net.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.allclose(a[k], one[k], atol=1e-4) for k in a)
    assert not all(torch.allclose(a[k], first[k], atol=1e-4) for k in a), "batch norm over halves is not batch norm over the whole"


def test_shares_of_an_odd_batch_add_up():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(37, 1, 4, 4), torch.arange(37) % 3
    grads = []
    for shares in (1, 2, 3):
        Crew(net, shares, shares).gradients(lambda n, x, y: F.cross_entropy(n(x), y), x, y)
        grads.append(net[1].weight.grad.clone())
    assert torch.allclose(grads[0], grads[1], atol=1e-6) and torch.allclose(grads[0], grads[2], atol=1e-6)


def test_shift_flip_matches_pad_crop_flip():
    """Every image of a batch is one of the crops of its padded self, perhaps mirrored."""
    x = torch.from_numpy(rng(0, "x").integers(0, 256, (50, 3, 9, 9), dtype=np.uint8))
    out = shift_flip(x, 2, True, rng(1, "r"), fill=7)
    padded = F.pad(x, (2, 2, 2, 2), value=7)
    for a, p in zip(out, padded):
        crops = [p[:, dy : dy + 9, dx : dx + 9] for dy, dx in itertools.product(range(5), repeat=2)]
        assert any(torch.equal(a, c) or torch.equal(a, c.flip(2)) for c in crops)


def test_gafi_crop_is_filled_with_grey():
    """GaFi pads with 0 in [-1, 1]; bytes have no such value, 128 is 0.004."""
    x = torch.full((64, 1, 8, 8), 255, dtype=torch.uint8)
    out = augment_batch(x, Augment(shift=4, fill=128), 0, 0)
    assert out.unique().tolist() == pytest.approx([128 / 127.5 - 1, 1.0], abs=1e-6)


def test_unknown_recipe_names_the_nearest():
    from synthlit.plan import plan, read_params

    with pytest.raises(SettingError, match="did you mean 'gafi'"):
        plan(read_params(dict(stages=dict(splits={}, classifier=dict(preset="gaffi")))))


def test_nan_stops_before_anything_is_saved(digits, tmp_path):
    train = digits["train"]
    r = resolve(ClassifierConfig, QUICK, dict(lr=10.0, weight_decay=1.0, schedule="constant", epochs=20))
    with pytest.raises(FloatingPointError, match="at step"):
        train_classifier(Fixed(train.images, train.labels), r, train.classes, 400, checkpoints=Checkpoints(tmp_path), every=5)
    for p in Checkpoints(tmp_path).paths():
        assert all(torch.isfinite(v).all() for v in load_tensors(p)[0].values() if v.is_floating_point())


class Turns(nn.Module):
    """A network whose answer to the seventh batch is not a number."""

    def __init__(self):
        super().__init__()
        self.head, self.n = nn.Linear(64, 10), 0

    def forward(self, x):
        self.n += self.training
        return self.head(x.flatten(1)) * (float("nan") if self.training and self.n == 7 else 1)


@pytest.mark.parametrize("every,kept", [(5, "the checkpoint of step 5 is kept"), (50, "no checkpoint was written before")])
def test_the_first_bad_step_is_named(digits, tmp_path, every, kept):
    train, ck = digits["train"], Checkpoints(tmp_path)
    with pytest.raises(FloatingPointError, match=f"the loss is no number any more at step 7; {kept}"):
        train_classifier(
            Fixed(train.images, train.labels), resolve(ClassifierConfig, QUICK), train.classes, 60, checkpoints=ck, every=every, net=Turns()
        )
    assert all(torch.isfinite(v).all() for p in ck.paths() for v in load_tensors(p)[0].values() if v.is_floating_point())


@pytest.mark.parametrize(
    "name,words", [("fst", "did you mean 'fast'"), ("resnet21", "depth 6n"), ("nowhere.at:all", "PYTHONPATH"), ("torch.nn:Nothing", "PYTHONPATH")]
)
def test_networks_are_refused_before_anything_runs(name, words):
    from synthlit.plan import plan, preflight, read_params

    with pytest.raises(SettingError, match=words):
        preflight(plan(read_params(dict(stages=dict(splits={}, classifier=dict(network=name))))))


def test_random_resized_crops_keep_their_share():
    """Area and ratio stay in range, no side is longer than the image, and a least share of 1 is no crop (as in torchvision)."""
    for area in (0.08, 0.5, 0.9, 1.0):
        h, w, y, x = crop_box(5000, area, rng(0, "box"))
        assert (h * w).min() >= area - 1e-5 and max(h.max(), w.max()) <= 1 + 1e-6 and 3 / 4 - 1e-5 <= (w / h).min() and (w / h).max() <= 4 / 3 + 1e-5
        assert ((y.abs() + h).max(), (x.abs() + w).max()) <= (1 + 1e-5, 1 + 1e-5)
    f = torch.rand(4, 3, 8, 8)
    assert torch.allclose(affine(f, 0, 0, 1.0, rng(0, "a")), f, atol=1e-5)


GAFI = """dataset image_size categorical val_categorical normalize dequantize resize padding horizontal_flip merge_train_val drop_remainder
optimizer lr momentum nesterov weight_decay batch_size val_batch_size epochs name width random_flip random_crop random_rotation random_zoom random_erasing
seed save_path extra_name mixed_precision CLS_PRE"""
REALFAKE = """dataset imagenet_path comb_dataset use_caption guidance_scale decay_milestones model num-classes batch-size opt momentum weight-decay sched lr
decay-rate epochs amp workers smoothing warmup-epochs warmup-lr hflip color-jitter scale aa mixup cutmix model-ema resume"""
FEWSHOT = "dataset name input_size seed train_percentage clf_transform_kwargs n_channels epochs batch_size optim lr beta1 beta2 weight_decay"


@pytest.mark.parametrize("system,keys", [("GaFi", GAFI), ("Real-Fake", REALFAKE), ("few-shot", FEWSHOT)])
def test_published_keys_are_in_the_chapter(system, keys):
    """Each key of the published classifiers stands in the left column, and each of our names in the right column exists."""
    cells = json.loads((TOP / "nbs" / "02_classifier.ipynb").read_text())["cells"]
    lines = [line for c in cells for line in "".join(c["source"]).splitlines() if line.startswith(f"| {system}")]
    rows = [[re.findall(r"`([^`]+)`", column) for column in line.split("|")[1:3]] for line in lines]
    there = {k for left, _ in rows for k in left}
    assert not set(keys.split()) - there
    ours = {f.name for f in fields(ClassifierConfig)} | {f"splits.{f.name}" for f in fields(SplitsConfig)}
    named = {n for _, right in rows for n in right if re.fullmatch(r"(splits\.)?[a-z_]+", n)}
    assert named - ours <= {"inputs", "workers", "timm", "gafi", "published", "bf16", "weights"} and len(named & ours) > 5


def test_average_and_best_are_kept(digits):
    train, val = digits["train"], digits["val"]
    r = resolve(ClassifierConfig, QUICK, dict(ema=0.9, keep="best"))
    t = Training(r, (1, 8, 8), train.classes, CPU)
    x, y = train.images[:32], train.labels[:32]
    for i in range(10):
        t.step(x, y, i, 10)
    assert not torch.equal(t.average.head.weight, t.net.head.weight)
    acc = t.judge(val)["val_accuracy"]
    assert t.score == pytest.approx(acc) and torch.equal(t.done().net.head.weight, t.average.head.weight)
    worse = replace(val, labels=(val.labels + 1) % 10)
    t.step(x, y, 9, 10), t.judge(worse)
    assert t.score == pytest.approx(acc) and not torch.equal(t.done().net.head.weight, t.average.head.weight)
