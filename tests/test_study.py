"""The parameter files of the DCGAN/WGAN study hold the published values, and its small twin keeps to its budget."""

import json
import re

import pytest

from synthlit.core import notebooks_dir
from synthlit.plan import plan, read_params

KEYS = [
    "kind_g",
    "kind_d",
    "width_d",
    "width_g",
    "z",
    "embed",
    "norm_d",
    "norm_g",
    "batch",
    "lr_g",
    "lr_d",
    "d_steps",
    "clip",
    "gp",
    "loss",
    "loss_g",
]
PUBLISHED = {  # the configurations of the study, key by key (test_every, save_every: 10 and 50 epochs of 50,000 images)
    "default": ("dcgan", "dcgan", 16, 16, 128, 16, "batch", "batch", 128, 1e-3, 1e-4, 1, 0, 0, "bce", "same"),
    "dcgan": ("dcgan", "dcgan", 32, 32, 128, 16, "batch", "batch", 128, 1e-4, 2e-4, 1, 0, 0, "bce", "same"),
    "deep_dcgan": ("dcgan_fc", "dcgan_deeper", 16, 64, 128, 16, "dropout", "batch", 128, 1e-4, 2e-4, 1, 0, 0, "bce", "feature_matching"),
    "wgan": ("dcgan", "wgan", 16, 16, 100, 16, "batch", "batch", 64, 4e-4, 4e-4, 5, 0.01, 0, "wasserstein", "same"),
    "wgan_gp": ("dcgan", "wgan_spectral", 64, 64, 128, 128, "instance", "batch", 64, 2e-5, 3e-5, 5, 0, 10, "wasserstein", "same"),
}
SHARED = dict(
    network="dcgan",
    epochs=1000,
    optimizer="adam",
    beta1=0.5,
    beta2=0.9,
    weight_decay_d=0.005,
    weight_decay_g=0.0,
    decay=False,
    ema=0.0,
    seed=0,
    balanced=False,
    pack=1,
    random_labels=False,
    basket="same",
    augment="",
    flip=False,
    precision="fp32",
    n_eval=1000,
    smooth=[0.7, 0.9],
    collapse=0.0,
    data="train",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    nodes = {n.stage: n.cfg for n in plan(read_params(f"gan_{name}_cifar10_gpu"))}
    c = nodes["gan"]
    values = {**vars(c), "kind_g": c.g["kind"], "kind_d": c.d["kind"], "embed": c.g["embed"], "norm_g": c.g["norm"], "norm_d": c.d["norm"]}
    assert tuple(values[k] for k in KEYS) == PUBLISHED[name]
    assert {k: values[k] for k in SHARED} == SHARED
    epoch = 50_000 // c.batch
    assert abs(c.eval_every - 10 * epoch) <= 10 and abs(c.keep_every - 50 * epoch) <= 50 and c.keep_every % c.eval_every == 0
    assert nodes["splits"].dataset == "cifar10" and nodes["splits"].size is None
    text = (notebooks_dir() / "params" / f"gan_{name}_cifar10_gpu.yaml").read_text()
    assert "NOT YET RUN ON A GPU" in text


def rows() -> dict:
    return {n.name: n.cfg for n in plan(read_params("gan_study_cpu")) if n.stage == "gan"}


def test_study_budgets():
    """Four CPU-minutes a row by the times that the file names, in four parts."""
    text = (notebooks_dir() / "params" / "gan_study_cpu.yaml").read_text()
    times = {k: int(ms) for k, ms in re.findall(r"(\w+) (\d+)(?=,|\n)", text[text.index("ms a step:") : text.index("What is not")])}
    assert times.keys() == rows().keys()
    for name, c in rows().items():
        assert c.steps == 4 * c.eval_every and c.epochs is None
        assert 0.97 <= c.steps * times[name] / 240_000, name
        assert c.steps * (times[name] - 0.5) <= 240_000, name  # the file says whole milliseconds


def test_study_page_knows_every_row():
    nb = json.loads((notebooks_dir() / "results" / "gan_study.ipynb").read_text())
    source = "\n".join("".join(c["source"]) for c in nb["cells"])
    assert all(f"'{name}'" in source for name in rows())
