"""Bad input: one clear line that names the file or the setting and the way out, exit code 1, before any training, and nothing lost."""

import gzip
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from synthlit import core, pipeline
from synthlit.cli import main
from synthlit.core import (
    STAGES,
    Checkpoints,
    DamagedFile,
    SettingError,
    load_json,
    open_stage,
    read_manifest,
    resolve,
    save_table,
    save_tensors,
    small_stage,
)
from synthlit.plan import plan, read_params
from synthlit.splits import DataError, SplitsConfig, load_data

CHAIN = {k: {} for k in ("splits", "classifier", "gan", "generate", "filter", "multigen", "evaluate")} | {"gan": {"seed": [0, 1]}}
MACHINE = {"device": "cpu", "threads": 1, "channels_last": False}


@pytest.fixture
def refused(tmp_path, capsys):
    """Call `refused(words, argv...)`: main must end with 1 and one line that holds the words; returns the line."""

    def call(words, *argv):
        code = main([str(a) for a in argv])
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("synthlit: ")]
        assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
        for w in [words] if isinstance(words, str) else words:
            assert str(w) in err, err
        return lines[0]

    return call


@pytest.fixture
def asked(tmp_path, refused, monkeypatch):
    """Call `asked(words, parameters, argv...)`: the run must be refused before any notebook is started and any stage folder made."""

    def begun(nb, out, parameters, label):
        raise AssertionError(f"{label} was begun")

    monkeypatch.setattr(pipeline, "execute", begun)

    def call(words, params, *argv):
        path, run = tmp_path / "asked.yaml", tmp_path / "run"
        path.write_text(params if isinstance(params, str) else yaml.safe_dump(params))
        line = refused(words, "run", path, *([] if "--out" in argv else ["--out", run]), *argv)
        assert not stages_in(run), "a stage was begun"
        return line

    return call


def stages_in(run: Path) -> list:
    return sorted(p.parent.name for p in Path(run).glob("*/stage.json"))


def chain(**stages) -> dict:
    return {"preset": "tiny", "machine": MACHINE, "stages": {**CHAIN, **stages}}


# ---- settings


