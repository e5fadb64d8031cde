"""Utility: intervals beside their definitions, what a set is worth, transfer, and what is refused."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from synthlit.classifier import ClassifierConfig, Fixed, planned_steps, train_classifier
from synthlit.core import SettingError, digest, load_table, save_json, save_table
from synthlit.data import DataError
from synthlit.splits import Split
from synthlit.utility import (
    accuracy_by_size,
    audited,
    by_duplicates,
    by_seed,
    class_recall,
    curve_sizes,
    desk,
    high_pass,
    invert,
    load_predictions,
    lost_classes,
    low_pass,
    mean_draws,
    nested_order,
    paired_bootstrap,
    predictions,
    protocol,
    read_transfer,
    real_equivalent,
    save_predictions,
    seen_in_train,
    trained,
    transfer,
    transfer_table,
    wilson,
)

RECIPE = ClassifierConfig(width=4, batch=16, shift=0)


def answers(seeds=3, n=200, p=0.8, seed=0):
    return np.random.default_rng(seed).random((seeds, n)) < p


def a_split(n=60, classes=3, seed=0, name="made/val"):
    """Images whose brightness shows their class."""
    g = np.random.default_rng(seed)
    y = torch.arange(n) % classes
    x = torch.from_numpy((g.integers(0, 60, (n, 1, 8, 8)) + 80 * y.numpy()[:, None, None, None]).astype(np.uint8))
    return Split(name, x, y, [f"c{i}" for i in range(classes)], digest(x, y), "")


def test_bootstrap_over_images_equals_brute_force():
    a, b = answers(seed=1), answers(p=0.7, seed=2)
    fast = paired_bootstrap(a, b, "images", resamples=20000)
    rows = np.random.default_rng(3).integers(0, 200, (20000, 200))
    slow = np.quantile((a * 1.0 - b).mean(0)[rows].mean(1), [0.025, 0.975])
    assert np.allclose([fast["low"], fast["high"]], slow, atol=0.004)
    assert fast["mean"] == pytest.approx(a.mean() - b.mean())


def test_bootstrap_over_both_is_wider_and_addressed():
    a, b = answers(), answers(p=0.7, seed=2)
    b[0, :60] = False  # one seed is much worse
    both, images = paired_bootstrap(a, b), paired_bootstrap(a, b, "images")
    assert both["low"] < images["low"] < images["high"] < both["high"]
    assert both == paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)


def test_order_of_images_does_not_matter():
    a, b = answers(), answers(p=0.7, seed=2)
    order = np.random.default_rng(0).permutation(200)
    assert paired_bootstrap(a, b) == paired_bootstrap(a[:, order], b[:, order])


def test_equal_recipes_have_no_gap():
    a = answers()
    assert [paired_bootstrap(a, a)[k] for k in ("mean", "low", "high")] == [0, 0, 0]


@pytest.mark.parametrize(
    "a,b,kw,says",
    [
        (answers(1), answers(1), {}, "over = 'both': one seed"),
        (answers(2), answers(3), {}, "the same ones"),
        (answers(2), answers(2), dict(over="seeds"), "over = 'seeds'"),
        (answers(2) * 3, answers(2), {}, "a: expected"),
        (np.empty((2, 0)), np.empty((2, 0)), {}, "a: expected"),
        (answers(2), answers(2) + np.nan, {}, "b: expected"),
    ],
)
def test_bootstrap_refuses(a, b, kw, says):
    with pytest.raises(SettingError, match=says):
        paired_bootstrap(a, b, **kw)


def test_one_seed_is_bootstrapped_over_images_when_asked():
    r = paired_bootstrap(answers(1)[0], answers(1, p=0.5, seed=1)[0], "images")
    assert r["low"] < r["mean"] < r["high"] and r["seeds"] == 1


def test_wilson_is_statsmodels_definition():
    for k, n in ((0, 5), (5, 5), (3, 10), (900, 1000)):
        low, high = wilson(k / n, n)
        for p in (low, high):  # both ends solve |p̂ - p| = z sqrt(p(1-p)/n), unless cut off
            assert p in (0, 1) or abs(k / n - p) == pytest.approx(1.959964 * (p * (1 - p) / n) ** 0.5, abs=1e-5)


def test_recall_and_lost_classes():
    y = np.repeat([0, 1, 2], 50)
    real, fake = np.ones((2, 150), bool), np.ones((2, 150), bool)
    fake[:, 50:75] = False  # half of class b is lost
    rows = class_recall(fake, y, ["a", "b", "c"])
    assert [r["recall"] for r in rows] == [1, 0.5, 1] and [r["n"] for r in rows] == [50] * 3
    worst = lost_classes(real, fake, y, ["a", "b", "c"])
    assert worst[0]["class"] == "b" and worst[0]["mean"] == 0.5 and worst[0]["low"] > 0.3
    with pytest.raises(SettingError, match="class 'd' has no image"):
        class_recall(fake, y, ["a", "b", "c", "d"])
    with pytest.raises(SettingError, match="labels: "):
        class_recall(fake, y[1:], ["a", "b", "c"])
    with pytest.raises(SettingError, match="classes: 2 names"):
        class_recall(fake, y, ["a", "b"])


def test_by_duplicates():
    a, b = answers(), answers(p=0.7, seed=2)
    rows = {r["images"]: r for r in by_duplicates(a, b, [0, 5, 9])}
    assert rows["duplicated"]["n"] == 3 and rows["clean"]["n"] == 197 and rows["all"]["n"] == 200
    assert rows["duplicated"]["real"] == pytest.approx(a[:, [0, 5, 9]].mean())
    assert [r["images"] for r in by_duplicates(a, b, [])] == ["all", "clean"]
    with pytest.raises(SettingError, match="positions"):
        by_duplicates(a, b, [200])


def test_audit_files_are_read_and_checked(tmp_path):
    save_json(tmp_path / "made.json", dict(digests=["x", "y"], threshold=0.8))
    save_table(
        tmp_path / "made.parquet",
        pa.table(dict(train=[0, 1, 2, 3], test=[5, 3, 5, 9], score=[0.9, 0.5, 0.85, 0.7], exact=[False, False, False, True])),
    )
    assert audited(tmp_path, "y", "made").tolist() == [5, 9]
    assert audited(tmp_path, "y", "made", 0.4).tolist() == [3, 5, 9]
    with pytest.raises(DataError, match="audited another test split"):
        audited(tmp_path, "z", "made")


def test_duplicates_are_found_without_an_audit():
    a, b = a_split(30, seed=1, name="made/train"), a_split(12, seed=2, name="made/test")
    b.images[4] = a.images[7]
    assert 4 in seen_in_train(a, b, threshold=0.999)


def test_predictions_round_trip(tmp_path):
    val, other = a_split(), a_split(classes=2)
    c = train_classifier(Fixed(val.images, val.labels), RECIPE, val.classes, 5)
    p = predictions(c, val)
    assert p.dtype == torch.uint8
    save_predictions(tmp_path / "p.safetensors", {"real": {0: p, 1: p}, "mixture (a)": {0: p}}, val)
    right, labels, classes = load_predictions(tmp_path / "p.safetensors")
    assert {k: v[0] for k, v in right.items()} == {"real": [0, 1], "mixture (a)": [0]} and classes == val.classes
    assert right["real"][1].shape == (2, 60) and right["real"][1].mean() == pytest.approx(c.accuracy(val)) and (labels == val.labels.numpy()).all()
    with pytest.raises(SettingError, match="this classifier knows the classes"):
        predictions(c, other)


def test_nested_order():
    y = np.array([0] * 60 + [1] * 30 + [2] * 3)
    o = nested_order(y, 0)
    assert sorted(o) == list(range(93)) and set(y[o[:3]]) == {0, 1, 2}
    for n in (10, 31, 62):
        assert abs(np.bincount(y[o[:n]], minlength=3) / n - np.array([60, 30, 3]) / 93).max() < 1.5 / n
    assert (nested_order(y, 0) == o).all() and (nested_order(y, 1) != o).any()


def test_curve_is_resumed_from_its_ledger(tmp_path, monkeypatch):
    val, train = a_split(), a_split(90, seed=1, name="made/train")
    stage, sizes = desk(tmp_path), curve_sizes(90, 3, 3)
    assert sizes == [22, 45, 90]
    go = lambda: accuracy_by_size(stage, "real", train.images, train.labels, sizes, [0, 1], RECIPE, 5, val)
    first = go()
    assert len(first) == 6 == len(load_table(tmp_path / "ledger.parquet"))
    monkeypatch.setattr("synthlit.filter.train_classifier", lambda *a, **k: pytest.fail("a training in the ledger was repeated"))
    assert go() == first
    with pytest.raises(pytest.fail.Exception):  # other steps are other trainings
        accuracy_by_size(stage, "real", train.images, train.labels, sizes, [0], RECIPE, 6, val)


@pytest.mark.parametrize("sizes,says", [([91], "has 90 images"), ([2, 90], "cannot show all 3 classes"), ([], "sizes")])
def test_curve_refuses(tmp_path, sizes, says):
    train = a_split(90)
    with pytest.raises(SettingError, match=says):
        accuracy_by_size(desk(tmp_path), "real", train.images, train.labels, sizes, [0], RECIPE, 5, train)


def test_curve_sizes_refuse_too_few():
    with pytest.raises(SettingError, match="points"):
        curve_sizes(40, 10)


def test_empty_set_is_refused(tmp_path):
    val = a_split()
    with pytest.raises(SettingError, match="empty set"):
        trained(desk(tmp_path), "none", val.images[:0], val.labels[:0], RECIPE, 5, val)
    with pytest.raises(SettingError, match="empty set"):
        transfer(desk(tmp_path), val, val, val.images[:0], val.labels[:0], RECIPE, 5, [0])


def curve(noise=0.0, seeds=(0, 1, 2)):
    return [dict(n=n, seed=s, accuracy=0.5 + 0.1 * np.log2(n / 100) + noise * (s - 1)) for n in (100, 200, 400, 800) for s in seeds]


def test_real_equivalent():
    assert real_equivalent(curve(), [0.65, 0.65], 1000)["n"] == round(100 * 2**1.5)
    assert real_equivalent(curve(), [0.65, 0.65], 1000)["rate"] == pytest.approx(1000 / (100 * 2**1.5))
    wide = real_equivalent(curve(0.01), [0.64, 0.65, 0.66])
    assert wide["low"] < wide["n"] < wide["high"]
    more, fewer = real_equivalent(curve(), [0.9, 0.91], 50), real_equivalent(curve(), [0.1, 0.11])
    assert "more than 800" in more["text"] and more["n"] is None and more["rate"] is None and "fewer than 100" in fewer["text"]
    assert real_equivalent(curve(), [0.5, 0.5])["n"] == 100


def test_real_equivalent_on_a_curve_that_falls_in_between():
    assert invert(np.array([1, 2, 4]), np.array([0.5, 0.7, 0.6]), 0.65) == pytest.approx(2)  # isotonic: 0.5, 0.65, 0.65
    assert invert(np.array([1, 2, 4]), np.array([0.5, 0.5, 0.5]), 0.5) == 1


@pytest.mark.parametrize(
    "rows,scores,says",
    [
        (curve(seeds=(0,)), [0.6, 0.7], "at least 2 of each"),
        (curve(), [0.6], "at least 2 of each"),
        (curve()[:3], [0.6, 0.7], "at least 2 sizes"),
        (curve()[:-1], [0.6, 0.7], "all seeds need all sizes"),
    ],
)
def test_real_equivalent_refuses(rows, scores, says):
    with pytest.raises(SettingError, match=says):
        real_equivalent(rows, scores)


def test_mean_draws_have_students_spread():
    x = np.array([[0.0, 0.0], [1.0, -1.0], [5.0, -5.0], [2.0, -2.0]])
    z = mean_draws(x, 100_000, np.random.default_rng(0))
    assert np.quantile(z[:, 0], 0.975) - 2 == pytest.approx(3.1824 * x[:, 0].std(ddof=1) / 2, rel=0.05) and np.allclose(z[:, 0], -z[:, 1])
    assert by_seed(curve())[1].shape == (3, 4)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 3, 17, 12), (1, 3, 32, 32)])
def test_low_and_high_are_the_image(shape):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))
    low, high = low_pass(x), high_pass(x)
    assert low.shape == x.shape and low.dtype == high.dtype == torch.uint8
    assert (low.short() + 2 * (high.short() - 128) - x.short()).abs().max() <= 1
    assert low.float().std() < x.float().std() and torch.equal(low_pass(x, block=1), low)
    assert (low_pass(torch.full_like(x, 9)) == 9).all() and len(low_pass(x[:0])) == 0
    with pytest.raises(SettingError, match="sigma"):
        low_pass(x, 0)


def test_transfer(tmp_path):
    val, train, fake = a_split(), a_split(90, seed=1, name="made/train"), a_split(90, seed=2)
    stage = desk(tmp_path)
    rows = transfer(stage, train, val, fake.images, fake.labels, RECIPE, 20, [0, 1])
    assert len(rows) == 3 * 2 * 2 * 2 and len(load_table(tmp_path / "ledger.parquet")) == 12
    table = transfer_table(rows)
    assert len(table) == 12 and all(r["low"] <= r["accuracy"] <= r["high"] for r in table)
    assert "synthetic to real" in read_transfer(table)
    with pytest.raises(SettingError, match="bring them to one size"):
        transfer(stage, train, val, fake.images[..., :4], fake.labels, RECIPE, 20, [0])


def test_transfer_is_read_in_words():
    def table(rs, sr, low=0.8, high=0.8):
        at = lambda v, a, b, x: dict(view=v, trained=a, tested=b, accuracy=x)
        rows = [at("all", "real", "real", 0.9), at("all", "real", "synthetic", rs), at("all", "synthetic", "real", sr)]
        return (
            rows
            + [at(v, "real", "real", 0.9) for v in ("low", "high")]
            + [at("low", "synthetic", "real", low), at("high", "synthetic", "real", high)]
        )

    assert "both ways work" in read_transfer(table(0.9, 0.88)) and "lack variety" in read_transfer(table(0.99, 0.5))
    assert "labels are wrong" in read_transfer(table(0.5, 0.5)) and "train well" in read_transfer(table(0.5, 0.9))
    assert "fine detail" in read_transfer(table(0.9, 0.8, 0.85, 0.5)).split("carried by")[1] and "coarse" in read_transfer(table(0.9, 0.8, 0.5, 0.85))
    assert "carried" not in read_transfer(table(0.9, 0.8)[:3])


def test_protocol_names_what_counts():
    val = a_split()
    text = protocol(RECIPE, planned_steps(RECIPE, 60), [0, 1], dict(real=60, floor=90), val, 2)
    assert val.digest[:12] in text and "opened 2 times" in text and "60 images to 90 images" in text and "seeds: 0, 1" in text
    assert "luck of the seed is left out" in protocol(replace(RECIPE, smoothing=0.0), 5, [3], dict(real=60), val)
