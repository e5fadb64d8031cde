"""Mistakes that published systems made, acted out again: each test does what went wrong there and shows that here it is refused or cannot happen.

The systems train classifiers on generated images, or measure such images. A docstring says what was wrong and in which kind of system. Two of the
known mistakes are of parts that are not here yet (prompts by a language model, fine-tuning by distribution matching): of them the general form is tested.
"""

import copy
import itertools
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthlit import core
from synthlit.augment import to_float
from synthlit.classifier import Classifier, ClassifierConfig, Fixed, Training, cas, learning_rate, load_classifier, train_classifier
from synthlit.core import (
    Checkpoints,
    DamagedFile,
    History,
    SettingError,
    load_json,
    load_table,
    load_tensors,
    open_stage,
    read_manifest,
    resolve,
    rng,
)
from synthlit.data import DataError, load_arrays
from synthlit.evaluate import EvaluateConfig, optimism, refuse_contamination
from synthlit.features import read_inception
from synthlit.fewshot import check_source
from synthlit.filter import Pool, Scores, accept, keep_rule
from synthlit.gan.train import GanConfig, GanState, Watcher, as_generator, gan_step, train_gan
from synthlit.generate import Maker, Rows, addresses, write_shards
from synthlit.generator import fit_floor, load_generator
from synthlit.metrics import load_reference
from synthlit.splits import Split, load_split, open_test, openings, read_part

MACHINE = dict(device="cpu", threads=1, channels_last=False)
GAN = dict(width_g=8, width_d=8, z=8, batch=20, steps=6, eval_every=3, n_eval=4)
PLAIN = ClassifierConfig(network="small", width=4, batch=20, epochs=1, shift=0, ema=0.0, smoothing=0.0)


def first_stages(run: Path, seed: int = 0) -> Path:
    """Splits of the digits, a classifier of real images, a small GAN of the base classes."""
    core.run_machine(run, **MACHINE)
    core.small_stage(run, "splits", seed=seed)
    core.small_stage(run, "classifier", epochs=1)
    core.small_stage(run, "gan", "base", classes="base", **GAN)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = first_stages(tmp_path_factory.mktemp("published") / "run")
    core.small_stage(run, "gan", **GAN)
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def train(finished):
    return load_split(finished / "splits", "train")


def noise(n: int, classes: int = 4, seed: int = 0) -> Split:
    """Images without anything to learn: whoever is right about them has learnt them by heart."""
    r = rng(seed, "published.noise")
    x, y = torch.from_numpy(r.integers(0, 256, (n, 1, 8, 8), np.uint8)), torch.from_numpy(r.integers(0, classes, n))
    return Split(f"noise{seed}/train", x, y, [str(i) for i in range(classes)], core.digest(x, y), "")


def weights(net) -> list:
    return [t.clone() for t in net.state_dict().values()]


