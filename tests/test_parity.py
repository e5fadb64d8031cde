"""Our measures beside public libraries and beside their definitions, written out in full."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import NearestNeighbors

from synthlit import features
from synthlit.classifier import one_cycle
from synthlit.core import DamagedFile, file_digest, global_rng, randn, rng
from synthlit.filter import Pool, Scores, accept, keep_rule
from synthlit.generator import BLOCK, Generator, latents
from synthlit.metrics import InceptionFeatures, Moments, fid, frechet_distance, frechet_from_moments, inception_score, kid, prdc
from synthlit.splits import SplitsConfig, cut_data, fewshot_split, load_data, stratified


def clouds(n, m, d, seed=0):
    """Two correlated Gaussian clouds, n×d and m×d."""
    r = np.random.default_rng(seed)
    mix = r.normal(size=(d, d)) / d**0.5
    return r.normal(size=(n, d)) @ mix + 1, r.normal(size=(m, d)) @ mix * 1.3 + r.normal(size=d)


# ---- Fréchet distance


def of_pytorch_fid(x, y) -> float:
    from pytorch_fid.fid_score import calculate_frechet_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it asks SciPy for sqrtm(disp=False)
        return calculate_frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))


def by_definition(x, y) -> float:
    """|μ₁-μ₂|² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½), the last from the eigenvalues of the plain product, in float64."""
    c, e = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    w = np.linalg.eigvals(c @ e).real.clip(0)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c) + np.trace(e) - 2 * np.sqrt(w).sum())


@pytest.mark.parametrize("n,m,d", [(500, 400, 16), (900, 700, 64), (300, 300, 1)])
def test_frechet_distance_equals_pytorch_fid(n, m, d):
    x, y = clouds(n, m, d)
    if d > 1:  # its own code cannot take one dimension
        assert frechet_distance(x, y) == pytest.approx(of_pytorch_fid(x, y), rel=1e-6)
    assert frechet_distance(x, y) == pytest.approx(by_definition(x, y), rel=1e-9)


@pytest.mark.parametrize("n,m,d", [(12, 9, 64), (40, 40, 41), (64, 64, 64), (30, 200, 64), (200, 30, 64)])
def test_frechet_distance_of_few_samples(n, m, d):
    x, y = clouds(n, m, d)
    assert frechet_distance(x, y) == pytest.approx(by_definition(x, y), rel=1e-5)  # the definition is the worse conditioned side here
    assert frechet_distance(x, y) == pytest.approx(frechet_from_moments(Moments().add(x), Moments().add(y)), rel=1e-5)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-6)


def test_frechet_distance_by_hand():
    x, _ = clouds(200, 2, 8)
    assert abs(frechet_distance(x, x)) < 1e-9
    assert frechet_distance(x, x + 3) == pytest.approx(8 * 9, rel=1e-9)  # a shift of 3 in 8 dimensions
    a, b = np.array([[-1.0], [1.0]]) / 2**0.5, np.array([[-2.0], [2.0]]) / 2**0.5  # standard deviations 1 and 2
    assert frechet_distance(a, b) == pytest.approx(1)
    assert frechet_distance(torch.from_numpy(x).float(), torch.from_numpy(x).float() + 3) == pytest.approx(72, rel=1e-5)


def test_moments_do_not_depend_on_blocks():
    x, _ = clouds(1000, 2, 12)
    m = Moments()
    for part in np.split(x + 1e4, [1, 17, 400]):  # far from zero, where naive sums lose digits
        m.add(part)
    assert np.allclose(m.mean, x.mean(0) + 1e4, rtol=1e-12) and np.allclose(m.cov, np.cov(x, rowvar=False), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(5), np.full((4, 2), np.nan), np.zeros((1, 3))], ids=["empty", "1-d", "nan", "one row"])
def test_frechet_distance_refuses(bad):
    with pytest.raises(ValueError, match="features|samples"):
        frechet_distance(bad, np.zeros((4, 3)))


# ---- precision, recall, density, coverage


def prdc_by_definition(real, fake, k) -> dict:
    """Kynkäänniemi et al. 2019 and Naeem et al. 2020 with full matrices; radii from scikit-learn."""
    radius = lambda z: NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(z).kneighbors(z)[0][:, k]  # the first neighbour is the point itself
    d = np.sqrt(((real[:, None] - fake[None]) ** 2).sum(-1))
    in_real, in_fake = d <= radius(real)[:, None], d <= radius(fake)[None]
    return dict(
        precision=in_real.any(0).mean(), recall=in_fake.any(1).mean(), density=in_real.sum(0).mean() / k, coverage=(d.min(1) <= radius(real)).mean()
    )


@pytest.mark.parametrize("n,m,d,k", [(150, 120, 8, 5), (120, 150, 2, 3), (60, 200, 4, 1)])
def test_prdc_equals_its_definition(n, m, d, k):
    real, fake = clouds(n, m, d, seed=3)
    want = prdc_by_definition(real, fake, k)
    assert 0 < want["precision"] < 1 or 0 < want["recall"] < 1
    for block in (7, 64, 1024):
        assert prdc(real, fake, k, block) == pytest.approx(want)


def test_prdc_counts_ties_as_inside():
    line = np.arange(20.0)[:, None]  # all gaps 1: every ball of radius 1 ends exactly on its neighbours
    want = prdc_by_definition(line, line + 1, 1)
    assert prdc(line, line + 1, 1) == pytest.approx(want)
    assert want["coverage"] == 1 and want["precision"] == 1  # point 20, outside, is at distance 1 of point 19: on the border
    same = np.ones((30, 4))
    assert prdc(same, same, 5) == dict(precision=1, recall=1, density=6, coverage=1)  # 30 balls of radius 0 / k


# ---- kernel distance and inception score


def kid_by_loops(x, y) -> float:
    """The unbiased estimate of Bińkowski et al. 2018, pair by pair."""
    k = lambda a, b: (sum(float(p) * float(q) for p, q in zip(a, b)) / len(a) + 1) ** 3
    within = lambda z: sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))
    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("n,m,d", [(23, 31, 5), (2, 2, 1), (40, 3, 12)])
def test_kid_equals_its_definition(n, m, d):
    x, y = clouds(n, m, d)
    for block in (1, 7, 1024):
        assert kid(x, y, block) == pytest.approx(kid_by_loops(x, y), rel=1e-9)
    assert kid(y, x) == pytest.approx(kid(x, y), rel=1e-9)
    assert kid(torch.from_numpy(x).float(), y) == pytest.approx(kid(x, y), rel=1e-4)


def test_kid_of_scikit_learns_kernel():
    from sklearn.metrics.pairwise import polynomial_kernel

    x, y = clouds(300, 200, 20)
    xx, yy, xy = [polynomial_kernel(a, b, degree=3, gamma=1 / 20, coef0=1) for a, b in ((x, x), (y, y), (x, y))]
    want = (xx.sum() - np.trace(xx)) / (300 * 299) + (yy.sum() - np.trace(yy)) / (200 * 199) - 2 * xy.mean()
    assert kid(x, y) == pytest.approx(want, rel=1e-9) and want > 0


def test_kid_is_unbiased():
    x, _ = clouds(120, 2, 6)
    halves = np.array([kid(x[p[:60]], x[p[60:]]) for p in (rng(0, "test.halves", i).permutation(120) for i in range(300))])
    assert halves.min() < 0 < halves.max() and abs(halves.mean()) < 4 * halves.std() / 300**0.5
    with pytest.raises(ValueError, match="at least 2"):
        kid(x[:1], x)


def inception_score_by_hand(p) -> float:
    kl = [sum(a * math.log(a / b) for a, b in zip(row, p.mean(0)) if a > 0) for row in p]
    return math.exp(sum(kl) / len(kl))


def test_inception_score_by_hand():
    p = np.random.default_rng(0).dirichlet([0.2] * 7, 300)
    assert inception_score(p, 1) == (pytest.approx(inception_score_by_hand(p), rel=1e-12), 0)
    scores = [inception_score_by_hand(part) for part in np.array_split(p[rng(0, "inception.splits").permutation(300)], 10)]
    assert inception_score(p) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
    assert inception_score(torch.from_numpy(p).float())[0] == pytest.approx(np.mean(scores), rel=1e-5)
    for k in (2, 5, 9):
        assert inception_score(np.full((100, k), 1 / k)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
        assert inception_score(np.eye(k)[np.arange(10 * k) % k], 1)[0] == pytest.approx(k)
    assert inception_score(np.eye(4)[[2] * 100]) == (1, 0)


@pytest.mark.parametrize("n,splits", [(9, 1), (99, 10), (5, 10), (20, 0)])
def test_inception_score_refuses_few_samples(n, splits):
    with pytest.raises(ValueError, match="at least .* samples, 10 a split"):
        inception_score(np.full((n, 4), 0.25), splits)


def test_inception_score_refuses_logits():
    with pytest.raises(ValueError, match="probabilities"):
        inception_score(np.random.default_rng(0).normal(size=(100, 4)))


# ---- FID with Inception's weights from a file


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """pytorch-fid's FID Inception with random weights: (state dict, .pth, .safetensors)."""
    from unittest.mock import patch

    from pytorch_fid import inception as theirs

    with global_rng(0, "test.inception"):
        with patch.object(theirs, "load_state_dict_from_url", lambda *a, **k: None), patch("torch.nn.Module.load_state_dict", lambda *a, **k: None):
            net = theirs.fid_inception_v3()
    state, folder = net.state_dict(), tmp_path_factory.mktemp("inception")
    torch.save(state, folder / "w.pth")
    save_file(state, folder / "w.safetensors")
    return state, folder / "w.pth", folder / "w.safetensors"


