"""Our measures beside pytorch-fid, prdc and torch-fidelity: the same features, one run, one thread each; time, peak memory, value.

pytorch-fid is a dependency. The other two go into an environment of their own, made with one command:

    python3.11 -m venv .venv-peers && .venv-peers/bin/pip install prdc==0.2 torch-fidelity==0.4.0

then `python tests/bench_metrics.py --peers .venv-peers/bin/python` (`--quick` for small sizes). Every measurement is a process of its own, given the
features as files; ours and the peers' take turns, and the fastest of the rounds counts. Seconds are those of the processor, all threads together,
which a busy machine stretches less; the JSON holds those of the clock too. Nothing is asserted. The table is kept as JSON with --out FILE
(nbs/results/metrics.ipynb prints nbs/results/metrics/bench.json). The Inception network has random weights: time does not depend on them, and both
sides have the same ones, so their features are compared too.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
import numpy as np

# ---- what is measured: each function imports what it needs, so that this file runs where synthlit is not installed


def ours_frechet(x, y, **_):
    from synthlit.metrics import frechet_distance

    return lambda: frechet_distance(x, y)


def ours_frechet_from_statistics(x, y, **_):
    from synthlit.metrics import Reference, frechet_distance, reference_of

    a, b = reference_of(x), reference_of(y)
    return lambda: frechet_distance(Reference(a.mean, a.cov), Reference(b.mean, b.cov))  # nothing cached


def ours_frechet_cached(x, y, **_):
    from synthlit.metrics import frechet_distance, reference_of

    a, b = reference_of(x), reference_of(y)
    a.root  # noqa: B018, the factor of the reference is at hand
    return lambda: frechet_distance(a, b)


def moments(z):
    return z.mean(0), np.cov(z, rowvar=False)


def pytorch_fid(x, y, **_):
    from pytorch_fid.fid_score import calculate_frechet_distance

    return lambda: calculate_frechet_distance(*moments(x), *moments(y))


def pytorch_fid_from_statistics(x, y, **_):
    from pytorch_fid.fid_score import calculate_frechet_distance

    a, b = moments(x), moments(y)
    return lambda: calculate_frechet_distance(*a, *b)


def torch_fidelity_fid(x, y, **_):
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = torch.from_numpy(x), torch.from_numpy(y)
    return lambda: fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)["frechet_inception_distance"]


def ours_prdc(x, y, k=5, ties=True):
    from synthlit.metrics import prdc

    return lambda: prdc(x, y, k, ties=ties)


def prdc(x, y, k=5, **_):
    from prdc import compute_prdc

    return lambda: {a: float(b) for a, b in compute_prdc(x, y, k).items()}


def torch_fidelity_prc(x, y, k=5, **_):
    import torch
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = torch.from_numpy(x), torch.from_numpy(y)  # it takes the generated first
    return lambda: prc_features_to_metric(fake, real, prc_neighborhood=k, prc_batch_size=1000, save_cpu_ram=True, verbose=False)


def ours_kid_subsets(x, y, subsets=10, size=1000):
    from synthlit.metrics import kid_subsets

    return lambda: kid_subsets(x, y, subsets, size)


def torch_fidelity_kid(x, y, subsets=10, size=1000):
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = torch.from_numpy(x), torch.from_numpy(y)
    asked = dict(kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return lambda: list(kid_features_to_metric(a, b, **asked).values())


def ours_features(x, weights, folder):
    import torch

    from synthlit.metrics import InceptionFeatures

    net, images = InceptionFeatures(weights), torch.from_numpy(x)
    return lambda: float(net(images).double().mean())


def pytorch_fid_features(x, weights, folder):
    """Its own loop over image files, with the same weights; without a worker process, so that it is one core beside one core."""
    from unittest.mock import patch

    from PIL import Image
    from pytorch_fid import fid_score, inception
    from safetensors.torch import load_file

    with patch.object(inception, "load_state_dict_from_url", lambda *a, **k: load_file(weights)):
        net = inception.InceptionV3([3]).eval()
    files = [Path(folder) / f"{i}.png" for i in range(len(x))]
    for f, image in zip(files, x):
        Image.fromarray(image.transpose(1, 2, 0)).save(f)
    return lambda: float(fid_score.get_activations(files, net, 50, num_workers=0).mean())


def worker(what: str, files: list, settings: dict):
    """One measurement in this process: seconds by the clock and of the processor, MB above what was there before, value."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    sets = [np.load(f) for f in files]
    call = globals()[what](*sets, **settings)
    before, start, busy = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
    stop, seen, now = threading.Event(), [0], Path("/proc/self/statm")
    page = resource.getpagesize() / 1e6

    def watch():
        while now.exists() and not stop.wait(0.005):
            seen.append(int(now.read_text().split()[1]) * page)

    base = int(now.read_text().split()[1]) * page if now.exists() else before / 1e3
    thread = threading.Thread(target=watch)
    thread.start()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            value = call()
        except Exception as e:
            value = f"{type(e).__name__}: {str(e)[:80]}"
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    stop.set()
    thread.join()
    print(json.dumps(dict(seconds=seconds, cpu=cpu, mb=max(max(seen) - base, 0), value=value)))