def equal(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- 1: choosing on test


CHOOSING = {"filter": dict(per_class=10, draws=2, tau=[0.0, 0.5], proxy=0.1), "search": dict(per_class=10, draws=2, places=2)}


@pytest.mark.parametrize("stage", ["classifier", "gan", "filter", "search"])
def test_choices_are_made_where_there_is_no_test(run, stage):
    """A pipeline that searches checkpoint, spread and threshold loaded val, yet took every accuracy that it chose by from test.
    Here all that chooses works in a run whose test images have been taken away, and asking for them by name is refused."""
    (run / "splits" / "test.safetensors").unlink()
    core.small_stage(run, stage, f"{stage}2", {"generator": "gan"} if stage in CHOOSING else {}, **CHOOSING.get(stage, {"epochs": 1}))
    assert load_json(run / f"{stage}2" / "result.json")
    with pytest.raises(SettingError, match="'test' is sealed"):
        load_split(run / "splits", "test")


def test_what_choosing_on_test_would_have_claimed_is_printed(run):
    """The same pipeline reported the best of its trials by test as its result. Here the trial is the best by val, whatever test says of it,
    and the report prints how much the other way would have claimed: shown with a test set on which the best by val is not the best."""
    core.small_stage(run, "filter", inputs={"generator": "gan"}, **CHOOSING["filter"] | dict(tau=[0.0, 0.3, 0.6, 0.9], proxy=0.3))
    ledger, chosen = load_table(run / "filter" / "ledger.parquet").to_pylist(), load_json(run / "filter" / "result.json")["chosen"]
    assert chosen == max(ledger, key=lambda r: r["val_accuracy"])["trial"]
    guess = {r["trial"]: load_classifier(run / "filter" / "trials" / f"{r['trial']}.safetensors") for r in ledger}
    test = read_part(run / "splits", "test")
    others = [guess[k].logits(test.images).argmax(1) for k in guess if k != chosen]
    theirs = replace(test, labels=torch.stack(others).mode(0).values)  # a test set by which the others are right
    found = optimism(run / "filter", theirs, MACHINE)
    assert found["honest"] == pytest.approx(guess[chosen].accuracy(theirs))
    assert found["published"] == max(c.accuracy(theirs) for c in guess.values()) and found["optimism"] > 0


def test_test_is_opened_once_and_written_down(run):
    """Nobody could say how often published work had looked at its test set. Here each look is in a ledger that all runs share, before the images are read;
    the same work done again is the same look."""
    digest = load_json(run / "splits" / "result.json")["digests"]["test"]
    before = len(openings(digest))
    for key in ("published-a", "published-a", "published-b"):
        open_test(run / "splits", "test of published mistakes", "a look", key)
    assert [r["key"] for r in openings(digest)[before:]] == ["published-a", "published-b"]
    (run / "splits" / "test.safetensors").write_bytes((run / "splits" / "val.safetensors").read_bytes()[:4000])
    with pytest.raises(DamagedFile):
        open_test(run / "splits", "test of published mistakes", "a torn file", "published-c")


# ---- 2: gradients that are kept


def plain_training(net, recipe, x, y, steps: int, every: int) -> list:
    """The recipe as a plain loop; gradients are put to zero every so many steps."""
    opt = torch.optim.SGD(net.parameters(), recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, weight_decay=recipe.weight_decay)
    net.train()
    for step in range(steps):
        if step % every == 0:
            opt.zero_grad()
        F.cross_entropy(net(to_float(x)), y).backward()
        opt.param_groups[0]["lr"] = learning_rate(step, steps, recipe)
        opt.step()
    return weights(net)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_classifier_forgets_the_gradients_of_the_step_before(threads):
    """The evaluation of a GAN library put gradients to zero once an epoch, so that each step moved by the sum of all before it.
    Here a step ends where a plain loop ends that clears them each time, not where the other one ends; also where two cores share a batch."""
    data = noise(64)
    recipe = replace(PLAIN, optimizer="sgd", momentum=0.9, weight_decay=0.0, clip=0.0, batch=64, lr=0.05)
    t = Training(recipe, (1, 8, 8), data.classes, dict(MACHINE, threads=threads))
    assert len(t.crew.nets) == threads
    if threads > 1:
        for m in [m for net in t.crew.nets for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
            m.eval().train = lambda mode=True, m=m: m  # so that halves of a batch see what the whole does
    right, wrong = (
        [plain_training(copy.deepcopy(t.crew.nets[0]), recipe, data.images, data.labels, 6, n) for n in (1, 6)] if threads == 1 else ([], [])
    )
    for step in range(6):
        if threads == 2:
            for p in itertools.chain(*(net.parameters() for net in t.crew.nets)):
                p.grad = torch.full_like(p, 1e6)  # what an earlier step might have left
        t.step(data.images, data.labels, step, 6)
    ours = weights(t.net)
    assert all(w.isfinite().all() and w.abs().max() < 1e3 for w in ours)
    if threads == 1:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, right, strict=True))
        assert not all(torch.allclose(a, b, atol=1e-2) for a, b in zip(ours, wrong, strict=True))
    torch.set_num_threads(1)


def batches(number: int) -> tuple:
    """Noise, two of each of four classes."""
    return torch.from_numpy(rng(0, "published.batch", number).integers(0, 256, (8, 1, 8, 8), np.uint8)), torch.arange(8) // 2


def gan_state(**more) -> GanState:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GanState(resolve(GanConfig, dict(GAN, batch=8, decay=False), more), (1, 8, 8), 4, MACHINE)


def parts(s: GanState) -> list:
    return [w for net in (s.G, s.D, s.E) for w in weights(net)]


