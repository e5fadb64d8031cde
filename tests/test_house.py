"""The house rules of the code and of the notebooks it comes from."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from synthlit.core import STAGES, field_help, notebooks_dir, resolve, stage_parts
from synthlit.pipeline import only_imports
from synthlit.plan import plan, preflight, read_params

TOP = Path(__file__).resolve().parent.parent
NBS = sorted((TOP / "nbs").glob("[0-9]*.ipynb"))
MODULES = sorted(p for p in (TOP / "synthlit").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
DEF = (ast.FunctionDef, ast.AsyncFunctionDef)


def cells(nb: Path, kind="code") -> list:
    """(tags, source) of a notebook's cells."""
    return [(c["metadata"].get("tags", []), "".join(c["source"])) for c in json.loads(nb.read_text())["cells"] if c["cell_type"] == kind]


def tree(source: str) -> ast.Module:
    """Syntax tree of a module or a cell (magics left out)."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))


def functions(path: Path) -> list:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, DEF)]


def module_of(nb: Path) -> str:
    """Module that a notebook exports to, such as gan.train."""
    return next((m[1] for _, s in cells(nb) if (m := re.search(r"#\|\s*default_exp\s+(\S+)", s))), "")


MODULE_NB = {module_of(nb): nb.stem for nb in NBS}


def test_there_is_a_house():
    assert len(NBS) >= 14 and len(MODULES) >= 14


def test_functions_are_short():
    lengths = {f"{p.name}:{f.name}": f.end_lineno - f.lineno + 1 for p in MODULES for f in functions(p)}
    assert not {k: n for k, n in lengths.items() if n > 40}
    p90 = sorted(lengths.values())[int(0.9 * len(lengths))]
    assert p90 <= 15, f"90th percentile of {len(lengths)} functions is {p90} lines"


def one_literal(n: int, line: str, literals: list) -> bool:
    """Is line n a single string literal, or a part of one, but for brackets and commas?"""
    raw = line.encode()  # columns of a syntax tree count bytes
    for s in (s for s in literals if s.lineno <= n <= s.end_lineno):
        start, end = s.col_offset if s.lineno == n else 0, s.end_col_offset if s.end_lineno == n else len(raw)
        if not (raw[:start] + raw[end:]).strip(b" ()[]{},"):
            return True
    return False


def overlong(path: Path):
    """Lines above 150 characters, save generated ones (`__all__`) and literals of up to 200 that stand alone."""
    source = path.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    lists = [n for n in nodes if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    literals = [n for n in nodes if isinstance(n, ast.JoinedStr) or isinstance(getattr(n, "value", None), str)]
    for i, line in enumerate(source.splitlines(), 1):
        alone = len(line) <= 200 and one_literal(i, line, literals)
        if len(line) > 150 and not alone and not any(n.lineno <= i <= n.end_lineno for n in lists):
            yield f"{path.name}:{i}: {len(line)} characters"


def test_lines_are_short():
    assert not [found for p in MODULES for found in overlong(p)]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_notebook_has_one_parameters_cell(stage):
    nb = TOP / "nbs" / f"{STAGES[stage].notebook}.ipynb"
    tagged = [s for tags, s in cells(nb) if "parameters" in tags]
    assert len(tagged) == 1
    body = ast.parse(tagged[0]).body
    assert all(isinstance(n, (ast.Assign, ast.AnnAssign)) for n in body), "a parameters cell holds plain assignments only"
    names = [(n.target if isinstance(n, ast.AnnAssign) else n.targets[0]).id for n in body]
    assert {"run_dir", "name", "inputs", "device", "preset", "settings"} <= set(names) and len(names) <= 15
    assert all(re.search(r"  # \S", line) for line in tagged[0].splitlines()), "each parameter says what it is, and its unit"
    values = {k: ast.literal_eval(n.value) for k, n in zip(names, body)}
    assert (values["run_dir"], values["name"], values["inputs"], values["settings"]) == ("", stage, {}, {})
    assert values["preset"] in stage_parts(stage)[1]
    fields = {f.name for f in dataclasses.fields(stage_parts(stage)[0])}
    assert set(names) - {"run_dir", "name", "inputs", "device", "preset", "settings"} <= fields, "shortcuts are settings"


def test_only_stages_have_parameters_and_a_run_section():
    books = {s.notebook for s in STAGES.values()}
    assert {nb.stem for nb in NBS if any("parameters" in tags for tags, _ in cells(nb))} == books
    starts = {nb.stem: sum(s.startswith("## Run the stage") for _, s in cells(nb, "markdown")) for nb in NBS}
    assert {nb for nb, n in starts.items() if n} == books and max(starts.values()) == 1


def has_imports(source: str) -> bool:
    return any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree(source).body)


@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.stem)
def test_notebook(nb):
    assert nb.stat().st_size <= 500_000
    assert next(s for _, s in cells(nb, "markdown")).startswith("# "), "the first text is the title"
    mixed = [s for _, s in cells(nb) if "nbdev_export()" not in s and has_imports(s) and not only_imports(s)]
    assert not mixed, "imports stand alone in their cells (nbdev executes such cells when it makes the docs)"


def imported(nb: Path) -> set:
    """synthlit modules that a notebook imports, anywhere in its code."""
    nodes = [n for _, s in cells(nb) for n in ast.walk(tree(s))]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) and n.module for a in n.names}
    tails = [n.split(".", 1)[1] for n in names if n.startswith("synthlit.")]
    return {m for m in MODULE_NB if any(t == m or t.startswith(f"{m}.") for t in tails)}


@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.stem)
def test_imports_point_downwards(nb):
    assert not {m for m in imported(nb) if MODULE_NB[m] >= nb.stem}


def commented(path: Path, f) -> bool:
    """Does every parameter have its docment, a comment on its own line?"""
    lines = path.read_text().splitlines()
    args = [a for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs] if a.arg not in ("self", "cls")]
    return bool(args) and all("  # " in lines[a.end_lineno - 1] for a in args)


def undocumented(path: Path):
    """Public functions and classes without docstring (or docments), and methods of more than one line without one.

    Methods of one line are their own explanation where the class has a docstring; so are `__init__` and `forward`, which the class describes.
    """
    for n in ast.parse(path.read_text()).body:
        if not isinstance(n, (*DEF, ast.ClassDef)) or n.name.startswith("_"):
            continue
        if not (ast.get_docstring(n) or (isinstance(n, DEF) and commented(path, n))):
            yield f"{path.name}:{n.name}"
        for m in n.body if isinstance(n, ast.ClassDef) else []:
            if isinstance(m, DEF) and not m.name.startswith("_") and m.name != "forward" and m.end_lineno > m.lineno and not ast.get_docstring(m):
                yield f"{path.name}:{n.name}.{m.name}"


def test_public_names_are_documented():
    assert not [name for p in MODULES for name in undocumented(p)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_has_help_and_every_preset_is_valid(stage):
    config, presets, _ = stage_parts(stage)
    assert set(field_help(config)) == {f.name for f in dataclasses.fields(config)}
    assert {"tiny", "digits"} <= set(presets) and ("smoke" in presets or stage == "splits")  # smoke takes random images of the data set's shape
    for row in presets.values():
        resolve(config, row)
    resolve(
        config, {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config()).items()}
    )  # the defaults obey their own limits


def unsafe(call: ast.Call) -> bool:
    """A call that may unpickle, or build any object from YAML."""
    name, kw = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name == "torch.load":
        return kw.get("weights_only") != "True"
    if name == "yaml.load":
        return "Loader" not in [kw.get("Loader"), *map(ast.unparse, call.args[1:])]
    return "allow_pickle" in kw or name in ("torch.save", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "pd.read_pickle", "eval", "exec")


def test_nothing_unpickles():
    sources = {p.name: p.read_text() for p in MODULES} | {nb.name: "\n".join(tree(s) and ast.unparse(tree(s)) for _, s in cells(nb)) for nb in NBS}
    bad = []
    for name, source in sources.items():
        for n in ast.walk(ast.parse(source)):
            modules = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or ""] if isinstance(n, ast.ImportFrom) else []
            bad += [(name, m) for m in modules if m.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal")]
            bad += [(name, ast.unparse(n))] if isinstance(n, ast.Call) and unsafe(n) else []
    assert not bad


def test_each_module_comes_from_a_notebook():
    for p in MODULES:
        dotted = ".".join(p.relative_to(TOP / "synthlit").with_suffix("").parts)
        assert dotted in MODULE_NB, f"{p} comes from no notebook: delete it, or write the notebook"
        assert f"nbs/{MODULE_NB[dotted]}.ipynb" in p.read_text()
    assert {m for m in MODULE_NB if m} == {".".join(p.relative_to(TOP / "synthlit").with_suffix("").parts) for p in MODULES}


PARAMS = sorted((notebooks_dir() / "params").glob("*.yaml"))


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_ready_experiments_are_valid_and_explained(path, imagenet):
    imagenet = [f"splits.dataset={imagenet}:{path.stem.split('_')[1]}"] if "image" in path.stem else []  # no download: a folder of one's own
    nodes = plan(read_params(path, imagenet))
    preflight(nodes)
    some = dict(
        fast={"splits", "classifier"},
        search={"splits", "classifier", "gan", "search", "evaluate", "report"},
        gafi={"splits", "classifier", "gan", "generate", "filter", "search", "multigen", "evaluate", "report"},
        gan={"splits", "classifier", "gan", "generate", "evaluate", "report"},
        few={"splits", "classifier", "gan", "fewshot", "fewclassify", "report"},
        tiny={"splits", "tiny"},
        pretrain={"splits", "transfer"} | ({"text2image", "generate"} if path.stem.endswith("gpu") else {"classifier", "gan"}),
        realfake={"splits", "classifier", "text2image", "lora", "generate", "evaluate", "report"}
        | ({"tiny"} if path.stem == "realfake_tiny_cpu" else set()),
        zero={"splits", "classifier", "prompts", "text2image", "generate", "filter", "tuning", "report"}
        | ({"evaluate"} if path.stem.endswith("gpu") else {"tiny"}),
        few_shot_bases_cpu={"splits", "classifier", "gan", "report"},
        few_shot_tiny_cpu={"splits", "tiny", "text2image", "generate", "tuning", "report"},
        few_shot_eurosat_gpu={"splits", "classifier", "prompts", "text2image", "generate", "tuning", "evaluate", "report"},
    )
    # a filter with settings of its own does for an example; the gafi_* experiments search, those of other generators have files of their own
    whole = set(STAGES) - {"search", "imported", "fewclassify", "diffusion", "tiny", "prompts", "text2image", "lora", "transfer", "tuning"}
    mine = {n.stage for n in nodes}
    if path.stem.startswith("diffusion"):
        assert {"splits", "classifier", "diffusion", "evaluate", "report"} <= mine
    else:
        assert mine == some.get(path.stem, some.get(path.stem.split("_")[0], whole))
    assert path.read_text().startswith("# ")


def tracked() -> list:
    out = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, capture_output=True, text=True)
    if out.returncode:
        pytest.skip("not a git checkout")
    return [TOP / p for p in out.stdout.split("\0") if p and (TOP / p).is_file()]


def test_no_paths_of_a_machine():
    here = re.compile("(?<![\\w.~}*])/(" + "|".join(["work", "tmp", "home", "root", "Users"]) + ")/[\\w.]")
    found = {}
    for p in tracked():
        try:
            hits = [line.strip()[:120] for line in p.read_text().splitlines() if here.search(line)]
        except UnicodeDecodeError:
            continue
        if hits:
            found[str(p.relative_to(TOP))] = hits[:3]
    assert not found


HEAVY = [
    "diffusers",
    "transformers",
    "peft",
    "timm",
    "ray",
    "tensorboard",
    "torch.utils.tensorboard",
    "papermill",
    "nbformat",
    "matplotlib",
    "accelerate",
    "sklearn",
    "pytorch_fid",
]


def test_imports_are_light():
    names = ["synthlit", *(f"synthlit.{m}" for m in MODULE_NB)]
    code = f"import sys, {', '.join(names)}; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_readme_is_up_to_date():
    if not (TOP / "README.md").exists():
        pytest.skip("no README.md yet")
    subprocess.run([sys.executable, "tests/make_readme.py", "--check"], cwd=TOP, check=True)


def test_scripts_can_be_imported():
    "Benchmarks and keepers are not run by the tests: at least their names must be there."
    scripts = [p.stem for p in (TOP / "tests").glob("*.py") if not p.stem.startswith(("test_", "conftest"))]
    assert "bench_gan" in scripts and "keep_search" in scripts
    subprocess.run([sys.executable, "-c", f"import {', '.join(sorted(scripts))}"], cwd=TOP / "tests", check=True)
