"""Transfer: what is compared differs in its beginning only, the kept backbone is what other libraries load, and the target's test stays shut."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn

from synthlit.classifier import CPU, Classifier, ClassifierConfig, load_classifier, new_net
from synthlit.core import (
    DamagedFile,
    SettingError,
    Stage,
    digest,
    enter_folder,
    find_inputs,
    load_json,
    load_table,
    load_tensors,
    resolve,
    rng,
    run_machine,
    save_json,
    small_inputs,
    small_stage,
    stage_identity,
)
from synthlit.data import DataError
from synthlit.generate import Maker, Rows, addresses, write_shards
from synthlit.generator import fit_floor
from synthlit.imported import ImageSet
from synthlit.networks import build_net
from synthlit.splits import SplitsConfig, cut_data, load_data, load_split, openings
from synthlit.transfer import (
    KINDS_OF_ROWS,
    TRANSFER_PRESETS,
    Row,
    Task,
    TransferConfig,
    backbone_state,
    beginning,
    brought,
    few_of,
    images_for,
    in_turn,
    load_backbone,
    logistic,
    network_shape,
    of_generator,
    of_set,
    pretrain,
    probe,
    put_backbone,
    run_transfer,
    save_backbone,
    spread_order,
    task_of,
    transfer_one,
)

SMALL = dict(width=4, pretrain=dict(epochs=1), steps=4, validate_every=2, rates=[1.0, 0.1], l2=[0.1, 0.01], seeds=[0, 1], sizes=[10, 20, 40])


@pytest.fixture(scope="module")
def base_run(home, tmp_path_factory):
    """Splits, a set made elsewhere as a generator, and a plain set drawn from it."""
    run = tmp_path_factory.mktemp("transfer") / "run"
    run.mkdir()
    run_machine(run, "cpu")
    small_inputs(run, "transfer")
    assert sorted(p.name for p in run.iterdir() if p.is_dir() and p.name != "locks") == ["splits"]  # the floor needs no generator
    small_stage(run, "imported")
    small_stage(run, "generate", inputs={"generator": "imported"}, per_class=6)
    return run


@pytest.fixture
def run(base_run, tmp_path):
    return shutil.copytree(base_run, tmp_path / "run")


def opened(run, name="transfer", **settings) -> Stage:
    """The stage, open, with the settings of SMALL."""
    cfg = resolve(TransferConfig, TRANSFER_PRESETS["tiny"], SMALL, settings)
    machine, found = run_machine(run), find_inputs(run, "transfer", {}, name)
    identity = stage_identity("transfer", cfg, run, found, machine)
    enter_folder(run / name, identity, cfg)
    return Stage("transfer", run, run / name, cfg, found, identity, None, machine)


@pytest.fixture(scope="module")
def digits():
    return cut_data(load_data(SplitsConfig()), SplitsConfig())


@pytest.fixture(scope="module")
def floor(digits):
    t = digits["train"]
    return fit_floor(t.images, t.labels, t.classes, 1, 8)


def task(digits, supplies, **settings) -> Task:
    cfg = resolve(TransferConfig, TRANSFER_PRESETS["tiny"], SMALL, settings)
    return Task(cfg, digits["train"], digits["val"], few_of(digits["train"], 5, 0), digits["val"], {s.name: s for s in supplies})


# ---- the layout of others


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_torchvision_resnet_misses_nothing_but_its_head(library, name):
    import torchvision

    if library == "timm":
        pytest.importorskip("timm")
    with torch.device("meta"):
        state = backbone_state(build_net(f"{library}:{name}", 3, 7))
        theirs = torchvision.models.get_model(name, weights=None)
        missing, unexpected = theirs.load_state_dict(state, strict=False, assign=True)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    assert all(state[k].shape == v.shape for k, v in theirs.state_dict().items() if not k.startswith("fc."))


def test_the_file_is_read_by_torchvision_timm_and_a_detector(tmp_path):
    timm = pytest.importorskip("timm")
    import torchvision
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    recipe = ClassifierConfig(network="torchvision:resnet18")
    c = Classifier(new_net(recipe, 3, 4), list("abcd"), (3, 32, 32), recipe, CPU)
    for m in c.net.modules():  # statistics that a fresh network does not have
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
    state = load_file(save_backbone(tmp_path, c) / "backbone.safetensors")
    card = load_json(tmp_path / "backbone.json")
    x = torch.from_numpy(rng(0, "test").integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    mean, std = [torch.tensor(card[k]).view(3, 1, 1) for k in ("mean", "std")]
    theirs, other = torchvision.models.resnet18(weights=None), timm.create_model("resnet18", pretrained=False)
    for net in (theirs, other):
        missing, unexpected = net.load_state_dict(state, strict=False)
        assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
        net.fc = nn.Identity()
        with torch.no_grad():
            assert torch.allclose(net.eval()((x / 255 - mean) / std), c.features(x), atol=1e-4)  # normalised as the card says
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d).body
    missing, unexpected = body.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    assert torch.equal(body["layer4"][1].conv2.weight, c.net.body.layer4[1].conv2.weight)
    assert (card["layout"], card["size"], card["features"], card["without"], card["classes"]) == ("torchvision", [32, 32], 512, "head", list("abcd"))


@pytest.mark.parametrize("network", ["small", "fast", "resnet8", "resnet18"])
def test_our_own_networks_come_back_under_a_new_head(network, tmp_path):
    recipe = ClassifierConfig(network=network, width=4)
    c = Classifier(new_net(recipe, 1, 3), list("abc"), (1, 8, 8), recipe, CPU)
    net = load_backbone(save_backbone(tmp_path, c), 6).eval()
    x = torch.randn(3, 1, 8, 8)
    assert (
        net(x).shape == (3, 6) and torch.equal(net.features(x), c.net.features(x)) and load_json(tmp_path / "backbone.json")["layout"] == "synthlit"
    )


def test_a_module_of_ones_own_keeps_its_names(monkeypatch, tmp_path):
    import sys
    import types

    mine = types.ModuleType("mine_transfer")
    mine.Plain = lambda channels, classes: nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 9), nn.ReLU(), nn.Linear(9, classes))
    monkeypatch.setitem(sys.modules, "mine_transfer", mine)
    recipe = ClassifierConfig(network="mine_transfer:Plain")
    c = Classifier(new_net(recipe, 1, 3), list("abc"), (1, 8, 8), recipe, CPU)
    assert sorted(backbone_state(c.net)) == ["net.1.bias", "net.1.weight"]
    net, x = load_backbone(save_backbone(tmp_path, c), 5), torch.randn(2, 1, 8, 8)
    assert net(x).shape == (2, 5) and torch.equal(net.features(x), c.net.features(x))


def test_another_network_and_a_damaged_file_are_refused(tmp_path):
    small, other = new_net(ClassifierConfig(width=4), 1, 3), new_net(ClassifierConfig(width=8), 1, 3)
    with pytest.raises(SettingError, match="another network"):
        put_backbone(other, backbone_state(small))
    recipe = ClassifierConfig(width=4)
    folder = save_backbone(tmp_path, Classifier(small, list("abc"), (1, 8, 8), recipe, CPU))
    raw = bytearray((folder / "backbone.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "backbone.safetensors").write_bytes(raw)
    with pytest.raises(DamagedFile, match="backbone.safetensors"):
        load_backbone(folder, 3)


# ---- the probe


def test_the_logistic_regression_is_scikit_learns():
    g = rng(0, "test")
    z, y = torch.from_numpy(g.normal(size=(200, 6))), torch.from_numpy(g.integers(0, 3, 200))
    z[:, 0] += y
    for l2 in (0.001, 0.1, 1.0):
        w, b = logistic(z, y, 3, l2)
        ref = LogisticRegression(C=1 / (200 * l2), tol=1e-10, max_iter=1000).fit(z.numpy(), y.numpy())
        assert np.allclose(w.numpy(), ref.coef_, atol=2e-4) and np.allclose((b - b.mean()).numpy(), ref.intercept_ - ref.intercept_.mean(), atol=2e-4)


def test_the_penalty_is_chosen_on_val_and_the_spread_is_folded_in():
    g = rng(1, "test")
    f, f_val = [torch.from_numpy(g.normal(3, 5, (n, 4))).float() for n in (60, 40)]
    f[:, 3] = f_val[:, 3] = 7.0  # a feature that says nothing must not divide by zero
    y, y_val = (f[:, 0] > 3).long(), (f_val[:, 0] > 3).long()
    p = probe(f, y, f_val, y_val, 2, [0.01, 10.0, 1.0])
    right = ((f_val @ p["w"].T + p["b"]).argmax(1) == y_val).float().mean().item()
    assert abs(right - p["val"]) < 1e-6 and torch.isfinite(p["w"]).all()
    assert p["l2"] == max(k for k, v in p["tried"].items() if v == p["val"])  # of equals the stronger


# ---- images by number


def test_every_beginning_of_a_set_holds_all_classes_alike():
    y = rng(0, "test").permutation(np.repeat(np.arange(4), [9, 20, 20, 31]))
    order = spread_order(y, 3)
    assert sorted(order) == list(range(80))
    for n in range(1, 36):
        assert np.ptp(np.bincount(y[order[:n]], minlength=4)) <= 1
    assert np.array_equal(order, spread_order(y, 3)) and not np.array_equal(order, spread_order(y, 4))


def test_smaller_sets_are_the_beginning_of_larger_ones(digits, floor, tmp_path):
    t = digits["train"]
    y, i = addresses(floor.trained, 9)
    write_shards(tmp_path, Rows([Maker(floor)], y, i), 40)
    cfg = TransferConfig()
    uneven = ImageSet(t.images[:57], t.labels[:57], t.classes)
    for s in (of_generator("floor", floor, 0), of_set("set", tmp_path, 0, (1, 8, 8), cfg), of_generator("mine", uneven, 0)):
        x, labels = s.first(s.total or 90)
        assert len(labels) == (s.total or 90) and (s.total in (None, 90, 57))
        for n in (1, 13, 40, 57):
            small, ys = s.first(n)
            assert torch.equal(small, x[:n]) and torch.equal(torch.as_tensor(ys), torch.as_tensor(labels)[:n])


def test_a_streamed_set_has_the_images_of_the_set_in_memory(floor, tmp_path):
    y, i = addresses(floor.trained, 5)
    write_shards(tmp_path, Rows([Maker(floor)], y, i), 20)
    kept = of_set("set", tmp_path, 1, (1, 8, 8), TransferConfig())
    streamed = of_set("set", tmp_path, 1, (3, 12, 12), TransferConfig(stream=True, rgb=True, fit="pad", size=12))
    source, (x, labels) = streamed.first(23), kept.first(23)
    assert not streamed.whole and len(source) == 23 and source.shape == (3, 12, 12)
    source.workers = 0
    got = list(source.batches(np.arange(23), 23))
    by = lambda images: sorted(v.numpy().tobytes() for v in images)
    assert by(got[0][0]) == by(brought(x, (3, 12, 12), "pad")) and sorted(got[0][1].tolist()) == sorted(labels.tolist())


def test_a_set_is_drawn_once_and_not_at_all_when_done(digits, floor):
    asked = []
    s = of_generator("floor", floor, 0)
    t = task(digits, [s._replace(first=lambda n: (asked.append(n), s.first(n))[1])], rows=list(KINDS_OF_ROWS))
    rows = t.rows()
    given = {r.label: d for r, d in in_turn(t, rows, lambda r: False)}
    assert asked == [40] and given["scratch"] is None and len(given["real + synthetic 20 (floor)"]) == 1079 + 20
    assert torch.equal(given["synthetic 10 (floor)"].images, s.first(10)[0]) and len({r.stem(0) for r in rows}) == len(rows) == 2 + 2 * 3
    assert all(d is None for _, d in in_turn(t, rows, lambda r: True)) and asked == [40]


def test_sizes_beyond_the_set_are_named(digits):
    t = digits["train"]
    s = of_generator("mine", ImageSet(t.images[:30], t.labels[:30], t.classes), 0)
    with pytest.raises(SettingError, match=r"transfer.sizes = \[10, 20, 40\]: mine holds 30 images"):
        task(digits, [s]).rows()
    assert [r.n for r in task(digits, [s], sizes=None).rows() if r.source] == [7, 15, 30]


# ---- the same for all rows


def test_rows_differ_in_the_body_alone(digits, floor, tmp_path):
    s = of_generator("floor", floor, 0)
    t = task(digits, [s])
    row = t.rows()[-1]
    pretrain(t, row, 1, images_for(t, row, s.first(40)), tmp_path)
    a, b = beginning(t, Row("scratch"), 1, tmp_path, CPU).state_dict(), beginning(t, row, 1, tmp_path, CPU).state_dict()
    kept = load_tensors(tmp_path / "backbone.safetensors")[0]
    assert all(torch.equal(a[k], b[k]) for k in ("head.weight", "head.bias")) and all(torch.equal(b[f"body.{k}"], v) for k, v in kept.items())
    assert not torch.equal(a["body.2.0.weight"], b["body.2.0.weight"])
    fresh = new_net(replace(t.after, seed=1), 1, 10).state_dict()
    assert all(torch.equal(a[k], fresh[k]) for k in fresh)  # scratch is the untrained network of the recipe


def test_the_price_of_pretraining_is_stated(digits, floor):
    s = of_generator("floor", floor, 0)
    alike, passes = [task(digits, [s], budget=b, pretrain=dict(epochs=4, batch=10)) for b in ("steps", "epochs")]
    assert [alike.steps_before(r) for r in alike.rows()] == [0] + 4 * [4 * 107]
    assert [passes.steps_before(r) for r in passes.rows()] == [0, 4 * 107, 4, 8, 16]


class Killed(Exception):
    pass


def stop_at(n):
    seen = []

    def track(it, total, start, desc):
        for i in it:
            seen.append(i)
            if len(seen) == n:
                raise Killed
            yield i

    return track


def test_a_killed_row_comes_to_the_same_numbers_and_a_finished_one_is_not_repeated(digits, floor, tmp_path):
    s = of_generator("floor", floor, 0)
    t = task(digits, [s])
    row = t.rows()[-1]
    data = images_for(t, row, s.first(40))
    whole = transfer_one(t, row, 0, data, tmp_path / "a")
    assert t.steps_before(row) == 16
    for n in (5, 18, 3):
        with pytest.raises(Killed):
            transfer_one(t, row, 0, data, tmp_path / "b", track=stop_at(n))
    assert transfer_one(t, row, 0, data, tmp_path / "b") == whole
    for f in ("backbone", "probe", "tune"):
        a, b = [load_tensors(tmp_path / k / f"{f}.safetensors")[0] for k in "ab"]
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert transfer_one(t, row, 0, None, tmp_path / "b", track=stop_at(1)) == whole
    assert whole["rate"] in t.cfg.rates and whole["l2"] in t.cfg.l2 and 0 <= whole["source_val"] <= 1


# ---- the stage


def test_the_stage(run):
    stage = opened(run)
    result = run_transfer(stage)
    lines = load_table(stage.dir / "scores.parquet").to_pylist()
    labels = ["scratch", "real 1079", *[f"synthetic {n} ({s})" for s in ("generate", "floor") for n in (10, 20, 40)]]
    assert [r["label"] for r in result["transfer"]] == labels and len(lines) == 2 * len(labels)
    assert result["n_target"] == 50 and result["copies"] == 0 and result["sources"] == {"generate": 60, "floor": None}
    opening = openings(result["test_digest"])
    assert [o["who"] for o in opening].count("run/transfer") == 1 and result["test_digest"] == load_json(run / "splits" / "result.json")["digests"][
        "test"
    ]
    by = {r["label"]: r for r in result["transfer"]}
    for how in ("probe", "tune"):
        for label in labels:
            tests, zero = [[r[f"{how}_test"] for r in lines if r["label"] == k] for k in (label, "scratch")]
            assert abs(by[label][how] - np.mean(tests)) < 1e-9 and abs(by[label][f"{how}_gain"] - np.mean(tests) + np.mean(zero)) < 1e-6
            assert by[label][f"{how}_low"] <= by[label][how] <= by[label][f"{how}_high"]
    cards = {p.parent.name: load_json(p) for p in (stage.dir / "backbones").glob("*/backbone.json")}
    assert len(cards) == 7 and {c["seed"] for c in cards.values()} == {0}
    train = load_split(run / "splits", "train")
    assert cards["real-1079-seed0"]["saw"] == [train.digest] == cards["synthetic-10-floor-seed0"]["saw"]
    assert load_classifier(stage.dir).classes == train.classes
    manifest = load_json(stage.dir / "manifest.json")
    assert not [f for f in manifest["artefacts"] if "times" in f or "checkpoints" in f] and not (stage.dir / "checkpoints").exists()
    assert set(load_json(stage.dir / "times.json")) == set(labels) - {"scratch"}
    assert train.digest in manifest["saw"]


def test_a_killed_stage_goes_on_to_the_same_digest(run, tmp_path, monkeypatch):
    import synthlit.transfer as module

    some = dict(seeds=[0], rates=[1.0], sources=["generate"], floor=False, rows=["synthetic"])
    other = shutil.copytree(run, tmp_path / "other" / "run")
    run_transfer(opened(other, **some))
    trained, real = [], module.train_classifier

    def train(*a, **k):
        trained.append(k.get("net") is None)
        if len(trained) == 4:
            raise Killed
        return real(*a, **k)

    monkeypatch.setattr(module, "train_classifier", train)
    with pytest.raises((Killed, KeyboardInterrupt)):
        run_transfer(opened(run, **some))
    before = len(list((run / "transfer" / "checkpoints").glob("*/job.json")))
    run_transfer(opened(run, **some))
    assert before >= 1 and len(trained) < 4 + 7  # four rows have seven trainings
    a, b = [load_json(r / "transfer" / "manifest.json") for r in (run, other)]
    assert a["artefacts"] == b["artefacts"] and a["digest"] == b["digest"]
    assert len(openings(load_json(run / "splits" / "result.json")["digests"]["test"])) >= 1


def write_npz(path, images, labels):
    np.savez(path, train_images=images, train_labels=labels)
    return str(path)


@pytest.fixture
def upside_down(tmp_path):
    """Digits upside down, in colour, with 10 pixels a side."""
    x, y = load_data(SplitsConfig())["train"]
    x = np.pad(x[:400, 0, ::-1], ((0, 0), (1, 1), (1, 1)))
    return write_npz(tmp_path / "upside.npz", np.stack([x, x, 255 - x], 3), y[:400])


def test_another_target_has_a_cut_and_a_sealed_test_of_its_own(run, upside_down):
    some = dict(seeds=[0], rates=[1.0], sources=["imported"], floor=False, rows=["real"], target=upside_down, per_class=3)
    with pytest.raises(SettingError, match="transfer.rgb = False: the synthetic images are grey"):
        task_of(opened(run, **some))
    with pytest.raises(SettingError, match="transfer.fit = 'refuse': the images of .* 10×10 pixels, the network sees 8×8"):
        task_of(opened(run, **some, rgb=True))
    stage = opened(run, **some, rgb=True, fit="resize")
    result = run_transfer(stage)
    facts = load_json(stage.dir / "target" / "facts.json")
    assert result["shape"] == [3, 8, 8] and result["n_target"] == 30 and result["n_test"] == facts["sizes"]["test"] == 80
    assert result["test_digest"] != load_json(run / "splits" / "result.json")["digests"]["test"] and len(openings(result["test_digest"])) == 1
    with pytest.raises(SettingError, match="sealed"):
        load_split(stage.dir / "target", "test")
    manifest = load_json(stage.dir / "manifest.json")
    assert set(manifest["cuts"]) == {"digits", "upside"} and load_split(stage.dir / "target", "train").digest in manifest["saw"]


def test_the_data_of_the_source_under_another_name_is_refused(run, tmp_path):
    x, y = load_data(SplitsConfig())["train"]
    with pytest.raises(SettingError, match="that is the data set of these splits; say target = 'same'"):
        task_of(opened(run, target="digits"))
    copied = write_npz(tmp_path / "mine.npz", x[:, 0], y)
    with pytest.raises(DataError, match="are among the training images of digits/train"):
        task_of(opened(run, target=copied))
    assert not (run / "transfer" / "target").exists()
    clean = load_split(run / "splits", "val")
    few = write_npz(tmp_path / "one.npz", clean.images[:10, 0].numpy(), np.arange(10))  # one image a class: no val can be cut
    with pytest.raises(SettingError, match="transfer.target = .*one.npz.*cannot be held out"):
        task_of(opened(run, target=few))


def test_who_has_seen_the_judge_is_refused(run):
    m = load_json(run / "generate" / "manifest.json")
    for part in ("val", "test"):
        seen = load_json(run / "splits" / "result.json")["digests"][part]
        save_json(run / "generate" / "manifest.json", {**m, "saw": [*m["saw"], seen]})
        with pytest.raises(SettingError, match=f"generate was trained on the {part} images"):
            task_of(opened(run))


def test_what_a_source_has_seen_is_on_the_card(run):
    m = load_json(run / "generate" / "manifest.json")
    save_json(run / "generate" / "manifest.json", {**m, "saw": ["abc"]})
    t = task_of(opened(run))[0]
    train = load_split(run / "splits", "train").saw
    assert t.saw["generate"] == ["abc", *train] and t.saw["floor"] == train  # what its generator has seen, a set has seen


def test_images_of_other_classes_or_another_size_are_refused(run, floor, digits, tmp_path):
    y, i = addresses(floor.trained, 4)
    files = sorted((run / "generate").glob("train-*.parquet"))
    for f in files:
        f.unlink()
    t = digits["train"]
    wide = ImageSet(torch.from_numpy(np.pad(t.images[:60].numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))), t.labels[:60], t.classes)
    write_shards(run / "generate", Rows([Maker(wide)], t.labels[:10], torch.zeros(10, dtype=torch.long)), 40)
    row = next(r for r in task_of(opened(run, sizes=[2, 4, 8]))[0].rows() if r.source == "generate")
    for cfg in (dict(), dict(stream=True)):
        made = task_of(opened(run, sources=["generate"], floor=False, sizes=[2, 4, 8], **cfg))[0]
        with pytest.raises(SettingError, match="1×10×10 .* the network sees 1×8×8"):
            images_for(made, row, made.supplies["generate"].first(4))
    for f in (run / "generate").glob("train-*.parquet"):
        f.unlink()
    floor.classes, kept = [f"digit {c}" for c in floor.classes], floor.classes
    write_shards(run / "generate", Rows([Maker(floor)], y, i), 40)
    floor.classes = kept
    with pytest.raises(SettingError, match="transfer.sources.*generate has the classes"):
        task_of(opened(run))


@pytest.mark.parametrize(
    "settings,words",
    [
        (dict(sources=["generte"]), ["transfer.sources", "'generate'"]),
        (dict(sources=["imported"], stream=True), ["transfer.stream", "is no set of files"]),
        (dict(sizes=[10, 40, 20]), ["transfer.sizes", "[10, 20, 40]"]),
        (dict(sizes=[10, 10, 20]), ["transfer.sizes", "twice"]),
        (dict(sizes=[10, 20]), ["at least 3 sizes"]),
        (dict(seeds=[1, 1]), ["transfer.seeds", "twice"]),
        (dict(rates=[1.0, 1.0]), ["transfer.rates"]),
        (dict(rows=["synthetic", "reel"]), ["transfer.rows", "'real'"]),
        (dict(rows=["real + synthetic"], stream=True), ["transfer.stream"]),
        (dict(per_class=200), ["transfer.rows", "smaller per_class"]),
        (dict(recipe="tinny"), ["'tinny'", "'tiny'"]),
        (dict(network="resnet21"), ["6n+2"]),
        (dict(network="torchvision:resnet18"), ["3 channels", "rgb = True"]),
        (dict(network="torchvision:resnet19"), ["did you mean 'resnet1"]),
        (dict(tune=dict(network="fast")), ["transfer.tune", "transfer.network"]),
        (dict(pretrain=dict(epoch=3)), ["'epoch'", "'epochs'"]),
        (dict(pretrain=dict(lr="fast")), ["lr"]),
        (dict(cut=dict(val=0.2)), ["transfer.cut", "same"]),
        (dict(target="cifar10", cut=dict(size=8)), ["transfer.cut", "transfer.size"]),
        (dict(target="cifar10", cut=dict(vall=0.2)), ["transfer.cut", "'vall'", "'val'"]),
        (dict(target="digit"), ["transfer.target", "'digits'"]),
        (dict(target="./no/such/folder"), ["transfer.target", "no/such/folder"]),
        (dict(size=16), ["transfer.fit", "8×8"]),
    ],
    ids=lambda x: str(x)[:50] if isinstance(x, dict) else "",
)
def test_bad_settings_are_named(run, settings, words):
    with pytest.raises(SettingError) as e:
        task_of(opened(run, **settings))
    assert not [w for w in words if w not in str(e.value)], str(e.value)


def test_without_synthetic_images_the_stage_says_so(home, base_run, tmp_path):
    shutil.copytree(base_run / "splits", tmp_path / "run" / "splits")
    shutil.copy(base_run / "run.json", tmp_path / "run")
    with pytest.raises(SettingError, match="no other synthetic images"):
        task_of(opened(tmp_path / "run", floor=False))
    assert list(task_of(opened(tmp_path / "run"))[0].supplies) == ["floor"]


def test_shapes_are_brought_only_where_it_was_said():
    x = torch.from_numpy(rng(0, "test").integers(0, 256, (2, 1, 8, 8), dtype=np.uint8))
    assert brought(x, (1, 8, 8), "refuse") is x
    padded = brought(x, (3, 10, 10), "pad")
    assert torch.equal(padded[:, 2, 1:9, 1:9], x[:, 0]) and int(padded.sum()) == 3 * int(x.sum())
    assert network_shape(TransferConfig(rgb=True), (1, 8, 8), (1, 8, 8)) == (3, 8, 8)
    with pytest.raises(SettingError, match="8×8"):
        network_shape(TransferConfig(size=16), (1, 8, 8), (1, 8, 8))


def test_few_images_are_nested_and_the_same_for_all(digits):
    a, b = few_of(digits["train"], 2, 0), few_of(digits["train"], 5, 0)
    of = lambda s: {x.numpy().tobytes() for x in s.images}
    assert of(a) < of(b) and torch.bincount(b.labels).tolist() == [5] * 10 and few_of(digits["train"], None, 0) is digits["train"]
    assert a.digest != b.digest and digits["train"].digest in a.saw and a.digest == digest(a.images, a.labels)


def test_the_published_row_is_a_curve_over_millions():
    cfg = resolve(TransferConfig, TRANSFER_PRESETS["published"])
    cfg.check(dict(shape=(3, 32, 32), smallest=400))
    assert cfg.sizes == [1200000, 2400000, 3600000] and cfg.recipes()[0].network == "torchvision:resnet50" and Path(cfg.target).name == "same"
