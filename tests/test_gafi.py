"""All of GaFi's steps on digits, two stages at a time: every row is there, test was opened once, and what was chosen was chosen on val."""

import time

from synthlit.core import load_json, load_table
from synthlit.pipeline import run_chain
from synthlit.plan import read_params
from synthlit.splits import openings


def test_gafi_digits(tmp_path):
    start = time.time()
    run = run_chain(read_params("gafi_digits", ["machine.threads=1", "machine.device=cpu"]), tmp_path / "gafi", jobs=2)
    print(f"gafi_digits took {time.time() - start:.0f} s")
    result = load_json(run / "evaluate" / "result.json")
    rows = {r["row"]: r for r in result["table"]}
    for name in ("real", "floor", "synthetic (gan-seed0)", "mixture", "mixture, recycled", "mixture, taught", "mixture, 50% real"):
        assert rows[name]["gap"] is not None and 0.1 < rows[name]["test"] <= 1, name
    assert sum(name.startswith("filtered, recycled") for name in rows) == 4  # two filters, two searches
    assert [r["seeds"] for r in result["table"] if r["kind"] == "mixture"] == [2, 2]
    for seed in (0, 1):
        ledger, chosen = load_table(run / f"search-seed{seed}" / "ledger.parquet").to_pylist(), load_json(run / f"search-seed{seed}" / "result.json")
        assert len({r["trial"] for r in ledger}) == len(ledger) and chosen["chosen"] in {r["trial"] for r in ledger}
        assert chosen["chosen"] == min(ledger, key=lambda r: r["val_loss"])["trial"]
    mine = [o for o in openings(result["test_digest"]) if o["who"].startswith("gafi/")]
    assert len(mine) == 1
    assert {o["stage"] for o in result["optimism"]} == {"filter-seed0", "filter-seed1", "search-seed0", "search-seed1", "multigen"}
    assert all(o["optimism"] >= 0 for o in result["optimism"])