@pytest.mark.parametrize("more", [{}, dict(d_steps=3), dict(accumulate=2), dict(g_first=True)], ids=str)
def test_a_gan_forgets_the_gradients_of_the_step_before(more):
    """The same mistake in the loop of a GAN, where the other network's loss leaves gradients too: whatever is left over, a step ends with the same bits."""
    clean, dirty = gan_state(**more), gan_state(**more)
    for step in range(3):
        for p in (p for net in (dirty.G, dirty.D) for p in net.parameters()):
            p.grad = torch.full_like(p, 1e6)
        gan_step(clean, batches, step, 3), gan_step(dirty, batches, step, 3)
    assert equal(parts(clean), parts(dirty))


# ---- 3: accuracy measured on what was trained on


def test_accuracy_is_that_of_images_that_were_not_trained_on():
    """Two evaluations (of a GAN library and of a few-shot method) measured accuracy on the training set. On noise that is learnt by heart
    their figure is near 100 %; the honest one is chance, and it is ours."""
    train, test = noise(60), noise(400, seed=1)
    theirs, honest = [cas(Fixed(train.images, train.labels), replace(PLAIN, width=8), train.classes, 90, s) for s in (train, test)]
    assert theirs > 0.9 and abs(honest - 0.25) < 0.1


def test_the_table_is_of_the_sealed_split(run):
    """The same, in the stage that makes the table: its accuracies are those of the kept classifiers on test, to the image, not those on train or val;
    and test is opened once for all rows."""
    digest = load_json(run / "splits" / "result.json")["digests"]["test"]
    before = len(openings(digest))
    core.small_stage(run, "evaluate", inputs={"generator": []}, seeds=[0], n_measure=50, floor_components=1, floor_dim=8)
    of = {p: read_part(run / "splits", p) for p in ("train", "val", "test")}
    for r in load_json(run / "evaluate" / "result.json")["table"]:
        c = load_classifier(run / "evaluate" / "classifiers" / f"{r['row']}-seed0.safetensors")
        found = {p: c.accuracy(s) for p, s in of.items()}
        assert r["test"] == pytest.approx(found["test"]) and r["val"] == pytest.approx(found["val"])
        assert found["test"] != found["train"]
    assert len(openings(digest)) == before + 1 and load_tensors(run / "evaluate" / "predictions.safetensors")[1]["digest"] == digest


def test_a_generator_that_saw_test_is_not_judged_by_it(run):
    """A few-shot benchmark trained its generators on images that later judged them. Here every product says what it saw, and the evaluation refuses."""
    sealed = load_json(run / "splits" / "result.json")["digests"]
    manifest = read_manifest(run / "gan")
    core.save_json(run / "gan" / "manifest.json", manifest | dict(saw=[*manifest["saw"], sealed["test"]]))
    stage = SimpleNamespace(inputs=dict(generator=[run / "gan"]))
    with pytest.raises(SettingError, match="gan was trained on the test images"):
        refuse_contamination(stage, {k: sealed[k] for k in ("val", "test")})


# ---- 4 and 5: names that exist on some ways only


@pytest.mark.parametrize("kept, logged, judged", list(itertools.product([True, False], repeat=3)))
def test_every_way_through_a_training_ends_with_the_same_classifier(kept, logged, judged, tmp_path, train):
    """A training script set a variable only where it resumed, so that a fresh start ended in an error. Here: with and without checkpoints, history and val,
    fresh, and gone on from its middle, one training gives one classifier."""
    source, some = Fixed(train.images[:200], train.labels[:200]), dict(every=5, val=train.take(range(40)) if judged else None)
    run = lambda steps, place, **kw: train_classifier(
        source,
        PLAIN,
        train.classes,
        steps,
        checkpoints=Checkpoints(tmp_path / place) if kept else None,
        history=History(tmp_path / place / "h.parquet") if logged else None,
        **some | kw,
    )
    whole = weights(train_classifier(source, PLAIN, train.classes, 20).net)
    assert equal(weights(run(20, "fresh").net), whole)

    def stop(it, total, start, desc):
        yield from itertools.takewhile(lambda i: i < 11, it)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(20, "stopped", track=stop)
    assert equal(weights(run(20, "stopped").net), whole)


