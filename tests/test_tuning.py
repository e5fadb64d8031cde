"""Classifier tuning: losses by hand, a cache that serves nobody else's features, a rate that ends at 0, one look at test."""

import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import synthlit.tuning as T
from synthlit.core import (
    Checkpoints,
    SettingError,
    Stage,
    digest,
    enter_folder,
    find_inputs,
    load_json,
    load_meta,
    load_table,
    load_tensors,
    resolve,
    rng,
    run_machine,
    save_json,
    small_stage,
    stage_identity,
)
from synthlit.data import DataError
from synthlit.imagetext import ImageText, random_image_text
from synthlit.plan import plan, preflight
from synthlit.splits import load_split, openings, read_part, save_split

NAMES = [str(i) for i in range(10)]
SMALL = dict(model="", steps=6, looks=3, batch_syn=20, batch_real=6, seeds=[0, 1], shots=[0, 1, 2], floor=0, lr=0.05, batch_features=32)


@pytest.fixture(scope="module")
def clip(home, tmp_path_factory):
    return random_image_text(tmp_path_factory.mktemp("model") / "clip", [*NAMES, "a photo of an"], 16)


@pytest.fixture(scope="module")
def judge(clip):
    return ImageText(clip, NAMES, batch=16)


@pytest.fixture(scope="module")
def noise():
    return torch.from_numpy(rng(0, "test.noise").integers(0, 256, (60, 3, 20, 20), dtype=np.uint8))


@pytest.fixture(scope="module")
def base_run(home, tmp_path_factory):
    """Splits of 20 images per class, and a set of 6."""
    run = tmp_path_factory.mktemp("tuning") / "run"
    run.mkdir()
    run_machine(run, "cpu")
    small_stage(run, "splits", per_class=20)
    small_stage(run, "imported")
    small_stage(run, "generate", per_class=6)
    return run


@pytest.fixture
def run(base_run, tmp_path):
    return shutil.copytree(base_run, tmp_path / "run")


def opened(run, clip, name="tuning", inputs=None, **settings) -> Stage:
    """The stage, open, with the settings of SMALL."""
    cfg = resolve(T.TuningConfig, T.TUNING_PRESETS["tiny"], SMALL, dict(model=str(clip)), settings)
    machine, found = run_machine(run), find_inputs(run, "tuning", inputs or {}, name)
    identity = stage_identity("tuning", cfg, run, found, machine)
    enter_folder(run / name, identity, cfg)
    return Stage("tuning", run, run / name, cfg, found, identity, None, machine)


# losses

Z, Q = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(9), 0.0]])  # p = 1/4, 3/4; the teacher 9/10, 1/10, and 3/4, 1/4 at T = 2
L0, L1 = math.log(4), math.log(4 / 3)


@pytest.mark.parametrize(
    "how, want",
    [
        (dict(soft=0.0), L1),
        (dict(soft=1.0, temperature=1.0), 0.9 * L0 + 0.1 * L1),
        (dict(soft=1.0, temperature=2.0), 0.75 * L0 + 0.25 * L1),  # with T² it would be four times that
        (dict(soft=0.5, temperature=2.0), 0.5 * L1 + 0.5 * (0.75 * L0 + 0.25 * L1)),
        (dict(soft=0.25, temperature=2.0, hard=True), 0.75 * L1 + 0.25 * L0),
        (dict(soft=0.0, smoothing=0.2), 0.8 * L1 + 0.2 * (L0 + L1) / 2),
        (dict(soft=0.5, temperature=2.0, smoothing=0.2), 0.5 * (0.8 * L1 + 0.1 * (L0 + L1)) + 0.5 * (0.75 * L0 + 0.25 * L1)),
    ],
)
def test_losses_by_hand(how, want):
    assert math.isclose(T.synthetic_loss(Z, torch.tensor([1]), Q, **how).item(), want, rel_tol=1e-6)


def test_soft_shares_at_their_ends():
    z, q = (torch.from_numpy(rng(i, "test.z").normal(size=(50, 7))) for i in (0, 1))
    y = torch.arange(50) % 7
    assert torch.allclose(T.synthetic_loss(z, y, q, 0.0), F.cross_entropy(z, y))  # sl = 0 is CE
    assert T.synthetic_loss(z, y, q, 1.0) == T.synthetic_loss(z, y.flip(0), q, 1.0)  # sl = 1 ignores labels
    for s in (0.0, 0.1, 0.5):
        assert torch.allclose(T.smoothed_cross_entropy(z, y, s), F.cross_entropy(z, y, label_smoothing=s))
    assert torch.allclose(T.soft_cross_entropy(z, q, 3.0), F.cross_entropy(z, (q / 3).softmax(1)))
    assert not torch.allclose(T.soft_cross_entropy(z, q, 3.0), F.cross_entropy(z / 3, (q / 3).softmax(1)))  # the pupil has no temperature


