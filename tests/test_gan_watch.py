"""What is watched while a GAN trains: measures against val, the rule of collapse, pictures and the film."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from synthlit.classifier import CPU, Classifier, ClassifierConfig, new_net
from synthlit.core import History, SettingError, global_rng, randn, rng
from synthlit.fewshot import NovelWatch
from synthlit.gan import watch as module
from synthlit.gan.watch import Watch, animate, collapsed, evenly, picture, save_picture, score_accuracy, spreads, tiles, variety
from synthlit.generator import Generator, fit_floor
from synthlit.metrics import frechet_distance, inception_score, kid, prdc
from synthlit.splits import SplitsConfig, cut_data, load_data

LABELS = list(range(10))
MEASURES = {"frechet", "kid", "agreement", "coverage", "variety"}


class Knows(Generator):
    """Replays k images per class (0: all)."""

    def __init__(self, split, k=0):
        self.classes, self.shape, self.trained, self.images = split.classes, tuple(split.images.shape[1:]), LABELS, split.images
        self.rows = {c: torch.nonzero(split.labels == c)[:, 0][: k or None] for c in LABELS}

    def sample(self, labels, index, *, seed=0, **dials):
        rows = [self.rows[int(c)] for c in labels]
        return self.images[torch.stack([r[int(i) % len(r)] for r, i in zip(rows, index)])]


@pytest.fixture(scope="module")
def parts():
    return cut_data(load_data(SplitsConfig()), SplitsConfig())


@pytest.fixture(scope="module")
def classifier(parts):
    """An untrained network: its features are a space like any other, and cost nothing."""
    train = parts["train"]
    return Classifier(new_net(ClassifierConfig(), 1, 10), train.classes, train.images.shape[1:], ClassifierConfig(), CPU)


@pytest.fixture(scope="module")
def watch(parts, classifier):
    return Watch(parts["val"], classifier, LABELS, 30)


@pytest.fixture(scope="module")
def floor(parts):
    return fit_floor(parts["train"].images, parts["train"].labels, parts["train"].classes)


def test_collapsed_real_and_copied(parts, watch):
    one, real, copy = [watch(g) for g in (Knows(parts["train"], 1), Knows(parts["train"]), Knows(parts["val"]))]
    assert set(one) == MEASURES and all(type(v) is float for v in one.values())
    assert one["variety"] < 1e-6 and 0.6 < real["variety"] < 1.2 and 0.8 < copy["variety"] < 1.2
    assert one["coverage"] < 0.2 < 0.6 < real["coverage"] < copy["coverage"]
    assert copy["frechet"] < real["frechet"] < one["frechet"] and copy["kid"] < one["kid"]


@pytest.mark.parametrize("labels,n", [(LABELS, 30), ([2, 3, 7], 11)])
def test_measures_are_those_of_their_definitions(parts, classifier, floor, labels, n):
    seen = Watch(parts["val"], classifier, labels, n, seed=3)(floor)
    y = torch.tensor(labels).repeat_interleave(n)
    x = floor.sample(y, torch.arange(n).repeat(len(labels)), seed=3)
    real, fake = classifier.features(parts["val"].only(labels).images), classifier.features(x)
    assert seen["frechet"] == frechet_distance(real, fake)
    assert seen["agreement"] == (classifier.logits(x).argmax(1) == y).float().mean().item()
    assert seen["coverage"] == prdc(real, fake)["coverage"] and seen["kid"] == kid(real, fake)
    ys, ratio = parts["val"].only(labels).labels, []
    for c in labels:
        a, b = fake[y == c].double().numpy(), real[ys == c].double().numpy()
        ratio.append(math.sqrt(((a - a.mean(0)) ** 2).sum() / (len(a) - 1)) / math.sqrt(((b - b.mean(0)) ** 2).sum() / (len(b) - 1)))
    assert seen["variety"] == pytest.approx(min(ratio), rel=1e-9)


def test_the_same_generator_has_the_same_measures(parts, classifier, watch, floor):
    assert watch(floor) == watch(floor) == Watch(parts["val"], classifier, LABELS, 30)(floor)


def test_large_sets_are_thinned_evenly(parts, classifier, floor, monkeypatch):
    y = torch.tensor([0] * 50 + [1] * 3 + [2] * 40)
    some = evenly(y, 23, 0)
    assert torch.bincount(y[some]).tolist() == [10, 3, 10] and (some.diff() > 0).all()
    assert torch.equal(evenly(y, 93, 0), torch.arange(93)) and torch.equal(some, evenly(y, 23, 0)) and not torch.equal(some, evenly(y, 23, 1))
    assert set(evenly(y, 9, 0).tolist()) < set(some.tolist())
    monkeypatch.setattr(module, "MOST", 120), monkeypatch.setattr(module, "COVER", 50)
    w = Watch(parts["val"], classifier, LABELS, 30)
    assert len(w.real) == 120 and len(w.cover) == len(w.radius) == 50 and set(w(floor)) == MEASURES


def test_small_sets(parts, classifier, floor):
    val = parts["val"]
    few = val.take(torch.tensor([torch.nonzero(val.labels == c)[0, 0] for c in LABELS[:3]]))
    seen = Watch(few, classifier, LABELS[:3], 2)(floor)  # one image a class: no spread to compare with
    assert set(seen) == MEASURES - {"variety"} and np.isfinite(list(seen.values())).all()
    with pytest.raises(SettingError, match="at least 2"):
        Watch(few, classifier, [9], 2)
    with pytest.raises(SettingError, match="inception score needs at least 100"):
        Watch(val, classifier, LABELS, 9, weights="w.safetensors")


def test_variety_is_that_of_the_worst_class():
    r = torch.from_numpy(rng(0, "test.variety").standard_normal((600, 8)))
    y = torch.arange(3).repeat_interleave(200)
    fake = r * torch.tensor([1.0, 0.25, 2.0])[y][:, None]
    real = spreads(r, y, [0, 1, 2])
    assert variety(spreads(fake, y, [0, 1, 2]), real)["variety"] == pytest.approx(0.25)
    assert variety(spreads(fake, y, [0, 2]), spreads(r, y, [0, 2]))["variety"] == pytest.approx(1)
    assert np.isnan(spreads(r, y, [3])).all() and variety(np.array([0.5, np.nan]), np.array([np.nan, 1.0])) == {}
    assert variety(np.array([0.5, 1.0]), np.array([0.0, 2.0])) == dict(variety=0.5)  # a class whose real images are all alike says nothing


# ---- the rule of collapse


def test_collapsed_needs_two_watched_rows(tmp_path):
    rows = lambda *v: [dict(step=100 * (i + 1), variety=x) for i, x in enumerate(v)]
    assert collapsed(rows(0.9, 0.1, 0.05), 0.2) and not collapsed(rows(0.1, 0.1, 0.3), 0.2) and not collapsed(rows(0.1, 0.3, 0.1), 0.2)
    assert not collapsed(rows(0.1), 0.2) and not collapsed([], 0.2) and not collapsed(rows(0.2, 0.2), 0.2)
    assert not collapsed(rows(0.0, 0.0), 0)  # 0 = never
    why = collapsed(rows(0.9, 0.1, 0.05), 0.2)
    assert "0.100 at step 200" in why and "0.050 at step 300" in why and "0.2" in why
    h = History(tmp_path / "history.parquet")
    for step in range(1, 9):
        h.log(step, loss_d=1.0)
        if step % 4 == 0:
            h.log(step, variety=0.01)
    h.save()
    read = History(tmp_path / "history.parquet").rows  # rows that were not watched hold None
    assert any("variety" in r and r["variety"] is None for r in read)
    assert collapsed(read, 0.2) == collapsed(h.rows, 0.2) != "" and not collapsed(read[:-1], 0.2)


# ---- the discriminator's accuracy


def test_score_accuracy_has_the_right_sign():
    real, fake = torch.tensor([3.0, 2.0, 1.0, -1.0]), torch.tensor([-3.0, -2.0, 2.5, -1.0])
    assert score_accuracy(real, fake, False) == (0.75, 0.75)
    assert score_accuracy(real + 100, fake + 100, False) == (1, 0)
    for shift in (0, 100, -100):  # the midpoint moves along: (1.25 - 0.875)/2 above the shift
        assert score_accuracy(real + shift, fake + shift, True) == (0.75, 0.75)
        assert score_accuracy(torch.full((5,), 1.0) + shift, torch.full((7,), -1.0) + shift, True) == (1, 1)
        assert score_accuracy(torch.full((5,), -1.0) + shift, torch.full((7,), 1.0) + shift, True) == (0, 0)
    assert score_accuracy(torch.zeros(4), torch.zeros(4), True) == (0, 0)  # a constant score is right about nothing


# ---- pictures


def test_pictures_are_the_same_bytes(parts, floor, tmp_path):
    val = parts["val"]
    image = picture(floor, val, LABELS)
    assert image.dtype == torch.uint8 and image.shape == (1, 2 * 50 + 8 + 4 * 50, 10 * 50)  # 8 pixels, six times enlarged, a line of 2
    assert torch.equal(image[:, :100], tiles(torch.cat([torch.stack([val.only([c]).images[i] for c in LABELS]) for i in range(2)]), 10))
    for name in ("a", "b"):
        save_picture(tmp_path / name, 500, picture(floor, val, LABELS))
        assert [p.name for p in (tmp_path / name).iterdir()] == ["step-000000500.png"]
    assert (tmp_path / "a/step-000000500.png").read_bytes() == (tmp_path / "b/step-000000500.png").read_bytes()
    with Image.open(tmp_path / "a/step-000000500.png") as im:
        assert np.array_equal(np.asarray(im), image[0].numpy())


def test_picture_shows_ten_classes_at_most_in_colour_too():
    class Colour(Generator):
        def sample(self, labels, index, *, seed=0, **dials):
            return torch.as_tensor(labels).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).byte()

    class Val:  # one image a class: the second row stays white
        images, labels = torch.arange(12).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).byte(), torch.arange(12)

    image = picture(Colour(), Val, list(range(2, 12)) + [0], rows=3)
    assert image.shape == (3, 5 * 34 + 8, 10 * 34)
    assert image[0, 5, 5::34].tolist() == list(range(2, 12)) == image[2, -5, 5::34].tolist() and (image[:, 34:76] == 255).all()
    assert picture(Colour(), Val, [4]).shape == (3, 6 * 34 + 8, 34)


def test_film_has_a_frame_for_each_step(parts, floor, tmp_path):
    val, folder = parts["val"], tmp_path / "pictures"
    with pytest.raises(FileNotFoundError, match="no pictures"):
        animate(folder, tmp_path / "film.png")
    steps = [1000, 500, 20000, 1500]
    for i, step in enumerate(steps):
        save_picture(folder, step, picture(floor if i else Knows(val), val, LABELS))  # the same picture thrice: still a frame each, by its step
    assert animate(folder, folder / "film.png") == 4 and animate(folder, tmp_path / "film.png") == 4  # the film is none of its own frames
    assert (folder / "film.png").read_bytes() == (tmp_path / "film.png").read_bytes()
    with Image.open(folder / "film.png") as film:
        assert film.n_frames == 4 and film.format == "PNG" and film.info["loop"] == 0
        shown = []
        for i, step in enumerate(sorted(steps)):
            film.seek(i)
            shown.append(np.asarray(film.convert("L")).copy())
            with Image.open(folder / f"step-{step:09d}.png") as still:
                assert np.array_equal(shown[-1][16:], np.asarray(still))
    assert all((shown[i][:16] != shown[j][:16]).any() for i in range(4) for j in range(i)) and film.info["duration"] == 2000
    save_picture(tmp_path / "alone", 5, picture(floor, val, LABELS))
    assert animate(tmp_path / "alone", tmp_path / "one.png") == 1


# ---- with Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights for pytorch-fid's FID Inception."""
    from unittest.mock import patch

    from pytorch_fid import inception as theirs
    from safetensors.torch import save_file

    with global_rng(0, "test.inception"):
        with patch.object(theirs, "load_state_dict_from_url", lambda *a, **k: None), patch("torch.nn.Module.load_state_dict", lambda *a, **k: None):
            state = theirs.fid_inception_v3().state_dict()
    for k, v in state.items():
        if k.endswith("conv.weight"):
            v.mul_(6**0.5)  # He's scale: with PyTorch's the signal dies away into denormal numbers, which are slow
    state["fc.weight"] = randn((1008, 2048), 0, "test.fc")
    path = tmp_path_factory.mktemp("inception") / "w.safetensors"
    save_file(state, path)
    return path


