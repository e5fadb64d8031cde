"""An installed wheel works like a checkout: built from what git has, installed into an empty folder, run from elsewhere."""

import os
import shutil
import subprocess
import sys
import textwrap
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
    "stages": {"splits": {"preset": "marked"}, "classifier": {"epochs": 1}},
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
    nbs = notebooks_dir()
    for p in [*nbs.glob("*.ipynb"), *(nbs / "params").glob("*.yaml"), *(nbs / "data").glob("*.json")]:
        assert names.count(f"synthlit/nbs/{p.relative_to(nbs)}") == 1, p
    assert {n.split("/")[0] for n in names} == {"synthlit", next(n.split("/")[0] for n in names if ".dist-info/" in n)}
    assert not [n for n in names if "test" in n.lower() or "ipynb_checkpoints" in n]


def test_a_chain_runs_from_the_wheel(site, tmp_path):
    """Runner and kernels import the wheel's package and read its notebooks: a preset that only the wheel's code has reaches the notebook."""
    with open(site / "synthlit" / "splits.py", "a") as f:
        f.write("\nSPLITS_PRESETS['marked'] = dict(k=4)\n")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CHAIN))
    code = """
        import sys
        import synthlit.core
        from synthlit.cli import main
        from synthlit.plan import plan, read_params
        print(synthlit.core.__file__, synthlit.core.notebooks_dir(), len(plan(read_params("digits"))))  # a file that comes along, by its name
        code = main(["run", "two.yaml"])
        print(synthlit.core.code_digest("splits"), synthlit.core.code_digest("classifier"))
        sys.exit(code)
    """
    out = run("-c", textwrap.dedent(code), cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    core, notebooks, nodes = out[0].split()
    assert core == str(site / "synthlit" / "core.py") and notebooks == str(site / "synthlit" / "nbs") and int(nodes) > 9
    assert any("2 of 2 stages run" in line for line in out)
    splits, classifier = [tmp_path / "runs" / "two" / s for s in ("splits", "classifier")]
    assert load_json(splits / "fewshot.json")["k"] == 4
    assert [load_json(f / "manifest.json")["code"] for f in (splits, classifier)] == out[-1].split()  # the kernels' code is the runner's
    notebook = nbformat.read(classifier / "notebook.ipynb", 4)
    assert any("val accuracy" in o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