def test_soft_labels_need_a_teacher():
    with pytest.raises(SettingError, match=r"tuning.soft = 0.5.*teacher"):
        T.synthetic_loss(Z, torch.tensor([1]), None, 0.5)
    assert T.synthetic_loss(Z, torch.tensor([1]), None, 0.0) > 0


# the rate


@pytest.mark.parametrize("seed", range(20))
def test_the_rate_ends_at_0_on_the_last_step_whatever_the_batches(seed):
    r = rng(seed, "test.rate")
    n_real, n_syn, epochs, warmup = int(r.integers(1, 200)), int(r.choice([0, r.integers(1, 3000)])), int(r.integers(1, 9)), int(r.choice([0, 3]))
    cfg = T.TuningConfig(epochs=epochs, batch_real=int(r.integers(1, 64)), batch_syn=int(r.integers(1, 600)), warmup=warmup)
    try:
        n = T.planned(cfg, n_real, n_syn)
    except SettingError:
        assert warmup == 3 and T.planned(with_(cfg, warmup=0), n_real, n_syn) < 5
        return
    lead, batch = (n_syn, cfg.batch_syn) if n_syn else (n_real, cfg.batch_real)
    assert n == max(2, epochs * math.ceil(lead / min(lead, batch)))
    rates = [T.rate_at(i, n, 0.3, warmup) for i in range(n)]
    assert rates[-1] == 0.0 and max(rates) == 0.3 == rates[warmup] and all(x > 0 for x in rates[:-1])
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)


def with_(cfg, **settings):
    return T.TuningConfig(**{**vars(cfg), **settings})


def labelled(n, d=8, seed=0, classes=10) -> T.Labelled:
    x = F.normalize(torch.from_numpy(rng(seed, "test.x", n).normal(size=(n, d)).astype(np.float32)))
    return T.Labelled(x, torch.arange(n) % classes, x @ x.T[:, :1].expand(-1, classes))


def linear(d=8, classes=10) -> nn.Linear:
    net = nn.Linear(d, classes)
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(rng(0, "test.w").normal(size=(classes, d))))
        net.bias.zero_()
    return net


@pytest.mark.parametrize("real, syn", [(labelled(30), None), (None, labelled(50)), (labelled(10), labelled(70))], ids=["real", "synthetic", "both"])
def test_the_steps_taken_are_the_steps_counted(monkeypatch, real, syn):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (seen.append(self.param_groups[0]["lr"]), step(self, *a))[1])
    cfg = T.TuningConfig(epochs=3, batch_real=7, batch_syn=16, looks=4)
    n = T.planned(cfg, len(real.labels) if real else 0, len(syn.labels) if syn else 0)
    trail = T.tune(linear(), T.Feed(real, syn, cfg, 0), n, lambda net: 0.5)
    assert len(seen) == n and seen[-1] == 0.0 and seen == [T.rate_at(i, n, cfg.lr) for i in range(n)]
    assert [r["step"] for r in trail.rows] == sorted(T.looks_at(n, 4)) and trail.rows[-1]["step"] == n


def test_warmup_longer_than_the_training():
    with pytest.raises(SettingError, match="warmup = 500.*has 48 steps"):
        T.planned(T.TuningConfig(epochs=3, warmup=500), 10, 8000)


# batches and what moves


def test_each_step_has_both_in_their_own_batch_sizes():
    real, syn = labelled(10), labelled(1001)
    feed = T.Feed(real, syn, T.TuningConfig(batch_real=4, batch_syn=512), 0)
    got = [(feed.batch("real", i), feed.batch("syn", i)) for i in range(10)]
    assert {(len(r.labels), len(s.labels)) for r, s in got} == {(4, 512)}
    used = np.bincount(torch.cat([r.labels for r, _ in got]).numpy(), minlength=10)
    assert (used == 4).all()  # ten real images, cycled evenly
    big = T.Feed(real, None, T.TuningConfig(batch_real=32), 0)
    assert sorted(big.batch("real", 3).labels.tolist()) == list(range(10))  # a batch is never larger than its set
    with pytest.raises(SettingError, match="nothing to train on"):
        T.Feed(None, None, T.TuningConfig(), 0)