def test_fid_and_inception_score_where_there_are_weights(parts, classifier, floor, weights):
    val, some, passes = parts["val"].take(torch.arange(20)), [0, 1], []
    w = Watch(val, classifier, some, 50, str(weights))
    net, last = w.inception, randn((1008, 2048), 0, "test.fc")
    assert torch.equal(net.last, last) and w.of_inception.shape == (len(val.only(some)), 2048)
    net.last = last / w.of_inception[0].norm()
    w.inception = SimpleNamespace(both=lambda x: passes.append((x, *net.both(x))) or passes[0][1:])
    seen = w(floor)
    (x, features, probs), *more = passes
    assert set(seen) == MEASURES | {"fid", "is_mean"} and not more
    assert torch.equal(x, floor.sample(torch.tensor(some).repeat_interleave(50), torch.arange(50).repeat(2), seed=0))
    assert seen["fid"] == frechet_distance(w.of_inception, features) > 0 and features.shape == (100, 2048)
    assert torch.allclose(probs, (features @ net.last.T).softmax(1)) and probs.std(1).min() > 1e-4  # without the bias
    assert seen["is_mean"] == inception_score(probs)[0] >= 1 - 1e-9
    # fine-tuning watches novel classes by the same features
    few = NovelWatch(val, classifier, some, 50, parts["train"].only(some).take(torch.arange(10)), str(weights))
    few.inception = SimpleNamespace(both=lambda images: (features, probs) if torch.equal(images, x) else None)
    assert few(floor)["fid"] == seen["fid"] and few(floor)["is_mean"] == seen["is_mean"]
