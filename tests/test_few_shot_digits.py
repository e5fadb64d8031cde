"""The few-shot chain on digits, whole: base classes first, then three novel ones from five supports each."""

import time
from dataclasses import replace

from synthlit.cli import main
from synthlit.core import load_json, load_table
from synthlit.generator import load_generator
from synthlit.pipeline import run_chain
from synthlit.plan import read_params
from synthlit.report import ReportConfig, RunView, fewshot_section, fewshot_table
from synthlit.splits import openings


def test_few_shot_digits(tmp_path):
    start = time.time()
    run = run_chain(read_params("few_shot_digits", ["machine.threads=1", "machine.device=cpu"]), tmp_path / "few", jobs=2)
    print(f"few_shot_digits took {time.time() - start:.0f} s")
    fs, base = load_json(run / "splits/fewshot.json"), load_generator(run / "base_gan/last")
    adapted = {f.name: load_json(f / "result.json") for f in sorted(run.glob("fewshot-*"))}
    assert list(adapted) == ["fewshot-alpha0.0", "fewshot-alpha1.0"] and sorted(base.trained) == sorted(fs["base"])
    assert adapted["fewshot-alpha0.0"]["pool"] == 0 < adapted["fewshot-alpha1.0"]["pool"]
    for name, r in adapted.items():
        best, last = load_generator(run / name), load_generator(run / name / "last")
        assert (
            set(best.trained) == {*fs["base"], *fs["novel"]}
            and r["k"] == 5
            and r["frechet"] == min(h["frechet"] for h in load_table(run / name / "history.parquet").to_pylist() if h["frechet"] is not None)
        )
        y = [c for c in fs["base"] for _ in range(4)]  # embed: base classes are drawn as before, bit by bit
        assert (last.sample(y, range(len(y))) == base.sample(y, range(len(y)))).all()
    result = load_json(run / "fewclassify/result.json")
    rows = {r["label"]: r for r in result["rows"]}
    assert {r["generator"] for r in rows.values()} == {"", *adapted} and "supports + augmentation" in rows and result["novel"] == fs["novel"]
    assert all(0 <= r["test"] <= r["test_novel"] <= 1 and r["test_novel"] > 1 / 3 for r in rows.values())
    mine = [o for o in openings(result["test_digest"]) if o["who"].startswith("few/")]
    assert [o["why"].startswith("novel classes") for o in mine] == [True]
    # the published evaluation's six pictures: base classes beside train, novel ones beside their supports
    assert main(["sample", str(run / "fewshot-alpha0.0"), "-n", "2", "--no-scores", "--diagnostics", "--out", str(tmp_path)]) == 0
    kinds = [f"{part}_{kind}" for part in ("train", "dev") for kind in ("class_interp", "crossover", "generated")]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(["fewshot-alpha0.0-samples.png", *(f"fewshot-alpha0.0-{k}.png" for k in kinds)])
    # the report lays both GANs out by supports and by unlabelled images
    view = RunView(run, ReportConfig())
    page = str(fewshot_section(view))
    assert all(w in page for w in ("k = 5", "supervised", "semi-supervised, α = 1", "images without labels"))
    few = [f for f in view.folders if f.stage == "fewshot"]
    few.append(replace(few[0], result={**few[0].result, "k": 1}))  # as if adapted on one support; nobody did so with unlabelled images
    page = str(fewshot_table(view, few))
    assert "k = 1" in page and "k = 5" in page and page.count("–") == 1
