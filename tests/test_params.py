"""The parameter files that come with synthlit: each is wired right, and its plan can be seen."""

import re
import time

import pytest
from test_chain import command, digests

from synthlit.cli import main
from synthlit.core import notebooks_dir
from synthlit.plan import plan, read_params
from synthlit.rehearsal import thinned

PARAMS = sorted((notebooks_dir() / "params").glob("*.yaml"))

# one of each family; the others differ from these in numbers, names and data sets, which planning checks
SMOKED = (
    "diffusion_digits",
    "few_shot_omniglot_cpu",
    "few_shot_tiny_cpu",
    "gafi_fashion_mnist_gpu",
    "gan_study_cpu",
    "pretrain_tiny_cpu",
    "realfake_imagenette_gpu",
    "search_digits",
    "zero_shot_eurosat_gpu",
    "zero_shot_tiny_cpu",
)
OWN_TEST = ("digits", "gafi_digits", "few_shot_digits")  # these run in full elsewhere


def given(file, imagenet) -> list:
    """Arguments of a parameter file that trains on ImageNet: an ImageNet of ours."""
    return ["-p", f"splits.dataset={imagenet}:{file.stem.split('_')[1]}"] if "imagenet" in file.stem else []


@pytest.mark.parametrize("name", SMOKED)
def test_parameter_files_are_wired_right(name, imagenet, tmp_path, monkeypatch):
    """Files that come with synthlit: smoke, all stages, without asking a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start, file = time.time(), notebooks_dir() / "params" / f"{name}.yaml"
    mine = given(file, imagenet)
    out = command("synthlit", "run", file, "--smoke", "--out", tmp_path / "smoke", *mine, cwd=tmp_path)
    print(f"{file.stem} --smoke: {time.time() - start:.1f} s")
    assert re.search(rf"^{file.stem}: \d+ stages are wired right", out, re.M)
    assert len(digests(tmp_path / "smoke")) == len(plan(thinned(read_params(file, mine[1:]))))


@pytest.mark.parametrize("file", PARAMS, ids=lambda p: p.stem)
def test_every_parameter_file_can_be_planned(file, imagenet):
    """Names, values, presets and what stands on what; each stage is one that a smoked file has too."""
    nodes = plan(read_params(file, given(file, imagenet)[1:]))
    assert len(nodes) >= 2 and len({n.name for n in nodes}) == len(nodes)
    smoked = {n.stage for p in PARAMS if p.stem in SMOKED + OWN_TEST for n in plan(read_params(p, given(p, imagenet)[1:]))}
    assert {n.stage for n in nodes} <= smoked


@pytest.mark.parametrize("file", [p for p in PARAMS if "gpu" not in p.stem], ids=lambda p: p.stem)
def test_dry_run_prints_a_plan_and_makes_nothing(file, tmp_path, monkeypatch, capsys):
    """Stages, time and disk; no run folder."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r" to do +(?:\d+:\d\d|\?)", out)) == len(plan(read_params(file))) and "together, about" in out
    assert list(tmp_path.iterdir()) == []
