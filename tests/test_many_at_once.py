"""Stages side by side, on this machine and on a Ray cluster of two nodes whose worker is killed: the digests of one after the other."""

import os
import signal
import threading
import time

import psutil
import pytest

from synthlit.core import read_manifest
from synthlit.pipeline import StageFailed, run_chain
from synthlit.plan import read_params

SOME = ("splits", "classifier", "gan", "generate", "filter")


def some(tiny_run) -> dict:
    """The first stages of the tiny chain."""
    stages = {k: v for k, v in tiny_run.params["stages"].items() if k in SOME}
    return read_params({**tiny_run.params, "name": "many", "stages": stages})


def digests(run) -> dict:
    return {p.parent.name: read_manifest(p.parent)["digest"] for p in run.glob("*/manifest.json")}


def test_two_at_a_time_give_the_same_bits(tiny_run, tmp_path, capsys):
    run = run_chain(some(tiny_run), tmp_path / "run", jobs=2)
    mine, good = digests(run), digests(tiny_run.run)
    assert len(mine) == 7 and mine == {k: good[k] for k in mine}
    out = capsys.readouterr().out
    assert out.index("gan-seed1 ...") < min(out.index("gan-seed0 done"), out.index("gan-seed1 done")) and "7 of 7 stages run" in out
    run_chain(some(tiny_run), run, jobs=2)
    assert "nothing to do: all 7 stages are done" in capsys.readouterr().out


def test_a_failure_lets_the_others_end_and_is_told(tiny_run, tmp_path):
    """A search for a checkpoint that nobody kept fails while the other GAN is still trained."""
    stages = {k: tiny_run.params["stages"][k] for k in ("splits", "classifier", "gan")}
    bad = {"stage": "search", "uses": "gan-seed0", "ckpts": ["777"], "per_class": 20, "places": 1}
    with pytest.raises(StageFailed, match="kept no generator '777'"):
        run_chain(read_params({**tiny_run.params, "name": "bad", "stages": {**stages, "search": bad}}), tmp_path / "run", jobs=2)
    assert {"splits", "classifier", "gan-seed0", "gan-seed1"} == {p.parent.name for p in (tmp_path / "run").glob("*/manifest.json")}


def test_a_ray_worker_that_is_killed_is_replaced(tiny_run, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    cluster.add_node(num_cpus=1)
    told: list = []
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        assert sum(n["Alive"] for n in ray.nodes()) == 2
        killer = threading.Thread(target=kill_ray_worker, args=(tmp_path / "run", told), daemon=True)
        killer.start()
        run = run_chain(some(tiny_run), tmp_path / "run", engine="ray")
    finally:
        ray.shutdown(), cluster.shutdown()
    mine, good = digests(run), digests(tiny_run.run)
    assert told, "no worker was killed"
    assert len(mine) == 7 and mine == {k: good[k] for k in mine}


def kill_ray_worker(run, told: list):
    """Kill the Ray worker that trains a GAN, once it has a checkpoint."""
    while not told:
        time.sleep(0.02)
        if not list(run.glob("gan-seed*/checkpoints/*")):
            continue
        for p in psutil.process_iter(["cmdline"]):
            if "ray::run_one" in " ".join(p.info["cmdline"] or []):
                told.append(p.pid), os.kill(p.pid, signal.SIGKILL)
                return
