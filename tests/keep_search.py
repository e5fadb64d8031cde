"""Keep what nbs/results/search.ipynb prints of finished runs of search_digits and search_fashion_mnist_cpu: one small file a run.

`python tests/keep_search.py RUN ...` writes nbs/results/search/<run>.json. Runs of one parameter file with other generators (`-p gan.seed=...`) are pooled by
the page, so they can be run one after another.
"""

import sys
from pathlib import Path

from synthlit.core import load_json, load_table, save_json

TO = Path(__file__).resolve().parent.parent / "nbs/results/search"
METHODS = ("published", "fast")
TRIED = ("ckpt", "std", "rule", "tau", "steps", "val_accuracy")  # of each trial


def searched(folder: Path) -> dict:
    """What a search chose and what it cost."""
    result, manifest = load_json(folder / "result.json"), load_json(folder / "manifest.json")
    chosen = {k: result[k] for k in ("ckpt", "std", "rule", "tau", "val_accuracy", "trials", "flops", "acceptance", "per_class")}
    tried = [[r[k] for k in TRIED] for r in load_table(folder / "ledger.parquet").to_pylist()] if (folder / "ledger.parquet").exists() else []
    return dict(chosen, seconds=manifest["seconds"], cpu_seconds=manifest["cpu_seconds"], tried=tried)


def keep(run: Path):
    """One run: for each generator both searches, and the final test accuracies by classifier seed, on a fixed set and on recycled ones."""
    scores = load_table(run / "evaluate/scores.parquet").to_pylist()
    test = lambda row: {str(r["seed"]): r["test"] for r in scores if r["row"] == row}
    whole, splits = load_json(run / "evaluate/result.json"), load_json(run / "evaluate/manifest.json")["cuts"]
    generators = []
    for f in sorted(run.glob("published-seed*/result.json")):
        seed = f.parent.name.split("-seed")[1]
        line: dict = dict(generator=int(seed))
        for m in METHODS:
            name = f"{m}-seed{seed}"
            line[m] = dict(searched(run / name), fixed=test(f"filtered ({name})"), recycled=test(f"filtered, recycled ({name})"))
        generators.append(line)
    of = dict(data=next(iter(splits)), real=test("real"), floor=test("floor"), n_test=whole["n_test"], test_digest=whole["test_digest"])
    TO.mkdir(parents=True, exist_ok=True)
    save_json(TO / f"{run.name}.json", dict(of, recipe=whole["recipe"], generators=generators))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        keep(Path(name))