@pytest.mark.parametrize(
    "stages,words",
    [
        ({"spilts": {}}, ["unknown stage 'spilts'", "'splits'"]),
        ({"more": {"stage": "gna"}}, ["unknown stage 'gna'", "'gan'"]),
        ({"gan": {"step": 5}}, ["gan", "'step'", "'steps'"]),
        ({"gan": {"steps": "many"}}, ["gan", "steps = 'many'", "int"]),
        ({"gan": {"steps": 2.5}}, ["steps = 2.5", "int"]),
        ({"gan": {"flip": "no way"}}, ["flip", "bool"]),
        ({"gan": {"steps": True}}, ["steps = True", "int"]),
        ({"gan": {"loss": "hinged"}}, ["loss = 'hinged'", "'hinge'"]),
        ({"gan": {"lr_g": float("nan")}}, ["lr_g = nan"]),
        ({"gan": {"r1": float("inf")}}, ["r1 = inf"]),
        ({"gan": {"seed": [0, -1]}}, ["seed = -1", "at least 0"]),
        ({"gan": {"seed": []}}, ["gan", "seed"]),
        ({"gan": {"seed": [0, 0]}}, ["gan-seed0"]),
        ({"gan-seed0": {"stage": "gan"}}, ["gan-seed0"]),
        ({"gan": {"preset": "tinny"}}, ["'tinny'", "'tiny'"]),
        ({"classifier": {"epochs": 0}}, ["classifier", "epochs = 0", "at least 1"]),
        ({"splits": {"k": 500}}, ["splits.k = 500", "smallest class"]),
        ({"splits": {"novel": 10}}, ["splits.novel = 10", "10 classes"]),
        ({"splits": {"dataset": "digit"}}, ["unknown data set 'digit'", "'digits'"]),
        ({"splits": {"dataset": "./no/such/folder"}}, ["no/such/folder"]),
        ({"splits": {"root": "$SYNTHLIT_NOT_SET/x"}}, ["splits.root", "$SYNTHLIT_NOT_SET is not set"]),
        ({"filter": {"tau": [0.5, 1.5]}}, ["filter", "tau[1] = 1.5", "between 0 and 0.999"]),
        ({"filter": {"tau": 1.5}}, ["filter", "tau", "1.5"]),
        ({"filter": {"tau": [1.0]}}, ["filter", "tau[0] = 1.0", "between 0 and 0.999"]),
        ({"filter": {"std": 0}}, ["filter", "std = 0", "0.001"]),
        ({"filter": {"std": -1.5}}, ["filter", "std = -1.5", "0.001"]),
        ({"filter": {"rule": "agreed"}}, ["filter.rule = 'agreed'", "filter.ensemble"]),
        ({"filter": {"ensemble": ["."]}}, ["filter.rule = 'confident'", "filter.ensemble"]),
        ({"filter": {"dials": {"std": -1}}}, ["filter.dials", "std = -1"]),
        ({"filter": {"dials": {"std": [1.5, 1]}}}, ["filter.dials", "std = [1.5, 1]"]),
        ({"filter": {"std": 1.2, "dials": {"std": 1}}}, ["filter.dials", "say std once"]),
        ({"generate": {"dials": {"truncation": -2}}}, ["generate.dials", "truncation = -2"]),
        ({"generate": {"dials": {"truncation": "two"}}}, ["generate.dials", "truncation = two"]),
        ({"filter": {"rule": "doubtful", "tau": [0.5], "most": 0.3}}, ["filter.tau = 0.5", "filter.most = 0.3"]),
        ({"filter": {"rule": "best_share", "tau": [0.0]}}, ["filter.tau = 0", "best_share"]),
        ({"search": {"rules": ["best_share"], "taus": [0.0]}}, ["search.taus", "best_share"]),
        ({"search": {"method": "published", "only": ["std"]}}, ["search.only", "search.ckpts"]),
        ({"search": {"ckpts": [5000]}}, ["ckpts[0] = 5000", "quotes"]),
        ({"multigen": {"shares": {"filter-seed0": 0.5, "filter-seed1": 0.6}}}, ["multigen.shares", "sum to 1"]),
        ({"multigen": {"shares": {"filter-seed0": 1.0}}}, ["multigen.shares", "at_least = 2"]),
        ({"search": {"taus": [0.0, 1.0]}}, ["search", "taus[1] = 1.0", "between 0 and 0.999"]),
        ({"search": {"stds": [1.0, 0.0]}}, ["search", "stds[1] = 0.0", "0.001"]),
        ({"search": {"short": "stop"}}, ["search", "short", "likeliest"]),
        ({"gan": {"keep_every": 10, "steps": 40}, "search": {"ckpts": ["20", "25", "50"]}}, ["search.ckpts: 25, 50", "40 steps", "every 10"]),
        ({"evaluate": {"one_per_epoch": True, "recycle": 0}}, ["evaluate.one_per_epoch", "evaluate.recycle"]),
        ({"filter": {"tau": []}}, ["filter", "tau"]),
        ({"evaluate": {"seeds": []}}, ["evaluate", "seeds"]),
        ({"evaluate": {"inception": "no/weights.pth"}}, ["evaluate", "no/weights.pth"]),
        ({"classifier": {"batch": 5000}}, ["classifier.batch = 5000", "images"]),
        ({"gan": {"batch": 5000}}, ["gan.batch = 5000", "images"]),
        ({"gan": {"batch": 41}}, ["batch = 41", "pack = 2"]),
        ({"gan": {"batch": 1000, "classes": "base"}}, ["batch = 1000", "images"]),  # the base classes alone have fewer
        ({"gan": {"classes": "base"}, "fewshot": {"batch": 41}}, ["batch = 41", "pack"]),
        ({"gan": {"seed": 0}}, ["at_least = 2"]),  # a mixture of one generator
        ({"multigen": {"per_class": 50}}, ["per_class"]),  # the filtered sets have 40
        ({"fewshot": {}}, ["fewshot", "base"]),  # no generator of the base classes
        ({"generate": {"uses": "gna"}}, ["generate.uses = 'gna'", "'gan'"]),
        ({"generate": {"uses": "../no/such/gan"}}, ["no/such/gan"]),
    ],
    ids=lambda x: json.dumps(x)[:60] if isinstance(x, dict) else "",
)
def test_settings_are_refused_before_anything_runs(asked, stages, words):
    asked(words, chain(**stages))


