"""Kill a run again and again, at moments spread over all stages, and run it again: nothing is lost, and every stage ends with the digests of a run
that nobody disturbed. SYNTHLIT_TORTURE=N sets the number of kills (`make torture N=100`), ten to a run."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from synthlit.core import STAGES, is_artefact, load_json
from synthlit.splits import openings

KILLS = int(os.environ.get("SYNTHLIT_TORTURE", 10))
WAYS = ["kernel", "runner", "rename", "both", "frozen"]  # frozen: the runner alone, while its kernel is stopped and cannot notice
LAST = ("result.json", "manifest.json")  # after these a kernel soon ends by itself


def one_of_each(run: Path) -> list:
    """One folder of every stage, in the order they run."""
    folders = {load_json(p)["stage"]: p.parent.name for p in sorted(run.glob("*/stage.json"))}
    return [folders[stage] for stage in STAGES]


def moments(reference: Path, seed: int) -> list:
    """Ten kills: (stage, way, file of the stage that is waited for, seconds to wait then). The first kill finds its kernel still starting."""
    r, stages = random.Random(seed), one_of_each(reference)
    ways = [WAYS[(i + seed) % len(WAYS)] for i in range(len(stages))]
    out = [(r.choice(stages), r.choice(["kernel", "runner", "both"]), None, r.random())]
    for stage, way in zip(stages, ways):
        folder = reference / stage
        files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
        files = [p for p in files if is_artefact(p) or p.parts[0] == "checkpoints" or p.name in ("stage.json", "manifest.json")]
        if way != "rename":  # there must still be a kernel to kill
            files = [p for p in files if p.name not in LAST] if stage != "report" else [Path("stage.json")]
        out.append((stage, way, str(r.choice(sorted(files))), r.random()))
    return sorted(out, key=lambda m: (stages.index(m[0]), m[2] is not None))


class Runner:
    """`synthlit run` in a session of its own."""

    def __init__(self, run: Path, params: Path, fault: str = ""):
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "fault"), os.environ.get("PYTHONPATH")]))
        self.log, self.run = run / "torture.log", run
        with open(self.log, "w") as out:
            code = "import sys; from synthlit.cli import main; sys.exit(main())"
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "run", str(params), "--out", str(run)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SYNTHLIT_FAULT": fault, "PYTHONPATH": path},
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text()

    def stage(self) -> str:
        """The stage that the runner said last that it begins."""
        heads = [line for line in self.text().splitlines() if line.startswith("[") and line.endswith(" ...")]
        return heads[-1].split()[1] if heads else ""

    def kernel(self):
        """The kernel's process, or None."""
        try:
            children = psutil.Process(self.process.pid).children()
            return next((p for p in children if "ipykernel_launcher" in " ".join(p.cmdline())), None)
        except psutil.NoSuchProcess:
            return None

    def wait(self, condition, what: str, seconds: float = 180):
        """Wait for something that must happen before the runner ends."""
        end = time.time() + seconds
        while not (found := condition()):
            assert self.process.poll() is None, f"the runner ended before {what}:\n{self.text()}"
            assert time.time() < end, f"{what} did not happen in {seconds} s:\n{self.text()}"
            time.sleep(0.01)
        return found

    def end(self, seconds: float = 600) -> int:
        """Exit code, once it has ended by itself."""
        return self.process.wait(seconds)


def gone(process, seconds: float = 5) -> bool:
    """Has the process ended after at most so many seconds? (A zombie has: it only waits for its new parent to look.)"""
    end = time.time() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.time() > end:
            return False
        time.sleep(0.05)
    return True


def thaw(kernel, runner: Runner, stage: str):
    """The next run's kernel has to wait for the lock that the frozen one holds; then this one may go on, and notices."""
    runner.wait(runner.kernel, "a second kernel starts")
    time.sleep(8)  # by now it has imported everything and stands before the lock
    assert runner.process.poll() is None, runner.text()
    assert (runner.run / "locks" / f"{stage}.pid").read_text() == str(kernel.pid)
    kernel.resume()


