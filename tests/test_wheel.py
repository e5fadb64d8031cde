"""An installed wheel works like a checkout: built from what git has, installed into an empty folder, run from elsewhere."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml

from synthlit.core import load_json, notebooks_dir

ROOT = Path(__file__).parent.parent
CHAIN = {
    "name": "two",
    "preset": "tiny",
    "machine": {"device": "cpu", "threads": 1, "channels_last": False},
    "stages": {"splits": {}, "classifier": {"epochs": 1}},
}


def run(*args, cwd, **env) -> str:
    """Output of a Python process that must end well."""
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **env}
    p = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert p.returncode == 0, p.stdout
    return p.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the files that git knows or would, as they are now, built without leaving anything in the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tmp = tmp_path_factory.mktemp("wheel")
    ls = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(ls, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            (tmp / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp / "tree" / name)
    run("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", tmp, cwd=tmp / "tree")
    return next(tmp.glob("synthlit-*.whl"))


@pytest.fixture(scope="module")
def site(wheel) -> Path:
    """The wheel, installed into a folder of its own."""
    folder = wheel.parent / "site"
    run("-m", "pip", "install", "--no-deps", "-q", "--target", folder, wheel, cwd=wheel.parent)
    return folder


def test_the_wheel_carries_notebooks_and_parameters(wheel):
    """Everything that a run reads, once; no tests."""
    names = zipfile.ZipFile(wheel).namelist()
    for p in [*notebooks_dir().glob("*.ipynb"), *(notebooks_dir() / "params").glob("*.yaml")]:
        assert names.count(f"synthlit/nbs/{p.relative_to(notebooks_dir())}") == 1, p
    assert {n.split("/")[0] for n in names} == {"synthlit", next(n.split("/")[0] for n in names if ".dist-info/" in n)}
    assert not [n for n in names if "test" in n.lower() or "ipynb_checkpoints" in n]


def test_a_chain_runs_from_the_wheel(site, tmp_path):
    """Runner and kernels import the wheel's package and read its notebooks; the digests are those of the checkout."""
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CHAIN))
    env, start = dict(PYTHONPATH=str(site)), time.time()
    where = run("-c", "import synthlit.core as c; print(c.__file__); print(c.notebooks_dir())", cwd=tmp_path, **env).split()
    assert where == [str(site / "synthlit" / "core.py"), str(site / "synthlit" / "nbs")]
    go = "import sys; from synthlit.pipeline import main; sys.exit(main())"
    out = run("-c", go, "run", "two.yaml", cwd=tmp_path, **env)
    assert "2 of 2 stages run" in out
    folder = tmp_path / "runs" / "two"
    assert "nothing to do" in run("-c", go, "run", "two.yaml", cwd=tmp_path, **env)
    print(f"two stages from the wheel, twice: {time.time() - start:.1f} s")
    # the same code and settings have the same identity; the code of a stage is read beside the package that is imported
    code = "import json, sys; from synthlit.core import code_digest; print(code_digest('splits'), code_digest('classifier'))"
    assert run("-c", code, cwd=tmp_path, **env).split() == [load_json(folder / s / "manifest.json")["code"] for s in ("splits", "classifier")]
    nb = nbformat.read(folder / "classifier" / "notebook.ipynb", 4)
    assert any("val accuracy" in o.get("text", "") for c in nb.cells if c.cell_type == "code" for o in c.outputs)


def test_kernels_import_the_wheel(site, tmp_path):
    """A mark left in the wheel's package (not in the checkout's) is seen by the notebook that a kernel runs."""
    core = site / "synthlit" / "splits.py"
    text = core.read_text()
    try:
        core.write_text(text + "\nSPLITS_PRESETS['marked'] = dict(k=4)\n")
        (tmp_path / "one.yaml").write_text(yaml.safe_dump({**CHAIN, "preset": "marked", "stages": {"splits": {}}}))
        run("-c", "from synthlit.pipeline import main; assert main(['run', 'one.yaml', '--out', 'one']) == 0", cwd=tmp_path, PYTHONPATH=str(site))
    finally:
        core.write_text(text)
    assert load_json(tmp_path / "one" / "splits" / "fewshot.json")["k"] == 4


def test_the_files_that_come_along_are_found_by_name(site, tmp_path):
    """`synthlit run digits` from the wheel, from any folder: planned, not run."""
    go = "from synthlit.pipeline import read_params, plan; print(len(plan(read_params('digits'))))"
    assert int(run("-c", go, cwd=tmp_path, PYTHONPATH=str(site))) > 9
