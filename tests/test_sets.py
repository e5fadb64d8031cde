"""Data sets that leave a run and that come into one: marks, cards, real readers, verification; sets made elsewhere and what may be wrong with them."""

import csv
import io
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from synthlit import cards, dataset, generate, imported
from synthlit.cards import SOURCE_TYPE, is_marked
from synthlit.classifier import CLASSIFIER_PRESETS, ClassifierConfig, Fixed, train_classifier
from synthlit.core import DamagedFile, SettingError, load_json, resolve, small_stage
from synthlit.data import DataError, decode, encode
from synthlit.dataset import PUBLIC, print_verified, push, rows_of, verify, write_set
from synthlit.filter import Pool, Scores, accept, keep_rule
from synthlit.generate import Maker, Rows, addresses, load_set, write_folder, write_shards
from synthlit.generator import GaussianFloor, fit_floor, load_generator
from synthlit.imported import ImageSet, ImportedConfig, load_made
from synthlit.plan import plan, preflight, read_params
from synthlit.recycle import Member, Recycled
from synthlit.splits import SplitsConfig, cut_data, load_data

DATASETS = "the datasets package is not installed (it is in the dev requirements): loading by it is not tested"
TIMM = "timm is not installed (it is in the dev requirements): loading by it is not tested"


@pytest.fixture(scope="module")
def train():
    return cut_data(load_data(SplitsConfig()), SplitsConfig())["train"]


@pytest.fixture(scope="module")
def floor(train):
    return fit_floor(train.images, train.labels, train.classes, 2, 16)


@pytest.fixture(scope="module")
def sets(floor, tmp_path_factory):
    """`g`: a generator's folder; `set`: shards and a folder of 120 images from it."""
    sets = tmp_path_factory.mktemp("sets")
    floor.save(sets / "g")
    known = dict(score=[i / 120 for i in range(120)], passed=[i % 7 > 0 for i in range(120)])
    rows = Rows([Maker(floor, 3, dict(std=1.2), sets / "g")], *addresses(list(range(10)), 12), known=known)
    write_set(rows, sets / "set", ("parquet", "folder"), shard=50, title="A floor", licence="cc0-1.0", measures=dict(CAS=0.75))
    return sets


@pytest.fixture
def copy(sets, tmp_path):
    """The set in a folder of the test's own, its generator where it was."""
    shutil.copytree(sets, tmp_path / "home")
    return tmp_path / "home" / "set"


def xmp_of(file) -> str:
    with Image.open(file) as im:
        im.load()
        return im.info.get("XML:com.adobe.xmp", "")


# ---- marks


def test_every_picture_says_that_it_is_synthetic(sets):
    files = sorted((sets / "set" / "images").rglob("*.png"))
    cells = [c["bytes"] for p in (sets / "set").glob("train-*.parquet") for c in pq.read_table(p)["image"].to_pylist()]
    assert len(files) == len(cells) == 120
    assert all(SOURCE_TYPE in xmp_of(f) for f in files) and all(SOURCE_TYPE in xmp_of(io.BytesIO(c)) for c in cells)


def test_the_packet_is_well_formed_xml_with_the_property_in_its_namespace(sets):
    from xml.etree import ElementTree

    root = ElementTree.fromstring(xmp_of(next((sets / "set" / "images").rglob("*.png"))))
    rdf, ext = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    assert root.find(f"{rdf}RDF/{rdf}Description").attrib[f"{ext}DigitalSourceType"] == SOURCE_TYPE


def test_the_mark_costs_little(train):
    images = train.images[:500]
    plain, marked = [encode(x) for x in images], [cards.encode_marked(x) for x in images]
    assert {len(m) - len(p) for p, m in zip(plain, marked)} == {len(cards.MARK)} and len(cards.MARK) < 400
    size = []
    for cells in (plain, marked):
        pq.write_table(pa.table(dict(image=cells)), out := io.BytesIO(), compression="zstd")
        size.append(len(out.getvalue()) / 500)
    assert size[1] < size[0] + 12  # in a shard it is the same again and again


