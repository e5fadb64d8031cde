"""Sources of data: small archives of each real format, written here; and what is refused."""

import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from synthlit.core import DamagedFile, SettingError, save_table
from synthlit.data import SETS, DataError, decode, encode, fit_image, load_arrays, open_set, remote, stand_in, subsets

RNG = np.random.Generator(np.random.Philox(1))


def images(n: int, c: int = 3, h: int = 32, w: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (n, c, h, w), np.uint8)


def load(name, root, **kw) -> dict:
    return load_arrays(name, root=str(root), download=False, **kw)


def same(a, x, y) -> bool:
    return a[0].dtype == np.uint8 and a[1].dtype == np.int64 and np.array_equal(a[0], x) and np.array_equal(a[1], y)


def idx(a: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{a.ndim}I", 0, 0, 8, a.ndim, *a.shape) + a.tobytes()


def hf_table(x, labels, names=None) -> pa.Table:
    """A table in the Hugging Face image-classification layout."""
    t = pa.table({"image": [{"bytes": encode(a), "path": None} for a in x], "label": pa.array(labels, pa.int64())})
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}}}
    return t.replace_schema_metadata({"huggingface": json.dumps(info)}) if names else t


def write_folder(folder: Path, x: np.ndarray, names: list, mode="png"):
    for i, a in enumerate(x):
        path = folder / names[i % len(names)] / f"{i:03d}.{mode}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(a))


# ---- EMNIST, CIFAR, SVHN, npz


def emnist(root: Path, n=94) -> tuple:
    """gzip.zip as NIST has it: images stored transposed."""
    x, y = images(n, 1, 28, 28)[:, 0], (np.arange(n) % 47).astype(np.uint8)
    (root / "emnist").mkdir()
    with zipfile.ZipFile(root / "emnist" / "gzip.zip", "w") as z:
        for part in ("train", "test"):
            z.writestr(f"gzip/emnist-balanced-{part}-images-idx3-ubyte.gz", gzip.compress(idx(x.transpose(0, 2, 1))))
            z.writestr(f"gzip/emnist-balanced-{part}-labels-idx1-ubyte.gz", gzip.compress(idx(y)))
        z.writestr("gzip/emnist-letters-train-images-idx3-ubyte.gz", b"not ours")
    return x, y


def test_emnist_stands_upright(tmp_path):
    x, y = emnist(tmp_path)
    d = load("emnist", tmp_path)
    assert same(d["train"], x[:, None], y) and same(d["test"], x[:, None], y)
    assert np.array_equal(d["train"][0][:, 0], np.rot90(x.transpose(0, 2, 1), -1, (1, 2))[:, :, ::-1])  # turned by -90 degrees and mirrored
    assert d["classes"][:11] == [*"0123456789A"] and len(d["classes"]) == 47


def test_emnist_from_loose_files(tmp_path):
    x, y = emnist(tmp_path)
    with zipfile.ZipFile(tmp_path / "emnist" / "gzip.zip") as z:
        z.extractall(tmp_path / "emnist")
    (tmp_path / "emnist" / "gzip.zip").unlink()
    (tmp_path / "EMNIST").mkdir()
    (tmp_path / "emnist" / "gzip").rename(tmp_path / "EMNIST" / "raw")
    assert same(load("emnist", tmp_path)["test"], x[:, None], y)