@pytest.mark.parametrize(
    "text,words",
    [
        ("stages: {splits: {}, classifier: {", ["asked.yaml", "not valid YAML"]),
        ("stages:\n  splits: {}\n  gan: {seed: 0}\n  gan: {seed: 1}", ["asked.yaml", "'gan' is said twice"]),
        ("stages:\n  splits: {seed: 0, seed: 1}", ["asked.yaml", "'seed' is said twice"]),
        ("", ["no stages"]),
        ("stages: {}", ["no stages"]),
        ("stages: [splits, gan]", ["stages"]),
        ("- splits\n- gan", ["asked.yaml"]),
        ("stages: {splits: digits}", ["splits"]),
        ("stages: {splits: {}}\nname: 5", ["name"]),
        ("stages: {splits: {}, classifier: {uses: 5}}", ["uses"]),
        ("stages: {splits: {}}\nstage: 3", ["'stage'", "'stages'"]),
        ("stages: {classifier: {}}", ["classifier needs a splits"]),
        ("stages: {splits: {}}\npreset: digit", ["'digit'", "'digits'"]),
        ("stages: {splits: {}}\nmachine: {gpu: 1}", ["machine.gpu"]),
        ("stages: {splits: {}}\nmachine: cpu", ["machine"]),
        ("stages: {splits: {}}\nmachine: {device: 'cuda:7'}", ["'cuda:7' is not there", "cpu"]),
        ("stages: {splits: {}}\nmachine: {device: gpu}", ["'gpu' is not there", "cpu", "machine.device"]),
        ("stages: {splits: {}}\nmachine: {device: cpu, threads: -1}", ["threads"]),
        ("stages: {splits: {}}\nmachine: {device: cpu, threads: two}", ["threads"]),
    ],
    ids=lambda x: x.replace("\n", " ")[:50] if isinstance(x, str) else "",
)
def test_files_are_refused_before_anything_runs(asked, text, words):
    asked(words, text)