OBJECTIVES = [
    dict(loss="ns"), dict(loss="bce"), dict(loss="hinge"), dict(loss="wasserstein", clip=0.01), dict(loss="relativistic", r1=1.0, r2=1.0),
    dict(loss="ns", gp=10.0, penalty_every=2), dict(loss="bce", loss_g="feature_matching"), dict(loss="hinge", loss_g="saturating"),
    dict(loss="ns", ema=0.0), dict(loss="ns", pack=1, random_labels=True), dict(loss="ns", same_fakes=False, basket="fresh", d_steps=2),
    dict(loss="hinge", accumulate=2, pack=1), dict(loss="ns", augment="colour+translate", augment_p=0.5), dict(loss="ns", uncond=0.5, pack=1),
    dict(loss="ns", uncond=0.5),
]  # fmt: skip


@pytest.mark.parametrize("more", OBJECTIVES, ids=lambda m: "-".join(f"{k}={v}" for k, v in m.items()))
def test_no_option_needs_another_one(more):
    """Fine-tuning by distribution matching defined its weights only where another option was set, and ended in an error without it. (That training is
    not here yet.) Here: each loss and each option alone takes its steps, with finite losses."""
    s = gan_state(**more)
    for step in range(2):
        assert all(torch.isfinite(loss) for loss in gan_step(s, batches, step, 2))


# ---- 6: torn files taken for whole ones