def test_loss_weights():
    net, real, syn = linear(), labelled(10), labelled(40)
    loss = lambda r, s, **k: T.Feed(r, s, T.TuningConfig(batch_real=5, batch_syn=20, **k), 0).loss(net, 3)
    a, b = loss(real, None), loss(None, syn)
    assert torch.allclose(loss(real, syn, weight_real=2.0, weight_syn=0.5), 2 * a + 0.5 * b)
    assert torch.allclose(loss(real, syn, weight_syn=0.0), a) and torch.allclose(loss(real, syn, soft=0.0), a + loss(None, syn, soft=0.0))


def test_gradients_are_clipped(monkeypatch):
    norms = []
    clip = nn.utils.clip_grad_norm_

    def watched(params, most):
        params = list(params)
        clip(params, most)
        norms.append(torch.stack([p.grad.norm() for p in params]).norm().item())

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)
    net = linear()
    feed = T.Feed(labelled(30), None, T.TuningConfig(weight_real=100.0), 0)
    T.tuning_step(net, T.new_adamw(net, feed.cfg), feed, 0, 5)
    assert len(norms) == 1 and norms[0] <= 1.0 + 1e-4


class WithNorms(nn.Module):
    """An image-text model whose image tower has a batch norm."""

    def __init__(self):
        super().__init__()
        self.vision_model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8))
        self.text_model = nn.Linear(4, 8)

    def get_image_features(self, pixel_values):
        return self.vision_model(pixel_values)


def test_full_tuning_moves_the_image_tower_and_leaves_batch_norms_in_eval():
    torch.manual_seed(0)
    own = SimpleNamespace(model=WithNorms(), batch=4, pixels=lambda x: x.float() / 255)
    x = torch.from_numpy(rng(0, "test.t").integers(0, 256, (20, 3, 2, 2), dtype=np.uint8))
    tower = T.Tower(own, linear())
    norm = tower.model.vision_model[2]
    was, stats = T.moved(tower), norm.running_mean.clone()
    before = T.logits_of(tower, x)
    assert torch.allclose(tower.train()(x[:3]), before[:3], atol=1e-5)  # a batch norm in training mode would use the batch
    cfg = T.TuningConfig(steps=5, batch_real=5, looks=1)
    T.tune(tower, T.Feed(T.Labelled(x, torch.arange(20) % 10), None, cfg, 0), 5, lambda n: 0.0)
    now = T.moved(tower)
    assert torch.equal(norm.running_mean, stats) and not norm.training and set(now) == set(was)
    assert {k for k in now if not torch.equal(now[k], was[k])} >= {"head.weight", "model.vision_model.1.weight", "model.vision_model.2.weight"}
    assert all(torch.equal(a, b) for a, b in zip(tower.model.text_model.parameters(), own.model.text_model.parameters()))
    with pytest.raises(SettingError, match="no part called vision"):
        T.Tower(odd(), linear())


def odd():
    """A model without an image tower."""
    net = nn.ModuleDict(dict(a=nn.Linear(2, 2)))
    net.config = SimpleNamespace(model_type="odd")
    return SimpleNamespace(model=net, batch=1)


def test_a_killed_full_training_goes_on_to_the_same_bits(judge, noise, tmp_path):
    data = T.Labelled(noise[:20], torch.arange(20) % 10)
    feed = T.Feed(data, None, T.TuningConfig(batch_real=8, looks=4), 0)
    score = lambda net: float(T.logits_of(net, noise[:4])[0, 0])
    fresh = lambda: T.Tower(judge, T.zero_shot_head(judge))
    whole = fresh()
    trail = T.tune(whole, feed, 8, score)

    def stop(it, total, start, desc):
        for i in it:
            if i == 5:
                raise KeyboardInterrupt
            yield i

    with pytest.raises(KeyboardInterrupt):
        T.tune(fresh(), feed, 8, score, Checkpoints(tmp_path), stop)
    again = fresh()
    after = T.tune(again, feed, 8, score, Checkpoints(tmp_path))
    assert after.rows == trail.rows and all(torch.equal(a, b) for a, b in zip(T.moved(whole).values(), T.moved(again).values()))
    assert all(torch.equal(trail.kept[k][n], after.kept[k][n]) for k in ("best", "last") for n in trail.kept[k])


# heads


