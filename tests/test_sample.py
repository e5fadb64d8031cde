"""Sampling: exact counts, addresses, files, scores, and the pictures that look inside a generator."""

import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from synthlit.cli import main
from synthlit.core import SettingError, global_rng, load_json, rng, save_json
from synthlit.gan.models import build_generator
from synthlit.gan.sample import (
    ENOUGH,
    class_counts,
    class_interpolation,
    crossover,
    diagnostics,
    draw,
    judges_of,
    mixed_labels,
    pairs,
    render,
    score,
    score_text,
)
from synthlit.gan.train import GanGenerator
from synthlit.generate import load_set
from synthlit.generator import GaussianFloor, fit_floor, latents, load_generator
from synthlit.splits import Split, load_split

NAMES = ["cat", "dog", "7", "T-shirt/top", "owl"]  # a name that is a number, and not that of its own place
FAMILIES = dict(
    pair=(8, {}),
    dcgan=(8, dict(embed=8, norm="virtualbatch")),
    biggan=(8, dict(shared=8)),
    biggan_deep=(8, dict(shared=8)),
    film=(16, {}),
    r3=(16, {}),
)


def gan(network="pair", classes=5, trained=None) -> GanGenerator:
    """An untrained generator of 32×32 colour images, its norms and tables shaken so that classes differ."""
    width, g = FAMILIES[network]
    with global_rng(1, "test.gan"):
        net = build_generator(network, (3, 32, 32), classes, width, 20, g)
        for m in net.modules():
            if isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight)
            elif isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(std=0.1)
    names = (NAMES * classes)[:classes]
    return GanGenerator(net, names, (3, 32, 32), trained or list(range(classes)), dict(network=network, width=width, z=20, g=g))


@pytest.fixture(scope="module")
def pair() -> GanGenerator:
    return gan()


@pytest.fixture(scope="module")
def real() -> Split:
    """Ten images of each of the five classes, all different."""
    x = torch.from_numpy(rng(0, "test.real").integers(0, 256, (50, 3, 32, 32), dtype="uint8"))
    return Split("noise/val", x, torch.arange(50) % 5, NAMES, "", "")


def test_counts(pair):
    assert class_counts(pair, 15) == dict.fromkeys(range(5), 3)
    assert class_counts(pair, 4, ["owl", "dog"]) == {4: 2, 1: 2} == class_counts(pair, 4, [4, "1"])
    assert class_counts(pair, 3, "7") == {2: 3}  # a name goes before a number
    assert class_counts(pair, None, {"cat": 1, 3: 4}) == {0: 1, 3: 4} == class_counts(pair, 5, {"cat": 1, 3: 4})
    assert class_counts(gan(trained=[0, 4]), 6) == {0: 3, 4: 3}  # balanced over what it was trained on


@pytest.mark.parametrize(
    ("n", "labels", "said"),
    [
        (13, "balanced", "try 10 or 15"),
        (2, "balanced", "try 5"),
        (0, "balanced", "try 5"),
        (-5, "balanced", "multiple of 5"),
        (None, "balanced", "try 5"),
        (3, ["cat", "dog"], "try 2 or 4"),
        (4, ["cta", "dog"], "did you mean 'cat'"),
        (5, ["9"], "no class '9'"),
        (5, [], "at least one class"),
        (4, {"cat": 3}, "labels asks for 3"),
        (None, {"cat": 0}, "at least 1 image"),
        (None, {}, "at least 1 image"),
        (None, {"cat": 1, 0: 2}, "every class once"),
    ],
)
def test_counts_that_cannot_be(pair, n, labels, said):
    with pytest.raises(SettingError, match=said):
        class_counts(pair, n, labels)


def test_untrained_class():
    with pytest.raises(SettingError, match="not trained on class 'dog'"):
        class_counts(gan(trained=[0, 4]), 4, ["cat", "dog"])


@pytest.mark.parametrize("network", FAMILIES)
def test_an_image_does_not_depend_on_its_company(network):
    g = gan(network)
    x, y = draw(g, 15, seed=3)
    assert y.tolist() == [*range(5)] * 3
    for n, labels in ((10, "balanced"), (6, ["owl", "dog"]), (None, {"owl": 1, "cat": 3})):
        some, of = draw(g, n, labels, seed=3)
        for c in of.unique():
            k = min(int((of == c).sum()), 3)
            assert torch.equal(some[of == c][:k], x[y == c][:k])
    assert not torch.equal(draw(g, 15, seed=4)[0], x)


def test_folder_and_parquet(pair, tmp_path):
    x, y = draw(pair, None, {"T-shirt/top": 3, "owl": 2}, seed=1, out=tmp_path / "a", std=0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "a-samples.png"}
    images, labels, _ = load_set(tmp_path / "a", NAMES)
    assert all(torch.equal(images[labels == c], x[y == c]) for c in (3, 4)) and len(images) == 5
    draw(pair, None, {"T-shirt/top": 3, "owl": 2}, seed=1, out=tmp_path / "set.parquet", std=0.5)
    images, labels, names = load_set(tmp_path)
    assert torch.equal(images, x) and torch.equal(labels, y) and names == NAMES
    assert torch.equal(x, pair.sample(labels, [0, 0, 1, 1, 2], seed=1, std=0.5))