def test_torn_files_are_made_again_although_later_ones_exist(train, tmp_path):
    """A generation script skipped a batch as soon as its last file existed: a process that was killed while writing left torn images for ever.
    Here every file is whole or absent, what is damaged later is seen, and the set ends with the same bytes."""
    rows = Rows([Maker(fit_floor(train.images, train.labels, train.classes, 1, 8))], *addresses(list(range(10)), 12))
    write_shards(tmp_path / "good", rows, 40)
    shutil.copytree(tmp_path / "good", tmp_path / "set")
    shards = sorted((tmp_path / "set").glob("*.parquet"))
    assert len(shards) == 3
    shards[0].write_bytes(shards[0].read_bytes()[:700])  # torn, and the last one exists
    flipped = bytearray(shards[1].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    shards[1].write_bytes(flipped)
    kept = shards[2].stat().st_mtime_ns
    write_shards(tmp_path / "set", rows, 40)
    assert all(p.read_bytes() == (tmp_path / "good" / p.name).read_bytes() for p in shards) and shards[2].stat().st_mtime_ns == kept


def test_a_write_that_dies_leaves_nothing_that_looks_whole(tmp_path):
    """The same at its root: a process that dies in the middle of a write. The old file stays, no half of the new one is ever under its name."""
    core.save_tensors(tmp_path / "a.safetensors", dict(x=torch.zeros(3)))
    with pytest.raises(ZeroDivisionError):
        with core.atomic(tmp_path / "a.safetensors") as tmp:
            tmp.write_bytes(b"half")
            raise ZeroDivisionError
    assert torch.equal(load_tensors(tmp_path / "a.safetensors")[0]["x"], torch.zeros(3)) and len(list(tmp_path.iterdir())) == 1


def test_a_torn_checkpoint_is_not_resumed_from(tmp_path, capsys):
    """And at resume: the newest checkpoint exists, but half of it. It is named, and training goes on from the one before."""
    kept = Checkpoints(tmp_path)
    for step in (1, 2):
        kept.save(step, dict(net=dict(w=torch.full((500,), float(step)))))
    newest = kept.paths()[-1]
    newest.write_bytes(newest.read_bytes()[:-300])
    step, state = kept.load()
    assert step == 1 and (state["net"]["w"] == 1).all() and str(newest) in capsys.readouterr().err


# ---- 7: more asked for than there is; files that run code


def test_a_class_that_never_passes_ends_and_is_told(train):
    """A prompt script asked for more different sentences than its language model had written, and ended in an error at the end of the work; a filter without
    a limit drew for ever from a class that had collapsed. Here a class that never passes stops at its limit, is filled as was asked, and is counted."""
    g = fit_floor(train.images, train.labels, train.classes, 1, 8)
    c = train_classifier(Fixed(train.images, train.labels), PLAIN, train.classes, 20)
    strict = lambda x, y, s: keep_rule("above", 0.0)(x, y, s) & (y != 3)
    rows, stats = accept(Pool(g, Scores(c), 0, {}), strict, 10, 3)
    short = next(s for s in stats if s["label"] == 3)
    assert (rows["label"] == 3).sum() == 10 and short["fallback"] == 10 and short["acceptance"] == 0 and not rows["passed"][rows["label"] == 3].any()
    assert short["candidates"] <= 128  # a window, not for ever
    with pytest.raises(RuntimeError, match="class 3: 10 images are lacking"):
        accept(Pool(g, Scores(c), 0, {}), strict, 10, 3, "stop")


class Payload:
    """What a pickle can be: code that runs when it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("kind", ["weights", "arrays", "statistics", "checkpoint"])
def test_no_file_is_unpickled(kind, tmp_path):
    """Sentences were handed on as a pickle, and weights still are in several systems: whoever loads them runs what they say. Here no reader opens one."""
    mark, bad = tmp_path / "it-ran", Payload(tmp_path / "it-ran")
    if kind == "weights":
        read, file = read_inception, tmp_path / "pt_inception-2015-12-05-6726825d.pth"
        torch.save(dict(w=bad), file)
    elif kind == "checkpoint":
        read, file = load_tensors, tmp_path / "step-000000001.safetensors"
        file.write_bytes(pickle.dumps(bad))
    else:
        read, file = dict(arrays=load_arrays, statistics=load_reference)[kind], tmp_path / "a.npz"
        np.savez(file, **dict.fromkeys(("mu", "sigma", "train_images", "train_labels"), np.array([bad], object)))
    with pytest.raises((DamagedFile, DataError, ValueError)):
        read(str(file))
    assert not mark.exists()


# ---- 8 and 9: the average that was lost, the best that was overwritten


def test_a_checkpoint_holds_the_moving_average(tmp_path):
    """The average of a generator's weights was not in the checkpoints of a GAN library: after a resume it began anew, and what sampled was another network.
    Here it comes back to the bit, is not a copy of the weights, and the samples after a resume are those of a training that never stopped."""
    stage = lambda place: SimpleNamespace(
        dir=tmp_path / place,
        checkpoints=Checkpoints(tmp_path / place / "checkpoints"),
        history=History(tmp_path / place / "h.parquet"),
        track=lambda it, *a: it,
    )
    whole, halves, resumed = gan_state(), gan_state(), gan_state(seed=1)
    train_gan(whole, batches, 6, stage("whole"), lambda *a: None)
    train_gan(halves, batches, 3, stage("halves"), lambda *a: None)
    resumed.load(stage("halves").checkpoints.load()[1])
    assert equal(weights(resumed.E), weights(halves.E)) and not equal(weights(resumed.E), weights(resumed.G))
    resumed = gan_state()
    train_gan(resumed, batches, 6, stage("halves"), lambda *a: None)
    val = noise(8)
    draw = lambda s: as_generator(s, val, [0, 1, 2, 3]).sample(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    assert equal(weights(resumed.E), weights(whole.E)) and torch.equal(draw(resumed), draw(whole))


def test_a_classifiers_average_is_in_its_checkpoint(tmp_path, train):
    """The same for a classifier that is the average of its training, and for the best on val that a recipe may keep."""
    source, recipe = Fixed(train.images[:200], train.labels[:200]), replace(PLAIN, ema=0.99, keep="best")
    a = Training(recipe, (1, 8, 8), train.classes, MACHINE)
    for step in range(5):
        a.step(source.images[:20], source.labels[:20], step, 5)
    a.judge(train.take(range(40)))
    kept = Checkpoints(tmp_path)
    kept.save(5, a.state())
    b = Training(replace(recipe, seed=1), (1, 8, 8), train.classes, MACHINE)
    b.load(kept.load()[1])
    assert equal(weights(b.average), weights(a.average)) and equal(weights(b.best), weights(a.best)) and b.score == a.score
    assert not equal(weights(b.average), weights(b.net))


def test_the_best_generator_by_val_outlives_a_collapse(tmp_path, train):
    """A DCGAN was best early (FID 49) and then diverged (137); what was kept was the end. Here the generator that is kept is the best by val, whatever
    comes after it, and a training whose samples become one picture is stopped and says so."""
    scores = iter(
        [dict(frechet=80.0, variety=0.5), dict(frechet=49.0, variety=0.5), dict(frechet=100.0, variety=0.01), dict(frechet=137.0, variety=0.01)]
    )
    classifier = train_classifier(Fixed(train.images[:60], train.labels[:60]), PLAIN, train.classes, 2)
    stage = SimpleNamespace(dir=tmp_path, device="cpu", history=History(tmp_path / "h.parquet"), machine=MACHINE)
    cfg, s = resolve(GanConfig, dict(GAN, batch=20, ema=0.0)), GanState(resolve(GanConfig, dict(GAN, ema=0.0)), (1, 8, 8), 10, MACHINE)
    watcher, made = Watcher(stage, cfg, train, classifier, list(range(10)), list(range(10)), lambda g: next(scores)), []
    for step in range(1, 5):
        with torch.no_grad():
            next(s.G.parameters()).add_(0.1)
        made.append(as_generator(s, train, list(range(10))).digest)
        if step < 4:
            watcher(s, step)
            continue
        with pytest.raises(RuntimeError, match="collapsed.*The best generator and the last checkpoint are kept"):
            watcher(s, step)
    assert load_generator(tmp_path).digest == made[1] and len(set(made)) == 4


# ---- 10: fine-tuning on another cut than pre-training


def test_fine_tuning_on_another_cut_is_refused(run, tmp_path):
    """Pre-trained on one random cut, fine-tuned on another: the novel classes, and test images, had been seen. (The few-shot reference guards against it
    by comparing seeds; the idea is kept, by the digest of the cut.) Also where the classes do not overlap, also by a generator of all classes."""
    other, config = first_stages(tmp_path / "other", seed=1), core.stage_parts("fewshot")[0]
    with pytest.raises(SettingError, match="contradicting splits.*cut differently"):
        open_stage("fewshot", resolve(config), run, inputs={"generator": str(other / "base")})
    novel = load_json(run / "splits" / "fewshot.json")["novel"]
    with pytest.raises(SettingError, match="gan was trained on novel classes already"):
        check_source(run / "gan", dict(shape=(1, 8, 8), classes=10, novel_labels=novel))
    assert check_source(run / "base", dict(shape=(1, 8, 8), classes=10, novel_labels=novel)) is None


# ---- others of the same systems


def test_images_keep_their_labels_in_any_order(finished, train):
    """A generation script regrouped each batch by class and saved it in the order it had before: with an unsorted list images got others' labels.
    Here an image is that of its own address, in whatever company and order it is asked for."""
    for g in (load_generator(finished / "gan"), fit_floor(train.images, train.labels, train.classes, 1, 8)):
        y = torch.from_numpy(rng(0, "published.order").permutation(np.arange(10).repeat(20)))
        index = torch.arange(200) % 20
        together = g.sample(y, index, seed=3)
        assert all(torch.equal(together[i], g.sample(y[i : i + 1], index[i : i + 1], seed=3)[0]) for i in range(0, 200, 17))


def test_a_new_start_deletes_nothing(run, capsys):
    """A generation tool removed its output folder at every start. Here what was made with other settings is moved aside, under a name that is told."""
    config = core.stage_parts("generate")[0]
    for n in (2, 3):
        stage = open_stage("generate", resolve(config, dict(per_class=n)), run, inputs={"generator": "gan"})
        core.stage_parts("generate")[2](stage)
    assert load_json(run / "generate" / "result.json")["per_class"] == 3 and load_json(run / "generate.old-1" / "result.json")["per_class"] == 2
    assert "generate changed (settings.per_class: 2 -> 3)" in capsys.readouterr().out


def test_labels_are_not_written_into_the_code(tmp_path):
    """Class names and their number were constants of a script, edited by hand for each data set, or 10 in a loop. Here three classes of any names do."""
    x, y = noise(90, 3).images, torch.arange(90) % 3
    c = train_classifier(Fixed(x, y), PLAIN, ["a b", "ß", "10"], 4)
    c.save(tmp_path / "c.safetensors")
    again = load_classifier(tmp_path / "c.safetensors")
    assert isinstance(again, Classifier) and again.classes == ["a b", "ß", "10"] and again.probs(x).shape == (90, 3)
    assert EvaluateConfig().seeds and fit_floor(x, y, c.classes, 1, 4).sample(torch.tensor([2]), torch.tensor([0])).shape == (1, 1, 8, 8)