def test_real_images_are_not_marked(train, tmp_path):
    write_folder(tmp_path / "real", train.images[:5], train.labels[:5], torch.arange(5), train.classes)
    assert not any(is_marked(p.read_bytes()) for p in (tmp_path / "real").rglob("*.png"))
    real = ImageSet(train.images, train.labels, train.classes, facts=dict(synthetic=False))
    facts = write_set(Rows([Maker(real)], *addresses(list(range(10)), 2)), tmp_path / "set", ("folder",))
    assert not any(is_marked(p.read_bytes()) for p in (tmp_path / "set").rglob("*.png"))
    assert "synthetic" not in yaml.safe_load((tmp_path / "set" / "README.md").read_text().split("---")[1])["tags"] and facts["images"] == 20


# ---- cards and rows


def test_the_card_says_what_the_set_is(sets):
    text = (sets / "set" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc0-1.0" and head["task_categories"] == ["image-classification"] and head["size_categories"] == ["n<1K"]
    assert "synthetic" in head["tags"] and head["configs"][0]["data_files"] == [dict(split="train", path="train-*.parquet")]
    g = load_generator(sets / "g")
    for said in (g.digest, "std 1.2", "seed of the candidates: 3", "CAS: 0.75", "synthlit verify", "Intended use", torch.__version__):
        assert said in text
    assert str(sets) not in text + (sets / "set" / "set.json").read_text()  # no paths of a machine


def test_rows_hold_their_addresses(sets, floor):
    t = pa.concat_tables([pq.read_table(p) for p in sorted((sets / "set").glob("train-*.parquet"))]).to_pydict()
    assert set(t["generator"]) == {floor.digest} and set(t["seed"]) == {3} and {json.loads(d)["std"] for d in t["dials"]} == {1.2}
    assert set(t["prompt"]) == {None} and t["score"][5] == pytest.approx(5 / 120) and t["passed"][7] is False
    x = floor.sample(torch.tensor(t["label"]), torch.tensor(t["index"]), seed=3, std=1.2)
    assert all(np.array_equal(decode(c["bytes"]), a) for c, a in zip(t["image"], x.numpy()))
    with open(sets / "set" / "addresses.csv", newline="") as f:
        lines = list(csv.DictReader(f))
    assert len(lines) == 120 and all((sets / "set" / r["file_name"]).is_file() for r in lines) and lines[0]["passed"] == "False"


def test_every_kind_of_set_of_a_run_is_written_and_verified(tiny_run, tmp_path):
    for stage, makers, scored in (("generate", 1, False), ("filter-seed0", 1, True), ("search", 1, True), ("multigen", 2, True)):
        facts = write_set(tiny_run.run / stage, tmp_path / stage, carry=True)
        t = pq.read_table(tmp_path / stage / "train-00000-of-00001.parquet")
        assert len(facts["makers"]) == makers and len(t) == facts["images"] == 200 and set(facts["counts"].values()) == {20}
        assert (t["score"].null_count == 0) == scored and facts["splits"]["digests"]["train"] in facts["makers"][0]["saw"]
        assert torch.equal(load_set(tmp_path / stage)[0], rows_of(tiny_run.run / stage)[0].interleaved().draw())
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        shutil.move(tmp_path / stage, tmp_path / "elsewhere" / stage)  # its generators come along
        check = verify(tmp_path / "elsewhere" / stage, n=50)
        assert check.ok and check.equal == 50 and check.worst == 0
    assert verify(tiny_run.run / "generate", n=None).ok
    with pytest.raises(SettingError, match="holds no set but a classifier"):
        write_set(tiny_run.run / "classifier", tmp_path / "x")


class Spy(GaussianFloor):
    """Counts how many images are asked for at once, and can stop as a killed process does."""

    most = drawn = 0
    stop = 10**9

    def sample(self, labels, index, **kw):
        Spy.most, Spy.drawn = max(Spy.most, len(labels)), Spy.drawn + len(labels)
        if Spy.drawn > Spy.stop:
            raise KeyboardInterrupt
        return super().sample(labels, index, **kw)


def test_a_set_is_written_block_by_block_and_goes_on_where_it_was(floor, tmp_path):
    g = Spy(floor.t)
    g.classes, g.shape, g.trained = floor.classes, floor.shape, floor.trained
    rows = Rows([Maker(g)], *addresses(list(range(10)), 500))
    Spy.stop = 3500
    with pytest.raises(KeyboardInterrupt):
        write_set(rows, tmp_path / "a", shard=1500)
    assert len(list((tmp_path / "a").glob("train-*.parquet"))) == 2 and not (tmp_path / "a" / "set.json").exists()
    Spy.stop, Spy.drawn = 10**9, 0
    write_set(rows, tmp_path / "a", shard=1500)
    assert Spy.most <= generate.block_size(floor.shape) == 1000 and Spy.drawn == 2000  # whole shards were not drawn again
    write_set(rows, tmp_path / "b", shard=1500)
    for p in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / p.name).read_bytes() == p.read_bytes()


