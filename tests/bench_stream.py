"""Peak memory and time of generating, and of filtering, 60,000 Fashion-MNIST images with the generator of a finished run of gafi_study_cpu.

`python tests/bench_stream.py [RUN] [IMAGES]` works on a copy of the run's first stages and writes nbs/results/gafi/memory.json. Each stage is a process
of its own; its peak counts everything, the interpreter, torch and the real images included. Nothing is asserted.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthlit.core import load_json, save_json

HERE = Path(__file__).resolve().parent.parent
CODE = """
import sys
from pathlib import Path
from synthlit.core import small_stage
stage, n = sys.argv[2], int(sys.argv[3])
more = dict(tau=[0.6], dials={'std': 1.25}, draws=6) if stage == 'filter' else dict(folder=0)
small_stage(Path(sys.argv[1]), stage, per_class=n//10, **more)
"""


def measured(run: Path, stage: str, n: int) -> dict:
    """Seconds and peak MiB of one stage in a process of its own."""
    start, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", CODE, str(run), stage, str(n)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    mib = after.ru_maxrss / 1024  # of the largest child so far: the smaller stage runs first
    return dict(stage=stage, seconds=time.time() - start, cpu=after.ru_utime - before.ru_utime, peak_mib=mib)


def main(run: Path, n: int):
    """Both stages, and what they made."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        for stage in ("splits", "classifier", "gan-seed0"):
            shutil.copytree(run / stage, copy / stage)
        rows = [measured(copy, stage, n) for stage in ("generate", "filter")]
        made = [load_json(copy / stage / "result.json") for stage in ("generate", "filter")]
    for row, r in zip(rows, made):
        row |= dict(images=n, candidates=sum(c["candidates"] for c in r.get("stats", [])) or n)
        print(row)
    save_json(HERE / "nbs/results/gafi/memory.json", dict(images=n, rows=rows))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "runs/gafi_study_cpu").resolve(), int(sys.argv[2] if len(sys.argv) > 2 else 60000))