def test_zero_shot_head_is_the_model(judge, clip, noise):
    head = T.zero_shot_head(judge)
    assert torch.allclose(head(judge.features(noise)).softmax(1), judge.probs(noise), atol=1e-6) and not head.bias.any()
    assert torch.allclose(head.weight.norm(dim=1), torch.full((10,), judge.scale), rtol=1e-5)
    both = ImageText(clip, NAMES, ["a photo of {a}", "{class}"], batch=16)
    one = [F.normalize(both.encode(t), dim=1).mean(0) for t in both.texts]
    want = torch.stack([v / v.norm() for v in one]) * both.scale  # mean of unit vectors, renormalised, times exp(logit_scale)
    assert torch.allclose(T.zero_shot_head(both).weight, want, atol=1e-5)


def test_wise_does_something():
    zero, tuned = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([4.0, 1.0])}
    assert [T.wise(zero, tuned, a)["w"].tolist() for a in (0.0, 0.25, 1.0)] == [[0.0, 2.0], [1.0, 1.75], [4.0, 1.0]]
    net, data = linear(), labelled(40)
    start = T.moved(net)
    trail = T.tune(net, T.Feed(data, None, T.TuningConfig(lr=0.3, batch_real=40, looks=1), 0), 30, lambda n: 0.0)
    right = lambda n: T.accuracy(T.logits_of(n, data.inputs), data.labels)
    curve = T.wise_curve(linear(), start, trail.kept["last"], [0.0, 0.5, 1.0], right)
    assert curve[0][1] == right(linear()) and curve[-1][1] == right(net) > curve[0][1]


def test_tip_adapter_by_hand():
    zero, cos, values = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.5, -1.0]]), torch.eye(2)[[0, 1, 1]]
    want = [1 + 2.0, 2 * (math.exp(-1.5) + math.exp(-6))]
    assert torch.allclose(T.tip_logits(zero, cos, values, 2.0, 3.0), torch.tensor([want]))
    chosen = lambda labels: T.choose_tip(torch.zeros(4, 2), torch.eye(4)[:, :2], torch.eye(2), torch.tensor(labels), [0.0, 1.0, 2.0], [1.0, 2.0])
    assert chosen([0, 1, 0, 0]) == (1.0, 1.0, 1.0) and chosen([0, 0, 0, 0]) == (0.0, 1.0, 1.0)  # of equals the first: the least memory


# features


def test_the_cache_serves_no_other_model_transform_or_set(judge, noise, tmp_path):
    random_image_text(tmp_path / "other", [*NAMES, "a photo of an"], 16, seed=1)
    other, half = ImageText(tmp_path / "other", NAMES, batch=16), copy.copy(judge)
    half.processor = copy.deepcopy(judge.processor)
    half.processor.image_mean = [0.4] * 3
    kinds = [(judge, None), (judge, 8), (judge, 12), (other, None), (half, None)]
    caches = [T.FeatureCache(tmp_path / "f", *k) for k in kinds]
    assert len({c.folder for c in caches}) == len(kinds)
    got = [c(noise[:20]) for c in caches]
    for (j, first), x in zip(kinds, got):
        assert torch.allclose(x, j.features(T.first_resize(noise[:20], first)), atol=1e-6)
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(got) for b in got[:i])
    again = T.FeatureCache(tmp_path / "f", judge)
    assert torch.equal(again(noise[:20].flip(0)), got[0].flip(0)) and again.made == 0
    assert torch.allclose(again(noise[20:40]), judge.features(noise[20:40]), atol=1e-6) and again.made == 20  # another set, the same size
    assert again(noise[:0]).shape == (0, 32)


def test_a_set_that_grows_costs_its_new_images(judge, noise, tmp_path, monkeypatch):
    T.FeatureCache(tmp_path, judge)(noise[:30])
    seen = []
    features = judge.features
    monkeypatch.setattr(judge, "features", lambda x: (seen.append(len(x)), features(x))[1])
    T.FeatureCache(tmp_path, judge)(torch.cat([noise[:35], noise[:35]]))
    assert sum(seen) == 5


def test_files_that_are_foreign_damaged_or_half_written(judge, noise, tmp_path, capsys):
    mine, theirs = (T.FeatureCache(tmp_path, judge, first) for first in (None, 8))
    x = mine(noise[:10])
    theirs.folder.mkdir()
    foreign = Path(shutil.copy(next(mine.folder.glob("*.safetensors")), theirs.folder))
    with pytest.raises(SettingError, match=f"{foreign.name} holds features made with other first_resize"):
        theirs(noise[:10])
    path = next(mine.folder.glob("*.safetensors"))
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    (mine.folder / ".tmp-1-x.safetensors").write_bytes(raw[:100])
    again = T.FeatureCache(tmp_path, judge)
    assert torch.equal(again(noise[:10]), x) and again.made == 10 and "made again" in capsys.readouterr().err