def test_a_folder_with_another_set_is_refused(sets, floor, copy):
    other = Rows([Maker(floor)], *addresses([0, 1], 3))
    with pytest.raises(SettingError, match="holds another set"):
        write_set(other, copy, shard=50)
    with pytest.raises(SettingError, match="forms"):
        write_set(other, copy.parent / "new", ("zip",))


# ---- verification


def problems(folder, **kw) -> str:
    return "\n".join(verify(folder, **kw).problems)


def test_a_good_set_is_verified_anywhere(copy, monkeypatch, capsys):
    assert print_verified(verify(copy)) == 0 and "equal bytes were asked for" in capsys.readouterr().out
    monkeypatch.setattr(dataset, "made_on", lambda d: dict(device=d, kind="other", torch="9.9", threads=1))
    assert print_verified(verify(copy)) == 0 and "one level of 255 was allowed" in capsys.readouterr().out


@pytest.mark.parametrize("levels", [1, 2])
def test_one_level_is_allowed_elsewhere_only(copy, monkeypatch, levels):
    sample = GaussianFloor.sample
    off = lambda self, *a, **kw: (x := sample(self, *a, **kw)) + torch.where(x < 200, levels, -levels).byte()
    monkeypatch.setattr(GaussianFloor, "sample", off)
    assert not verify(copy).ok  # here: equal bytes
    monkeypatch.setattr(dataset, "made_on", lambda d: dict(device=d, kind="other", torch="9.9", threads=1))
    check = verify(copy)
    assert check.worst == levels and check.ok == (levels == 1) and check.near == 100 and check.equal == 0


def test_a_damaged_shard_is_named_and_the_others_are_checked(copy):
    path = copy / "train-00001-of-00003.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    check = verify(copy, n=None)
    assert f"{path.name} does not match its checksum" in check.problems and f"{path.name} cannot be read" in "\n".join(check.problems)
    assert check.equal >= 70
    path.unlink()
    assert f"{path.name} is missing" in problems(copy)


@pytest.mark.parametrize("column, said", [("image", "differs by up to"), ("index", "not what its address makes"), ("generator", "does not know")])
def test_a_changed_row_is_named(copy, column, said):
    path = copy / "train-00001-of-00003.parquet"
    t = pq.read_table(path)
    values = t[column].to_pylist()
    values[7] = dict(image=dict(values[0]) if column == "image" else None, index=999, generator="0" * 64)[column]
    pq.write_table(t.set_column(t.column_names.index(column), t.schema.field(column), pa.array(values, t.schema.field(column).type)), path)
    found = problems(copy, n=1)
    assert f"{path.name}, row 7" in found and said in found and found.count("row ") == 1


def test_a_changed_picture_of_a_folder_is_named(copy):
    for p in copy.glob("train-*.parquet"):
        p.unlink()
    facts = load_json(copy / "set.json")
    cards_files = {k: v for k, v in facts["files"].items() if k == "addresses.csv"}
    generate.save_json(copy / "set.json", facts | dict(files=cards_files, forms=["folder"]))
    assert verify(copy, n=None).equal == 120
    one, two, three = sorted((copy / "images").rglob("*.png"))[5:8]
    one.write_bytes(encode(255 - decode(two.read_bytes())))
    two.write_bytes(b"no picture")
    three.unlink()
    found = problems(copy, n=1)
    assert f"{one.name} does not match its checksum" in found and f"{one.name} (class" in found
    assert f"{two.name} (class" in found and "no picture" in found and f"{three.name} is missing" in found