@pytest.mark.parametrize(
    "argv,words",
    [
        (["-p", "gan.stepz=5"], ["'stepz'", "'steps'"]),
        (["-p", "gam.steps=5"], ["'gam'", "'gan'"]),
        (["-p", "steps=5"], ["steps=5", "stage.name=value"]),
        (["-p", "splits.root=$SYNTHLIT_NOT_SET"], ["$SYNTHLIT_NOT_SET is not set"]),
        (["-p", "machine.threads=-1"], ["threads"]),
        (["--from", "gam"], ["'gam'", "gan"]),
        (["--only", "report"], ["'report'"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_command_lines_are_refused_before_anything_runs(asked, argv, words):
    asked(words, chain(), *argv)


def test_parameter_file_that_is_not_there(refused):
    refused(["no parameter file", "did you mean 'digits'"], "run", "digitz.yaml")
    refused(["01_splits.ipynb is a notebook"], "run", "nbs/01_splits.ipynb")


def test_a_run_folder_is_not_a_parameter_file(tmp_path, monkeypatch):
    """By its path; a bare name still means a file that comes with synthlit, wherever one stands."""
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "params.yaml").write_text("stages: {splits: {}}")
    with pytest.raises(SettingError, match="is a run folder; its parameter file is"):
        read_params(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert read_params("digits")["stages"].keys() > {"splits"}


def test_numbers_written_with_exponents(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNTHLIT_RATE", "2e-4")
    path = tmp_path / "p.yaml"
    path.write_text("stages: {splits: {}, classifier: {}, gan: {lr_g: 1e-4, lr_d: 1.5E+0, r1: 0.1}, base: {stage: gan, lr_g: -1.E-4}}")
    read = read_params(path, ["gan.lr_d=1e-3"])["stages"]
    assert (read["gan"], read["base"]["lr_g"]) == ({"lr_g": 1e-4, "lr_d": 1e-3, "r1": 0.1}, -1e-4)
    assert all(type(v) is float for v in read["gan"].values())
    with pytest.raises(SettingError, match="base: lr_g = -0.0001: must be between"):
        plan({"stages": read})


# ---- the other commands


def test_commands_name_what_is_missing(refused, tmp_path, tiny_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("no run 'nope'", "show", "nope")
    refused("no run 'nope'", "report", "nope")
    refused(["unknown stage 'gna'", "'gan'"], "params", "gna")
    refused("no run", "sample", tmp_path / "empty")
    refused("no run", "export", tmp_path / "empty", "--to", tmp_path / "x")
    refused("none.png", "predict", tiny_run.run, tmp_path / "none.png")
    (tmp_path / "text.png").write_text("this is no image")
    refused("text.png", "predict", tiny_run.run, tmp_path / "text.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 200)
    refused("cut.png cannot be read as an image", "predict", tiny_run.run, tmp_path / "cut.png")
    refused("none.safetensors", "predict", tmp_path / "none.safetensors", tmp_path / "text.png")
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    refused("generator.safetensors", "predict", tiny_run.run / "gan-seed0" / "generator.safetensors", tmp_path / "good.png")  # not a classifier


def test_show_survives_a_torn_progress_file(tiny_copy, capsys):
    (tiny_copy / "gan-seed0" / "manifest.json").unlink()
    (tiny_copy / "gan-seed0" / "progress.json").write_text("")  # it is written twice a second, and not flushed to the disk
    assert main(["show", str(tiny_copy)]) == 0 and "gan-seed1" in capsys.readouterr().out


# ---- data


def idx(path: Path, a: np.ndarray, cut: int = 0):
    """Write an IDX file, gzipped if its name says so, without its last `cut` bytes."""
    raw = struct.pack(f">BBBB{a.ndim}I", 0, 0, 8, a.ndim, *a.shape) + a.tobytes()
    raw = gzip.compress(raw) if path.suffix == ".gz" else raw
    path.write_bytes(raw[: len(raw) - cut])


def write_mnist(root: Path, suffix="", n=(60, 30)) -> Path:
    folder = root / "mnist"
    folder.mkdir(parents=True)
    for part, m in zip(("train", "t10k"), n):
        idx(folder / f"{part}-images-idx3-ubyte{suffix}", np.zeros((m, 28, 28), np.uint8))
        idx(folder / f"{part}-labels-idx1-ubyte{suffix}", (np.arange(m) % 10).astype(np.uint8))
    return folder


def test_truncated_idx_files(tmp_path):
    load = lambda: load_data(SplitsConfig(dataset="mnist", root=str(tmp_path), download=False))
    folder = write_mnist(tmp_path, ".gz")
    assert load()["train"][0].shape == (60, 1, 28, 28)
    file = folder / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for torn in (whole[: len(whole) // 2], whole[:-4], b"", whole[:30] + bytes(20) + whole[50:], b"not gzip"):
        file.write_bytes(torn)
        with pytest.raises(DataError, match="train-images-idx3-ubyte.gz is damaged or truncated"):
            load()
    file.unlink()
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte.*not found in {tmp_path}.*download is off"):
        load()


def test_short_idx_files(tmp_path):
    folder = write_mnist(tmp_path)
    for cut in (1, 60 * 784, 60 * 784 + 10):
        idx(folder / "train-images-idx3-ubyte", np.zeros((60, 28, 28), np.uint8), cut)
        with pytest.raises(DataError, match="train-images-idx3-ubyte is damaged or truncated"):
            load_data(SplitsConfig(dataset="mnist", root=str(tmp_path)))
    idx(folder / "train-images-idx3-ubyte", np.zeros((50, 28, 28), np.uint8))
    with pytest.raises(DataError, match="train.*50.*60"):  # images and labels of different downloads
        load_data(SplitsConfig(dataset="mnist", root=str(tmp_path)))


def test_truncated_cifar(tmp_path):
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        (folder / name).touch()
        os.truncate(folder / name, 3073 * 10000)  # zeros that take no room on the disk
    load = lambda: load_data(SplitsConfig(dataset="cifar10", root=str(tmp_path), download=False))
    os.truncate(folder / "data_batch_3.bin", 3073 * 9999)  # cut between two records
    with pytest.raises(DataError, match="data_batch_3.bin"):
        load()
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match="data_batch_3.bin"):
        load()


def test_bad_parquet(tmp_path):
    load = lambda: load_data(SplitsConfig(dataset=str(tmp_path)))
    path = tmp_path / "train-00000.parquet"
    save_table(path, {"image": [b"no image"] * 4, "label": [0, 0, 1, 1]})
    with pytest.raises((DataError, DamagedFile), match="train-00000.parquet"):
        load()
    save_table(path, {"picture": [b"x"] * 4, "label": [0, 0, 1, 1]})
    with pytest.raises(DataError, match="train-00000.parquet has columns.*image and label"):
        load()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DamagedFile, match="train-00000.parquet"):
        load()


def test_a_named_data_set_is_not_taken_for_another(tmp_path):
    """SYNTHLIT_DATA (or root) that points at one data set must not be loaded under another's name."""
    from synthlit.data import encode

    save_table(
        tmp_path / "train-00000.parquet", {"image": [encode(torch.zeros(3, 32, 32, dtype=torch.uint8))] * 40, "label": [i % 4 for i in range(40)]}
    )
    try:
        data = load_data(SplitsConfig(dataset="digits", root=str(tmp_path)))
    except DataError:
        return
    assert data["train"][0].shape == (1797, 1, 8, 8)


def test_missing_data_stops_the_chain_before_training(tmp_path, refused):
    params = chain(splits={"dataset": "mnist", "root": str(tmp_path / "nowhere"), "download": False})
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(params))
    refused(["splits", "mnist", tmp_path / "nowhere", "download is off"], "run", tmp_path / "p.yaml", "--out", tmp_path / "run")
    assert set(stages_in(tmp_path / "run")) <= {"splits"} and not (tmp_path / "run" / "splits" / "manifest.json").exists()


# ---- damaged files


def damage(path: Path):
    """Turn one bit in the middle of a file's last third."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 5 // 6] ^= 1
    path.write_bytes(raw)


def again(run: Path, name: str) -> dict:
    """Do one stage of a copied run again in this process, from what its folder holds; returns its manifest."""
    was = read_manifest(run / name)
    (run / name / "manifest.json").unlink()
    config, _, go = core.stage_parts(was["stage"])
    inputs = {k: list(v) for k, v in was["inputs"].items()}
    go(open_stage(was["stage"], resolve(config, was["settings"]), run, name, inputs))
    return read_manifest(run / name)


@pytest.mark.parametrize(
    "torn", [damage, lambda p: p.write_bytes(p.read_bytes()[:1000]), lambda p: p.write_bytes(b"")], ids=["one bit", "cut", "empty"]
)
def test_damaged_checkpoint_falls_back_and_ends_with_the_same_bits(tiny_copy, capsys, torn):
    whole = read_manifest(tiny_copy / "gan-seed0")
    newest = tiny_copy / "gan-seed0" / "checkpoints" / "step-000000040.safetensors"
    torn(newest)
    assert again(tiny_copy, "gan-seed0")["artefacts"] == whole["artefacts"]
    err = capsys.readouterr().err
    assert str(newest) in err and "going back to the checkpoint before it" in err
    assert Checkpoints(newest.parent).load()[0] == 40  # and the damaged one is good again


def test_all_checkpoints_damaged_begins_anew(tiny_copy, capsys):
    whole = read_manifest(tiny_copy / "gan-seed0")
    for p in (tiny_copy / "gan-seed0" / "checkpoints").iterdir():
        damage(p)
    assert again(tiny_copy, "gan-seed0")["artefacts"] == whole["artefacts"]
    assert capsys.readouterr().err.count("going back") == 2


def contents(run: Path) -> dict:
    """Digest of each finished stage that still matches its manifest, file by file."""
    return {
        m.parent.name: all(core.file_digest(m.parent / f) == d for f, d in read_manifest(m.parent)["artefacts"].items())
        for m in run.glob("*/manifest.json")
    }


def test_damaged_generator_is_named_and_nothing_is_lost(tiny_copy, tiny_run, refused, tmp_path):
    file = tiny_copy / "gan-seed0" / "generator.safetensors"
    damage(file)
    refused([file, "checksum"], "sample", tiny_copy, "--out", tmp_path)
    refused([file, "checksum"], "run", tiny_copy / "params.yaml", "--out", tiny_copy, "-p", "generate.per_class=21", "--to", "generate")
    want = {**contents(tiny_run.run), "gan-seed0": False, "generate.old-1": True}
    assert want.pop("generate") and contents(tiny_copy) == want


def test_damaged_classifier_and_manifest_are_named(tiny_copy, refused, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    for p in (tiny_copy / "evaluate" / "classifiers").glob("mixture*"):
        damage(p)
    refused(["mixture", "checksum"], "predict", tiny_copy, tmp_path / "x.png")
    manifest = tiny_copy / "splits" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"digits"', '"digitz"', 1))
    refused([manifest, "checksum"], "run", tiny_copy / "params.yaml", "--out", tiny_copy)


# ---- splits that contradict each other


@pytest.fixture
def other_run(tmp_path):
    """A run whose digits are cut with another seed; its splits and classifier are done."""
    run = tmp_path / "other"
    core.run_machine(run, **MACHINE)
    small_stage(run, "splits", seed=1)
    small_stage(run, "classifier", epochs=1)
    return run


def test_generator_of_another_cut_is_refused(tiny_run, other_run, refused, tmp_path):
    foreign = str(tiny_run.run / "gan-seed0")
    with pytest.raises(SettingError, match="contradicting splits.*saw digits cut differently"):
        open_stage("filter", resolve(core.stage_parts("filter")[0]), other_run, inputs={"generator": foreign})
    params = {"preset": "tiny", "machine": MACHINE, "stages": {"splits": {"seed": 1}, "classifier": {"epochs": 1}, "filter": {"uses": foreign}}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(params))
    refused(["contradicting splits", foreign, "digits"], "run", tmp_path / "p.yaml", "--out", other_run)
    assert stages_in(other_run) == ["classifier", "splits"]


def test_generator_of_another_cut_is_refused_before_training(tiny_run, refused, tmp_path):
    params = {
        "preset": "tiny",
        "machine": MACHINE,
        "stages": {"splits": {"seed": 1}, "classifier": {}, "filter": {"uses": str(tiny_run.run / "gan-seed0")}},
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(params))
    refused("contradicting splits", "run", tmp_path / "p.yaml", "--out", tmp_path / "new")
    assert set(stages_in(tmp_path / "new")) <= {"splits"}


def test_trained_on_what_judges_it_is_refused(tiny_run):
    from types import SimpleNamespace

    from synthlit.evaluate import refuse_contamination

    stage = SimpleNamespace(inputs={"generator": [tiny_run.run / "gan-seed0"]})
    saw = read_manifest(tiny_run.run / "gan-seed0")["saw"][0]
    digests = load_json(tiny_run.run / "splits" / "result.json")["digests"]
    assert saw == digests["train"] and len(set(digests.values())) == 3
    refuse_contamination(stage, {"val": digests["val"], "test": digests["test"]})
    with pytest.raises(SettingError, match="gan-seed0 was trained on the test images"):
        refuse_contamination(stage, {"test": saw})


# ---- disks and neighbours

HOLD = "import sys; from synthlit.core import take_lock; lock = take_lock(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


@pytest.mark.parametrize("command", ["run", "clean"])
def test_run_folder_in_use(tmp_path, asked, refused, tiny_run, command):
    run = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, run / "locks" / "run.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        words = [run, f"in use by process {other.pid}"]
        core.run_machine(run, **MACHINE)
        asked(words, chain()) if command == "run" else refused(words, "clean", run, "--yes")
    finally:
        other.communicate()
    core.take_lock(run / "locks" / "run.lock").release()  # free again when its holder ends


def test_stage_folder_in_use(tiny_copy, monkeypatch):
    """A stage's own lock: a notebook open in JupyterLab and the runner must not write in one folder."""
    real = core.take_lock
    monkeypatch.setattr(core, "take_lock", lambda path, wait=0.0: real(path, 0.1))
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tiny_copy / "locks" / "gan-seed0.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(core.InUse, match=f"gan-seed0 is in use by process {other.pid}"):
            again(tiny_copy, "gan-seed0")
    finally:
        other.communicate()


LIMITED = "import sys; from synthlit.cli import main; sys.exit(main(sys.argv[1:]))"


def test_full_disk(tmp_path):
    """No file may grow above 40 kB (as on a full disk, the write fails in the middle): named, and with room the same command goes on."""
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"machine": MACHINE, "stages": {"splits": {}}}))
    argv, run = [sys.executable, "-c", LIMITED, "run", tmp_path / "p.yaml", "--out", tmp_path / "run"], tmp_path / "run"
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    out = subprocess.run(argv, preexec_fn=full, capture_output=True, text=True)
    assert out.returncode == 1 and "Traceback" not in out.stderr, out.stderr
    assert f"cannot write {run}/splits/train.safetensors" in out.stderr and "too large" in out.stderr
    assert not list(run.rglob("*.safetensors")) and not (run / "splits" / "manifest.json").exists()
    out = subprocess.run(argv, capture_output=True, text=True)
    assert out.returncode == 0 and all(contents(run).values()) and not list(run.rglob(".tmp-*")), out.stderr


def test_full_disk_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.zeros(5)})
    was = path.read_bytes()
    code = f"""
import resource, torch
from synthlit.core import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
save_tensors({str(path)!r}, dict(x=torch.zeros(100_000)))"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 1 and f"cannot write {path}" in out.stderr and "unharmed" in out.stderr, out.stderr
    assert path.read_bytes() == was and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("where", ["/proc/nowhere/run", "file/run"])
def test_disk_that_cannot_be_written(asked, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    asked(["cannot write", where], chain(), "--out", where)


def test_ledger_that_cannot_be_written_is_refused_before_training(asked, monkeypatch):
    monkeypatch.setenv("SYNTHLIT_HOME", "/proc/nowhere")  # evaluate would find out at the end of the night
    asked("/proc/nowhere", chain())


# ---- machines


def test_a_run_keeps_its_machine(tiny_copy, refused):
    refused(["machine.threads = 2", "begun with 1", "--out"], "run", tiny_copy / "params.yaml", "--out", tiny_copy, "-p", "machine.threads=2")
    refused(["'cuda:7' is not there"], "run", tiny_copy / "params.yaml", "--out", tiny_copy, "-p", "machine.device='cuda:7'")
    core.save_json(tiny_copy / "run.json", {"machine": {"device": "cuda:7", "threads": 1, "channels_last": True}})  # begun on a GPU box, copied here
    p = yaml.safe_load((tiny_copy / "params.yaml").read_text()) | {"machine": {}}
    (tiny_copy / "p.yaml").write_text(yaml.safe_dump(p))
    refused(["'cuda:7' is not there"], "run", tiny_copy / "p.yaml", "--out", tiny_copy)


# ---- notebooks


@pytest.fixture
def my_notebooks(tmp_path, monkeypatch):
    """A copy of nbs/ that the runner takes for the real one; returns a function that edits each cell's JSON of a notebook."""
    folder = tmp_path / "nbs"
    shutil.copytree(core.notebooks_dir(), folder, ignore=shutil.ignore_patterns(".*"))
    for module in (core, pipeline):
        monkeypatch.setattr(module, "notebooks_dir", lambda: folder)
    core.code_digest.cache_clear()

    def edit(name, change):
        nb = json.loads((folder / f"{name}.ipynb").read_text())
        for c in nb["cells"]:
            c["source"] = "".join(c["source"])
            change(c)
        (folder / f"{name}.ipynb").write_text(json.dumps(nb))

    yield edit
    core.code_digest.cache_clear()


@pytest.mark.parametrize("stage", ["splits", "gan"])
def test_notebook_without_its_parameters_cell(my_notebooks, asked, stage):
    my_notebooks(STAGES[stage].notebook, lambda c: c["metadata"].pop("tags", None))
    asked([f"{STAGES[stage].notebook}.ipynb", "0 cells tagged `parameters`"], chain())


def test_notebook_without_its_run_section(my_notebooks, asked):
    my_notebooks("03b_gan_training", lambda c: c.update(source=c["source"].replace("## Run the stage", "## Run")))
    asked(["03b_gan_training.ipynb", "## Run the stage"], chain())


@pytest.mark.parametrize("notebook", ["01_splits", "03b_gan_training", "03a_gan_models", "00b_metrics"])
def test_stale_export(my_notebooks, asked, notebook):
    """A notebook that was edited and not exported: the stage's own, or one of a module that it imports."""
    my_notebooks(
        notebook, lambda c: c.update(source=c["source"] + "\nnot_yet_exported = 1" if c["source"].startswith("#| export\n") else c["source"])
    )
    asked(["stale export", f"{notebook}.ipynb", "nbdev_export"], chain())


def test_comments_and_prose_do_not_make_an_export_stale(my_notebooks):
    my_notebooks("01_splits", lambda c: c.update(source=c["source"] + "\n# a remark" if c["cell_type"] == "code" else "prose\n"))
    pipeline.refuse_stale("splits")


def test_kernel_must_be_the_runners_interpreter(monkeypatch):
    cell = next(c.source for c in pipeline.derive("splits").cells if "sys.executable" in c.source)
    exec(cell, {})
    monkeypatch.setattr(sys, "executable", "/elsewhere/python")
    with pytest.raises(AssertionError, match="this kernel is /elsewhere/python.*ipykernel"):
        exec(cell, {})