def test_killed_in_the_middle_it_goes_on(judge, noise, tmp_path, monkeypatch):
    whole = T.FeatureCache(tmp_path / "a", judge, blocks=1)(noise)
    features, calls = judge.features, []

    def dies(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return features(x)

    monkeypatch.setattr(judge, "features", dies)
    with pytest.raises(KeyboardInterrupt):
        T.FeatureCache(tmp_path / "b", judge, blocks=1)(noise)
    again = T.FeatureCache(tmp_path / "b", judge, blocks=1)
    assert torch.equal(again(noise), whole) and again.made == len(noise) - 32


def test_first_resize():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    x = torch.from_numpy(rng(0, "test.r").integers(0, 256, (2, 3, 30, 40), dtype=np.uint8))
    small = T.first_resize(x, 15)
    assert small.shape == (2, 3, 15, 20) and small.dtype == torch.uint8
    assert (small.int() - resize(x, 15, InterpolationMode.BICUBIC, antialias=True).int()).abs().max() <= 1
    assert T.first_resize(x, None) is x and T.first_resize(x, 30) is x


# test sets


def test_missing_classes_are_masked():
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 2.0]])
    exam = T.Exam(logits, logits, torch.tensor([2, 1]), [1, 2])
    assert exam.accuracy(logits) == 1.0 and T.Exam(logits, logits, torch.tensor([2, 1])).accuracy(logits) == 0.0
    assert T.numbers_in(["7", "2"], NAMES, "x").tolist() == [7, 2]
    with pytest.raises(DataError, match="faces: class 'eye' is none of the 10 classes"):
        T.numbers_in(["1", "eye"], NAMES, "faces")


def test_supports_are_nested_and_addressed(base_run):
    train = load_split(base_run / "splits", "train")
    sets = {(k, s): {*T.supports_at(train, k, s).tolist()} for k in (1, 2, 4, 8, 16) for s in (0, 1)}
    assert all(sets[k, s] < sets[2 * k, s] and len(sets[k, s]) == 10 * k for k in (1, 2, 4, 8) for s in (0, 1)) and sets[4, 0] != sets[4, 1]
    with pytest.raises(SettingError, match=r"tuning.shots = 21: class \S+ has only 20 training images; at most 20"):
        T.supports_at(train, 21, 0)
    with pytest.raises(DataError, match="no images of class 3, so no real supports"):
        T.supports_at(train.only([c for c in range(10) if c != 3]), 1, 0)