def cifar(root: Path, name: str, n=20) -> dict:
    """The binary archive as a .tar.gz; CIFAR-10's files need their full length, so zeros fill them."""
    classes, sub = (10, "cifar-10-batches-bin") if name == "cifar10" else (100, "cifar-100-binary")
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"] if classes == 10 else ["train.bin", "test.bin"]
    n = 10000 if classes == 10 else n * 100
    out = {}
    (root / name).mkdir()
    with tarfile.open(root / name / f"{sub.removesuffix('-batches-bin').removesuffix('-binary')}-binary.tar.gz", "w:gz", compresslevel=1) as t:
        for f in files:
            x, y = np.zeros((n, 3072), np.uint8), np.arange(n) % classes
            x[:, :5] = RNG.integers(0, 256, (n, 5))
            raw = np.concatenate([*([(y // 5)[:, None]] if classes == 100 else []), y[:, None], x], 1).astype(np.uint8).tobytes()
            out[f] = (x.reshape(-1, 3, 32, 32), y, raw)
            info = tarfile.TarInfo(f"{sub}/{f}")
            info.size = len(raw)
            t.addfile(info, io.BytesIO(raw))
    return out


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_its_binary_archive(tmp_path, name):
    files = list(cifar(tmp_path, name).values())
    d = load(name, tmp_path)
    assert same(d["test"], *files[-1][:2]) and same(d["train"], *(np.concatenate([f[i] for f in files[:-1]]) for i in (0, 1)))
    assert d["classes"] == list(SETS[name].classes)  # the fine labels of CIFAR-100
    archive = next((tmp_path / name).glob("*.tar.gz"))
    os.truncate(archive, archive.stat().st_size // 2)
    with pytest.raises(DataError, match=f"{archive.name} is damaged or truncated"):
        load(name, tmp_path)


def test_cifar100_unpacked_and_cut(tmp_path):
    files = cifar(tmp_path, "cifar100")
    for f in (tmp_path / "cifar100").glob("*.gz"):
        f.unlink()
    folder = tmp_path / "cifar100" / "cifar-100-binary"
    folder.mkdir()
    for f, (_, _, raw) in files.items():
        (folder / f).write_bytes(raw)
    assert same(load("cifar100", tmp_path)["test"], *files["test.bin"][:2])
    os.truncate(folder / "train.bin", 3074 * 7 + 5)
    with pytest.raises(DataError, match=r"train\.bin is missing or truncated"):
        load("cifar100", tmp_path)
    os.truncate(folder / "train.bin", 0)
    with pytest.raises(DataError, match=r"train\.bin is missing or truncated"):
        load("cifar100", tmp_path)


def test_svhn(tmp_path):
    from scipy.io import savemat

    x, y = images(20), np.arange(20) % 10
    (tmp_path / "svhn").mkdir()
    for part in ("train", "test"):
        savemat(tmp_path / "svhn" / f"{part}_32x32.mat", {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y)[:, None]})
    d = load("svhn", tmp_path)
    assert same(d["train"], x, y) and same(d["test"], x, y)  # the label 10 means 0
    path = tmp_path / "svhn" / "test_32x32.mat"
    whole = path.read_bytes()
    for bad in (b"", b"no mat file", whole[: len(whole) // 2]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="test_32x32.mat is damaged or truncated"):
            load("svhn", tmp_path)
    savemat(path, {"Z": x})
    with pytest.raises(DataError, match="test_32x32.mat holds.*expected X and y"):
        load("svhn", tmp_path)


def npz(path: Path, n=(14, 7, 7), **more) -> dict:
    a = {}
    for part, m in zip(("train", "val", "test"), n):
        a |= {f"{part}_images": RNG.integers(0, 256, (m, 28, 28, 3), np.uint8), f"{part}_labels": (np.arange(m) % 7)[:, None]}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **(a | more))
    return a


def test_npz_keeps_the_official_val(tmp_path):
    a = npz(tmp_path / "dermamnist" / "dermamnist.npz")
    for d in (load("dermamnist", tmp_path), load_arrays(str(tmp_path / "dermamnist" / "dermamnist.npz"))):
        for part in ("train", "val", "test"):
            assert same(d[part], a[f"{part}_images"].transpose(0, 3, 1, 2), a[f"{part}_labels"].ravel())
    assert load("dermamnist", tmp_path)["classes"][4] == "melanoma" and d["classes"] == [*"0123456"]  # only the named set has names
    grey = npz(tmp_path / "grey.npz") | {"train_images": images(14, 1, 28, 28)[:, 0]}
    np.savez(tmp_path / "grey.npz", **grey)
    assert load_arrays(str(tmp_path / "grey.npz"))["train"][0].shape == (14, 3, 28, 28)  # its other parts have colour


def test_derma_is_resized_with_lanczos(tmp_path):
    a = npz(tmp_path / "dermamnist.npz")
    x = load("dermamnist", tmp_path, size=32)["val"][0]
    want = [np.asarray(Image.fromarray(im).resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1) for im in a["val_images"]]
    assert np.array_equal(x, np.stack(want))


@pytest.mark.parametrize(
    "more,words",
    [
        ({"train_images": np.zeros((14, 28, 28), np.float32)}, "train_images is float32"),
        ({"train_images": np.zeros((14, 28, 28, 3, 1), np.uint8)}, "train_images is uint8"),
        ({"val_labels": np.zeros((7, 14))}, "val_labels .*one label each"),
        ({"test_labels": np.arange(7) + 1000}, "has no image"),
        ({"train_labels": np.arange(14) - 1}, "dermamnist.npz, train, image 0: its label is -1"),
        ({"train_images": np.array([{}, {}], object)}, "dermamnist.npz is damaged.*allow_pickle"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_npz(tmp_path, more, words):
    npz(tmp_path / "dermamnist.npz", **more)
    with pytest.raises(DataError, match=words):
        load_arrays(str(tmp_path / "dermamnist.npz"))


def test_label_out_of_range_of_a_named_set(tmp_path):
    npz(tmp_path / "dermamnist.npz", test_labels=np.array([0, 1, 2, 7, 4, 5, 6]))
    with pytest.raises(DataError, match="dermamnist.npz, test, image 3: its label is 7, but there are 7 classes, 0 to 6"):
        load("dermamnist", tmp_path)


def test_torn_npz(tmp_path):
    path = tmp_path / "dermamnist.npz"
    npz(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for bad in (whole[: len(whole) // 2], b"", bytes(flipped)):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="dermamnist.npz is damaged or truncated"):
            load_arrays(str(path))


# ---- zips of folders


def zip_folder(path: Path, top: str, classes: list, per: int, c=1, side=16) -> tuple:
    x = images(per * len(classes), c, side, side)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{top}/", "")
        for i, a in enumerate(x):
            z.writestr(f"{top}/{classes[i // per]}/{i:04d}.png", encode(a))
    return x, np.arange(len(x)) // per


def test_omniglot_labels_are_global(tmp_path):
    x, y = zip_folder(tmp_path / "omniglot-py" / "images_background.zip", "images_background", ["Greek/character01", "Greek/character02"], 3)
    xt, yt = zip_folder(tmp_path / "omniglot-py" / "images_evaluation.zip", "images_evaluation", ["Angelic/character01"], 3)
    d = load("omniglot", tmp_path)
    assert same(d["train"], x, y) and same(d["test"], xt, yt + 2)
    assert d["classes"] == ["Greek/character01", "Greek/character02", "Angelic/character01"]


def test_eurosat_from_zip_and_from_its_folder(tmp_path):
    names = list(SETS["eurosat"].classes)
    x, y = zip_folder(tmp_path / "eurosat" / "EuroSAT.zip", "2750", names, 2, c=3)
    d = load("eurosat", tmp_path)
    assert same(d["train"], x, y) and d["classes"] == names and "test" not in d
    with zipfile.ZipFile(tmp_path / "eurosat" / "EuroSAT.zip") as z:
        z.extractall(tmp_path / "eurosat")
    (tmp_path / "eurosat" / "EuroSAT.zip").unlink()
    assert same(load("eurosat", tmp_path)["train"], x, y)


def test_torn_zip(tmp_path):
    path = tmp_path / "eurosat" / "EuroSAT.zip"
    zip_folder(path, "2750", list(SETS["eurosat"].classes), 2, c=3)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="EuroSAT.zip is damaged or truncated"):
        load("eurosat", tmp_path)
    flipped = bytearray(whole)
    flipped[300] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DataError, match="EuroSAT.zip, 2750/AnnualCrop/0000.png.*damaged"):
        load("eurosat", tmp_path)


# ---- folders, lists, CINIC


def test_folder_with_and_without_parts(tmp_path):
    x = images(12, 3, 20, 20)
    write_folder(tmp_path / "plain", x, ["b", "a", "c"])
    d = load_arrays(str(tmp_path / "plain"))
    assert (
        d["classes"] == ["a", "b", "c"]
        and list(d) == ["train", "classes"]
        and same(d["train"], x[[1, 4, 7, 10, 0, 3, 6, 9, 2, 5, 8, 11]], np.arange(12) // 4)
    )
    for part in ("train", "val", "test"):
        write_folder(tmp_path / "parts" / part, x[:6], ["a", "b"])
    (tmp_path / "parts" / "train" / "a" / "notes.txt").write_text("no image")
    d = load_arrays(str(tmp_path / "parts"))
    assert [len(d[p][1]) for p in ("train", "val", "test")] == [6, 6, 6]


def test_a_class_called_train_is_a_class(tmp_path):
    write_folder(tmp_path, images(6), ["train", "tractor", "test"])
    d = load_arrays(str(tmp_path))
    assert d["classes"] == ["test", "tractor", "train"] and len(d["train"][1]) == 6


def test_file_lists(tmp_path):
    write_folder(tmp_path / "train", x := images(6), ["n02", "n01"])
    write_folder(tmp_path / "val", images(4), ["n02", "n01"])
    for part, n in (("train", 6), ("val", 4)):
        (tmp_path / part / "file_list.txt").write_text("".join(f"/{['n02', 'n01'][i % 2]}/{i:03d}.png {i % 2}\n" for i in range(n)))
    d = load_arrays(str(tmp_path))
    assert same(d["train"], x, np.arange(6) % 2) and d["classes"] == ["n02", "n01"] and len(d["val"][1]) == 4
    (tmp_path / "train" / "file_list.txt").write_text("n02/000.png 0\nn01/001.png\t1\n\nn02/003.png 1\n")
    with pytest.raises(DataError, match="n02/003.png cannot be read as an image"):
        load_arrays(str(tmp_path))
    (tmp_path / "train" / "file_list.txt").write_text("n02/000.png 0\nn01/001.png one\n")
    with pytest.raises(DataError, match="file_list.txt, line 2: 'n01/001.png one'"):
        load_arrays(str(tmp_path))
    (tmp_path / "train" / "file_list.txt").write_text("n02/000.png 0\nn01/001.png 4\n")
    with pytest.raises(DataError, match="class 2 .* has no image"):
        load_arrays(str(tmp_path))


def test_cinic_pools_train_and_valid(tmp_path):
    names = list(SETS["cinic10"].classes)
    for part, n in (("train", 20), ("valid", 20), ("test", 10)):
        write_folder(tmp_path / "CINIC-10" / part, images(n), names)
    for d in (load("cinic10", tmp_path), load_arrays(str(tmp_path / "CINIC-10"))):
        assert list(d) == ["train", "test", "classes", "n_val"] and len(d["train"][1]) == 40 and d["classes"] == names
        assert d["n_val"] == round(40 * 10000 / 180000)
    (tmp_path / "CINIC-10").rename(tmp_path / "other")
    assert len(load_arrays(str(tmp_path / "other"))["val"][1]) == 20  # any other folder keeps its own val


def test_mixed_sizes_need_a_size(tmp_path):
    write_folder(tmp_path, images(4), ["a", "b"])
    (tmp_path / "b" / "wide.png").write_bytes(encode(images(1, 3, 20, 30)[0]))
    with pytest.raises(DataError, match=r"b/wide.png has 30×20 pixels, those before it 32×32.*`size`"):
        load_arrays(str(tmp_path))
    assert load_arrays(str(tmp_path), size=16)["train"][0].shape == (5, 3, 16, 16)
    assert load_arrays(str(tmp_path), size=32, fit="pad")["train"][0][4, :, :6].sum() == 0
    with pytest.raises(SettingError, match="000.png: size = 31: an image of 32×32 pixels cannot be padded"):
        load_arrays(str(tmp_path), size=31, fit="pad")


def test_grey_becomes_rgb_and_is_said_once(tmp_path, capsys):
    write_folder(tmp_path / "train", x := images(4), ["a", "b"])
    grey = images(3, 1)
    for i, a in enumerate(grey):
        (tmp_path / "train" / "a" / f"g{i}.png").write_bytes(encode(a))
    write_folder(tmp_path / "test", grey[:2], ["a", "b"])
    d = load_arrays(str(tmp_path))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "grey images among coloured ones were made RGB" in out and "g0.png" in out
    assert (
        d["train"][0].shape == (7, 3, 32, 32)
        and np.array_equal(d["train"][0][2], np.repeat(grey[0], 3, 0))
        and np.array_equal(d["train"][0][0], x[0])
    )
    assert np.array_equal(d["test"][0], np.repeat(grey[:2], 3, 1))
    write_folder(tmp_path / "all", grey, ["a", "b", "c"])
    assert load_arrays(str(tmp_path / "all"))["train"][0].shape == (3, 1, 32, 32) and not capsys.readouterr().out


def test_sixteen_bit_and_palette_images():
    wide = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    out = io.BytesIO()
    Image.fromarray(wide).save(out, "PNG")
    assert np.array_equal(decode(out.getvalue())[0], (wide >> 8).astype(np.uint8))
    out = io.BytesIO()
    Image.fromarray(images(1)[0].transpose(1, 2, 0)).quantize(8).save(out, "PNG")
    assert decode({"bytes": out.getvalue()}).shape == (3, 32, 32)


def test_unreadable_and_empty(tmp_path):
    write_folder(tmp_path, images(4), ["a", "b"])
    (tmp_path / "b" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    with pytest.raises(DataError, match="b/torn.jpg cannot be read as an image"):
        load_arrays(str(tmp_path))
    (tmp_path / "b" / "torn.jpg").unlink()
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path}/c holds no image"):
        load_arrays(str(tmp_path))
    with pytest.raises(DataError, match="holds neither train.*parquet, nor class folders"):
        load_arrays(str(tmp_path / "c"))
    write_folder(tmp_path / "set" / "train", images(2), ["a", "b"])
    write_folder(tmp_path / "set" / "test", images(2), ["a", "x"])
    with pytest.raises(DataError, match="test/x: .*train has no such class"):
        load_arrays(str(tmp_path / "set"))


@pytest.mark.parametrize("names,words", [(["a b", "a+b"], "'a b' and 'a\\+b'|'a\\+b' and 'a b'"), (["x", "\u00d7", "+"], "share the folder '_'")])
def test_class_names_that_share_a_folder(tmp_path, names, words):
    write_folder(tmp_path, images(len(names)), names)
    with pytest.raises(DataError, match=words):
        load_arrays(str(tmp_path))


# ---- Parquet


def test_parquet_with_parts_and_names(tmp_path):
    x = images(9)
    names = ["cat", "dog", "owl"]
    for part in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000", "test-00000"):
        save_table(tmp_path / f"{part}.parquet", hf_table(x, np.arange(9) % 3, names))
    d = load_arrays(str(tmp_path))
    assert d["classes"] == names and same(d["val"], x, np.arange(9) % 3) and same(d["train"], np.concatenate([x, x]), np.tile(np.arange(9) % 3, 2))
    (tmp_path / "data").mkdir()
    for p in tmp_path.glob("*.parquet"):
        p.rename(tmp_path / "data" / p.name)
    assert same(load_arrays(str(tmp_path))["test"], x, np.arange(9) % 3)


def test_parquet_fine_labels_and_plain_bytes(tmp_path):
    x = images(6)
    save_table(tmp_path / "train.parquet", {"img": [encode(a) for a in x], "coarse_label": [0] * 6, "fine_label": [0, 1, 2] * 2})
    d = load_arrays(str(tmp_path))
    assert same(d["train"], x, [0, 1, 2] * 2) and d["classes"] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "labels,names,words",
    [
        ([0, 1, 2, 3], ["a", "b", "c"], "train.parquet, image 3: its label is 3, but there are 3 classes"),
        ([0, 1, -1, 1], ["a", "b"], "train.parquet, image 2: its label is -1"),
        ([0, 1, 0, 1], ["a", "b", "c"], r"class 2 \(c\) has no image"),
        ([0, 1, None, 1], ["a", "b"], "train.parquet has images without a label"),
        ([0, 1, 2, 2], ["a/b", "a b", "c"], "share the folder 'a_b'"),
        ([0, 1, 2, 2], ["a", "a", "c"], "share the folder 'a'"),
        ([0, 1, 2, 2], ["a", "", "c"], "class name '' cannot be a folder name"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_labels_in_parquet(tmp_path, labels, names, words):
    save_table(tmp_path / "train.parquet", hf_table(images(4), labels, names))
    with pytest.raises(DataError, match=words):
        open_set(str(tmp_path))


def test_text_labels_and_damage_in_parquet(tmp_path):
    save_table(tmp_path / "train.parquet", {"image": [encode(a) for a in images(2)], "label": ["cat", "dog"]})
    with pytest.raises(DataError, match="column label holds string"):
        open_set(str(tmp_path))
    save_table(tmp_path / "train.parquet", hf_table(images(400, 3, 8, 8), np.arange(400) % 4))
    raw = bytearray((tmp_path / "train.parquet").read_bytes())
    raw[len(raw) // 3] ^= 1
    (tmp_path / "train.parquet").write_bytes(raw)
    with pytest.raises((DamagedFile, DataError), match="train.parquet"):
        load_arrays(str(tmp_path))
    save_table(tmp_path / "train.parquet", pa.table({"image": [{"bytes": encode(images(1)[0])}, {"bytes": None}], "label": [0, 1]}))
    with pytest.raises(DataError, match="train.parquet, image 1 cannot be read"):
        load_arrays(str(tmp_path))


# ---- ImageNet subsets


def test_subsets_are_consistent():
    rows = {(r["wnid"], r["index"], r["name"]) for s in subsets().values() for r in s["classes"]}
    assert {k: len(s["classes"]) for k, s in subsets().items()} == {
        "imagenette": 10, "imagewoof": 10, "imagefruit": 10, "imageyellow": 10, "imagemeow": 10, "imagesquawk": 10, "imagenet100": 100
    }  # fmt: skip
    assert [i for _, i, _ in sorted(rows)] == sorted(i for _, i, _ in rows), "an index is the rank of the WordNet id"
    from torchvision.datasets import Imagenette
    from torchvision.models import ResNet18_Weights

    names = ResNet18_Weights.DEFAULT.meta["categories"]
    assert all(names[i] == n for _, i, n in rows)
    assert [r["wnid"] for r in subsets()["imagenette"]["classes"]] == list(Imagenette._WNID_TO_CLASS)


def test_subset_of_a_folder(tmp_path):
    woof = [r["wnid"] for r in subsets()["imagewoof"]["classes"]]
    for part in ("train", "val"):
        write_folder(tmp_path / "imagenet" / part, images(24), [*woof, "n00000000", "n99999999"])
    d = load_arrays(f"{tmp_path}/imagenet:imagewoof")
    assert d["classes"][:3] == ["Australian terrier", "Border terrier", "Samoyed"] and len(d["train"][1]) == 20 and set(d["val"][1]) == set(range(10))
    whole = load_arrays(f"{tmp_path}/imagenet")
    at = whole["classes"].index(woof[2])
    assert np.array_equal(d["train"][0][d["train"][1] == 2], whole["train"][0][whole["train"][1] == at])
    with pytest.raises(DataError, match="lacks 10 of the 10 classes of imagemeow, such as n02123045"):
        load_arrays(f"{tmp_path}/imagenet:imagemeow")
    with pytest.raises(SettingError, match="unknown subset 'imagewof'.*did you mean 'imagewoof'"):
        load_arrays(f"{tmp_path}/imagenet:imagewof")


def test_subset_of_parquet_by_index(tmp_path):
    """The thousand classes as numbers in ImageNet's order, as on the Hugging Face hub."""
    save_table(tmp_path / "train.parquet", hf_table(x := images(1000, 1, 4, 4), np.arange(1000), [f"name {i}" for i in range(1000)]))
    d = load_arrays(f"{tmp_path}:imageyellow")
    order = np.argsort([r["index"] for r in subsets()["imageyellow"]["classes"]])
    assert np.array_equal(d["train"][1], order) and np.array_equal(d["train"][0], x[sorted(r["index"] for r in subsets()["imageyellow"]["classes"])])


# ---- sizes, places, stand-ins


def test_padding_is_zero_on_all_sides():
    x = fit_image(a := images(1, 1, 28, 28)[0], 32, "pad")
    assert np.array_equal(x[:, 2:30, 2:30], a) and x.sum() == a.sum()


def test_nothing_is_downloaded_when_told_so(tmp_path):
    for name in SETS:
        if name != "digits":
            with pytest.raises(DataError, match=f"^{name}: .*not found in {tmp_path}.*download is off.*SYNTHLIT_DATA"):
                load(name, tmp_path)
    with pytest.raises(DataError, match="cinic10.*no address is known"):
        load_arrays("cinic10", root=str(tmp_path))


def test_lists_are_torchvisions():
    from torchvision import datasets as tv

    assert remote("emnist")[0][1:] == ([tv.EMNIST.url], tv.EMNIST.md5) and [f for f, _, _ in remote("mnist")] == [f for f, _ in tv.MNIST.resources]
    assert not any("python" in u for n in ("cifar10", "cifar100") for _, urls, _ in remote(n) for u in urls)  # the pickled archives
    assert list(SETS["emnist"].classes) == tv.EMNIST.classes_split_dict["balanced"]


@pytest.mark.parametrize("name", SETS)
def test_stand_ins_have_the_shape(name):
    n = 2 if name != "omniglot" else 1
    d = stand_in(name, n, size=12)
    assert d["train"][0].shape == (n * len(SETS[name].names), SETS[name].shape[0], 12, 12) and len(d["classes"]) == len(SETS[name].names)


# ---- the real files, where they are


def real(name: str) -> dict:
    try:
        return load_arrays(name, download=False)
    except DataError:
        pytest.skip(f"{name} is not here")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "emnist", "svhn", "dermamnist"])
def test_real_data_is_what_we_say(name):
    d, s = real(name), SETS[name]
    assert d["train"][0].shape == (s.n_train, *s.shape) and d["test"][0].shape == (s.n_test, *s.shape) and d["classes"] == list(s.classes)


def test_real_omniglot_is_complete():
    d = real("omniglot")
    y = np.concatenate([d["train"][1], d["test"][1]])
    assert len(d["classes"]) == 1623 and (np.bincount(y) == 20).all() and d["test"][1].min() == 964
