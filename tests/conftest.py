"""What all tests share: homes of their own, one thread, and one small finished run."""

import io
import shutil
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from synthlit.data import subsets

TINY_CHAIN = {  # every kind of stage, two generators for the mixture; about a minute, most of it kernels starting
    "name": "tiny",
    "preset": "tiny",
    "machine": {"device": "cpu", "threads": 1, "channels_last": False},
    "stages": {
        "splits": {},
        "classifier": {"epochs": 2},
        "base_classifier": {"stage": "classifier", "classes": "base", "epochs": 2},
        "gan": {"seed": [0, 1], "steps": 40, "eval_every": 20, "width_g": 8, "width_d": 8, "n_eval": 10},
        "base_gan": {"stage": "gan", "classes": "base", "steps": 40, "eval_every": 20, "width_g": 8, "width_d": 8, "n_eval": 10},
        "fewshot": {"mode_g": "linear", "mode_d": "linear", "steps": 10, "eval_every": 10, "n_eval": 10},
        "diffusion": {"preset": "smoke"},
        "tiny": {"preset": "smoke"},
        "prompts": {},
        "text2image": {"model": "", "strength": 0.5, "steps": 2, "batch": 32},
        "lora": {"preset": "smoke"},
        "mine": {"stage": "imported"},
        "generate": {"uses": "gan-seed0", "per_class": 20, "folder": 2},
        "filter": {"uses": "gan", "per_class": 20, "draws": 2},
        "search": {"uses": "gan-seed0", "per_class": 20, "draws": 2, "places": 2},
        "multigen": {"uses": ["gan", "diffusion"], "per_class": 20},
        "evaluate": {"uses": ["generate", "gan", "mine"], "seeds": [0], "n_measure": 100, "recycle": 1},
        "fewclassify": {"steps": 20, "seeds": [0]},
        "transfer": {"steps": 10, "seeds": [0, 1], "pretrain": {"epochs": 1}, "floor": False},
        "tuning": {"sources": ["generate"], "steps": 10, "seeds": [0], "shots": [0, 1]},
        "report": {},
    },
}


LONG = ("test_torture", "test_params", "test_chain", "test_many_at_once", "test_gafi", "test_few_shot_digits", "test_wheel")  # minutes each


def pytest_collection_modifyitems(items):
    """The longest files first: one that begins last would leave a worker idle."""
    items.sort(key=lambda t: t.path.stem not in LONG)


def isolate(patch, home):
    """Send all that synthlit keeps outside a run folder (openings of test, downloads) to `home`, and be quiet."""
    patch.setenv("SYNTHLIT_HOME", str(home / "synthlit"))
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("SYNTHLIT_QUIET", "1")
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.delenv("IN_TEST", raising=False)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """The session's own home, for this process and all it starts."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        isolate(patch, folder)
        torch.set_num_threads(1)
        yield folder


@pytest.fixture(scope="session")
def tiny_run(home, tmp_path_factory):
    """A finished run of TINY_CHAIN: `.run` (its folder), `.params`, `.seconds`. Read only: `tiny_copy` is there to be changed."""
    from synthlit.pipeline import run_chain
    from synthlit.plan import read_params

    start = time.time()
    params = read_params(TINY_CHAIN)
    run = run_chain(params, tmp_path_factory.mktemp("runs") / "tiny")
    assert (run / "report" / "report.html").exists()
    return SimpleNamespace(run=run, params=params, seconds=time.time() - start)


@pytest.fixture
def tiny_copy(tiny_run, tmp_path):
    """The finished run in a folder of the test's own: a run folder may be moved."""
    return shutil.copytree(tiny_run.run, tmp_path / "tiny")


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """An ImageNet folder of one grey image, thousands of times."""
    folder, png = tmp_path_factory.mktemp("imagenet"), io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    for wnid in {c["wnid"] for name in ("imagenette", "imagenet100") for c in subsets()[name]["classes"]}:
        for part, n in (("train", 70), ("val", 2)):
            (folder / part / wnid).mkdir(parents=True)
            for i in range(n):
                (folder / part / wnid / f"{i}.png").write_bytes(png.getvalue())
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Nothing here may reach for a network."""

    def refuse(*args, **kw):
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
