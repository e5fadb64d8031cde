"""Images per second through the filter with an image-text model, beside one image per forward pass, and beside the published form of the filter.

One image per pass, with the texts encoded once, is what is gained by blocks alone; the published form also encodes the texts of all classes for each
image. Scores of all three are compared before their times are. Nothing is asserted.
`python tests/bench_clip_filter.py [IMAGES [CLASSES [MODEL ...]]]` writes nbs/results/speed/bench_clip_filter.json. MODEL: `tiny` (a CLIP as the stage `tiny`
trains it: 32 pixels, width 64, three layers), `base` (the sizes of ViT-B/32, random weights), or a folder. Where the model itself is the work, as on a
CPU with `base`, blocks cannot save much of it; what the published form wastes on texts they save all the same.
"""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
from bench import keep, row

from synthlit.core import global_rng, rng
from synthlit.filter import Pool, Scores
from synthlit.folders import quiet
from synthlit.generator import fit_floor
from synthlit.imagetext import ImageText, accept_published
from synthlit.prompts import from_grammar
from synthlit.tiny import make_image_encoder, make_image_processor, make_text_encoder, make_tokenizer


def clip_like(folder: Path, names: list, size: int, width: int, layers: int, patch: int, text: int, context: int) -> Path:
    """A CLIP of these sizes with random weights, in a folder."""
    from transformers import CLIPConfig, CLIPModel

    t = make_tokenizer([*names, "a photo of a"], context)
    with global_rng(0, "bench.clip"):
        towers = make_text_encoder(t, text, layers), make_image_encoder(size, text, width, layers, patch)
        clip = CLIPModel(CLIPConfig(text_config=towers[0].config.to_dict(), vision_config=towers[1].config.to_dict(), projection_dim=text))
    with quiet():
        [part.save_pretrained(folder) for part in (clip, t, make_image_processor(size))]
    return folder


SIZES = dict(tiny=(32, 64, 3, 4, 64, 24), base=(224, 768, 12, 32, 512, 77))  # image side, width, layers, patch, text width, context


def pace(f, n: int, times: int = 3) -> float:
    """Images per second of the fastest of a few calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        f()
        taken.append(time.perf_counter() - start)
    return n / min(taken)


def choices(m: ImageText, single: ImageText, g, n: int) -> dict:
    """Ways to score the first n candidates of each class: name -> function that gives N probabilities of the own class."""
    y, i = torch.arange(len(g.classes)).repeat_interleave(n), torch.arange(n).repeat(len(g.classes))
    x, flat = g.sample(y, i), [t for ts in m.texts for t in ts]
    own = lambda p, y: p.gather(1, y[:, None])[:, 0]

    def published():
        out = []
        for image, label in zip(x, y):
            text = single.encode(flat)
            out.append((single.scale * single.features(image[None]) @ text.T).softmax(1)[0, label])
        return torch.stack(out)

    return dict(ours=lambda: own(m.probs(x), y), single=lambda: own(torch.cat([single.probs(image[None]) for image in x]), y), published=published)


def measure(name: str, images: int, classes: int):
    """The rows of one model."""
    names = [f"thing {k}" for k in range(classes)]
    folder = clip_like(Path(tempfile.mkdtemp()), names, *SIZES[name]) if name in SIZES else Path(name)
    m, single = [ImageText(folder, names, batch=b) for b in (None, 1)]
    real = torch.from_numpy(rng(0, "bench.images").integers(0, 256, (4 * classes, 3, 32, 32), dtype=np.uint8))
    g, n = fit_floor(real, torch.arange(len(real)) % classes, names, 1, 2), max(1, images // classes)
    ways = choices(m, single, g, n)
    own = {k: f() for k, f in ways.items()}
    apart = max(float((v - own["ours"]).abs().max()) for v in own.values())
    speed = {k: pace(f, n * classes, 3 if k == "ours" else 2) for k, f in ways.items()}
    for k, words in dict(single="one image a pass, texts once", published="published: texts for each image").items():
        row(f"{name}, {classes} classes, images/s", words, f"{speed['ours']:.0f}", f"{speed[k]:.1f}", f"{speed['ours'] / speed[k]:.1f}x")
    start, pool = time.perf_counter(), Pool(g, Scores(m), 0, {})
    rows, _ = accept_published(pool, n, max(1, n * 2 // 5))
    scored = sum(pool.seen(c) for c in g.trained)
    whole = scored / (time.perf_counter() - start)
    print(
        f"    scores differ by at most {apart:.1e}; drawn by the floor, scored and chosen: {whole:.0f} images/s, {len(rows['label'])} of {scored} kept"
    )


def main(images: int = 640, classes: int = 10, models=("tiny",)):
    """All rows."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from_grammar("owl", 1)  # what is read once is read before the clock runs
    row("what", "beside", "ours", "peer", "ratio")
    for name in models:
        measure(name, images, classes)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    said = sys.argv[1:]
    main(*[int(x) for x in said[:2]], *([said[2:]] if said[2:] else []))
    keep("bench_clip_filter")