def kill(runner: Runner, stage: str, way: str, file: str | None, delay: float):
    """One kill, from outside (the runner, the kernel, or both) or, between write and rename, from inside; checks what must hold at once."""
    if way != "rename":
        runner.wait(lambda: runner.stage() == stage and runner.kernel(), f"{stage} begins")
        if file:
            runner.wait((runner.run / stage / file).exists, f"{stage}/{file} is written")
        time.sleep(0 if way == "frozen" else delay)
        kernel = runner.wait(runner.kernel, "a kernel runs")
        if way == "frozen":
            kernel.suspend()
            if (runner.run / stage / "manifest.json").exists():  # too late: it holds no lock any more
                kernel.resume()
        if way in ("runner", "both", "frozen"):
            runner.process.kill()
        if way in ("runner", "frozen"):  # the kernel, left alone, notices, while the next runner already starts
            runner.process.wait()
            return kernel
        with contextlib.suppress(psutil.NoSuchProcess):
            kernel.kill()
            while way == "kernel" and runner.process.poll() is None:  # one that was about to end anyway does not count: the next stage's is killed
                time.sleep(0.05)
                if again := runner.kernel():
                    again.kill()
    code = runner.end()
    if way == "both":
        assert code == -signal.SIGKILL
    else:
        assert code == 1, f"exit code {code} after the kernel of {stage} was killed ({way} {file}):\n{runner.text()}"
        assert f"{runner.stage()}: its kernel died by signal SIGKILL" in runner.text()
    if way == "rename":
        assert runner.stage() == stage
        assert not (runner.run / stage / file).exists(), f"{stage}/{file} was to be lost"


@pytest.mark.parametrize("seed", range(-(-KILLS // 10)))
def test_killed_runs_end_with_the_same_digests(tiny_run, tmp_path, seed):
    """Ten kills and as many reruns of one run; then all artefacts are those of `tiny_run`. (Second variants are copied from it, to save time.)"""
    todo = one_of_each(tiny_run.run)
    run, params = tmp_path / "run", tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(tiny_run.params))
    shutil.copytree(tiny_run.run, run, ignore=lambda folder, names: set(todo) & set(names) if Path(folder) == tiny_run.run else ())
    start, orphan, was, last = time.time(), None, "", ""
    for moment in [*moments(tiny_run.run, seed), None]:  # at last nobody disturbs it
        stage, way, file, _ = moment or ("", "", None, 0)
        runner = Runner(run, params, f"/{stage}/{file}" if way == "rename" else "")
        if was == "frozen" and orphan.is_running() and orphan.status() == psutil.STATUS_STOPPED:
            thaw(orphan, runner, last)
        assert not orphan or gone(orphan), f"kernel {orphan.pid} outlived its runner by more than 5 s"
        if moment:
            orphan, was, last = kill(runner, *moment), way, stage
            print(f"{time.time() - start:5.0f} s  {stage:20} {way:8} {f'at {file}' if file else 'its kernel starts'}", flush=True)
    assert runner.end() == 0, runner.text()
    names = sorted(p.parent.name for p in tiny_run.run.glob("*/manifest.json"))
    for name in names:
        good, mine = load_json(tiny_run.run / name / "manifest.json"), load_json(run / name / "manifest.json")
        assert mine["artefacts"] == good["artefacts"], name
        assert mine["digest"] == good["digest"], name
    assert set(todo) <= set(names)
    assert not list(run.glob("*.old-*")) and not [p for name in names for p in (run / name).rglob(".tmp-*")]
    test = load_json(run / "splits" / "result.json")["digests"]["test"]
    assert len(openings(test)) == len({o["key"] for o in openings(test)})
    print(f"{time.time() - start:5.0f} s  {len(names)} stages with the digests of an undisturbed run")
