"""The parameter files that come with synthlit: each is wired right, and its plan can be seen."""

import re
import time

import pytest
from test_chain import command, digests

from synthlit.core import notebooks_dir
from synthlit.pipeline import main, plan, read_params, thinned

PARAMS = sorted((notebooks_dir() / "params").glob("*.yaml"))

# five files hold GaFi's published settings, four those of the few-shot GAN; they differ in numbers only, and such networks take their time even when
# they are small: one of each will do
ALIKE = (
    {"realfake_imagenet100_gpu"}
    | {f"gafi_{name}_gpu" for name in ("cifar100", "cinic10", "dermamnist", "fashion_mnist")}
    | {f"few_shot_{name}_gpu" for name in ("cifar100", "emnist", "omniglot")}
)


@pytest.mark.parametrize("file", [p for p in PARAMS if p.stem not in ALIKE], ids=lambda p: p.stem)
def test_parameter_files_are_wired_right(file, imagenet, tmp_path):
    """Files that come with synthlit: smoke, all stages."""
    start = time.time()
    mine = ["-p", f"splits.dataset={imagenet}:{file.stem.split('_')[1]}"] if "imagenet" in file.stem else []
    out = command("synthlit", "run", file, "--smoke", "--out", tmp_path / "smoke", *mine, cwd=tmp_path)
    print(f"{file.stem} --smoke: {time.time() - start:.1f} s")
    assert re.search(rf"^{file.stem}: \d+ stages are wired right", out, re.M)
    assert len(digests(tmp_path / "smoke")) == len(plan(thinned(read_params(file, mine[1:]))))


@pytest.mark.parametrize("file", [p for p in PARAMS if "gpu" not in p.stem], ids=lambda p: p.stem)
def test_dry_run_prints_a_plan_and_makes_nothing(file, tmp_path, monkeypatch, capsys):
    """Stages, time and disk; no run folder."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r" to do +(?:\d+:\d\d|\?)", out)) == len(plan(read_params(file))) and "together, about" in out
    assert list(tmp_path.iterdir()) == []