# ---- the table


def measure(python: str, what: str, files: list, settings: dict) -> dict:
    """Run one measurement in a process of its own."""
    got = subprocess.run([python, __file__, "--work", what, json.dumps(settings), *map(str, files)], capture_output=True, text=True)
    if got.returncode:
        return dict(seconds=float("nan"), cpu=float("nan"), mb=float("nan"), value=(got.stderr.strip().splitlines() or ["failed"])[-1][:100])
    return json.loads(got.stdout.splitlines()[-1])


def make_features(folder: Path, n: int, d: int) -> list:
    """Two files of correlated features, n x d, float32."""
    from synthlit.core import rng

    r, files = rng(0, "bench.metrics", d), [folder / f"{n}x{d}-{i}.npy" for i in range(2)]
    mix = r.standard_normal((d, d)) / d**0.5
    for i, f in enumerate(files):
        np.save(f, (r.standard_normal((n, d)) @ mix * (1 + 0.1 * i) + 0.1 * i).astype(np.float32))
    return files


def make_inception(folder: Path, n: int) -> tuple:
    """Images and an Inception of random weights."""
    from unittest.mock import patch

    from pytorch_fid import inception as theirs
    from safetensors.torch import save_file

    from synthlit.core import global_rng, rng

    with global_rng(0, "bench.inception"), patch.object(theirs, "load_state_dict_from_url", lambda *a, **k: None):
        with patch("torch.nn.Module.load_state_dict", lambda *a, **k: None):
            state = theirs.fid_inception_v3().state_dict()
    for k, v in state.items():
        if k.endswith("conv.weight"):
            v.mul_(6**0.5)  # He's scale: with PyTorch's the signal dies away into denormal numbers, which are slow
    save_file(state, folder / "inception.safetensors")
    np.save(folder / "images.npy", rng(0, "bench.images").integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))
    return [folder / "images.npy"], dict(weights=str(folder / "inception.safetensors"), folder=str(folder))