# settings


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(methods=["tip-adapter"]), "did you mean 'Tip-Adapter'"),
        (dict(methods=["real", "real"]), "said twice"),
        (dict(shots=[0, 40]), "tuning.shots.*at most 30"),
        (dict(seeds=[1, 1]), "tuning.seeds"),
        (dict(warmup=599), "tuning.warmup.*at most 598"),
        (dict(hard=True, soft=0.0), "tuning.hard"),
        (dict(templates=["a photo"]), "names no class"),
        (dict(template_set="eurosats"), "did you mean 'eurosat'"),
        (dict(methods=["synthetic"], shots=[1, 2]), "none of them has a place"),
        (dict(freeze=False, precision="fp16"), "tuning.precision"),
        (dict(freeze=False, published=True), "tuning.published"),
        (dict(also=dict(more="nowhere")), "tuning.also.*more: there is no nowhere"),
        (dict(weight_real=0.0, weight_syn=0.0), "nothing would be learned"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(SettingError, match=text):
        resolve(T.TuningConfig, settings).check(dict(smallest=30))


def test_published_recipes_stand_by_name():
    zsl, fsl = (resolve(T.TuningConfig, T.TUNING_PRESETS[f"published_{k}"]) for k in ("zsl", "fsl"))
    for c in (zsl, fsl):
        assert (c.freeze, c.soft, c.temperature, c.epochs, c.weight_decay, c.batch_syn, c.warmup) == (True, 0.5, 2.0, 30, 0.1, 512, 0)
        assert (c.beta1, c.beta2, c.eps, c.clip, c.hard, c.smoothing) == (0.9, 0.999, 1e-8, 1.0, False, 0.0)
    assert zsl.lr == 2e-3 and (fsl.lr, fsl.batch_real, fsl.weight_real, fsl.weight_syn) == (1e-3, 32, 1.0, 1.0)
    assert T.planned(zsl, 0, 8000) == 30 * 16


def test_the_chain_knows_the_stage():
    stages = dict(splits={}, tiny={}, gan=dict(seed=[0, 1]), classifier={}, generate={}, tuning=dict(shots=[0, 4]), report={})
    nodes = plan(dict(preset="tiny", stages=stages))
    node = next(n for n in nodes if n.stage == "tuning")
    assert {k: len(v) for k, v in node.reads.items()} == dict(splits=1, pipeline=1, set=2)
    preflight(nodes)
    with pytest.raises(SettingError, match="tuning.shots.*at most"):
        preflight(plan(dict(preset="tiny", stages=stages | dict(tuning=dict(shots=[500])))))


# the stage


def files(stage) -> dict:
    return load_json(stage.dir / "manifest.json")["artefacts"]


@pytest.fixture(scope="module")
def whole(base_run, clip, tmp_path_factory):
    copied = shutil.copytree(base_run, tmp_path_factory.mktemp("whole") / "run")
    stage = opened(copied, clip)
    return stage, T.run_tuning(stage)


def test_the_stage(whole, clip):
    stage, result = whole
    rows = load_table(stage.dir / "scores.parquet").to_pylist()
    assert len(rows) == 1 + 2 + 2 * 2 * 3 and {r["label"] for r in rows} == {
        "zero-shot",
        "synthetic (generate)",
        "real",
        "real+synthetic (generate)",
        "Tip-Adapter",
    }
    test, val = read_part(stage.input("splits"), "test"), load_split(stage.input("splits"), "val")
    probs = ImageText(clip, test.classes, batch=32).probs
    assert math.isclose(rows[0]["test"], T.accuracy(probs(test.images), test.labels), abs_tol=1e-6)
    for r in rows:
        looks = load_meta(T.job_path(stage.dir, T.Job(r["method"], r["source"], r["shots"], r["seed"]))).get("looks")
        assert (r["n_real"], r["n_syn"]) == (10 * r["shots"], 60 * bool(r["source"]))
        if looks:
            assert r["val"] == max(x["val"] for x in looks) and r["val_last"] == looks[-1]["val"] and looks[-1]["step"] == 6 == r["steps"]
    kept = T.load_tuned(stage.dir)
    assert math.isclose(T.accuracy(kept.probs(val.images), val.labels), max(r["val"] for r in rows if r["step"]), abs_tol=1e-6)
    why = [o["why"] for o in openings(result["test_digest"])]
    assert sum(w.startswith("classifier tuning") for w in why) >= 1 and result["seen_train"] == ["generate"]
    line = {(r["label"], r["shots"]): r for r in result["rows"]}
    own = {(r["label"], r["shots"], r["seed"]): r["test"] for r in rows}
    gain = [own["real+synthetic (generate)", 2, s] - own["real", 2, s] for s in (0, 1)]
    assert math.isclose(line["real+synthetic (generate)", 2]["gain"], np.mean(gain), abs_tol=1e-12)
    assert all(r["test_best"] >= max(r["test"], r["test_last"]) for r in rows if r["step"]) and not (stage.dir / "checkpoints").exists()
    wise = load_table(stage.dir / "wise.parquet").to_pylist()
    assert len(wise) == 10 * 11 and all(math.isclose(w["test"], rows[0]["test"], abs_tol=1e-9) for w in wise if w["alpha"] == 0)


@pytest.mark.parametrize("stop", [3, 20, 58])
def test_a_killed_stage_goes_on_to_the_same_bits_and_repeats_nothing(whole, base_run, clip, tmp_path, monkeypatch, stop):
    copied, steps, step = shutil.copytree(base_run, tmp_path / "run"), dict(done=0), T.tuning_step

    def counted(*a):
        steps["done"] += 1
        if steps["done"] == stop:
            raise KeyboardInterrupt
        return step(*a)

    monkeypatch.setattr(T, "tuning_step", counted)
    before = len(openings(whole[1]["test_digest"]))
    with pytest.raises(KeyboardInterrupt):
        T.run_tuning(opened(copied, clip))
    assert len(openings(whole[1]["test_digest"])) == before  # nobody has looked at test
    stop, steps["done"], stage = -1, 0, opened(copied, clip)
    done = sum("looks" in load_meta(p) for p in (stage.dir / "tuned").glob("*.safetensors"))
    T.run_tuning(stage)
    assert files(stage) == files(whole[0]) and steps["done"] == (10 - done) * 6
    steps["done"] = 0
    T.run_tuning(opened(copied, clip))
    assert steps["done"] == 0 and len(openings(whole[1]["test_digest"])) == before  # the same work is the same look


def test_nothing_is_chosen_without_val(run, clip):
    settings = dict(choose_on="nothing", alpha=0.3, tip_alpha=2.0, tip_beta=3.0, seeds=[0], shots=[0, 1])
    stage = opened(run, clip, **settings)
    T.run_tuning(stage)
    for r in load_table(stage.dir / "scores.parquet").to_pylist():
        if r["step"]:
            assert (
                r["step"] == r["steps"]
                and r["val"] == r["val_last"]
                and r["test"] == r["test_last"]
                and r["alpha"] == 0.3
                and r["test_wise"] is not None
            )
        if r["method"] == "Tip-Adapter":
            assert (r["tip_alpha"], r["tip_beta"]) == (2.0, 3.0)


def test_full_tuning_in_the_stage(run, clip):
    stage = opened(
        run, clip, freeze=False, published=False, steps=2, looks=1, seeds=[0], shots=[1], methods=["real", "Tip-Adapter"], alphas=[0.0, 1.0], lr=1e-3
    )
    result = T.run_tuning(stage)
    names = load_tensors(stage.dir / "tuned.safetensors")[0]
    assert any(n.startswith("model.vision_model") for n in names) and not any("text_model" in n for n in names)
    val, kept = load_split(stage.input("splits"), "val"), T.load_tuned(stage.dir)
    assert math.isclose(T.accuracy(kept.probs(val.images), val.labels), result["rows"][0]["val"], abs_tol=1e-6)
    assert not (stage.dir / "checkpoints" / "real-shots1-seed0").exists()


def test_further_test_sets_are_masked_and_each_opening_is_counted(run, clip, tmp_path):
    few = read_part(run / "splits", "test").only([2, 7])
    few = T.Split("few/test", few.images, (few.labels == 7).long(), ["2", "7"], digest(few.images, "own"), "")
    save_split(tmp_path / "few", "test", few)
    other = tmp_path / "own"
    for c in few.classes:
        (other / c).mkdir(parents=True)
    for i, (x, y) in enumerate(zip(few.images[:20], few.labels)):
        Image.fromarray(x[0].numpy()).save(other / few.classes[int(y)] / f"{i}.png")
    stage = opened(run, clip, also=dict(few=str(tmp_path / "few"), folder=str(other)), seeds=[0], shots=[0], methods=["zero-shot"])
    before = len(openings(few.digest))
    result = T.run_tuning(stage)
    assert [o["why"] for o in openings(few.digest)][before:] == ["further test set few"]
    row = load_table(stage.dir / "scores.parquet").to_pylist()[0]
    probs = ImageText(clip, NAMES, batch=32).probs(few.images)[:, [2, 7]]
    assert math.isclose(row["also few"], T.accuracy(probs, few.labels), abs_tol=1e-6) and 0 <= row["also folder"] <= 1
    assert result["n_test"]["few"] == len(few) and result["n_test"]["folder"] == 20


def test_another_cut_of_the_same_data_is_no_further_test_set(run, clip, tmp_path):
    (tmp_path / "other").mkdir()
    run_machine(tmp_path / "other", "cpu")
    small_stage(tmp_path / "other", "splits", per_class=20, seed=1)
    other = read_part(tmp_path / "other" / "splits", "test")
    assert "tuning.also: more is another cut of digits" in refused(run, clip, also=dict(more=str(tmp_path / "other" / "splits")))
    assert not openings(other.digest)  # not even opened
    train = load_split(run / "splits", "train")
    save_split(tmp_path / "mine", "test", T.Split("mine/test", train.images, train.labels, train.classes, train.digest, ""))
    assert "more is among what was trained on" in refused(run, clip, also=dict(more=str(tmp_path / "mine")))


def test_a_guided_source_has_a_set_for_each_training():
    cfg = resolve(T.TuningConfig, dict(guided=dict(rg="set-{shots}-{seed}"), shots=[0, 1, 4], seeds=[0, 1]))
    sets = ["plain", "set-1-0", "set-1-1", "set-4-0", "set-4-1"]
    jobs = T.jobs_of(cfg, sets)
    assert {(j.method, j.source) for j in jobs if j.source} == {("synthetic", "plain"), ("real+synthetic", "plain"), ("real+synthetic", "rg")}
    assert {T.folder_of(cfg, *j[1:]) for j in jobs if j.source == "rg"} == set(sets[1:])  # and none of these is a source of its own
    T.check_guided(cfg, sets)
    assert not [j for j in T.jobs_of(cfg, sets[:3]) if j.shots == 4 and j.source == "rg"]  # no line where no seed has a set
    with pytest.raises(SettingError, match="rg has no set 'set-4-1', for 4 shots of seed 1"):
        T.check_guided(cfg, sets[:-1])


def refused(run, clip, **settings) -> str:
    with pytest.raises((SettingError, DataError)) as e:
        T.run_tuning(opened(run, clip, **settings))
    return str(e.value)


def test_what_the_stage_refuses(run, clip, tmp_path):
    assert "tuning.model is empty" in refused(run, "")
    assert "tuning.shots" in refused(run, clip, shots=[0, 21]) and "at most 20" in refused(run, clip, shots=[0, 21])
    assert "no 'generates' among the sets" in refused(run, clip, sources=["generates"]) and "did you mean 'generate'" in refused(
        run, clip, sources=["generates"]
    )
    assert "no set of this run is named like 'rg-shots{shots}'" in refused(run, clip, guided=dict(rg="rg-shots{shots}"))
    assert "say where {shots} (and {seed}) stand" in refused(run, clip, guided=dict(rg="generate"))
    big = shutil.copytree(clip, tmp_path / "big")
    processor = json.loads((big / "preprocessor_config.json").read_text())
    processor.update(size={"shortest_edge": 24}, crop_size=dict(height=24, width=24))
    (big / "preprocessor_config.json").write_text(json.dumps(processor))
    assert "makes 24×24 pixels, but the model takes 16×16" in refused(run, big)
    seen = shutil.copytree(clip, tmp_path / "seen" / "clip")
    save_json(seen.parent / "synthlit.json", dict(saw=[load_split(run / "splits", "val").digest]))
    assert "the model was trained on the val images" in refused(run, seen)
    shutil.rmtree(run / "generate")
    assert "all need synthetic images" in refused(run, clip, methods=["synthetic"])


def test_sets_that_do_not_fit(run, clip, monkeypatch):
    train = load_split(run / "splits", "train")
    part = train.only(range(9))
    monkeypatch.setattr(T, "load_set", lambda f: (part.images, part.labels, train.classes))
    assert "generate has no images of 1 classes, such as 9" in refused(run, clip)
    monkeypatch.setattr(T, "load_set", lambda f: (part.images, part.labels, [*train.classes[:8], "cat", "9"]))
    assert "class 'cat' is none of the 10 classes" in refused(run, clip)
    shuffled = [*train.classes[::-1]]
    monkeypatch.setattr(T, "load_set", lambda f: (train.images, 9 - train.labels, shuffled))  # another order, by name
    stage = opened(run, clip)
    images, labels = T.sets_of(stage, train)[0]["generate"]()
    assert torch.equal(labels, train.labels)


def test_a_set_that_saw_val_is_refused(run, clip):
    path = run / "imported" / "manifest.json"
    m = load_json(path)
    save_json(path, m | dict(saw=[*m["saw"], load_split(run / "splits", "val").digest]))
    assert "generate was trained on the val images" in refused(run, clip)


def test_the_product_belongs_to_its_model(whole, run, clip, tmp_path):
    stage = whole[0]
    other = random_image_text(tmp_path / "other", [*NAMES, "a photo of an"], 16, seed=3)
    with pytest.raises(SettingError, match="another model"):
        T.load_tuned(stage.dir, str(other))
    x = load_split(stage.input("splits"), "val").images[:5]
    elsewhere = shutil.copytree(clip, tmp_path / "elsewhere")
    assert torch.equal(T.load_tuned(stage.dir, str(elsewhere)).probs(x), T.load_tuned(stage.dir).probs(x))


def test_templates_of_a_set_and_of_the_pipeline():
    cfg = T.TuningConfig(template_set="eurosat", names=dict(Forest="the woods"))
    templates, names = T.texts_for(cfg, dict(templates=["a {}"]))
    assert templates == ["a centered satellite photo of {class}."] and names["Forest"] == "the woods" and names["River"] == "a river"
    assert T.texts_for(T.TuningConfig(), dict(templates=["a {}"])) == (["a {class}"], {})
    assert T.texts_for(T.TuningConfig(), {}) == (["a photo of {a}."], {}) and T.texts_for(T.TuningConfig(templates=["{a}"]), {})[0] == ["{a}"]
