"""Stages side by side, on this machine and on a Ray cluster of two nodes whose worker is killed: the digests of one after the other."""

import os
import signal
import threading
import time

import psutil
import pytest

from synthlit.core import read_manifest
from synthlit.pipeline import StageFailed, read_params, run_chain

SOME = ("splits", "classifier", "gan", "generate", "filter")


def some(tiny_run, **changes) -> dict:
    """The first stages of the tiny chain."""
    stages = {k: {**v, **changes.get(k, {})} for k, v in tiny_run.params["stages"].items() if k in SOME}
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
    params = some(tiny_run, gan=dict(lr_g=[1e-3, 1.0], lr_d=1.0, seed=0))
    with pytest.raises(StageFailed, match="gan-lr_g1.0|gan-lr_g0.001"):
        run_chain(params, tmp_path / "run", jobs=2)
    assert (tmp_path / "run" / "splits" / "manifest.json").exists()


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
