"""`synthlit score` and `synthlit stats`: any two sets, without a run; what does not fit is refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from synthlit.classifier import Classifier, ClassifierConfig, new_net
from synthlit.cli import main
from synthlit.core import SettingError, load_json, resolve, rng, save_table
from synthlit.data import DataError
from synthlit.generate import shard_table, write_folder
from synthlit.metrics import frechet_distance, load_reference
from synthlit.score import network_of, read_set, score, score_sets

CLASSES = ["cat", "dog"]


def images(n, seed, size=8, channels=1):
    return torch.from_numpy(rng(seed, "score").integers(0, 256, (n, channels, size, size), dtype=np.uint8))


@pytest.fixture
def sets(tmp_path):
    """A folder of class folders, Parquet shards of the same images, and other images."""
    y = torch.arange(60) % 2
    write_folder(tmp_path / "folder", images(60, 0), y, torch.arange(60), CLASSES)
    save_table(tmp_path / "shards" / "train.parquet", shard_table(images(60, 0), y, torch.arange(60), CLASSES, "", 0))
    write_folder(tmp_path / "other", images(60, 1), y, torch.arange(60), CLASSES)
    return tmp_path


def test_the_form_of_a_set_does_not_matter(sets):
    a, b = read_set(str(sets / "folder")), read_set(str(sets / "shards"))
    assert a.classes == b.classes == CLASSES and len(a.images) == len(b.images) == 60
    rows = {r["measure"]: r["value"] for r in score_sets(a, b, network_of("pixels"))}
    assert abs(rows["Fréchet distance (pixels)"]) < 1e-6 and rows["precision"] == rows["coverage"] == 1


def test_loose_images_have_no_labels(tmp_path):
    for i, x in enumerate(images(20, 0)):
        Image.fromarray(x[0].numpy()).save(tmp_path / f"{i:02}.png")
    s = read_set(str(tmp_path), n=10)
    assert len(s.images) == 10 and s.labels is None and s.classes == []


def test_the_command_prints_and_writes(sets, capsys):
    out = sets / "score.json"
    assert main(["score", str(sets / "folder"), str(sets / "other"), "--draws", "5", "--out", str(out), "--train", str(sets / "other")]) == 0
    said, found = capsys.readouterr().out, load_json(out)
    assert "Fréchet distance (pixels)" in said and "fewer than 10,000 images" in said and "kernel distance" in said
    assert found["table"][0]["low"] < found["table"][0]["high"] and set(found["classes"]) == set(CLASSES) and "text" in found["copies"]


def test_a_classifier_lends_its_features(sets):
    r = resolve(ClassifierConfig, dict(network="small", width=4))
    machine = dict(device="cpu", threads=1, channels_last=False)
    c = Classifier(new_net(r, 1, 2), CLASSES, (1, 8, 8), r, machine)
    c.save(sets / "mine" / "classifier.safetensors")
    net, a = network_of(str(sets / "mine" / "classifier.safetensors")), read_set(str(sets / "folder"))
    assert net.name == "classifier mine" and torch.allclose(net(a.images), c.features(a.images), atol=1e-5)


def test_what_does_not_fit_is_refused(sets, tmp_path):
    write_folder(tmp_path / "big", images(8, 2, 16), torch.arange(8) % 2, torch.arange(8), CLASSES)
    write_folder(tmp_path / "named", images(8, 2), torch.arange(8) % 2, torch.arange(8), ["cat", "cow"])
    write_folder(tmp_path / "colour", images(8, 2, 8, 3), torch.arange(8) % 2, torch.arange(8), CLASSES)
    with pytest.raises(SettingError, match="16×16 pixels where 8×8 are expected: say fit"):
        score(str(tmp_path / "big"), str(sets / "folder"))
    with pytest.raises(SettingError, match="do not have the same list of classes .in one of them only: cow, dog"):
        score(str(tmp_path / "named"), str(sets / "folder"))
    with pytest.raises(SettingError, match="has colour where grey is expected"):
        score(str(tmp_path / "colour"), str(sets / "folder"))
    with pytest.raises(SettingError, match="known are pixels"):
        score(str(sets / "other"), str(sets / "folder"), features="pixel")
    with pytest.raises(ValueError, match="more than 5 samples"):
        score(str(sets / "other"), str(sets / "folder"), n=4)


def test_an_unreadable_image_is_named_and_the_rest_kept(sets, capsys):
    bad = sorted((sets / "other").rglob("*.png"))[7]
    bad.write_bytes(b"not a picture")
    found = score(str(sets / "other"), str(sets / "folder"))
    assert found["sets"]["a"]["n"] == 59 and bad.name in capsys.readouterr().out
    for p in (sets / "other").rglob("*.png"):
        p.write_bytes(b"no")
    with pytest.raises(DataError, match="none of its 60 images"):
        score(str(sets / "other"), str(sets / "folder"))


def test_reference_statistics_stand_for_their_set(sets, capsys):
    out = sets / "ref.safetensors"
    assert main(["stats", str(sets / "folder"), "--split", "train", "--out", str(out)]) == 0
    net, ref = network_of("pixels"), load_reference(out)
    a, b = net(read_set(str(sets / "other")).images), net(read_set(str(sets / "folder")).images)
    assert abs(frechet_distance(a, ref) - frechet_distance(a, b)) < 1e-6 and "60 images" in capsys.readouterr().out
    assert main(["stats", str(sets / "folder"), "--split", "test", "--out", str(out)]) != 0