def test_a_changed_generator_is_named(copy, floor):
    t = dict(floor.t, mean=floor.t["mean"] * 1.01)
    other = GaussianFloor(t)
    other.classes, other.shape, other.trained = floor.classes, floor.shape, floor.trained
    other.save(copy.parent / "g")
    assert "has changed" in problems(copy) and other.digest[:12] in problems(copy)
    assert verify(copy, n=0).equal == 0
    shutil.rmtree(copy.parent / "g")
    assert "was not found" in problems(copy)
    floor.save(copy.parent / "again")
    assert verify(copy, generators=[copy.parent / "again"]).ok
    (copy.parent / "again" / "generator.safetensors").write_bytes(b"torn")
    assert "cannot be read" in problems(copy, generators=[copy.parent / "again"])


def test_an_edited_record_is_refused(copy):
    (copy / "set.json").write_text((copy / "set.json").read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(DamagedFile, match="set.json"):
        verify(copy)
    (copy / "set.json").unlink()
    with pytest.raises(SettingError, match="cannot be verified"):
        verify(copy)


# ---- the real libraries


def test_datasets_reads_shards(sets, floor):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    d = datasets.load_dataset(str(sets / "set"), split="train", cache_dir=str(sets / "cache"))
    assert d.features["label"].names == floor.classes and len(d) == 120 and isinstance(d.features["image"], datasets.Image)
    assert np.array_equal(np.asarray(d[33]["image"]), floor.sample([d[33]["label"]], [d[33]["index"]], seed=3, std=1.2)[0, 0])
    assert d[33]["generator"] == floor.digest and d[7]["passed"] is False and d[7]["prompt"] is None


def test_datasets_reads_a_generate_stage(tiny_run, tmp_path):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    d = datasets.load_dataset(str(tiny_run.run / "generate"), split="train", cache_dir=str(tmp_path))
    assert len(d) == 200 and d.features["label"].names == [str(i) for i in range(10)]


def test_datasets_reads_folders(sets, floor, tmp_path):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    write_set(Rows([Maker(floor)], *addresses(list(range(10)), 3)), tmp_path / "set", ("folder",))
    for how in (dict(path=str(tmp_path / "set")), dict(path="imagefolder", data_dir=str(tmp_path / "set" / "images"))):
        d = datasets.load_dataset(**how, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(d) == 30 and d.features["label"].names == floor.classes
        assert np.array_equal(np.asarray(d[4]["image"]), floor.sample([1], [1])[0, 0])


def test_torchvision_and_timm_read_the_folder(sets, floor):
    from torchvision.datasets import ImageFolder

    there = ImageFolder(sets / "set" / "images")
    assert there.classes == floor.classes and len(there) == 120 and there[13][1] == 1
    assert np.array_equal(np.asarray(there[13][0])[..., 0], floor.sample([1], [1], seed=3, std=1.2)[0, 0])
    pytest.importorskip("timm", reason=TIMM)
    from timm.data import create_dataset

    d = create_dataset("", root=str(sets / "set" / "images"))
    assert len(d) == 120 and d[13][1] == 1 and np.array_equal(np.asarray(d[13][0].convert("L")), floor.sample([1], [1], seed=3, std=1.2)[0, 0])


class Hub:
    """A stand-in for the hub's client."""

    calls: list = []

    def create_repo(self, *a, **kw):
        Hub.calls.append(("create_repo", a, kw))

    def upload_folder(self, **kw):
        Hub.calls.append(("upload_folder", (), kw))
        return "done"


def test_push_is_one_thin_call(sets, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Hub))
    Hub.calls = []
    assert push(sets / "set", "me/digits", commit_message="first") == "done"
    (_, _, made), (_, _, kw) = Hub.calls
    assert made["private"] and kw["repo_type"] == "dataset" and kw["repo_id"] == "me/digits" and kw["commit_message"] == "first"
    assert kw["allow_patterns"] == list(PUBLIC) and "token" not in {**made, **kw}
    with pytest.raises(SettingError, match="no card"):
        push(tmp_path, "me/digits")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SettingError, match="synthlit\\[hub\\]"):
        push(sets / "set", "me/digits")


def test_what_is_pushed_leaves_the_run_at_home(tiny_run):
    filter_ = pytest.importorskip("huggingface_hub.utils", reason="huggingface_hub is not installed (extra hub)").filter_repo_objects
    folder = tiny_run.run / "generate"
    sent = set(filter_([str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()], allow_patterns=list(PUBLIC)))
    assert {"README.md", "set.json"} <= sent and not {"manifest.json", "stage.json", "notebook.ipynb", "result.json"} & sent
    assert any(p.startswith("images/") for p in sent) and any(p.endswith(".parquet") for p in sent)


