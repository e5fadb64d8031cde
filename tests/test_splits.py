"""The cut: sizes of the published systems, few-shot protocols, digests, export and import, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from synthlit.cli import main
from synthlit.core import DamagedFile, SettingError, load_json, read_manifest, resolve, run_machine, save_json, save_table, small_stage
from synthlit.data import SETS, DataError, encode, load_arrays
from synthlit.evaluate import refuse_contamination
from synthlit.plan import plan, preflight, read_params
from synthlit.splits import (
    SPLITS_PRESETS,
    SplitsConfig,
    cut_data,
    cut_labels,
    data_facts,
    export_split,
    fewshot_of,
    import_split,
    kshot,
    load_data,
    load_split,
    merge,
    open_test,
    openings,
    published_fewshot,
    read_part,
    sources,
)

# ---- sizes


def balanced(*per: int, classes: int) -> dict:
    return {p: np.repeat(np.arange(classes), n) for p, n in zip(("train", "test"), per)}


GAFI = {  # images per class in train and test, classes; sizes; class_samples: tables 1.3 and 6.5 of the published system
    "cifar10": (5000, 1000, 10, (40000, 10000, 10000), 4000),
    "cifar100": (500, 100, 100, (40000, 10000, 10000), 400),
    "fashion_mnist": (6000, 1000, 10, (50000, 10000, 10000), 5000),
    "cinic10": (18000, 9000, 10, (170000, 10000, 90000), 17000),
}


@pytest.mark.parametrize("name", GAFI)
@pytest.mark.parametrize("seed", [0, 3])
def test_gafi_sizes(name, seed):
    train, test, classes, sizes, class_samples = GAFI[name]
    ys = balanced(train, test, classes=classes)
    rows = cut_labels(ys, SplitsConfig(name, seed=seed), SETS[name].n_val)
    assert tuple(len(i) for _, i in rows.values()) == sizes and sizes[0] // classes == class_samples
    assert (np.bincount(ys["train"][rows["val"][1]]) == sizes[1] // classes).all()  # stratified
    assert not set(rows["train"][1]) & set(rows["val"][1]) and [p for p, _ in rows.values()] == ["train", "train", "test"]
    facts = data_facts(SplitsConfig(name))
    assert (facts["n_train"], facts["n_val"], facts["n_test"]) == sizes


def test_dermamnist_keeps_its_official_parts(tmp_path):
    n = (7007, 1003, 2005)
    a = {f"{p}_images": np.zeros((m, 2, 2, 3), np.uint8) for p, m in zip(("train", "val", "test"), n)}
    np.savez_compressed(tmp_path / "dermamnist.npz", **a, **{f"{p}_labels": np.arange(m)[:, None] % 7 for p, m in zip(("train", "val", "test"), n)})
    cfg = SplitsConfig("dermamnist", root=str(tmp_path), download=False, size=4)
    parts = cut_data(load_data(cfg), cfg)
    assert tuple(map(len, parts.values())) == n and len(parts["train"]) // 7 == 1001 and parts["val"].images.shape[1:] == (3, 4, 4)
    facts = data_facts(cfg)
    assert (facts["n_train"], facts["n_val"], facts["n_test"]) == n and facts["shape"] == (3, 4, 4)
    cfg.val = 0.1  # asked for: train and val are pooled and cut again
    assert tuple(map(len, cut_data(load_data(cfg), cfg).values())) == (7209, 801, 2005)


def test_halves_that_share_no_class_are_pooled():
    ys = dict(train=np.repeat(np.arange(964), 20), test=np.repeat(np.arange(964, 1623), 20))  # Omniglot
    assert sources(ys, SplitsConfig("omniglot")) == dict(train=["train", "test"])
    y = np.concatenate([*ys.values()])
    rows = cut_labels(dict(train=y), SplitsConfig("omniglot"))
    assert [(np.bincount(y[i]) == n).all() for n, (_, i) in zip((12, 4, 4), rows.values())] == [True] * 3


# ---- few-shot


def by_the_book(labels, n_classes, novel, k, seed):
    """The published recipe, written down a second time, with lists."""
    new = np.random.RandomState(seed).permutation(n_classes)[-novel:].tolist()  # noqa: NPY002
    parts = {}
    for c in new:
        index = [i for i, y in enumerate(labels) if y == c]
        np.random.RandomState(c).shuffle(index)  # noqa: NPY002
        parts[c] = (index[:k], index[: int(0.8 * len(index))], index[int(0.8 * len(index)) :])
    return new, parts


def test_published_indices():
    labels = np.random.Generator(np.random.Philox(0)).integers(0, 12, 600)
    new, parts = by_the_book(labels.tolist(), 12, 4, 5, seed=3)
    p = published_fewshot(labels, 12, 4, 5, seed=3)
    assert p["novel"] == sorted(new) and p["base"] == sorted(set(range(12)) - set(new))
    for i, key in enumerate(("supports", "valid", "test")):
        assert p[key].tolist() == [j for c in sorted(new) for j in parts[c][i]]
    assert p["train"].tolist() == [i for i, y in enumerate(labels) if y not in new]


@pytest.mark.parametrize("seed", [0, 1, 4, 77])
@pytest.mark.parametrize(
    "classes,per,novel,k,base,valid,test",
    [(47, 2800, 10, 5, 103600, 22400, 5600), (47, 2800, 10, 25, 103600, 22400, 5600), (1623, 20, 212, 5, 28220, 3392, 848)],
)
def test_published_sizes(seed, classes, per, novel, k, base, valid, test):
    p = published_fewshot(np.tile(np.arange(classes), per), classes, novel, k, seed)
    assert [len(p[x]) for x in ("train", "valid", "test", "supports")] == [base, valid, test, novel * k]
    sets = {x: set(p[x].tolist()) for x in ("train", "valid", "test", "supports")}
    assert sets["supports"] <= sets["valid"] and not sets["valid"] & sets["test"] and not sets["train"] & (sets["valid"] | sets["test"])


def test_presets_of_the_published_systems():
    facts = {n: data_facts(resolve(SplitsConfig, SPLITS_PRESETS[n])) for n in SPLITS_PRESETS}
    assert (facts["emnist_fewshot"]["classes"], facts["emnist_fewshot"]["novel"], facts["emnist_fewshot"]["n_test"]) == (47, 10, 5600)
    assert (facts["omniglot_fewshot"]["classes"] - facts["omniglot_fewshot"]["novel"], facts["omniglot_fewshot"]["n_test"]) == (1411, 848)
    assert facts["gafi_fashion_mnist"]["shape"] == (1, 32, 32) and facts["gafi_dermamnist"]["shape"] == (3, 32, 32)


def keys(s, rows=slice(None)) -> list:
    return [x.numpy().tobytes() for x in s.images[rows]]


@pytest.mark.parametrize("protocol", ["disjoint", "published"])
def test_protocols_on_digits(protocol):
    cfg = SplitsConfig(fewshot=protocol, novel=4, k=3, seed=2)
    data = load_data(cfg)
    parts = cut_data(data, cfg)
    fs = fewshot_of(data, parts["train"], cfg)
    assert parts["train"].labels[fs["supports"]].tolist() == [c for c in fs["novel"] for _ in range(3)] and fs["protocol"] == protocol
    supports = set(keys(parts["train"], fs["supports"]))
    assert (
        len(supports) == 12
        and not supports & set(keys(parts["test"]))
        and len(supports & set(keys(parts["val"]))) == (12 if protocol == "published" else 0)
    )
    facts = data_facts(cfg)
    assert all(abs(len(s) - facts[f"n_{k}"]) <= 2 for k, s in parts.items())  # named sets are not opened for facts, but taken as balanced
    if protocol == "published":
        y = data["train"][1]
        p = published_fewshot(y, 10, 4, 3, 2)
        x = torch.from_numpy(data["train"][0])
        assert torch.equal(parts["train"].images[fs["supports"]], x[p["supports"]]) and torch.equal(parts["val"].images[fs["valid"]], x[p["valid"]])
        assert sorted(keys(parts["test"])) == sorted(i.numpy().tobytes() for i in x[p["test"]])


def test_kshot_is_nested_by_seed():
    labels = np.random.Generator(np.random.Philox(0)).integers(0, 7, 900)
    for seed in (0, 1):
        sets = {k: kshot(labels, k, seed) for k in (1, 2, 4, 8, 16)}
        for k, rows in sets.items():
            assert (np.bincount(labels[rows]) == k).all() and len(set(rows.tolist())) == 7 * k
        for k in (1, 2, 4, 8):
            assert set(sets[k].tolist()) < set(sets[2 * k].tolist())
    assert set(kshot(labels, 4, 0).tolist()) != set(kshot(labels, 4, 1).tolist())
    with pytest.raises(SettingError, match="k = 400: class 0 has only"):
        kshot(torch.from_numpy(labels), 400)


# ---- a splits folder


@pytest.fixture
def run(tmp_path):
    run_machine(tmp_path / "run", device="cpu", threads=1, channels_last=False)
    return tmp_path / "run"


def test_train_and_val_by_name(run):
    small_stage(run, "splits")
    train, val, both = (load_split(run / "splits", p) for p in ("train", "val", "train+val"))
    assert both.name == "digits/train+val" and len(both) == len(train) + len(val) and torch.equal(both.images[len(train) :], val.images)
    assert both.saw == (both.digest, train.digest, val.digest) and train.saw == (train.digest,) and val.only([1, 2]).saw[1] == val.digest
    with pytest.raises(SettingError, match="sealed"):
        load_split(run / "splits", "train+test")
    for name, part in (("merged", both), ("some", both.only([0, 1])), ("clean", train), ("base", train.only([0, 1])), ("filter", None)):
        (run / name).mkdir()
        inputs = dict(generator={} if part else {"merged": "its digest"})  # a filter sees nothing itself, its generator did
        save_json(run / name / "manifest.json", dict(saw=list(part.saw) if part else [], inputs=inputs))
    stage = lambda *names: SimpleNamespace(inputs=dict(generator=[run / n for n in names]))
    sealed = {k: d for k, d in load_json(run / "splits" / "result.json")["digests"].items() if k != "train"}
    refuse_contamination(stage("clean", "base"), sealed)
    for name in ("merged", "some", "filter"):
        with pytest.raises(SettingError, match=f"{name} was trained on the val images"):
            refuse_contamination(stage("clean", name), sealed)
    other = cut_data(load_data(SplitsConfig()), SplitsConfig(seed=1))["val"]
    with pytest.raises(SettingError, match="different cuts"):
        merge(train, other)


@pytest.mark.parametrize("protocol", ["disjoint", "published"])
def test_export_and_import(run, tmp_path, monkeypatch, protocol):
    monkeypatch.setenv("SYNTHLIT_HOME", str(tmp_path / "home"))
    small_stage(run, "splits", fewshot=protocol, k=4, seed=1)
    path = export_split(run / "splits", tmp_path / "out")
    assert path.name == "digits-s1-8px-k4.json"
    assert {p.name for p in path.parent.glob("*.parquet")} == {f"digits-s1-8px-k4-{p}.parquet" for p in ("train", "supports", "valid", "test")}
    back, fs = import_split(path), load_json(run / "splits" / "fewshot.json")
    train, val, test = (read_part(run / "splits", p) for p in ("train", "val", "test"))
    assert torch.equal(back["supports"].images, train.images[fs["supports"]]) and torch.equal(back["test"].images, test.only(fs["novel"]).images)
    assert back["valid"].digest == val.only(fs["novel"]).digest and val.digest in back["valid"].saw and back["valid"].classes == val.classes
    base = merge(train, val) if protocol == "published" else train
    assert back["train"].digest == base.only(fs["base"]).digest
    assert len(openings(test.digest)) == 1 and "export" in openings(test.digest)[0]["who"]  # the ledger knows
    assert load_json(path)["recipe"]["fewshot"] == protocol and "root" not in load_json(path)["recipe"]
    loaded = load_arrays_of(path.parent, "valid")
    assert np.array_equal(loaded, back["valid"].images.numpy())  # any reader of the Hugging Face layout sees the same


def load_arrays_of(folder, part) -> np.ndarray:
    """The exported part read as an ordinary folder of shards; its classes are not all there, so the door's checks are passed by."""
    from synthlit.data import decode_all, parquet_cells

    files = sorted(folder.glob(f"*-{part}.parquet"))
    return decode_all(parquet_cells(files, "image"), len(list(parquet_cells(files, "image"))))