def test_sets_never_mix(pair, tmp_path):
    out = tmp_path / "a"
    draw(pair, 5, out=out)
    before = {p: p.read_bytes() for p in out.rglob("*.png")}
    draw(pair, 10, out=out)
    assert len(list(out.rglob("*.png"))) == 10 and all(p.read_bytes() == b for p, b in before.items())
    for more in (dict(n=5), dict(n=10, seed=1), dict(n=10, std=2.0)):
        with pytest.raises(SettingError, match="choose a folder that is new"):
            draw(pair, out=out, **more)
    with pytest.raises(SettingError, match="another generator"):
        draw(gan("film"), 10, out=out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(SettingError, match="other files"):
        draw(pair, 5, out=tmp_path / "mine")


def test_unknown_dial(pair):
    with pytest.raises(SettingError, match="std"):
        draw(pair, 5, stdev=2.0)


@pytest.mark.parametrize("network", FAMILIES)
def test_interpolation_ends_at_its_classes(network):
    """alpha = 1 is y1's own candidates, alpha = 0 is y2 with the same noise; what is between differs from both, and the network is left as it was."""
    g = gan(network)
    x, rows, heads = class_interpolation(g, 6, 5, seed=2)
    y1, y2 = pairs(g.trained, 6, 2)
    x = x.view(5, 6, 3, 32, 32)
    z = latents(y1, torch.arange(6), g.net.z, 2)
    assert torch.equal(x[4], g.sample(y1, torch.arange(6), seed=2)) and torch.equal(x[0], render(g, z, y2))
    assert all(not torch.equal(x[2, j], x[k, j]) for j in range(6) for k in (0, 4))
    assert (rows[0], rows[-1]) == ("y2  0.00", "y1  1.00") and len(rows) == 5 and len(heads) == 6
    assert not any(m._forward_hooks for m in g.net.modules())


def test_the_hook_is_what_film_does_by_itself():
    g = gan("film")
    z, y, other = latents([0, 1, 4], [0, 0, 0], 20, 0), torch.tensor([0, 1, 4]), torch.tensor([3, 0, 2])
    with torch.no_grad():
        own = g.net(z, y, other, 0.3)
        with mixed_labels(g.net, other, torch.full((3,), 0.3)):
            ours = g.net(z, y)
        plain = g.net(z, y)
    assert torch.allclose(own, ours, atol=1e-6) and not torch.allclose(own, plain, atol=1e-3)


def test_hooks_go_when_the_network_fails(pair):
    with pytest.raises(RuntimeError, match="stop"), mixed_labels(pair.net, torch.tensor([0]), torch.ones(1)):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in pair.net.modules())


def test_pairs():
    y1, y2 = pairs([0, 2, 4], 9, 1)
    assert (y1 != y2).all() and sorted(y1.tolist()) == [0, 0, 0, 2, 2, 2, 4, 4, 4] and set(y2.tolist()) <= {0, 2, 4}
    with pytest.raises(SettingError, match="two classes"):
        pairs([3], 4)


def test_crossover(pair, real):
    x, rows, heads = crossover(pair, real, 7, 1)
    y1, y2 = pairs(pair.trained, 7, 1)
    x = x.view(8, 7, 3, 32, 32)
    assert rows == ["x1", "x2", "", "(y1, z1)", "(y1, z2)", "(y1, 0)", "(y2, z1)", "(y2, z2)"] and len(heads) == 7
    for row, y in ((x[0], y1), (x[1], y2)):
        assert all(any(torch.equal(a, b) for b in real.images[real.labels == c]) for a, c in zip(row, y))
    assert len({a.numpy().tobytes() for a in x[:2].flatten(0, 1)}) == 14 and (x[2] == 255).all()  # another pair of images in every column
    i = torch.arange(7)
    z1, z2 = (latents(y, i, 20, 1) for y in (y1, y2))
    assert torch.equal(x[3], pair.sample(y1, i, seed=1)) and torch.equal(x[7], pair.sample(y2, i, seed=1))
    assert torch.equal(x[4], render(pair, z2, y1)) and torch.equal(x[5], render(pair, 0 * z1, y1)) and torch.equal(x[6], render(pair, z1, y2))
    assert torch.equal(crossover(pair, None, 7, 1)[0], x[3:].flatten(0, 1))


def test_crossover_with_few_real_images(pair, real):
    """Two images of some classes, none of others: they come again, and white stands for none."""
    few = real.take([i for i in range(10) if i % 5 < 3])
    x = crossover(pair, few, 12)[0].view(8, 12, -1)[:2]
    y = torch.stack(pairs(pair.trained, 12))
    assert (x[y > 2] == 255).all() and not (x[y < 3] == 255).all(1).any()