# ---- sets made elsewhere

SHAPE, TEN = (1, 8, 8), [str(i) for i in range(10)]


def jpeg(a) -> bytes:
    Image.fromarray(np.asarray(a)).save(out := io.BytesIO(), "JPEG")
    return out.getvalue()


@pytest.fixture
def made(floor, tmp_path):
    """Class folders with six images each, as somebody else's script writes them."""
    y, i = addresses(list(range(10)), 6)
    write_folder(tmp_path / "made", floor.sample(y, i), y, i, TEN, synthetic=True)
    return tmp_path / "made"


def load(path, shape=SHAPE, classes=TEN, **kw):
    return load_made(ImportedConfig(str(path), **kw), shape, classes)


def test_a_set_with_a_shard_missing_is_not_read(floor, tmp_path):
    y, i = addresses(list(range(10)), 6)
    write_shards(tmp_path, Rows([Maker(floor)], y, i), 25)
    assert len(load_set(tmp_path)[1]) == 60
    (tmp_path / "train-00002-of-00003.parquet").rename(tmp_path / ".train-00002-part.parquet")
    with pytest.raises(DataError, match="2 of 3 shards"):
        load_set(tmp_path)


def test_folder_shards_and_arrays_are_the_same_set(made, floor, tmp_path):
    y, i = addresses(list(range(10)), 6)
    write_shards(tmp_path / "shards", Rows([Maker(floor)], y, i), 25)
    np.savez(tmp_path / "pool.npz", image=floor.sample(y, i)[:, 0].numpy(), label=y.numpy())
    np.savez(tmp_path / "parts.npz", train_images=floor.sample(y, i)[:, 0].numpy(), train_labels=y.numpy())
    sets = [load(p) for p in (made, tmp_path / "shards", tmp_path / "pool.npz", tmp_path / "parts.npz")]
    for g, _, bad in sets:
        assert not bad and g.trained == list(range(10)) and all(g.limit(c) == 6 for c in g.trained)
        assert torch.equal(g.sample(y, i), floor.sample(y, i))
    assert "labels without names" in sets[2][1] and not sets[0][1]


def test_a_set_is_kept_and_does_not_repeat_itself(made, tmp_path):
    g, _, _ = load(made)
    g.save(tmp_path / "kept")
    again = load_generator(tmp_path / "kept")
    assert again.digest == g.digest and torch.equal(again.sample([4], [5]), g.sample([4], [5])) and again.source == "made" and again.synthetic
    with pytest.raises(SettingError, match="class 4 of this set has 6 images, number 6"):
        again.sample([4], [6])
    with pytest.raises(SettingError, match="unknown dial"):
        again.sample([4], [0], std=2.0)


def test_another_order_of_classes_is_mapped_and_another_list_refused(made):
    turned = TEN[::-1]
    g, notes, _ = load(made, classes=turned)
    assert torch.equal(g.sample([9], [0]), load(made)[0].sample([0], [0])) and notes == {"classes in another order": 10}
    shutil.move(made / "3", made / "three")
    with pytest.raises(SettingError, match="only there: three; only in the splits: 3"):
        load(made)


def test_names_are_found_as_folders_write_them(floor, tmp_path):
    names = ["T-shirt/top", "Ankle boot", *TEN[2:]]
    y, i = addresses(list(range(10)), 2)
    write_folder(tmp_path / "made", floor.sample(y, i), y, i, names)
    assert torch.equal(load(tmp_path / "made", classes=names)[0].sample(y, i), floor.sample(y, i))


def test_numbers_without_names_must_fit(tmp_path, floor):
    y, i = addresses(list(range(9)), 2)
    np.savez(tmp_path / "pool.npz", image=floor.sample(y, i)[:, 0].numpy(), label=y.numpy())
    with pytest.raises(SettingError, match="labels go to 8 and have no names, the splits have 10"):
        load(tmp_path / "pool.npz")


def test_mixed_sizes_are_refused_or_brought_to_one(made):
    (made / "5" / "000003.png").write_bytes(encode(np.zeros((1, 12, 9), np.uint8)))
    with pytest.raises(SettingError, match="000003.png has 9×12 pixels where 8×8 are expected: say fit"):
        load(made)
    g, notes, _ = load(made, fit="resize")
    assert notes == {"resized": 1} and len(g.images) == 60