def test_export_of_every_class(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHLIT_HOME", str(tmp_path / "home"))
    small_stage(run, "splits")
    back = import_split(export_split(run / "splits", tmp_path / "out", every=True, k=2))
    assert (torch.bincount(back["supports"].labels) == 2).all() and back["valid"].digest == load_split(run / "splits", "val").digest


def test_exports_that_are_not_what_was_written(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHLIT_HOME", str(tmp_path / "home"))
    small_stage(run, "splits")
    path = export_split(run / "splits", tmp_path / "out")
    valid, supports = (path.with_name(f"{path.stem}-{p}.parquet") for p in ("valid", "supports"))
    whole = valid.read_bytes()
    for bad in (whole[:-100], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], supports.read_bytes()):
        valid.write_bytes(bad)
        with pytest.raises(DamagedFile, match=f"{valid.name} is not the file that was exported"):
            import_split(path)
    valid.unlink()
    with pytest.raises(DataError, match=f"{valid.name} is missing"):
        import_split(path)
    valid.write_bytes(whole)
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"k": 7}))
    with pytest.raises(DamagedFile, match="checksum"):
        import_split(path)
    meta["parts"]["valid"]["digest"] = meta["parts"]["test"]["digest"]  # a JSON of another export, whole in itself
    save_json(path, {k: v for k, v in meta.items() if k != "sha256"})
    with pytest.raises(DataError, match=f"{valid.name} holds other images than its JSON says"):
        import_split(path)