def test_nothing_to_look_into(real):
    floor = fit_floor(real.images, real.labels, NAMES, 1, 4)
    assert isinstance(floor, GaussianFloor)
    with pytest.raises(SettingError, match="no network"):
        class_interpolation(floor)
    with pytest.raises(SettingError, match="no embeddings"), mixed_labels(nn.Linear(1, 1), torch.tensor([0]), torch.ones(1)):
        pass


def test_diagnostics_write_three_pictures(pair, real, tmp_path):
    paths = diagnostics(pair, tmp_path, real, 4, name="g-")
    assert [p.name for p in paths] == ["g-class_interp.png", "g-crossover.png", "g-generated.png"]
    assert all(min(Image.open(p).size) > 100 for p in paths)


def test_scores_say_when_images_are_few():
    s = dict(frechet=1.0, kid=0.1, agreement=0.5, coverage=0.5, n=ENOUGH - 1, n_val=100)
    assert "9,999 images are few" in score_text(s) and "few" not in score_text(dict(s, n=ENOUGH)) and "FID to val" not in score_text(s)
    assert "FID to val" in score_text(dict(s, fid=30.0)) and "trained on val" in score_text(s, True)


def test_judges(tiny_run, tiny_copy):
    """A run's generator is judged by that run's val; one that has seen val says so; one alone has no judges."""
    val, classifier, seen = judges_of(tiny_run.run / "gan-seed0")
    assert val.digest == load_split(tiny_run.run / "splits", "val").digest and not seen
    g = load_generator(tiny_run.run / "gan-seed0")
    s = score(g, class_counts(g, 100), val, classifier)
    assert s["n"] == 100 and 0 <= s["coverage"] <= 1 and s == score(g, class_counts(g, 100), val, classifier)
    assert s != score(g, class_counts(g, 100), val, classifier, std=0.2)
    m = load_json(tiny_copy / "gan-seed0" / "manifest.json")
    save_json(tiny_copy / "gan-seed0" / "manifest.json", dict(m, saw=[*m["saw"], val.digest]))
    assert judges_of(tiny_copy / "gan-seed0")[2] and judges_of(tiny_copy / "fewshot")
    shutil.rmtree(tiny_copy / "splits")
    assert judges_of(tiny_copy / "gan-seed0") is None and judges_of(tiny_copy) is None
    with pytest.raises(SettingError, match="at least 100"):
        score(g, class_counts(g, 50), val, classifier, inception="weights.pth")


def test_command(tiny_run, tmp_path, capsys):
    """Files of two kinds, labels, diagnostics and scores; an image is the same whatever it came with."""
    gan = str(tiny_run.run / "gan-seed0")
    assert main(["sample", gan, "--n", "2", "--out", str(tmp_path), "--write", "png", "--diagnostics", "--seed", "5"]) == 0
    names = {"gan-seed0", *(f"gan-seed0-{k}.png" for k in ("samples", "class_interp", "crossover", "generated"))}
    assert {p.name for p in tmp_path.iterdir()} == names
    out = capsys.readouterr().out
    assert "coverage of val" in out and "20 images are few" in out and "crossover.png" in out
    args = ["sample", gan, "--labels", "3=1", "8=2", "--out", str(tmp_path / "some"), "--write", "parquet", "--seed", "5", "--no-scores"]
    assert main(args) == 0 and "coverage" not in capsys.readouterr().out
    (x, y, _classes), (whole, labels, _) = load_set(tmp_path / "some"), load_set(tmp_path / "gan-seed0")
    assert sorted(y.tolist()) == [3, 8, 8] and torch.equal(x[y == 8], whole[labels == 8])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--total", "44"], "try 40 or 50"),
        (["-n", "0"], "n = 0"),
        (["-n", "2", "--total", "20"], "say one of them"),
        (["--labels", "three"], "no class 'three'"),
        (["--labels", "3=1", "3=2"], "twice"),
        (["-n", "1", "--inception", "w.pth"], "at least 100"),
        (["--total", "100", "--inception", "w.pth"], "w.pth"),
        (["--device", "cuda:7"], "cuda:7"),
    ],
)
def test_command_refuses(tiny_run, tmp_path, capsys, args, said):
    assert main(["sample", str(tiny_run.run / "gan-seed0"), "--out", str(tmp_path), *args]) == 1
    assert said in capsys.readouterr().err


def test_command_without_a_run(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run.run / "gan-seed0", tmp_path / "g", ignore=shutil.ignore_patterns("*.json"))
    assert main(["sample", str(tmp_path / "g"), "--out", str(tmp_path), "--diagnostics"]) == 0
    assert "lies in no run" in capsys.readouterr().out and (tmp_path / "g-crossover.png").exists()
    assert main(["sample", str(tmp_path / "g"), "--out", str(tmp_path), "--inception", "w.pth"]) == 1