def test_grey_and_colour(made):
    g, notes, _ = load(made, shape=(3, 8, 8))
    assert notes == {"grey made RGB": 60} and (g.images == g.images[:, :1]).all()
    (made / "5" / "000003.png").write_bytes(encode(np.repeat(decode(made / "5" / "000003.png"), 3, 0)))
    g, notes, _ = load(made)
    assert notes == {"RGB without colour made grey": 1} and torch.equal(g.images, load(made)[0].images)
    (made / "5" / "000003.png").write_bytes(encode(np.arange(192, dtype=np.uint8).reshape(3, 8, 8)))
    with pytest.raises(SettingError, match="000003.png has colour where grey is expected"):
        load(made)


def test_an_unreadable_image_is_named_and_the_rest_is_kept(made):
    torn = made / "5" / "000003.png"
    torn.write_bytes(torn.read_bytes()[:-60])
    (made / "7" / "000000.png").write_bytes(b"")
    g, _, bad = load(made)
    assert [Path(b).name for b in bad] == ["000003.png", "000000.png"] and len(g.images) == 58 and g.limit(5) == g.limit(7) == 5
    with pytest.raises(DataError, match="000003.png cannot be read"):
        load(made, unreadable="stop")


def test_an_unreadable_cell_of_a_shard_is_named(floor, tmp_path):
    write_shards(tmp_path, Rows([Maker(floor)], *addresses(list(range(10)), 6)), 100)
    path = next(tmp_path.glob("*.parquet"))
    t = pq.read_table(path)
    cells = t["image"].to_pylist()
    cells[31]["bytes"] = cells[31]["bytes"][:100]
    pq.write_table(t.set_column(0, t.schema.field("image"), pa.array(cells, t.schema.field("image").type)), path)
    g, _, bad = load(tmp_path)
    assert len(bad) == 1 and "image 31" in bad[0] and len(g.images) == 59


def test_jpeg_sources_are_counted(made):
    for n, name in enumerate(("a.jpg", "b.png", "c.webp")):  # by content, not by name
        im = Image.fromarray(np.full((8, 8), 90, np.uint8))
        im.save(out := io.BytesIO(), "WEBP" if name[0] == "c" else "JPEG", **(dict(quality=80) if name[0] == "c" else {}))
        (made / str(n) / name).write_bytes(out.getvalue())
    assert load(made)[1]["lossy"] == 3


def test_torn_arrays_and_empty_folders_are_named(tmp_path, made):
    y, i = addresses(list(range(10)), 6)
    np.savez(tmp_path / "pool.npz", image=np.zeros((60, 8, 8), np.uint8), label=y.numpy())
    (tmp_path / "torn.npz").write_bytes((tmp_path / "pool.npz").read_bytes()[:2000])
    with pytest.raises(DataError, match="torn.npz is damaged"):
        load(tmp_path / "torn.npz")
    np.savez(tmp_path / "floats.npz", image=np.zeros((60, 8, 8)), label=y.numpy())
    with pytest.raises(DataError, match="float64"):
        load(tmp_path / "floats.npz")
    with pytest.raises(SettingError, match="part = 'test'.*imported.part.*only train"):
        load(made, part="test")
    for p in (made / "4").iterdir():
        p.unlink()
    with pytest.raises(DataError, match="holds no image"):
        load(made)