def features_by_hand(state, images: torch.Tensor) -> np.ndarray:
    """pytorch-fid's whole path: its network built with these weights, images as its ToTensor gives them."""
    from unittest.mock import patch

    from pytorch_fid import inception as theirs

    with patch.object(theirs, "load_state_dict_from_url", lambda *a, **k: state):
        net = theirs.InceptionV3([3]).eval()
    with torch.no_grad():
        return net(images.float() / 255)[0].squeeze(3).squeeze(2).numpy()


def pictures(n, channels, seed):
    return torch.from_numpy(rng(seed, "test.images").integers(0, 256, (n, channels, 16, 16), dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_fid_equals_pytorch_fids_network_by_hand(inception, channels, monkeypatch):
    state, pth, st = inception
    real, fake = pictures(12, channels, 0), pictures(12, channels, 1) // 2
    x, y = [features_by_hand(state, z if channels == 3 else z.repeat(1, 3, 1, 1)) for z in (real, fake)]
    with pytest.raises(DamagedFile, match="not unpickled"):  # random weights are not the published file
        InceptionFeatures(pth)
    monkeypatch.setattr(features, "FID_SHA256", file_digest(pth))
    net = InceptionFeatures(pth)
    ours = net(real[:3], batch=2)
    assert net.name == "FID Inception" and InceptionFeatures(st).name.startswith("Inception with weights ")
    features.convert_inception(pth, pth.with_name("ours.safetensors"))
    again = InceptionFeatures(pth.with_name("ours.safetensors"))
    assert again.name == "FID Inception" and torch.equal(again(real[:3], batch=2), ours) and torch.equal(again.last, net.last)
    assert ours.shape == (3, 2048) and x.std(0).max() > 0 and np.allclose(ours, x[:3], rtol=1e-4, atol=1e-4 * x.std())
    got = fid(real, fake, st)
    assert got > 0 and got == pytest.approx(by_definition_small(x, y), rel=1e-4)


def by_definition_small(x, y) -> float:
    """The definition for n << d: tr(Σ₁Σ₂)^½ is the sum of the singular values of X Yᵀ, here from its Gram matrix."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = [(z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    k = a @ b.T
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * np.sqrt(np.linalg.eigvalsh(k @ k.T).clip(0)).sum())


def test_fid_says_what_is_wrong_with_the_weights(tmp_path):
    images = pictures(4, 3, 0)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        fid(images, images, tmp_path / "none.pth")
    for name in ("torn.pth", "torn.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no weights")
        with pytest.raises(DamagedFile, match=name):
            fid(images, images, tmp_path / name)
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(DamagedFile, match="other.safetensors"):
        fid(images, images, tmp_path / "other.safetensors")


# ---- splits


def test_stratified_is_proportional_and_exact():
    labels = np.repeat([0, 1, 2, 3], [500, 301, 150, 49])
    for n in (1, 4, 10, 97, 333):
        held, rest = stratified(labels, n, 0, "test")
        assert len(held) == n and sorted([*held, *rest]) == list(range(1000))
        share = n * np.bincount(labels) / 1000
        assert (np.abs(np.bincount(labels[held], minlength=4) - share) < 1).all()
    assert not np.array_equal(held, stratified(labels, n, 1, "test")[0]) and np.array_equal(held, stratified(labels, n, 0, "test")[0])


def test_parts_of_digits_are_disjoint_and_whole():
    data = load_data(SplitsConfig())
    parts = cut_data(data, SplitsConfig())
    assert sum(map(len, parts.values())) == 1797
    rows = [tuple(z.flatten().tolist()) for p in parts.values() for z in p.images]
    assert sorted(rows) == sorted(tuple(z.flatten().tolist()) for z in torch.from_numpy(data["train"][0]))
    fs = fewshot_split(parts["train"], 3, 5, 0)
    assert sorted(fs["base"] + fs["novel"]) == list(range(10)) and len(set(fs["supports"])) == 15
    assert parts["train"].labels[fs["supports"]].tolist() == [c for c in fs["novel"] for _ in range(5)]
    assert cut_data(data, SplitsConfig(seed=1))["train"].cut != parts["train"].cut == cut_data(data, SplitsConfig())["test"].cut


# ---- GaFi's keep-rule


class Told(Generator):
    """A generator of class 0 whose images are only numbers, and a classifier that gives them these probabilities; all later ones are hopeless."""

    trained, classes = [0], ["zero"]

    def __init__(self, p):
        self.p = torch.cat([torch.tensor(p), torch.tensor([[0.0] * (len(p[0]) - 1) + [1.0]]).expand(1000, -1)])

    def sample(self, labels, index, **_):
        return index

    def probs(self, index):
        return self.p[index]


def accepted(p, tau: float, per_class: int, draws: int):
    """What GaFi's rule accepts of candidates with these probabilities."""
    return accept(Pool(Told(p), Scores(Told(p)), 0, {}), keep_rule("confident", tau), per_class, draws)


def test_keep_rule_is_strict_and_needs_the_top_class():
    p = [[0.5, 0.5], [0.75, 0.25], [0.25, 0.75], [0.5625, 0.4375], [0.875, 0.125], [0.75, 0.25]]
    zeros = torch.zeros(6, dtype=torch.int64)
    keep = lambda tau: keep_rule("confident", tau)(None, zeros, Scores(Told(p))(torch.arange(6), zeros)).tolist()
    assert keep(0.75) == [False, False, False, False, True, False]  # above, not at, the threshold
    assert keep(0.5) == [False, True, False, True, True, True]  # p_c = 1/2 is not above 1/2
    assert keep(0.0) == [True, True, False, True, True, True]  # argmax takes the first of equals
    rows, stats = accepted(p, 0.5, 3, 2)
    assert rows["index"].tolist() == [1, 3, 4] and rows["passed"].all() and stats[0]["fallback"] == 0  # the first three accepted, in order
    rows, stats = accepted(p, 0.75, 3, 2)
    assert rows["index"].tolist() == [4, 1, 5] and rows["passed"].tolist() == [True, False, False] and stats[0]["fallback"] == 2  # then the likeliest


def test_keep_rule_of_the_pool_is_gafis():
    p = np.random.default_rng(0).dirichlet([0.3] * 4, 200).astype(np.float32)
    for tau in (0.0, 0.3, 0.9):
        rows, _ = accepted(p.tolist(), tau, 20, draws=10)
        good = np.flatnonzero((p.argmax(1) == 0) & (p[:, 0] > np.float32(tau)))[:20].tolist()
        assert rows["index"][rows["passed"]].tolist() == good


# ---- schedules and addresses


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 100, 1001])
def test_one_cycle_rises_and_falls(steps):
    lr = [one_cycle(s, steps, 0.2) for s in range(steps)]
    assert all(0 <= x <= 0.2 + 1e-12 for x in lr) and sum(lr) > 0 and (steps < 100 or lr[-1] < 1e-3)
    top = int(np.argmax(lr))
    assert lr[: top + 1] == sorted(lr[: top + 1]) and lr[top:] == sorted(lr[top:], reverse=True)
    if steps % 4 == 0:
        assert top == steps // 4 and lr[top] == pytest.approx(0.2 * (1 + math.cos(math.pi * (0.5 / steps) / 0.75)) / 2)
    if steps == 100:
        assert lr[0] == pytest.approx(0.2 / 50) and lr[61] == pytest.approx(0.2 * (1 + math.cos(math.pi * (0.615 - 0.25) / 0.75)) / 2)


