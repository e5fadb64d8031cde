"""Measures: the three forms of the Fréchet distance, references, CMMD, ties, intervals, feature networks, and bad input."""

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from synthlit import metrics
from synthlit.core import DamagedFile, SettingError, rng
from synthlit.features import Features, as_rows, download_inception, feature_network, prepare, random_features, timm_features
from synthlit.metrics import (
    Near,
    Reference,
    bootstrap,
    cmmd,
    distance_name,
    frechet_distance,
    frechet_per_class,
    inception_score,
    kid,
    kid_subsets,
    load_reference,
    prdc,
    reference_of,
    reference_stats,
    squared_radii,
    trace_sqrt,
)


def cloud(n, d, seed, scale=1.0, shift=0.0):
    r = rng(seed, "test.metrics", d)
    mix = rng(0, "test.mix", d).standard_normal((d, d)) / d**0.5
    return r.standard_normal((n, d)) @ mix * scale + shift


def by_svd(x, y) -> float:
    """The definition without any square: singular values of the product of two QR factors."""
    a, b = [np.linalg.qr(z - z.mean(0))[1] / (len(z) - 1) ** 0.5 for z in (x, y)]
    diff = x.mean(0) - y.mean(0)
    return float(diff @ diff + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


# ---- Fréchet


@pytest.mark.parametrize("n,m", [(400, 300), (50, 30), (30, 50), (30, 400), (400, 30), (64, 64), (2, 2), (2, 400)])
def test_all_forms_agree_with_the_definition(n, m):
    x, y = cloud(n, 64, 1), cloud(m, 64, 2, 1.2, 0.3)
    want = by_svd(x, y)
    for a in (x, reference_of(x), torch.from_numpy(x), x[::-1]):
        for b in (y, reference_of(y)):
            assert frechet_distance(a, b) == pytest.approx(want, rel=1e-7 if isinstance(a, Reference) and isinstance(b, Reference) else 1e-9)
            assert frechet_distance(b, a) == pytest.approx(want, rel=1e-7 if isinstance(a, Reference) and isinstance(b, Reference) else 1e-9)


def broken(kind: str, n: int = 300, d: int = 48):
    x = cloud(n, d, 3, 1.1, 0.2)
    if kind == "constant features":
        x[:, ::3] = 7
    if kind == "repeated features":
        x[:, 1::2] = x[:, ::2]
    if kind == "three points":
        x = x[rng(0, "three").integers(3, size=n)]
    if kind == "all equal":
        x = np.repeat(x[:1], n, 0)
    if kind == "one dimension":
        x = x[:, :1] * np.ones(d)
    if kind == "steep":
        x = x * 10.0 ** -np.linspace(0, 9, d)
    return x


KINDS = ["constant features", "repeated features", "three points", "all equal", "one dimension", "steep", "plain"]


@pytest.mark.parametrize("n", [300, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_singular_covariances_are_exact_and_do_not_depend_on_order_or_blocks(kind, n):
    x, y = cloud(320, 48, 1), broken(kind, n)
    want = by_svd(x, y)
    found = frechet_distance(x, y)
    assert found == pytest.approx(
        want, rel=1e-8 if kind == "steep" else 1e-9
    )  # 18 decades of variance: a covariance in float64 cannot hold the last two
    r = rng(0, "test.shuffle")
    for size in (1, 7, 100):
        p, q = r.permutation(len(x)), r.permutation(len(y))
        in_blocks = reference_of(x[p][i : i + size] for i in range(0, len(x), size))
        assert frechet_distance(in_blocks, y[q]) == pytest.approx(found, rel=1e-9)
        assert frechet_distance(y[q], in_blocks) == pytest.approx(found, rel=1e-9)
    assert frechet_distance(y, y[::-1]) == pytest.approx(0, abs=1e-9 * max(1, np.trace(np.cov(y.T))))


def test_both_sides_singular():
    for a in KINDS:
        x, y = broken(a, 300), broken("three points", 200)
        assert frechet_distance(x, y) == pytest.approx(by_svd(x, y), rel=1e-7, abs=1e-9)


def test_pytorch_fid_at_full_size_in_small():
    from pytorch_fid.fid_score import calculate_frechet_distance

    x, y = cloud(1500, 256, 1), cloud(1500, 256, 2, 1.1, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        want = calculate_frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(x.astype(np.float32), y) == pytest.approx(want, rel=1e-5)


def test_a_given_root_is_used(monkeypatch):
    x, y = reference_of(cloud(200, 16, 1)), reference_of(cloud(200, 16, 2))
    want = trace_sqrt(x.cov, y.cov, x.root)
    monkeypatch.setattr(metrics, "root_of", lambda cov: pytest.fail("made again"))
    assert trace_sqrt(x.cov, y.cov, x.root) == want


def test_references_are_kept(tmp_path):
    x, y = cloud(300, 16, 1), cloud(300, 16, 2)
    ref = reference_of(x, "a network", "abc", data="cloud")
    ref.save(tmp_path / "r.safetensors")
    again = load_reference(tmp_path / "r.safetensors")
    assert (again.n, again.name, again.digest, again.about) == (300, "a network", "abc", dict(data="cloud"))
    assert frechet_distance(y, again) == frechet_distance(y, ref) and (again.root == ref.root).all()
    with pytest.raises(ValueError, match="two networks"):
        frechet_distance(again, reference_of(y, "another"))
    with pytest.raises(ValueError, match="two networks.*digest"):
        frechet_distance(again, reference_of(y, "a network", "xyz"))
    whole = (tmp_path / "r.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[:-9] + b"123456789")
    with pytest.raises(DamagedFile, match="torn"):
        load_reference(tmp_path / "torn.safetensors")
    save_file({"mean": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DamagedFile, match="other"):
        load_reference(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        load_reference(tmp_path / "none.safetensors")


def test_references_of_pytorch_fid(tmp_path):
    x, y = cloud(300, 16, 1), cloud(300, 16, 2)
    np.savez(tmp_path / "r.npz", mu=x.mean(0), sigma=np.cov(x.T))
    assert frechet_distance(y, load_reference(tmp_path / "r.npz")) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "without.npz", mu=np.zeros(2))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(2), sigma=np.eye(3))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    (tmp_path / "torn.npz").write_bytes(b"PK no zip")
    for name in ("pickled", "without", "shape", "nan", "torn"):
        with pytest.raises(DamagedFile, match=f"{name}.npz"):
            load_reference(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError, match="none.npz"):
        load_reference(tmp_path / "none.npz")


def test_per_class():
    x, y = cloud(200, 4, 1), cloud(200, 4, 2)
    a, b = np.arange(200) % 3, np.arange(200) % 4
    got = frechet_per_class(x, a, y, b)
    assert got[1] == frechet_distance(x[a == 1], y[b == 1]) and got[3] is None and list(got) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="labels"):
        frechet_per_class(x, a[:-1], y, b)


# ---- kernels


def test_cmmd_by_definition():
    x, y = cloud(40, 6, 1), cloud(30, 6, 2, 1, 0.5)
    k = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 0.7**2))
    off = lambda a: (k(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))
    for block in (1, 7, 1024):
        assert cmmd(x, y, 0.7, 1, block=block) == pytest.approx(k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean(), rel=1e-9)
        assert cmmd(x, y, 0.7, 1, True, block) == pytest.approx(off(x) + off(y) - 2 * k(x, y).mean(), rel=1e-9)
    assert cmmd(x + 1e6, y + 1e6, 0.7) == pytest.approx(cmmd(x, y, 0.7), rel=1e-6)
    assert cmmd(x[::-1], y[::-1], 0.7) == pytest.approx(cmmd(x, y, 0.7), rel=1e-9)


def test_kid_over_subsets():
    x, y = cloud(60, 5, 1), cloud(60, 5, 2, 1.2)
    assert kid_subsets(x, y, 3, 60) == (pytest.approx(kid(x, y), rel=1e-9), pytest.approx(0, abs=1e-9))
    mean, std = kid_subsets(x, y, 200, 30)
    assert abs(mean - kid(x, y)) < 4 * std / 200**0.5 and kid_subsets(x, y, 5, 30) == kid_subsets(x, y, 5, 30) != kid_subsets(x, y, 5, 30, seed=1)
    with pytest.raises(ValueError, match="61"):
        kid_subsets(x, y, 1, 61)


# ---- precision, recall, density, coverage


def prdc_in_full(real, fake, k, ties=True) -> dict:
    square = lambda a, b: np.stack([((row.astype(np.float64) - b.astype(np.float64)) ** 2).sum(1) for row in a])
    r_real, r_fake = [np.sort(square(z, z), 1)[:, k] for z in (real, fake)]
    d = square(real, fake)
    in_real, in_fake = (d <= r_real[:, None], d <= r_fake) if ties else (d < r_real[:, None], d < r_fake)
    return dict(precision=in_real.any(0).mean(), recall=in_fake.any(1).mean(), density=in_real.sum(0).mean() / k, coverage=in_real.any(1).mean())


def many_ties(kind: str):
    r = rng(0, "test.ties")
    real, fake = cloud(230, 5, 1), cloud(170, 5, 2, 1.1)
    if kind == "grid":  # all coordinates whole: nearly every distance is tied
        real, fake = [r.integers(0, 4, (n, 5)).astype(float) for n in (230, 170)]
    if kind == "copies":
        fake[:100] = real[:100]
    if kind == "collapse":
        fake = fake[r.integers(3, size=170)]
    if kind == "one point":
        real = fake = np.ones((60, 3))
    if kind == "far from zero":
        real, fake = real + 1e6, fake + 1e6
    if kind == "one outlier":
        real[0] = 1e5
    if kind == "nearly equal":
        fake = real[:170] + 1e-9 * r.standard_normal((170, 5))
    if kind == "small numbers":
        real, fake = real * 1e-30, fake * 1e-30
    if kind == "float32":
        real, fake = real.astype(np.float32), fake.astype(np.float32)
    return real, fake


@pytest.mark.parametrize(
    "kind", ["plain", "grid", "copies", "collapse", "one point", "far from zero", "one outlier", "nearly equal", "small numbers", "float32"]
)
def test_prdc_is_exact_with_ties(kind):
    real, fake = many_ties(kind)
    r = rng(0, "test.order")
    p, q = r.permutation(len(real)), r.permutation(len(fake))
    for k in (1, 5):
        for ties in (True, False):
            want = prdc_in_full(real, fake, k, ties)
            for block in (0, 1, 17):
                assert prdc(real, fake, k, block, ties) == pytest.approx(want, rel=1e-12), (k, ties, block)
            assert prdc(real[p], fake[q], k, ties=ties) == pytest.approx(want, rel=1e-12)


def test_the_slack_holds():
    for d in (1, 64, 700):
        x, y = cloud(150, d, 1).astype(np.float32), cloud(120, d, 2, 3, 1).astype(np.float32)
        near = Near(x, y)
        for s, h in near.products(0, 1):
            true = -((x[s, None].astype(np.float64) - y[None].astype(np.float64)) ** 2).sum(-1) / 2 / near.scale**2
            assert np.abs(h - true).max() < near.slack
        assert np.allclose(squared_radii(near, 0, 3), np.sort(((x[:, None].astype(float) - x[None]) ** 2).sum(-1), 1)[:, 3], rtol=1e-12)


@pytest.mark.parametrize("kind", ["cloud", "copies", "one point"])
def test_radii_from_several_tiles(kind):
    """Half of the tiles, each read both ways, and candidates that are measured in between because there are so many."""
    x = cloud(1300, 8, 1).astype(np.float32)
    x = x[rng(0, "test.copies").integers(0, 40, 1300)] if kind == "copies" else x[[0] * 1300] if kind == "one point" else x
    want = np.sort(((x[:, None].astype(float) - x[None]) ** 2).sum(-1), 1)[:, 5]
    for block in (0, 16, 100):
        assert np.allclose(squared_radii(Near(x, x, block=block), 0, 5), want, rtol=1e-12)


# ---- intervals


def test_intervals():
    x, y = cloud(200, 4, 1), cloud(200, 4, 2)
    got = bootstrap(frechet_distance, x, y, n=20)
    assert got["value"] == frechet_distance(x, y) and got["low"] < got["value"] < got["high"] and got["bias"] > 0
    assert got == bootstrap(frechet_distance, x, y, n=20) != bootstrap(frechet_distance, x, y, n=20, seed=1)
    ref = reference_of(x)
    assert bootstrap(frechet_distance, ref, y, n=5)["value"] == frechet_distance(ref, y)
    assert bootstrap(prdc, x, y, n=3, k=3)["recall"]["value"] == prdc(x, y, 3)["recall"]
    p = np.eye(4)[np.arange(200) % 4]
    assert bootstrap(inception_score, p, n=3, splits=1)["value"] == pytest.approx(4)
    assert bootstrap(kid, torch.from_numpy(x), torch.from_numpy(y), n=3) == bootstrap(kid, x, y, n=3)


# ---- bad input


@pytest.mark.parametrize("measure", [frechet_distance, kid, cmmd, prdc, kid_subsets])
def test_bad_features(measure):
    good = cloud(20, 3, 1)
    bad = good.copy()
    bad[7, 1], bad[9] = np.nan, np.inf
    for a, b in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=r"NaN or infinity in rows \[7, 9\]"):
            measure(a, b)
    for few in (good[:1], good[:0], good[0]):
        with pytest.raises(ValueError, match="samples|features"):
            measure(few, good)
    with pytest.raises(ValueError, match="3 and of 2 dimensions"):
        measure(good, good[:, :2])


def test_bad_features_in_part():
    with pytest.raises(ValueError, match="3 dimensions are followed by some of 2"):
        reference_of([np.zeros((4, 3)), np.zeros((4, 2))])
    with pytest.raises(ValueError, match="got none"):
        reference_of(iter([]))
    with pytest.raises(ValueError, match="at least 2"):
        reference_of(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="k = 5"):
        prdc(cloud(5, 2, 1), cloud(50, 2, 1))
    same = np.ones((20, 3))
    assert frechet_distance(same, same) == kid(same, same) == cmmd(same, same) == 0
    assert frechet_distance(same, same + 1) == 3 and frechet_distance(same[:2], same[:2] + 1) == 3


# ---- feature networks


def pictures(n=5, c=3, size=16):
    return torch.from_numpy(rng(0, "test.pictures").integers(0, 256, (n, c, size, size), dtype=np.uint8))


def test_prepare():
    x = pictures(c=1)
    got = prepare(x, 24, (0.5,), (0.5,), 3)
    assert got.shape == (5, 3, 24, 24) and -1 <= got.min() < -0.5 and 0.5 < got.max() <= 1 and torch.equal(got[:, 0], got[:, 2])
    assert torch.equal(prepare(x), x / 255)
    with pytest.raises(ValueError, match="uint8"):
        prepare(x.float())
    with pytest.raises(ValueError, match="3 channels, the network takes 1"):
        prepare(pictures(), channels=1)


def test_any_function_is_a_feature_network():
    seen = []
    own = Features(lambda x: seen.append(len(x)) or x.mean((2, 3)), "my means", batch=2)
    assert own(pictures()).shape == (5, 3) and seen == [2, 2, 1] and distance_name(own.name) == "Fréchet distance (my means)"
    got = reference_stats((pictures() for _ in range(3)), own, data="noise")
    assert (got.n, got.name, got.about) == (15, "my means", dict(data="noise"))
    with pytest.raises(ValueError, match="gave 1 rows for 2"):
        Features(lambda x: x[:1], "wrong", batch=2)(pictures())
    with pytest.raises(ValueError, match="NaN"):
        reference_stats(pictures(), Features(lambda x: x.mean((2, 3)) * np.nan, "nan"))
    with pytest.raises(ValueError, match="no images"):
        own(iter([]))


def test_networks_of_timm(tmp_path):
    pytest.importorskip("timm")
    net = timm_features("test_vit", img_size=32)
    assert "random weights" in net.name and net(pictures()).shape[0] == 5 and net.digest == timm_features("test_vit", img_size=32).digest
    save_file({k: v.contiguous() for k, v in net.net.state_dict().items()}, tmp_path / "w.safetensors")
    again = timm_features("test_vit", str(tmp_path / "w.safetensors"), img_size=32)
    assert again.name == "timm test_vit" and again.digest == net.digest and torch.equal(again(pictures()), net(pictures()))
    with pytest.raises(SettingError, match="test_vit"):
        timm_features("test_vitt")
    with pytest.raises(SettingError, match="only .safetensors"):
        timm_features("test_vit", "w.pth")


@pytest.mark.parametrize("spec", ["", "fid", "inception", "timm:", "inceptoin:x"])
def test_unknown_networks(spec):
    with pytest.raises(SettingError, match="known are"):
        feature_network(spec)


def test_a_download_of_other_bytes_is_refused(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, to, hash_prefix, progress: asked.append(hash_prefix) or open(to, "wb").close())
    with pytest.raises(DamagedFile, match="not the published file"):
        download_inception(tmp_path)
    assert len(asked[0]) == 64


def test_digests_follow_the_weights():
    assert random_features().digest == random_features().digest != random_features(seed=1).digest
    assert as_rows(np.zeros((2, 2), np.float16)).dtype == np.float32
