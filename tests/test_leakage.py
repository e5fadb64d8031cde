"""The leakage audit beside its definitions, and what it must find, keep and refuse."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from synthlit.core import SettingError, load_json, load_table, save_table
from synthlit.leakage import (
    CHANGES,
    audit,
    audit_dataset,
    clean_positions,
    deduplicate,
    detail,
    duplicates,
    exact_pairs,
    near_pairs,
    planted,
    without,
)
from synthlit.splits import DataError, Split, SplitsConfig, cut_data, data_facts, load_data, recipe_of


def pictures(n, seed=0, side=32, channels=3):
    """Images with detail at every scale, as photographs have: noise of four resolutions, added."""
    r = np.random.default_rng(seed)
    fields = [torch.from_numpy(r.normal(size=(n, channels, side // s, side // s))) * s**0.7 for s in (1, 2, 4, 8)]
    x = sum(torch.nn.functional.interpolate(f, size=(side, side), mode="bilinear") for f in fields)
    return (x * 20 + 128).clamp(0, 255).byte()


def split(x, name, seed=0):
    y = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, len(x)))
    return Split(name, x, y, ["a", "b", "c"], "", "").take(torch.arange(len(x)))


def cosine(a, b, shift):
    """The score written out: every shift, every mirror image, one pair."""
    best = -1.0
    for m in (b, b[:, :, ::-1]):
        for dy in range(-shift, shift + 1):
            for dx in range(-shift, shift + 1):
                h, w = a.shape[1:]
                u = np.stack([a[:, y, x] for y in range(h) for x in range(w) if 0 <= y - dy < h and 0 <= x - dx < w])
                v = np.stack([m[:, y - dy, x - dx] for y in range(h) for x in range(w) if 0 <= y - dy < h and 0 <= x - dx < w])
                best = max(best, float((u * v).sum() / max(np.sqrt((u * u).sum() * (v * v).sum()), 1e-6)))
    return best


@pytest.mark.parametrize("side,channels", [(8, 1), (12, 3)])
def test_near_pairs_equal_a_double_loop(side, channels):
    a = pictures(8, 0, side, channels)
    b = torch.cat([pictures(3, 1, side, channels), *[f(a[i : i + 1]) for i, f in enumerate(CHANGES.values())]])
    da, db = detail(a).double().numpy(), detail(b).double().numpy()
    want = {(i, j): s for i in range(len(a)) for j in range(len(b)) if (s := cosine(da[i], db[j], 1)) >= 0.7}
    p = near_pairs(a, b, threshold=0.7, k=len(a), least=-1.0)
    assert dict(zip(zip(p.a.tolist(), p.b.tolist()), p.score.tolist())) == pytest.approx(want, abs=1e-4) and len(want) >= 5


@pytest.mark.parametrize("inside", [False, True])
def test_blocks_do_not_matter(inside):
    a = pictures(90)
    a = torch.cat([a, CHANGES["noisy"](a[:30])])
    b = None if inside else torch.cat([pictures(40, 1), CHANGES["mirrored"](a[20:60])])
    p, q = near_pairs(a, b, threshold=0.3), near_pairs(a, b, threshold=0.3, budget=1e-3, chunk=5)
    assert set(zip(p.a.tolist(), p.b.tolist())) == set(zip(q.a.tolist(), q.b.tolist())) and len(p) >= 30
    assert torch.allclose(p.score, q.score, atol=1e-5)
    assert not inside or (p.a < p.b).all()


def test_exact_pairs_equal_the_intersection_of_bytes():
    a = torch.randint(0, 2, (200, 1, 2, 3), generator=torch.Generator().manual_seed(0)).byte()  # 64 possible images: many repeats
    b = torch.randint(0, 2, (100, 1, 2, 3), generator=torch.Generator().manual_seed(1)).byte()
    key = [bytes(x.numpy()) for x in a], [bytes(x.numpy()) for x in b]
    both, p = set(key[0]) & set(key[1]), exact_pairs(a, b)
    assert p.of("a").tolist() == [i for i, k in enumerate(key[0]) if k in both]
    assert p.of("b").tolist() == [i for i, k in enumerate(key[1]) if k in both]
    assert len(p) <= 300 and all(key[0][i] == key[1][j] for i, j in zip(p.a.tolist(), p.b.tolist()))
    q = exact_pairs(a)
    assert len(without(a, q, name="a")) == len(set(key[0])) == len(a) - len(q)


def test_changed_copies_are_found():
    x = pictures(400)
    scores = planted(x, 40)
    assert all((s >= 0.8).float().mean() == 1 for k, s in scores.items() if k != "zoomed")
    assert not len(near_pairs(x)) and not len(near_pairs(x, pictures(200, 1)))


def test_flat_images_are_pairs_by_bytes_only():
    flat = torch.arange(6).byte().view(6, 1, 1, 1).expand(6, 1, 8, 8).repeat(2, 1, 1, 1)
    assert not len(near_pairs(flat)) and len(duplicates(flat)) == 6 and duplicates(flat).exact.all()


def test_a_pair_is_listed_once_and_knows_its_labels():
    a, b = split(pictures(20), "set/train"), split(pictures(20)[::2], "set/test", 1)
    p = duplicates(a, b)
    assert p.names == ("train", "test") and len(p) == 10 and p.exact.all() and torch.equal(p.a, p.b * 2)
    assert torch.equal(p.same, a.labels[p.a] == b.labels[p.b])


def test_deduplicate_leaves_test_alone():
    x = pictures(60)
    train, val = torch.cat([x[:40], CHANGES["brighter"](x[50:52]), x[57:58]]), torch.cat([x[40:50], x[55:56], CHANGES["mirrored"](x[0:1])])
    parts = dict(train=split(train, "s/train"), val=split(val, "s/val"), test=split(x[50:], "s/test"))
    new, report = deduplicate(parts)
    assert report["removed"] == dict(train=[0, 40, 41, 42], val=[10], test=[])
    assert (new["test"].digest, len(new["train"]), len(new["val"])) == (parts["test"].digest, 39, 11)
    assert len({s.cut for s in new.values()}) == 1 and new["train"].digest != parts["train"].digest
    assert not any(len(p) for p in audit(new, within=()).values())
    assert clean_positions(10, *[p for k, p in audit(parts).items() if k[1] == "test"], name="test").tolist() == [2, 3, 4, 6, 8, 9]
    assert [len(s) for s in deduplicate(parts, "exact")[0].values()] == [42, 11, 10]


def test_bad_input_is_refused():
    x = pictures(4)
    with pytest.raises(DataError, match="uint8"):
        near_pairs(x.float(), x)
    with pytest.raises(DataError, match="different sizes"):
        exact_pairs(x, pictures(4, side=16))
    with pytest.raises(SettingError, match="threshold"):
        near_pairs(x, x, threshold=95)
    with pytest.raises(SettingError, match="near"):
        duplicates(x, x, how="nearly")
    with pytest.raises(SettingError, match="not 'train'"):
        without(x, exact_pairs(x), name="train")
    with pytest.raises(DataError, match="nothing is left"):
        deduplicate(dict(train=split(x, "s/train"), val=split(pictures(3, 1), "s/val"), test=split(x, "s/test")))
    with pytest.raises(SettingError, match="no test split"):
        audit_dataset("digits", ".")
    assert len(near_pairs(x[:0], x)) == len(duplicates(x, x[:0])) == len(near_pairs(x[:1])) == 0


def npz(path, train, test, turned=False):
    x, y = (torch.cat([train, test]).permute(0, 2, 3, 1).numpy(), np.arange(len(train) + len(test)) % 3)
    order = np.arange(len(train))[:: -1 if turned else 1]
    np.savez(path, train_images=x[order], train_labels=y[order], test_images=x[len(train) :], test_labels=y[len(train) :])


def test_an_audit_makes_a_new_cut(tmp_path):
    """Found in test, or earlier in train: what is named in the file leaves train, by position, and test stays."""
    x = pictures(90)
    train = torch.cat([x[:70], CHANGES["mirrored"](x[3:5]), x[9:10]])  # 70 to 72 repeat 3, 4 and 9
    npz(tmp_path / "mine.npz", train, torch.cat([x[70:], CHANGES["brighter"](x[20:23])]))
    audit_dataset(str(tmp_path / "mine.npz"), tmp_path, inside=True)
    plain = SplitsConfig(str(tmp_path / "mine.npz"), val=0.2, novel=1, k=2)
    whole = load_data(plain)["train"][0]
    again, inside = (replace(plain, drop=str(tmp_path / f"mine{end}.parquet"), drop_above=0.8) for end in ("", "-inside"))
    for cfg, gone in ((again, [20, 21, 22]), (inside, [70, 71, 72])):
        data = load_data(cfg)
        assert np.array_equal(data["train"][0], np.delete(whole, gone, 0)) and len(data["train"][1]) == 70
        old, new, facts = cut_data(load_data(plain), plain), cut_data(data, cfg), data_facts(cfg)
        assert new["test"].digest == old["test"].digest and new["test"].cut != old["test"].cut
        assert [facts[f"n_{p}"] for p in ("train", "val", "test")] == [len(s) for s in new.values()]
        assert len(recipe_of(cfg)["drop"]) == 64  # of the file, not where it lay
    pairs = load_table(tmp_path / "mine-inside.parquet").to_pylist()
    assert sorted((r["kept"], r["train"], r["exact"]) for r in pairs if r["score"] >= 0.8) == [(3, 70, False), (4, 71, False), (9, 72, True)]


def test_an_audit_of_something_else_is_refused(tmp_path):
    x = pictures(60)
    for name, images, turned in (("mine", x, False), ("turned", x, True), ("short", x[30:], False)):
        npz(tmp_path / f"{name}.npz", images[:-20], images[-20:], turned)
    npz(tmp_path / "mine.npz", x[:40], torch.cat([x[40:], x[30:40]]))
    audit_dataset(str(tmp_path / "mine.npz"), tmp_path)
    ask = lambda name, drop: load_data(SplitsConfig(str(tmp_path / f"{name}.npz"), drop=str(tmp_path / drop)))
    assert len(ask("mine", "mine.parquet")["train"][1]) == 30
    for name in ("turned", "short"):
        with pytest.raises(DataError, match="mine.parquet was made from another data set than .*, or from a copy in another order"):
            ask(name, "mine.parquet")
    with pytest.raises(DataError, match="drop = .*nothing.parquet'.*audit_dataset"):
        ask("mine", "nothing.parquet")
    save_table(tmp_path / "other.parquet", dict(a=[1]))
    with pytest.raises(DataError, match="splits.drop needs train and score"):
        ask("mine", "other.parquet")


def test_a_whole_data_set(tmp_path):
    x = pictures(60)
    for part, rows in dict(train=x[:45], test=torch.cat([x[45:], x[:3], CHANGES["noisy"](x[10:12])])).items():
        cells = []
        for im in rows.permute(0, 2, 3, 1).numpy():
            f = io.BytesIO()
            Image.fromarray(im).save(f, "PNG")
            cells.append(dict(bytes=f.getvalue()))
        (tmp_path / "mine").mkdir(exist_ok=True)
        pq.write_table(
            pa.table(dict(image=cells, label=[i % 3 for i in range(len(rows))])), tmp_path / "mine" / f"{part}-0.parquet", write_page_checksum=True
        )
    audit_dataset(str(tmp_path / "mine"), tmp_path / "out", inside=True)
    inside = load_table(tmp_path / "out" / "mine-inside.parquet")
    assert inside.column_names == ["train", "kept", "score", "exact", "same"] and len(inside) == 0
    r, t = load_json(tmp_path / "out" / "mine.json"), load_table(tmp_path / "out" / "mine.parquet").to_pydict()
    assert (r["test"]["exact"], r["test"]["at_threshold"], r["train"]["at_threshold"]) == (3, 5, 0)
    assert sorted(zip(t["train"], t["test"])) == [(0, 15), (1, 16), (2, 17), (10, 18), (11, 19)]
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"mine-some.png", "mine-near.png", "mine-inside.png"}