def test_addresses_do_not_overlap():
    seeds, streams, steps = (0, 1, 2**31, 2**40), ("gan.z", "gan.z ", "gan", "latent.1.64", "latent.11.64"), (0, 1, 2, 255, 256, 2**32, 2**63)
    words = [rng(s, t, i).integers(2**63, size=64) for s, t, i in itertools.product(seeds, streams, steps)]
    assert len({w for block in words for w in block.tolist()}) == 64 * len(words)  # a shared word of 63 bits would be an overlap
    assert np.array_equal(rng(1, "gan.z", 2).integers(2**63, size=64), rng(1, "gan.z", 2).integers(2**63, size=64))


def test_a_step_has_more_numbers_than_anyone_draws():
    """The step is the counter's top word: 2**192 blocks lie between two steps, so that a long draw never runs into the next step."""
    a, b = rng(0, "test", 0), rng(0, "test", 1)
    later = a.integers(2**63, size=200_000)
    assert not set(b.integers(2**63, size=1000).tolist()) & set(later.tolist())
    x = [randn((20_000,), 0, "test", i) for i in range(2)]
    assert abs(torch.dot(*x).item() / 20_000) < 5 / 20_000**0.5  # uncorrelated to 5 sigma


def test_known_numbers():
    """What stands at an address never changes: sets made long ago are lists of addresses."""
    assert rng(7, "gan.z", 3).integers(2**32, size=3).tolist() == [3960783529, 2177076531, 3991622867]


def test_latents_do_not_depend_on_company():
    y, i = torch.tensor([3, 0, 3, 1, 3]), torch.tensor([BLOCK, 5, 0, 5, 2 * BLOCK + 1])
    z = latents(y, i, 8, seed=0)
    for n in range(5):
        assert torch.equal(latents(y[n : n + 1], i[n : n + 1], 8, seed=0)[0], z[n])
    assert len({tuple(row) for row in z.tolist()}) == 5 and not torch.equal(z, latents(y, i, 8, seed=1))
