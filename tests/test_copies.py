"""Copies and privacy: distances beside their definitions, planted copies, attacks on known answers, and what is refused."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from synthlit.classifier import ClassifierConfig, Fixed, train_classifier
from synthlit.copies import (
    attack_quality,
    attacks,
    confidence,
    copy_test,
    halves,
    left_out_confidence,
    nearer_than,
    nearest_in,
    pool_of,
    read_attacks,
    read_copies,
    show_closest,
)
from synthlit.core import SettingError, digest, load_table
from synthlit.splits import Split
from synthlit.utility import desk

RECIPE = ClassifierConfig(width=4, batch=16, shift=0, smoothing=0.0)
G = np.random.default_rng


def a_split(n, seed, classes=3):
    y = torch.arange(n) % classes
    x = torch.from_numpy((G(seed).integers(0, 80, (n, 1, 8, 8)) + 60 * y.numpy()[:, None, None, None]).astype(np.uint8))
    return Split("made/val", x, y, [f"c{i}" for i in range(classes)], digest(x, y), "")


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_nearest_is_the_nearest(block):
    x, ref = G(0).normal(size=(40, 5)) + 1000, G(1).normal(size=(30, 5)) + 1000
    x[3] = ref[11]
    full = np.sqrt(((x[:, None] - ref) ** 2).sum(2))
    d, i = nearest_in(x, ref, block=block)
    assert np.allclose(d, full.min(1), atol=1e-3) and (i == full.argmin(1)).all() and d[3] == 0
    own = np.sqrt(((ref[:, None] - ref) ** 2).sum(2)) + np.diag([np.inf] * 30)
    d, i = nearest_in(ref, ref, np.arange(30), block)
    assert np.allclose(d, own.min(1), atol=1e-3) and (i == own.argmin(1)).all()


def test_a_twin_in_train_is_a_neighbour():
    ref = G(0).normal(size=(10, 4))
    ref[9] = ref[2]
    d, i = nearest_in(ref, ref, np.arange(10))
    assert d[2] == d[9] == 0 and i[2] == 9 and i[9] == 2


def test_alarms_are_rarely_false():
    alarms, apart = 0, []
    for k in range(60):
        r = copy_test(*[G(3 * k + s).normal(size=(400, 4)) for s in range(3)], resamples=1000)
        alarms += "SIGN OF COPYING" in read_copies(r)
        apart.append(r["unauthentic"]["share"] - r["unauthentic"]["val"])
    assert alarms <= 3 and abs(np.mean(apart)) < 0.015


def test_copies_are_found():
    train, val, new = [G(s).normal(size=(2000, 6)) for s in range(3)]
    new[:100] = train[:100] + 1e-3
    r = copy_test(new, train, val)
    assert r["below"][0]["share"] > 0.05 and r["below"][0]["low"] > 0.03 and "SIGN OF COPYING" in read_copies(r)
    new[:3] = train[5]
    r = copy_test(new, train, val)
    assert r["zero"] == 3 and (r["nearest"][:3] == 5).all() and "3 are equal" in read_copies(r)


def test_all_copies_are_unauthentic():
    train, val = G(0).normal(size=(500, 6)), G(1).normal(size=(400, 6))
    assert copy_test(train + 1e-4, train, val)["unauthentic"]["share"] == 1


def test_interval_of_the_share_is_the_bootstrap():
    ds, dv, g = G(0).gamma(3, size=700), G(1).gamma(3.2, size=300), G(2)
    slow = [(g.choice(ds, 700) < np.sort(g.choice(dv, 300))[14]).mean() for _ in range(4000)]
    fast = nearer_than(ds, dv, 0.05, 4000, G(3), 0.95)
    assert np.allclose([fast["low"], fast["high"]], np.quantile(slow, [0.025, 0.975]), atol=0.006)
    assert fast["share"] == (ds < np.sort(dv)[14]).mean()


@pytest.mark.parametrize(
    "s,t,v,kw,says",
    [
        (0, 50, 200, {}, "synthetic: an empty set"),
        (50, 1, 200, {}, "at least 2"),
        (50, 50, 20, {}, "quantiles"),
        (50, 50, 0, {}, "quantiles"),
    ],
)
def test_copy_test_refuses(s, t, v, kw, says):
    with pytest.raises(SettingError, match=says):
        copy_test(G(0).normal(size=(s, 4)), G(1).normal(size=(t, 4)), G(2).normal(size=(v, 4)), **kw)


def test_features_of_two_networks_are_refused():
    with pytest.raises(SettingError, match="one network"):
        nearest_in(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(SettingError, match="ref: the features hold NaN"):
        nearest_in(np.ones((3, 4)), np.full((3, 4), np.nan))
    with pytest.raises(SettingError, match="x: features must be N×d"):
        nearest_in(np.ones(3), np.ones((3, 4)))


def test_closest_pairs_are_shown():
    import matplotlib

    matplotlib.use("Agg")
    x = a_split(200, 0).images
    r = copy_test(x.flatten(1)[:50].float(), x.flatten(1).float(), a_split(100, 1).images.flatten(1).float())
    show_closest(x[:50], x, r, n=4)
    with pytest.raises(SettingError, match="images: 49"):
        show_closest(x[:49], x, r)


def test_auc_and_rate_are_their_definitions():
    a, b = G(0).normal(1, 1, 300).round(1), G(1).normal(0, 1, 250).round(1)
    q = attack_quality(a, b, 0.02)
    assert q["auc"] == pytest.approx(roc_auc_score([1] * 300 + [0] * 250, [*a, *b]), abs=1e-12)
    cuts = [t for t in np.unique([*a, *b]) if (b >= t).mean() <= 0.02]
    assert q["tpr"] == pytest.approx(max(((a >= t).mean() for t in cuts), default=0))
    assert q["auc_low"] < q["auc"] < q["auc_high"] and q["tpr_low"] <= q["tpr"] <= q["tpr_high"]
    assert attack_quality(b, b)["auc"] == pytest.approx(0.5) and attack_quality(a + 99, b)["tpr"] == 1
    assert attack_quality(a, b) == attack_quality(a, b)


def test_interval_of_auc_is_a_bootstrap():
    a, b, g = G(0).normal(1, 1, 200), G(1).normal(0, 1, 150), G(2)
    q = attack_quality(a, b, 0.02)
    slow = [stats.mannwhitneyu(g.choice(a, 200), g.choice(b, 150)).statistic / 200 / 150 for _ in range(500)]
    assert np.allclose([q["auc_low"], q["auc_high"]], np.quantile(slow, [0.025, 0.975]), atol=0.012)


@pytest.mark.parametrize(
    "a,b,says", [([1.0], [1.0, 2.0] * 99, "inside"), ([1.0, 2.0], [np.nan] * 200, "outside"), ([1.0, 2.0], [1.0, 2.0], "fpr = 0.01")]
)
def test_attack_quality_refuses(a, b, says):
    with pytest.raises(SettingError, match=says):
        attack_quality(a, b)


def test_confidence_is_the_logit_of_the_probability():
    s = a_split(30, 0)
    c = train_classifier(Fixed(s.images, s.labels), RECIPE, s.classes, 5)
    p = c.probs(s.images)[torch.arange(30), s.labels].double().numpy()
    assert np.allclose(confidence(c, s.images, s.labels), np.log(p / (1 - p)), atol=1e-4)


@pytest.mark.parametrize("n,k", [(10, 2), (11, 4), (100, 8)])
def test_halves_leave_everyone_out_equally_often(n, k):
    h = halves(n, k)
    assert h.shape == (k, n) and (h.sum(0) == k // 2).all() and abs(h.sum(1) - n / 2).max() <= 0.5


@pytest.mark.parametrize("k", [0, 1, 3])
def test_odd_references_are_refused(k):
    with pytest.raises(SettingError, match="references"):
        halves(10, k)


@pytest.mark.parametrize("references", [2, 4])
def test_an_overfit_classifier_is_attackable(tmp_path, references):
    """Random labels can only be learned by heart: who knows them was there."""
    members, others = a_split(100, 0), a_split(100, 1)
    for s in (members, others):
        s.labels[:] = torch.from_numpy(G(len(s.digest) + int(s.images.sum())).integers(0, 3, 100))
    pool = pool_of((members.images, members.labels), others)
    assert pool[2].sum() == 100 == len(pool[1]) / 2
    reference = left_out_confidence(desk(tmp_path), pool, RECIPE, 60, others, references)
    assert reference[0].shape == (200,) and np.isfinite(reference[0]).all() and reference[1] > 0
    assert len(load_table(tmp_path / "ledger.parquet")) == references
    c = train_classifier(Fixed(members.images, members.labels), RECIPE, members.classes, 150)
    found = attacks(c, pool, reference, fpr=0.05)
    assert found["loss"]["auc_low"] > 0.6 and found["lira"]["auc_low"] > 0.6
    assert "members can be told apart" in read_attacks(found, "real")


def test_an_untrained_classifier_tells_nothing():
    members, others = a_split(150, 0), a_split(150, 1)
    c = train_classifier(Fixed(others.images[:4], others.labels[:4]), RECIPE, members.classes, 1)
    found = attacks(c, pool_of((members.images, members.labels), others))
    assert "loss" in found and "lira" not in found and found["loss"]["auc_low"] < 0.5 < found["loss"]["auc_high"]


def test_attacks_refuse():
    members, few = a_split(20, 0), a_split(10, 0, classes=2)
    c = train_classifier(Fixed(few.images, few.labels), RECIPE, few.classes, 1)
    with pytest.raises(SettingError, match="target: it knows 2 classes"):
        attacks(c, pool_of((members.images, members.labels), members))
    with pytest.raises(SettingError, match="members: 0"):
        pool_of((members.images[:0], members.labels[:0]), members)
