"""Keep what nbs/results/few_shot.ipynb prints of finished runs of few_shot_omniglot_cpu, one run for each class split.

`python tests/keep_few_shot.py RUN ...` writes nbs/results/few_shot/seed<N>/ for each: the table, the scores and the looks of the classification, a line for each
GAN, the seconds of each stage; and small pictures of split 0: supports, val, and what each adapted generator draws. Of a finished run of
few_shot_bases_cpu it writes bases.json: how its GANs learned.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from synthlit.core import load_json, load_table, save_json
from synthlit.data import encode
from synthlit.gan.watch import tiles
from synthlit.generator import load_generator
from synthlit.splits import load_split, supports_of

TO = Path(__file__).resolve().parent.parent / "nbs/results/few_shot"
SHOWN, EACH = 8, 8  # classes and images of each in a picture


def stages(run: Path, name: str) -> list:
    """The finished stages of a run that a notebook's stage made."""
    return [f for f in sorted(run.iterdir()) if (f / "manifest.json").exists() and load_json(f / "manifest.json")["stage"] == name]


def gan_line(folder: Path) -> dict:
    """What is kept of a GAN: settings that were varied, measures before, at best and at the end, and the middle of the classes."""
    manifest, result = load_json(folder / "manifest.json"), load_json(folder / "result.json")
    classes = result.pop("per_class", [])
    for k in ("frechet", "frechet_supports", "coverage"):
        if values := [c[k] for c in classes if c.get(k) is not None]:
            result[f"class_{k}"] = dict(zip(("low", "middle", "high"), np.quantile(values, [0.1, 0.5, 0.9]).tolist()))
    result.pop("trained", None)
    settings = {k: manifest["settings"].get(k) for k in ("mode_g", "mode_d", "alpha", "steps", "batch", "lr_g", "lr_d", "width_g", "width_d")}
    return dict(name=folder.name, settings=settings, **result, history=history(folder))


def history(folder: Path) -> list:
    """The rows of a history that were measured, losses left out."""
    rows = load_table(folder / "history.parquet").to_pylist()
    keep = ("step", "frechet", "frechet_supports", "agreement", "precision", "recall", "density", "coverage", "variety")
    return [{k: r[k] for k in keep if r.get(k) is not None} for r in rows if r.get("frechet") is not None]


def keep_pictures(run: Path, to: Path):
    """Supports, val and samples of the first novel classes, a PNG each."""
    where = run / "splits"
    fs, train, val = load_json(where / "fewshot.json"), load_split(where, "train"), load_split(where, "val")
    novel, k = fs["novel"][:SHOWN], fs["k"]
    sets = dict(supports=train.images[supports_of(fs, k)][: SHOWN * k])
    sets["val"] = torch.cat([val.images[val.labels == c][:4] for c in novel])
    for f in stages(run, "fewshot"):
        how = load_json(f / "manifest.json")["settings"]
        name = f"{how['mode_g']}-{how['alpha']:g}"
        sets[name] = load_generator(f).sample(torch.tensor(novel).repeat_interleave(EACH), torch.arange(EACH).repeat(SHOWN))
    to.mkdir(parents=True, exist_ok=True)
    for name, images in sets.items():
        (to / f"{name}.png").write_bytes(encode(tiles(images, len(images) // SHOWN).numpy()))


def keep_bases(run: Path):
    """The histories and prices of base GANs."""
    cost = [load_json(f / "manifest.json")["cpu_seconds"] for f in stages(run, "gan")]
    gans = [dict(name=f.name, cpu_seconds=s, history=history(f)) for f, s in zip(stages(run, "gan"), cost)]
    save_json(TO / "bases.json", dict(gans=gans, machine=load_json(run / "run.json")["machine"]))


def keep(run: Path):
    """One run, whole."""
    if (run / "small-pack1").exists():  # of few_shot_bases_cpu
        return keep_bases(run)
    seed, few = load_json(run / "splits/manifest.json")["settings"]["seed"], run / "fewclassify"
    to = TO / f"seed{seed}"
    to.mkdir(parents=True, exist_ok=True)
    for f in ("result.json", "scores.parquet", "looks.parquet", "manifest.json"):
        shutil.copy(few / f, to / f)
    shutil.copy(run / "lighter/scores.parquet", to / "lighter.parquet")
    gans = [gan_line(f) for stage in ("gan", "fewshot") for f in stages(run, stage)]
    done = [f for stage in ("splits", "classifier", "gan", "fewshot", "fewclassify") for f in stages(run, stage)]
    keep = ("stage", "seconds", "cpu_seconds")
    cost = {f.name: {k: v for k, v in load_json(f / "manifest.json").items() if k in keep} for f in done}
    classifier = {k: v for k, v in load_json(run / "classifier/result.json").items() if isinstance(v, (int, float))}
    save_json(
        to / "chain.json",
        dict(
            seed=seed,
            base_classes=len(load_json(run / "splits/fewshot.json")["base"]),
            gans=gans,
            cost=cost,
            classifier=classifier,
            machine=load_json(run / "run.json")["machine"],
        ),
    )
    if seed == 0:
        keep_pictures(run, to / "pictures")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        keep(Path(name))
