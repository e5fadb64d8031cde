"""Keep what nbs/results/search.ipynb prints of finished runs of search_digits and search_fashion_mnist_cpu: one small file.

`python tests/keep_search.py NAME FROM ...` writes nbs/results/search/<NAME>.json. FROM is a run folder or a file that was kept before; a generator's two
searches may come from different ones, if data, recipe and every accuracy of the rows `real` and `floor` are the same to the last digit.
"""

import sys
from pathlib import Path

from synthlit.core import load_json, load_table, save_json

TO = Path(__file__).resolve().parent.parent / "nbs/results/search"
METHODS = ("published", "fast")
TRIED = ("ckpt", "std", "rule", "tau", "steps", "val_accuracy", "val_loss")  # of each trial


def searched(folder: Path) -> dict:
    """What a search chose and what it cost."""
    result, manifest = load_json(folder / "result.json"), load_json(folder / "manifest.json")
    chosen = {k: result[k] for k in ("ckpt", "std", "rule", "tau", "val_accuracy", "trials", "flops", "acceptance", "per_class")}
    tried = [[r.get(k) for k in TRIED] for r in load_table(folder / "ledger.parquet").to_pylist()] if (folder / "ledger.parquet").exists() else []
    return dict(chosen, seconds=manifest["seconds"], cpu_seconds=manifest["cpu_seconds"], tried=tried)


def read(run: Path) -> dict:
    """What a run found: for each generator its searches, and the final test accuracies by classifier seed, on recycled sets."""
    if run.suffix == ".json":
        return load_json(run)
    scores = load_table(run / "evaluate/scores.parquet").to_pylist()
    test = lambda row: {str(r["seed"]): r["test"] for r in scores if r["row"] == row}
    whole, splits = load_json(run / "evaluate/result.json"), load_json(run / "evaluate/manifest.json")["cuts"]
    generators: dict = {}
    for f in sorted(run.glob("*-seed*/result.json")):
        method, _, seed = f.parent.name.partition("-seed")
        if method in METHODS and seed.isdigit():  # not one that was moved aside
            line = generators.setdefault(int(seed), dict(generator=int(seed)))
            line[method] = dict(searched(f.parent), recycled=test(f"filtered, recycled ({f.parent.name})"))
    of = dict(data=next(iter(splits)), real=test("real"), floor=test("floor"), n_test=whole["n_test"], test_digest=whole["test_digest"])
    return dict(of, recipe=whole["recipe"], generators=[*generators.values()])


def together(found: list) -> dict:
    """Several of them as one."""
    lines: dict = {}
    for r in found:
        for k in ("data", "real", "floor", "n_test", "test_digest", "recipe"):
            assert r[k] == found[0][k], f"{k} = {r[k]}, but elsewhere {found[0][k]}: not one experiment"
        for line in r["generators"]:
            mine = lines.setdefault(line["generator"], {})
            assert not {*mine} & {*line} - {"generator"}, f"generator {line['generator']} was searched twice in one way"
            mine |= line
    return dict(found[0], generators=[lines[k] for k in sorted(lines)])


if __name__ == "__main__":
    TO.mkdir(parents=True, exist_ok=True)
    save_json(TO / f"{sys.argv[1]}.json", together([read(Path(name)) for name in sys.argv[2:]]))