def differ(a, b) -> float | None:
    """Largest relative difference of two values, lists or dicts of numbers; None where a side has none (it failed, or measures something else)."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [differ(a[k], b[k]) for k in a.keys() & b.keys()]
        return max((f for f in found if f is not None), default=None)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b) / max(abs(a), abs(b), 1e-300)
    return None


def compare(rows: list, key: str, title: str, files, ours: str, peers: list, settings: dict, rounds: int):
    """Ours and the peers in turn; one row per peer. `key` names the row whatever the size."""
    best = {}
    for _ in range(rounds):
        for what, python in [(ours, sys.executable), *peers]:
            got = measure(python, what, files, settings)
            best[what] = got if what not in best or got["cpu"] < best[what]["cpu"] else best[what] | dict(mb=max(got["mb"], best[what]["mb"]))
    for what, _ in peers:
        a, b = best[ours], best[what]
        ratios = dict(times_faster=b["cpu"] / a["cpu"], times_smaller=b["mb"] / max(a["mb"], 1), difference=differ(a["value"], b["value"]))
        rows.append(dict(key=key, what=title, ours=a, beside=what, peer=b, **ratios))
        print(
            f"{title:<38}{what:<29}{a['cpu']:8.2f}{b['cpu']:9.2f}{rows[-1]['times_faster']:7.1f}x"
            f"{a['mb']:8.0f}{b['mb']:8.0f}{rows[-1]['times_smaller']:7.1f}x",
            flush=True,
        )
        print(f"    {a['value']}\n    {b['value']}", flush=True)


def machine(peers: str) -> dict:
    """What the figures were measured on and with."""
    versions = "import importlib.metadata as m; print({p: m.version(p) for p in ('torch', 'numpy', 'scipy', 'prdc', 'torch-fidelity')})"
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    own = {p: importlib.metadata.version(p) for p in ("torch", "numpy", "scipy", "pytorch-fid")}
    theirs = subprocess.run([peers, "-c", versions], capture_output=True, text=True).stdout.strip() if peers else ""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return dict(cpu=(cpu or [platform.processor()])[0], cores=os.cpu_count(), python=platform.python_version(), load=load, ours=own, peers=theirs)


def main(peers: str, quick: bool, only: list, rounds: int) -> list:
    """All rows."""
    rows, me, few = [], sys.executable, quick and 4 or 1
    extra = lambda *names: [(n, peers) for n in names] if peers else []
    print(f"{'':38}{'beside':<29}{'ours, s':>8}{'peer, s':>9}{'':>8}{'ours, MB':>8}{'peer, MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        folder, d = Path(folder), 2048 // few
        for nominal in (1000, 5000, 10000) if "frechet" in only else ():
            n, files = nominal // few, make_features(folder, nominal // few, d)
            compare(
                rows, f"frechet-{nominal}", f"Fréchet {n}x{d}", files, "ours_frechet", [("pytorch_fid", me), *extra("torch_fidelity_fid")], {}, rounds
            )
            for ours, words in (("ours_frechet_from_statistics", "from statistics"), ("ours_frechet_cached", "factor cached")):
                if nominal > 1000:  # fewer samples than dimensions: there are no statistics to speak of
                    title = f"Fréchet {n}x{d}, {words}"
                    compare(rows, f"{ours[5:]}-{nominal}", title, files, ours, [("pytorch_fid_from_statistics", me)], {}, rounds)
        for nominal, w in ((20000, 64), (5000, d), (20000, d)) if "prdc" in only else ():
            n, files, turns = nominal // few, make_features(folder, nominal // few, w), 1 if nominal * w > 2e7 else rounds
            key = f"{nominal}-{'wide' if w == d else w}"
            compare(rows, f"prdc-{key}", f"PRDC {n}x{w}", files, "ours_prdc", extra("prdc"), dict(k=5, ties=False), turns)
            compare(rows, f"prc-{key}", f"PRDC {n}x{w}, ties in", files, "ours_prdc", extra("torch_fidelity_prc"), dict(k=5), turns)
        if "kid" in only:
            files = make_features(folder, 5000 // few, d)
            size = dict(subsets=10, size=1000 // few)
            compare(rows, "kid", f"KID {5000 // few}x{d}, 10 of {size['size']}", files, "ours_kid_subsets", extra("torch_fidelity_kid"), size, rounds)
        if "features" in only:
            files, settings = make_inception(folder, 100 // few)
            compare(rows, "features", f"Inception, {100 // few} images", files, "ours_features", [("pytorch_fid_features", me)], settings, rounds)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        worker(sys.argv[2], sys.argv[4:], json.loads(sys.argv[3]))
        sys.exit()
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--peers", default="", help="Python of the environment with prdc and torch-fidelity")
    ask.add_argument("--quick", action="store_true", help="a quarter of each size")
    ask.add_argument("--only", nargs="+", default=["frechet", "prdc", "kid", "features"], help="parts of the table")
    ask.add_argument("--rounds", type=int, default=2, help="turns; the fastest of each counts")
    ask.add_argument("--out", default="", help="JSON file for the table")
    asked = ask.parse_args()
    before, start = machine(asked.peers), time.time()
    table = main(asked.peers, asked.quick, asked.only, asked.rounds)
    print(f"{time.time() - start:.0f} s")
    if asked.out:
        from synthlit.core import save_json

        save_json(asked.out, dict(machine=before, quick=asked.quick, rounds=asked.rounds, seconds=round(time.time() - start), rows=table))