def test_a_stage_says_what_it_holds(run, capsys):
    small_stage(run, "splits", fewshot="published")
    r = load_json(run / "splits" / "result.json")
    assert (
        {k: sum(n) for k, n in r["counts"].items()} == r["sizes"]
        and r["protocol"] == "published"
        and "val has the 15 supports" in capsys.readouterr().out
    )
    assert [n for c, n in enumerate(r["counts"]["test"]) if c not in r["novel"]] == [0] * 7
    assert read_manifest(run / "splits")["cuts"] == {"digits": r["cut"]}
    assert open_test(run / "splits", "test", "test", "key").digest == r["digests"]["test"]


# ---- refused before anything is decoded


@pytest.fixture
def folder(tmp_path):
    for c, n in (("cat", 12), ("dog", 12), ("owl", 12)):
        (tmp_path / "pets" / c).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "pets" / c / f"{i}.png").write_bytes(encode(np.full((3, 8, 8), 10 * i, np.uint8)))
    return tmp_path / "pets"


def asked(tmp_path, capsys, **splits) -> str:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(dict(machine=dict(device="cpu", threads=1, channels_last=False), stages=dict(splits=splits))))
    assert main(["run", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert not list(tmp_path.glob("run/*/manifest.json"))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "settings,words",
    [
        (dict(novel=1, k=50), "splits.k = 50: the smallest class"),
        (dict(novel=3), "splits.novel = 3"),
        (dict(novel=1, fit="pad"), "splits.fit = 'pad' needs splits.size"),
        (dict(novel=1, fit="pad", size=7), "splits.size = 7: images of 8×8 pixels cannot be padded"),
        (dict(novel=1, fit="stretch"), "fit = 'stretch'"),
        (dict(novel=1, k=2, fewshot="published", test=0.2), "leave out splits.test"),
        (dict(novel=1, k=10, fewshot="published"), "splits.k = 10: 9 images"),
        (dict(novel=1, k=2, fewshot="both"), "fewshot = 'both'"),
    ],
    ids=lambda x: str(x)[:50] if isinstance(x, dict) else "",
)
def test_contradictions_are_refused(folder, tmp_path, capsys, settings, words):
    assert words in asked(tmp_path, capsys, dataset=str(folder), **settings)


def test_one_image_classes_and_empty_ones(folder, tmp_path, capsys):
    (folder / "yak").mkdir()
    assert "pets/yak holds no image" in asked(tmp_path, capsys, dataset=str(folder), novel=1, k=1)
    (folder / "yak" / "0.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    assert "class 3 has only 1" in asked(tmp_path, capsys, dataset=str(folder), novel=1, k=1)


def test_a_share_for_test_where_there_is_a_test():
    with pytest.raises(SettingError, match="splits.test = 0.3: cifar10 has a test split of its own"):
        (cfg := SplitsConfig("cifar10", test=0.3)).check(data_facts(cfg))


def test_a_folder_through_the_stage(folder, run):
    small_stage(run, "splits", dataset=str(folder), novel=1, k=2, size=10, fit="pad")
    train = load_split(run / "splits", "train")
    assert train.classes == ["cat", "dog", "owl"] and train.images.shape[1:] == (3, 10, 10) and train.name == "pets/train"
    assert data_facts(SplitsConfig(str(folder), novel=1, k=2))["n_train"] == len(train)
    for i in range(12, 40):
        (folder / "cat" / f"{i}.png").write_bytes(encode(np.zeros((3, 8, 8), np.uint8)))
    assert load_arrays(str(folder))["train"][1].tolist().count(0) == 40
    assert data_facts(SplitsConfig(str(folder), novel=1, k=2))["n_train"] > len(train)  # what is remembered of a folder is forgotten when it changes


def test_parquet_val_is_kept(tmp_path):
    for part, n in (("train", 20), ("validation", 8), ("test", 6)):
        save_table(
            tmp_path / f"{part}-0.parquet", {"image": [encode(np.full((1, 4, 4), i, np.uint8)) for i in range(n)], "label": [i % 2 for i in range(n)]}
        )
    cfg = SplitsConfig(str(tmp_path), novel=1, k=2)
    assert [len(s) for s in cut_data(load_data(cfg), cfg).values()] == [20, 8, 6] == [data_facts(cfg)[f"n_{p}"] for p in ("train", "val", "test")]


def test_some_of_the_classes():
    """Drawn by the seed, numbered anew, and known before an image is decoded."""
    cfg = SplitsConfig(classes=5, novel=2)
    whole, parts, facts = load_data(SplitsConfig()), cut_data(load_data(cfg), cfg), data_facts(cfg)
    names = parts["train"].classes
    assert len(names) == facts["classes"] == 5 and names != [whole["classes"][i] for i in range(5)]
    assert set(facts["novel_labels"]) < set(range(5)) and abs(facts["n_train"] - len(parts["train"])) < 10
    for i, name in enumerate(names):
        theirs = {x.tobytes() for x in whole["train"][0][whole["train"][1] == whole["classes"].index(name)]}
        assert all(x.numpy().tobytes() in theirs for s in parts.values() for x in s.images[s.labels == i])
    assert load_data(SplitsConfig(classes=5, seed=1))["classes"] != names
    with pytest.raises(SettingError, match=r"splits\.classes = 11.*only 10"):
        preflight(plan(read_params(dict(stages=dict(splits=dict(classes=11))))))