def test_a_data_set_of_a_hub_is_read_by_its_package(sets, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    asked, real = [], datasets.load_dataset

    def local(name, split, revision):
        asked.append((name, split, revision))
        return real(str(sets / "set"), split=split, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", local)
    g, notes, bad = load_made(ImportedConfig("hf:someone/digits@abc"), SHAPE, TEN)
    assert asked == [("someone/digits", "train", "abc")] and not bad and torch.equal(g.sample([3], [2]), load(sets / "set")[0].sample([3], [2]))


def test_a_hub_without_its_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingError, match="synthlit\\[hub\\]"):
        load_made(ImportedConfig("hf:someone/digits"), SHAPE, TEN)


def test_a_set_with_an_end_is_filtered_up_to_it(train, made):
    recipe = resolve(ClassifierConfig, CLASSIFIER_PRESETS["tiny"])
    judge = train_classifier(Fixed(train.images, train.labels), recipe, train.classes, 60)
    g, _, _ = load(made)
    rows, stats = accept(Pool(g, Scores(judge), 0, {}), keep_rule("confident", 0.0), 4, 6)
    assert (np.bincount(rows["label"]) == 4).all() and max(rows["index"]) < 6 and {s["candidates"] for s in stats} == {6}
    whole, _ = accept(Pool(g, Scores(judge), 0, {}), keep_rule("confident", 0.99), 6, 6)
    assert len({*zip(whole["label"], whole["index"])}) == 60  # each image once, the likeliest of the rejected too
    with pytest.raises(SettingError, match="class 0 of this set has only 6 images"):
        accept(Pool(g, Scores(judge), 0, {}), keep_rule("confident", 0.0), 7, 6)


def test_a_recycled_set_begins_again(made):
    source = Recycled([Member(load(made)[0])], 6, seed=0)
    assert {bytes(x.numpy()) for x in source.epoch(1)[0]} <= {bytes(x.numpy()) for x in load(made)[0].images}


def test_everything_after_a_generator_works_without_one(made, tmp_path, capsys):
    stages = dict(splits={}, classifier={}, mine=dict(stage="imported", path=str(made)), generate=dict(uses="mine"), filter=dict(uses="mine"))
    nodes = {n.name: n for n in plan(read_params(dict(name="x", preset="tiny", stages={**stages, "evaluate": {}, "report": {}})))}
    assert nodes["filter"].reads["generator"] == nodes["generate"].reads["generator"] == [nodes["mine"]]
    (made / "3" / "000002.png").write_bytes(b"not a picture")
    run, mine = tmp_path / "run", dict(generator="mine")
    small_stage(run, "splits")
    small_stage(run, "classifier", epochs=2)
    small_stage(run, "imported", "mine", path=str(made))
    small_stage(run, "generate", inputs=mine, per_class=None)
    small_stage(run, "filter", inputs=mine, per_class=4, draws=2)
    small_stage(run, "evaluate", seeds=[0], n_measure=50)
    small_stage(run, "report")
    r = load_json(run / "mine" / "result.json")
    assert r["images"] == 59 and r["unreadable"] == 1 and r["counts"]["3"] == 5 and r["copies"] == dict(train=0, val=0)
    table = {row["row"]: row for row in load_json(run / "evaluate" / "result.json")["table"]}
    assert table["synthetic (mine)"]["n"] == 59 and table["filtered (mine)"]["n"] == 40
    assert "mine" in (run / "report" / "report.html").read_text()
    assert verify(run / "generate", n=None).ok and "made elsewhere, read from: made" in (run / "generate" / "README.md").read_text()


def test_a_search_takes_a_set_made_elsewhere(tmp_path, floor):
    y, i = addresses(list(range(10)), 140)
    write_folder(tmp_path / "made", floor.sample(y, i), y, i, TEN)
    for stage, kw in dict(splits={}, classifier=dict(epochs=2), imported=dict(path=str(tmp_path / "made"))).items():
        small_stage(tmp_path / "run", stage, **kw)
    small_stage(tmp_path / "run", "search", places=2, per_class=20)
    assert len(rows_of(tmp_path / "run" / "search")[0]) == 200
    with pytest.raises(SettingError, match="search.per_class = 150: imported has fewer images of 0"):  # before anything is drawn
        small_stage(tmp_path / "run", "search", "more", places=2, per_class=150)


def test_copies_of_real_images_are_counted(train, tmp_path):
    write_folder(tmp_path / "made", train.images[:200], train.labels[:200], torch.arange(200), TEN)
    for stage, kw in dict(splits={}, imported=dict(path=str(tmp_path / "made"), synthetic=False)).items():
        small_stage(tmp_path / "run", stage, **kw)
    r = load_json(tmp_path / "run" / "imported" / "result.json")
    assert r["copies"]["train"] == 200 and not load_generator(tmp_path / "run" / "imported").synthetic
    imported.print_imported(r)


def test_a_place_where_nothing_is_is_refused_before_anything_runs():
    stages = dict(splits={}, classifier={}, mine=dict(stage="imported", path="nowhere/at/all"))
    with pytest.raises(SettingError, match="imported.path"):
        preflight(plan(read_params(dict(name="x", stages=stages))))
