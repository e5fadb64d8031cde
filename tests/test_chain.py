"""The whole chain as a person uses it: commands in processes of their own, run folders that are finished, changed, continued or damaged."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
import yaml
from PIL import Image

from synthlit.cli import main
from synthlit.compare import COMPARED, compare_runs, compared, difference
from synthlit.core import (
    SettingError,
    digest,
    load_json,
    load_tensors,
    notebooks_dir,
    read_manifest,
    resolve,
    save_json,
    save_tensors,
    small_stage,
    stage_parts,
)
from synthlit.generator import load_generator
from synthlit.pipeline import parameters_of
from synthlit.plan import plan, read_params, resolved
from synthlit.report import headline_row
from synthlit.splits import load_split, open_test, openings
from synthlit.utility import load_predictions

OUTSIDE = r"""(?:src|srcset|href|action|data)\s*=\s*["']?\s*(?:https?:)?//[^\s"'>]*"""


def command(*args, cwd=None, code: int = 0) -> str:
    """Output of a command from the environment's bin, in a process of its own; fails unless it ends with `code`, after 10 minutes with all stacks."""
    args = [str(Path(sys.executable).parent / args[0]), *map(str, args[1:])]
    env = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    p = subprocess.Popen(args, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        out, _ = p.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(p.pid).children(recursive=True), p]:
            child.send_signal(signal.SIGABRT)  # makes it print where it hangs
        pytest.fail(f"{args} still ran after 10 minutes:\n{p.communicate()[0]}")
    assert p.returncode == code, f"{args} ended with {p.returncode}:\n{out}"
    return out


def write_params(path: Path, params: dict) -> Path:
    """A parameter file."""
    path.write_text(yaml.safe_dump(params))
    return path


def digests(run: Path) -> dict:
    """Stage folder -> digest of its artefacts, of all finished stages."""
    return {p.parent.name: read_manifest(p.parent)["digest"] for p in run.glob("*/manifest.json") if ".old-" not in p.parent.name}


def chain(run, *stages) -> dict:
    """The tiny chain's parameters, of some entries only."""
    return {**run.params, "name": "part", "stages": {k: v for k, v in run.params["stages"].items() if k in stages}}


# a finished chain


def test_second_run_does_nothing(tiny_run, tiny_copy, tmp_path):
    """No kernel, no new file, and quick."""
    before = {p: p.stat().st_mtime_ns for p in tiny_copy.rglob("*") if p.is_file() and p.parent.name != "locks"}
    start = time.time()
    out = command("synthlit", "run", write_params(tmp_path / "tiny.yaml", tiny_run.params), "--out", tiny_copy)
    print(f"the second run of a finished chain took {time.time() - start:.1f} s, imports included")
    assert "nothing to do: all 23 stages are done" in out and str(tiny_copy / "report" / "report.html") in out
    after = {p: p.stat().st_mtime_ns for p in tiny_copy.rglob("*") if p.is_file() and p.parent.name != "locks"}
    assert {p.name for p in after if before.get(p) != after[p]} <= {"params.yaml"}


def test_params_yaml_repeats_the_run(tiny_run, tmp_path):
    """The resolved parameter file, in a new folder, stage by stage: the same digests; then everything wanted is done."""
    new = tmp_path / "again"
    for only in ("splits", "classifier", "gan-seed0", "generate"):
        assert main(["run", str(tiny_run.run / "params.yaml"), "--out", str(new), "--only", only]) == 0
    mine, good = digests(new), digests(tiny_run.run)
    made = ("splits", "classifier", "base_classifier", "gan-seed0", "generate")  # a stage's name means all that use it
    assert mine == {k: good[k] for k in made}
    assert yaml.safe_load((new / "params.yaml").read_text()) == yaml.safe_load((tiny_run.run / "params.yaml").read_text())


def test_a_changed_setting_reruns_what_depends_on_it(tiny_run, tiny_copy, tmp_path, capsys):
    """Other settings for `evaluate`: it and the report run anew, nothing else; the old folder stays beside the new one."""
    before, params = digests(tiny_copy), write_params(tmp_path / "tiny.yaml", tiny_run.params)
    assert main(["run", str(params), "--out", str(tiny_copy), "-p", "evaluate.n_measure=120"]) == 0
    out, after = capsys.readouterr().out, digests(tiny_copy)
    assert re.findall(r"^(\S+) done in", out, re.M) == ["evaluate", "report"] and "2 of 23 stages run" in out
    assert {k for k in after if after[k] != before[k]} <= {"evaluate", "report"} and after["evaluate"] != before["evaluate"]
    assert {p.name for p in tiny_copy.glob("*.old-*")} == {"evaluate.old-1", "report.old-1"}
    assert read_manifest(tiny_copy / "evaluate.old-1")["digest"] == before["evaluate"]
    notebook = nbformat.read(tiny_copy / "notebooks" / "evaluate.ipynb", 4)
    assert "evaluate changed (settings.n_measure: 100 -> 120)" in str(notebook.cells)


def test_dry_run_sees_what_a_change_entails(tiny_run, tiny_copy, tmp_path, capsys):
    """A change at the top of the chain: all below will run anew, and the plan says so and counts their time."""
    params, before = write_params(tmp_path / "tiny.yaml", tiny_run.params), sorted(tiny_copy.rglob("*"))
    assert main(["run", str(params), "--out", str(tiny_copy), "-p", "classifier.epochs=3", "--dry-run"]) == 0
    rows = dict(re.findall(r"^(\S+) +(done|changed|begun|to do|waiting) ", capsys.readouterr().out, re.M))
    assert len(rows) == 23 and rows.pop("splits") == "done" and rows["classifier"] == "changed"
    assert {k for k, state in rows.items() if state == "done"} == {"base_classifier", "mine", "tiny", "prompts", "text2image", "lora"}, (
        rows
    )  # they stand on the splits alone
    assert sorted(tiny_copy.rglob("*")) == before


# continuing


FULL = {"classifier": "classifier"}  # not the one of the base classes
GAN = dict(width_g=8, width_d=8, n_eval=10, eval_every=20, decay=False)


def test_more_steps_continue_from_the_checkpoint(tiny_copy, capsys):
    """40 steps, then 80: the same bits as 80 at once, and only 40 more are made."""
    small_stage(tiny_copy, "gan", "long", FULL, steps=40, **GAN)
    short = read_manifest(tiny_copy / "long")
    small_stage(tiny_copy, "gan", "long", FULL, steps=80, **GAN)
    small_stage(tiny_copy, "gan", "straight", FULL, steps=80, **GAN)
    assert not list(tiny_copy.glob("long.old-*")) and short["settings"]["steps"] == 40
    for file in ("generator", "last/generator", "last/discriminator", "checkpoints/step-000000080"):
        a, b = [load_tensors(tiny_copy / stage / f"{file}.safetensors")[0] for stage in ("long", "straight")]
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    assert read_manifest(tiny_copy / "long")["artefacts"] == read_manifest(tiny_copy / "straight")["artefacts"]


def test_falling_rates_begin_anew(tiny_copy):
    """With decay the rate of step 30 depends on the total: 80 steps after 40 are another training."""
    for steps in (40, 60):
        small_stage(tiny_copy, "gan", "long", FULL, steps=steps, **{**GAN, "decay": True})
    assert (tiny_copy / "long.old-1" / "manifest.json").exists()


# notebooks and parameter files


def test_papermill_on_its_own(tmp_path):
    """The README's lines: source notebooks, one after the other, in one run folder."""
    run = tmp_path / "run"
    for notebook, *more in (("01_splits",), ("02_classifier", "-p", "epochs", "2")):
        start = time.time()
        command("papermill", notebooks_dir() / f"{notebook}.ipynb", tmp_path / "out.ipynb", "-p", "run_dir", run, *more, cwd=tmp_path)
        print(f"papermill {notebook}: {time.time() - start:.1f} s")
    assert read_manifest(run / "splits")["stage"] == "splits"
    assert read_manifest(run / "classifier")["settings"]["epochs"] == 2


# the commands


def test_show(tiny_run, capsys):
    """A line for every stage, with its state; an unfinished stage is not done."""
    assert main(["show", str(tiny_run.run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 24 and all(" done " in line for line in lines[1:])


def test_log(tiny_run, tmp_path, capsys):
    """All histories, on the terminal and as CSV."""
    assert main(["log", str(tiny_run.run)]) == 0
    assert re.search(r"^gan-seed0 +step 20 .*frechet", capsys.readouterr().out, re.M)
    assert main(["log", str(tiny_run.run), "--csv", str(tmp_path / "log.csv")]) == 0
    with open(tmp_path / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    trained = {"classifier", "base_classifier", "gan-seed0", "gan-seed1", "base_gan", "diffusion", "tiny", "fewshot", "lora", "fewclassify", "tuning"}
    assert {r["stage"] for r in rows} == trained
    assert all(0 <= float(r["val_accuracy"]) <= 1 for r in rows if r["stage"] == "classifier")


def test_params_template_is_a_parameter_file(tmp_path, capsys):
    """`synthlit params --yaml` parses, is accepted back, and a null in it stays one whatever the preset says."""
    assert main(["params"]) == 0
    assert "classifier  (02_classifier.ipynb;" in capsys.readouterr().out
    assert main(["params", "--yaml"]) == 0
    text = capsys.readouterr().out
    said = yaml.safe_load(text)["stages"]
    (tmp_path / "all.yaml").write_text(text.replace("at_least: 2", "at_least: 1").replace("classes: all", "classes: base"))
    nodes = plan(read_params(tmp_path / "all.yaml"))
    assert list(dict.fromkeys(n.stage for n in nodes)) == list(said)  # several of a stage, where there are several generators
    for n in nodes:
        assert [k for k, v in vars(type(n.cfg)()).items() if vars(n.cfg)[k] != v and k not in ("at_least", "classes")] == [], n.stage
    for stage in said:
        assert main(["params", stage, "--yaml"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["stages"][stage] == said[stage]


def test_settings_survive_the_way_to_the_notebook(tiny_run, tmp_path):
    """What was planned is what params.yaml repeats and what the notebook resolves, also where an entry has a preset of its own."""
    params = {**tiny_run.params, "stages": {**tiny_run.params["stages"], "generate": {"uses": "gan-seed0", "preset": "digits"}}}
    nodes = plan(params)
    assert next(n for n in nodes if n.stage == "generate").cfg.per_class is None
    again = plan(read_params(resolved(params, nodes, params["machine"])))
    assert [(n.name, n.cfg) for n in again] == [(n.name, n.cfg) for n in nodes]
    for n in nodes:
        Config, presets, _ = stage_parts(n.stage)
        p = parameters_of(n, tmp_path, params["preset"])
        assert resolve(Config, presets[p["preset"]], p["settings"]) == n.cfg, n.name


def test_report_again(tiny_copy, capsys):
    """Written again from what is there, finished or not."""
    shutil.rmtree(tiny_copy / "evaluate")
    assert main(["report", str(tiny_copy)]) == 0
    assert len((tiny_copy / "report.html").read_text()) > 10_000 and "report.html" in capsys.readouterr().out


def scored_otherwise(run: Path, **said):
    """Change what a copied run's evaluation says of its test split, or (`flip`) which of the headline's predictions are right."""
    flip, folder = said.pop("flip", 0), run / "evaluate"
    save_json(folder / "result.json", load_json(folder / "result.json") | said)
    tensors, meta = load_tensors(folder / "predictions.safetensors")
    row = [k for k, _ in meta["rows"]].index(headline_row(load_json(folder / "result.json")["table"])["row"])
    tensors[f"row{row}"][:, :flip] = (tensors["labels"][:flip] + 1).to(torch.uint8) % 10
    save_tensors(folder / "predictions.safetensors", tensors, meta | ({"digest": said["test_digest"]} if said else {}))


def test_compare(tiny_run, tiny_copy, tmp_path, capsys):
    """One page of two runs: the same classes of both, the paired difference, what differs, cost; whole, and without a network."""
    scored_otherwise(tiny_copy, flip=150)
    copied = tiny_copy.rename(tmp_path / "other")
    assert main(["compare", str(tiny_run.run), str(copied), "--out", str(tmp_path / "c.html"), "--samples", "3"]) == 0
    text = (tmp_path / "c.html").read_text()
    assert str(tmp_path / "c.html") in capsys.readouterr().out and not re.search(OUTSIDE + "|could not be drawn", text)
    assert all(f'id="{k}"' in text for k in COMPARED) and text.count("<img") == 3  # real images, and each run's
    a, b = compared([tiny_run.run, copied])
    of = {c.name: load_predictions(c.view.run / "evaluate" / "predictions.safetensors")[0] for c in (a, b)}
    want = of["other"][b.rows["best"]["row"]][1].mean() - of["tiny"][a.rows["best"]["row"]][1].mean()
    d = difference(a, b)
    assert d["mean"] == pytest.approx(want) and want < -0.05 and d["low"] < want < d["high"] < 0 and d["over"] == "images"
    assert difference(a, b, "real")["mean"] == 0 and "tiny is ahead: of other" in text and "Nothing: data, settings" in text


def test_compare_refuses_other_test_images(tiny_run, tiny_copy, tmp_path):
    """Accuracies on different test images are not subtracted, and the page says why; nor where the predictions kept are not those of the scores."""
    other = shutil.copytree(tiny_copy, tmp_path / "other")
    scored_otherwise(other, test_digest="f" * 64)
    a, b = compared([tiny_run.run, other])
    text = compare_runs([tiny_run.run, other])
    assert difference(a, b).keys() == {"why"} and "other test images" in difference(a, b)["why"]
    assert "cannot be paired" in text and "points ahead of tiny" in text and "No run can be set against tiny" in text
    save_json(other / "evaluate" / "result.json", load_json(other / "evaluate" / "result.json") | dict(test_digest=a.of))
    assert "other images than the scores" in difference(*compared([tiny_run.run, other]))["why"]


def test_compare_takes_runs_as_they_are(tiny_run, tiny_copy, tmp_path):
    """Unfinished runs, other classes, damaged files: the rest of the page is there."""
    shutil.rmtree(tiny_copy / "evaluate")
    (tiny_copy / "multigen" / "mixture.parquet").write_bytes(b"torn")
    raw = (tiny_copy / "gan-seed0" / "manifest.json").read_text()
    (tiny_copy / "gan-seed0" / "manifest.json").write_text(raw.replace("seconds", "secends"))
    text = compare_runs([tiny_run.run, tiny_copy.rename(tmp_path / "half")])
    assert "half has no evaluation yet" in text and "gan-seed0: " in text and "checksum" in text and "mixture.parquet cannot be read" in text
    assert "stage evaluate" in text and text.count("could not be drawn") == 1  # the torn mixture's pictures


@pytest.mark.parametrize("runs, words", [(["{run}"], "at least two"), (["{run}", "{run}"], "said twice"), (["{run}", "nowhere"], "no run 'nowhere'")])
def test_compare_refuses(tiny_run, tmp_path, monkeypatch, capsys, runs, words):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *[r.format(run=tiny_run.run) for r in runs]]) == 1
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_report_needs_no_network(tiny_run):
    """Nothing that a browser would fetch when it opens the page."""
    html = (tiny_run.run / "report" / "report.html").read_text()
    assert "could not be drawn" not in html and "Not in this run: few-shot classification" not in html
    assert not re.findall(OUTSIDE, html, re.I)
    assert not re.findall(r"url\(\s*[\"']?(?!data:|#)[^)]*", html, re.I) and "@import" not in html
    assert not re.findall(r"<(?:script|link|iframe)[^>]*\b(?:src|href)\b", html, re.I)
    assert len(re.findall(r"data:image/\w+;base64,", html)) >= 3


def test_sample(tiny_run, tmp_path, capsys):
    """A picture for every generator of a run, or for one folder."""
    assert main(["sample", str(tiny_run.run), "--out", str(tmp_path), "-n", "2"]) == 0
    makers = ("gan-seed0", "gan-seed1", "base_gan", "diffusion", "text2image", "fewshot", "lora", "mine")
    names = {f"{m}-samples.png" for m in makers}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert main(["sample", str(tiny_run.run / "gan-seed0"), "--out", str(tmp_path / "one"), "-n", "2"]) == 0
    assert Image.open(tmp_path / "one" / "gan-seed0-samples.png").size[0] > 100


def test_export_then_predict(tiny_run, tmp_path, capsys):
    """train as Parquet and PNG files; the real classifier recognises most of them; the run's product answers for each."""
    run = str(tiny_run.run)
    assert main(["export", run, "--to", str(tmp_path)]) == 0
    assert (tmp_path / "train.parquet").exists()
    images = [str(p) for c in range(10) for p in sorted((tmp_path / "train" / str(c)).glob("*.png"))[:4]]
    assert len(images) == 40
    capsys.readouterr()
    assert main(["predict", str(tiny_run.run / "classifier" / "classifier.safetensors"), *images]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [r[0] for r in rows] == images and sum(Path(r[0]).parent.name == r[1] for r in rows) > 24
    assert main(["predict", run, *images[:2]]) == 0
    out = capsys.readouterr()
    assert len(out.out.splitlines()) == 2 and "mixture" in out.err
    with pytest.raises(SystemExit):
        main(["export", run, "--to", str(tmp_path), "--part", "test"])


def test_clean(tiny_run, tiny_copy, tmp_path, capsys):
    """Checkpoints and working notebooks go; the chain is still done."""
    assert list(tiny_copy.glob("*/checkpoints"))
    assert main(["clean", str(tiny_copy), "--yes"]) == 0
    assert not list(tiny_copy.glob("*/checkpoints")) and not (tiny_copy / "notebooks").exists()
    assert digests(tiny_copy) == digests(tiny_run.run)
    capsys.readouterr()
    assert main(["run", str(write_params(tmp_path / "tiny.yaml", tiny_run.params)), "--out", str(tiny_copy)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_failed_notebook_is_kept(tiny_run, tmp_path, capsys):
    """A truncated input: exit code 1; stage, cell and error on the terminal; the notebook with its red cell is there; mended, the run goes on."""
    run, params = tmp_path / "run", write_params(tmp_path / "part.yaml", chain(tiny_run, "splits", "classifier"))
    shutil.copytree(tiny_run.run / "splits", run / "splits")
    shutil.copy(tiny_run.run / "run.json", run)
    whole = (run / "splits" / "train.safetensors").read_bytes()
    (run / "splits" / "train.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(["run", str(params), "--out", str(run)]) == 1
    err = capsys.readouterr().err
    assert re.search(r"synthlit: classifier, cell \d+: DamagedFile: \S+train.safetensors ", err), err
    kept = run / "notebooks" / "classifier.ipynb"
    assert str(kept) in err and "classifier, cell" in (run / "run.log").read_text()
    errors = [o for c in nbformat.read(kept, 4).cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert errors and errors[0].ename == "DamagedFile"
    assert not (run / "classifier" / "manifest.json").exists()
    (run / "splits" / "train.safetensors").write_bytes(whole)
    assert main(["run", str(params), "--out", str(run)]) == 0
    assert digests(run)["classifier"] == digests(tiny_run.run)["classifier"]


# what a stage promises to the next


def test_the_test_split_is_sealed(tiny_run, tmp_path, monkeypatch):
    """The library does not hand it out; every opening by other work is counted, the same work is counted once."""
    folder = tiny_run.run / "splits"
    with pytest.raises(SettingError, match="sealed"):
        load_split(folder, "test")
    test = load_json(folder / "result.json")["digests"]["test"]
    key = digest(load_json(tiny_run.run / "evaluate" / "stage.json"))
    mine = [o for o in openings(test) if o["key"] == key]
    assert len(mine) == 1 and mine[0]["who"] == f"{tiny_run.run.name}/evaluate"
    monkeypatch.setenv("SYNTHLIT_HOME", str(tmp_path))
    for key in ("a", "a", "b"):
        assert open_test(folder, "tests", "count", key).name == "digits/test"
    assert [o["key"] for o in openings(test)] == ["a", "b"]


@pytest.mark.parametrize("name", ["gan-seed0", "fewshot"])
def test_an_image_is_its_address(tiny_run, name):
    """A candidate's image depends on neither order nor company, nor on whether the generator was saved and loaded."""
    g = load_generator(tiny_run.run / name)
    y = torch.tensor(g.trained).repeat(20)
    i = torch.arange(20).repeat_interleave(len(g.trained))
    whole, mixed = g.sample(y, i, seed=5), torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    assert whole.dtype == torch.uint8 and tuple(whole.shape[1:]) == g.shape
    assert torch.equal(g.sample(y[mixed], i[mixed], seed=5), whole[mixed])
    assert all(torch.equal(g.sample(y[k : k + 1], i[k : k + 1], seed=5)[0], whole[k]) for k in range(0, len(y), 17))
    assert not torch.equal(g.sample(y, i, seed=6), whole)
    again = load_generator(tiny_run.run / name)
    assert again.digest == g.digest == load_json(tiny_run.run / name / "result.json")["digest"]
    assert torch.equal(again.sample(y[mixed[:9]], i[mixed[:9]], seed=5), whole[mixed[:9]])


def test_a_filtered_set_is_a_list_of_addresses(tiny_run):
    """What `generate` wrote is what the addresses give."""
    from synthlit.core import load_table
    from synthlit.generate import load_set

    images, labels, _ = load_set(tiny_run.run / "generate")
    t = load_table(min((tiny_run.run / "generate").glob("*.parquet")))
    g = load_generator(tiny_run.run / "gan-seed0")
    n = t.num_rows
    assert set(t["generator"].to_pylist()) == {g.digest}
    assert torch.equal(g.sample(labels[:n], torch.tensor(t["index"].to_pylist()), seed=t["seed"][0].as_py()), images[:n])


def test_embed_leaves_the_base_classes_alone(tiny_copy):
    """Few-shot by embeddings: base classes draw the very same images as before, novel ones have changed."""
    small_stage(tiny_copy, "fewshot", "embed", {"generator": "base_gan", **FULL}, mode_g="embed", mode_d="embed", steps=10, eval_every=10, n_eval=10)
    before, after = load_generator(tiny_copy / "base_gan" / "last"), load_generator(tiny_copy / "embed" / "last")
    base = torch.tensor(before.trained).repeat(8)
    index = torch.arange(8).repeat_interleave(len(before.trained))
    assert torch.equal(before.sample(base, index, seed=1), after.sample(base, index, seed=1))
    novel = sorted(set(after.trained) - set(before.trained))
    assert len(novel) == 3 and load_json(tiny_copy / "splits" / "fewshot.json")["novel"] == novel
    with pytest.raises(SettingError, match="not trained on classes"):
        before.sample(novel, [0] * 3)
    a, b = [load_tensors(tiny_copy / f / "last" / "generator.safetensors")[0] for f in ("base_gan", "embed")]
    moved = {k for k in a if not torch.equal(a[k], b[k])}
    assert moved and all(k.startswith(("embed.", "norms.")) for k in moved)
