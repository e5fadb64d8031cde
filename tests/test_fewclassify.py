"""Few-shot classification: only what is asked moves, killed work goes on to the same bits, and nobody judges who has seen too much."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synthlit.classifier import ClassifierConfig, Training, load_classifier, new_net
from synthlit.core import (
    SettingError,
    Stage,
    digest,
    enter_folder,
    find_inputs,
    load_json,
    load_table,
    load_tensors,
    resolve,
    run_machine,
    save_json,
    small_inputs,
    stage_identity,
)
from synthlit.fewclassify import (
    FEWCLASSIFY_PRESETS,
    Beside,
    Exam,
    FewclassifyConfig,
    Job,
    Looks,
    Still,
    drawn,
    endless,
    fine_tune,
    further,
    jobs_of,
    mixer,
    moving,
    rank_correlation,
    read_row,
    ready,
    recipe_for,
    restored,
    retrieved,
    run_fewclassify,
    shared_floor,
    source_for,
    summary,
    task_of,
    tuned_path,
)
from synthlit.generator import load_generator
from synthlit.plan import plan, preflight, read_params
from synthlit.splits import openings

SMALL = dict(
    steps=12,
    validate_every=4,
    n_generated=4,
    n_fakeval=3,
    seeds=[0, 1],
    look_seeds=1,
    batch=6,
    batch_generated=5,
    floor_dim=8,
    rows=["supports", "supports + mixup", "sample + augmentation", "generated alone", "retrieved real", "Gaussian floor"],
)


@pytest.fixture(scope="module")
def base_run(home, tmp_path_factory):
    """Splits, a classifier and a GAN of the base classes, and the GAN adapted to the supports."""
    run = tmp_path_factory.mktemp("few") / "run"
    run.mkdir()
    run_machine(run, "cpu")
    small_inputs(run, "fewclassify")
    return run


@pytest.fixture
def run(base_run, tmp_path):
    return shutil.copytree(base_run, tmp_path / "run")


def opened(run, name="fewclassify", inputs=None, **settings) -> Stage:
    """The stage, open, with the settings of SMALL."""
    cfg = resolve(FewclassifyConfig, FEWCLASSIFY_PRESETS["tiny"], SMALL, settings)
    machine, found = run_machine(run), find_inputs(run, "fewclassify", inputs or {}, name)
    identity = stage_identity("fewclassify", cfg, run, found, machine)
    enter_folder(run / name, identity, cfg)
    return Stage("fewclassify", run, run / name, cfg, found, identity, None, machine)


@pytest.fixture(scope="module")
def task(base_run, tmp_path_factory):
    copied = shutil.copytree(base_run, tmp_path_factory.mktemp("task") / "run")
    return task_of(opened(copied))


def of(task, **settings):
    """The same task with other settings."""
    return SimpleNamespace(**{**vars(task), "cfg": resolve(FewclassifyConfig, vars(task.cfg), settings), "floor": task.floor})


def changed(task, folder, row="supports", **settings) -> set:
    """Names of the tensors that a fine-tuning changed."""
    t, job = of(task, **settings), Job(row, "", 0)
    looks = fine_tune(t, job, further(t, job), folder, task.base.machine)
    now, was = restored(task.base, looks.file(t.cfg.steps)).net.state_dict(), task.base.net.state_dict()
    return {k for k in was if not torch.equal(was[k], now[k])}


@pytest.mark.parametrize("optimizer", ["adamw", "sgdw"])
def test_only_what_is_named_moves(task, tmp_path, optimizer):
    how = dict(optimizer=optimizer, weight_decay=0.01)  # a decay must not reach what is frozen
    assert changed(task, tmp_path / "a", moves="head", **how) == {"head.weight", "head.bias"}
    block = changed(task, tmp_path / "b", moves="last_block", **how)
    assert block == {n for n in moving(task.base.net, "last_block")} and any(n.startswith("body.4") for n in block)
    assert changed(task, tmp_path / "c", moves="body.2", **how) == {n for n in moving(task.base.net, "body.2")}
    every = changed(task, tmp_path / "d", moves="all", **how)
    assert every == {n for n, _ in task.base.net.named_parameters()}


def test_batch_norms_keep_their_averages_unless_asked(task, tmp_path):
    names = {n for n in task.base.net.state_dict() if "running" in n or "num_batches" in n}
    assert names and not names & changed(task, tmp_path / "a", moves="all")
    assert names <= changed(task, tmp_path / "b", batch_norm="batch")  # though only the head has a gradient


def test_a_still_batch_norm_is_still_in_copies_and_gone_after_saving(task):
    import copy

    net, _ = ready(task.base.net, "all", "moving")
    twin = copy.deepcopy(net).train()
    still = [m for m in twin.modules() if isinstance(m, Still)]
    assert still and not any(m.training for m in still) and twin.body.training
    assert not any(isinstance(m, Still) for m in task.base.net.modules())


def test_parts_of_other_networks_have_names():
    class Own(nn.Module):
        def __init__(self, channels=1, classes=10):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 10)

        def forward(self, x):
            return self.out(self.b(self.a(x)))

    from synthlit.networks import with_features

    net = with_features(Own())
    assert moving(net, "head") == ["net.out.weight", "net.out.bias"]
    assert set(moving(net, "last_block")) == {"net.out.weight", "net.out.bias", "net.b.weight", "net.b.bias"}
    for name in ("resnet18", "fast", "resnet20"):
        n = new_net(ClassifierConfig(network=name, width=4), 1, 5)
        assert moving(n, "head") == ["head.weight", "head.bias"] and 2 < len(moving(n, "last_block")) < len(moving(n, "all"))
    with pytest.raises(SettingError, match="last_block"):
        moving(net, "last_blok")


def test_every_image_is_used_as_often_as_any_other():
    used = np.bincount(np.concatenate([endless(7, 5, s, 3, "x") for s in range(14)]), minlength=7)
    assert (used == 10).all()
    assert (np.bincount(np.concatenate([endless(3, 11, s, 3, "x") for s in range(3)])) == 11).all()  # more than there are in one step


def test_a_step_has_so_many_of_each_and_follows_from_its_number():
    sets = [(torch.zeros(4, 1, 2, 2).byte(), torch.zeros(4).long(), 3), (torch.ones(9, 1, 2, 2).byte(), torch.ones(9).long(), 2)]
    a, b = Beside(sets, 0, 10), Beside(sets, 0, 10)
    late = list(a.batches(None, 5, 7, 2))
    assert len(late) == 3 and all(torch.equal(late[0][j], b.at(27)[j]) for j in (0, 1)) and late[0][1].tolist() == [0, 0, 0, 1, 1]
    assert len(Beside([sets[0], (torch.zeros(0, 1, 2, 2).byte(), torch.zeros(0).long(), 2)], 0, 10)) == 30  # an empty set takes no place


def test_mixing_each_image_by_its_own_share_gives_the_sum_of_two_losses(task):
    recipe = recipe_for(task, Job("supports + mixup", "", 0), 6)
    mix = mixer(task.cfg, 0)
    seen = {}

    def spy(x, y, step):
        seen["out"] = mix(x, y, step)
        return seen["out"]

    net, _ = ready(task.base.net, "head", "moving")
    t = Training(recipe, task.base.shape, task.base.classes, task.base.machine, net, spy)
    was = {k: v.clone() for k, v in net.state_dict().items()}
    loss = t.step(task.supports.images[:6], task.supports.labels[:6], 0, 10)
    net.load_state_dict(was)
    x, ya, yb, lam = seen["out"]
    out = net.train()(x)
    ce = lambda y: F.cross_entropy(out, y, reduction="none")
    assert len(lam) == 6 and torch.allclose(loss, (lam * ce(ya) + (1 - lam) * ce(yb)).mean(), atol=1e-6)


def test_two_shares_of_a_batch_mix_as_one(task):
    cfg = task.cfg
    losses = []
    for threads in (1, 2):
        recipe = recipe_for(task, Job("supports + mixup", "", 0), 64)
        net, _ = ready(task.base.net, "head", "moving")
        t = Training(recipe, task.base.shape, task.base.classes, dict(task.base.machine, threads=threads), net, mixer(cfg, 0))
        rows = torch.arange(64) % len(task.supports)
        losses.append(t.step(task.supports.images[rows], task.supports.labels[rows], 0, 10))
        assert len(t.crew.nets) == threads
    torch.set_num_threads(1)
    assert torch.allclose(*losses, atol=1e-6)


def test_plain_rows_see_the_images_as_they_are(task):
    plain, augmented = [recipe_for(of(task, shift=2, rotate=5.0, flip=True), Job(r, "", 0), 6) for r in ("supports", "supports + augmentation")]
    assert (plain.shift, plain.rotate, plain.flip, plain.mixup) == (0, 0.0, False, 0.0)
    assert (augmented.shift, augmented.rotate, augmented.flip) == (2, 5.0, True)
    assert recipe_for(task, Job("supports + cutmix", "", 0), 6).cutmix == 1.0 and plain.smoothing == 0.0 and plain.schedule == "constant"


def test_generated_alone_sees_no_support_and_sample_sees_both(task):
    name = next(iter(task.generators))
    for row, n in (("generated alone", 5), ("sample", 11)):
        job = Job(row, name, 0)
        more = further(task, job)
        assert len(more[1]) == 4 * len(task.novel) and set(more[1].tolist()) == set(task.novel)
        x, _ = source_for(task, job, more).at(0)
        mine = {i.numpy().tobytes() for i in task.supports.images}
        assert len(x) == n and sum(i.numpy().tobytes() in mine for i in x) == (0 if row == "generated alone" else 6)


def test_fakeval_images_are_never_trained_on(task):
    name = next(iter(task.generators))
    g = task.generators[name]
    trained = drawn(g, task.novel, 4, 0, {})[0]
    looked, _ = drawn(g, task.novel, 3, 0, {}, first=4)
    assert not {x.numpy().tobytes() for x in trained} & {x.numpy().tobytes() for x in looked}
    assert torch.equal(task.exams[name].labels, torch.tensor(task.novel).repeat(3))


def test_retrieved_images_are_the_nearest_and_belong_to_one_class(task):
    x, y = retrieved(task.base, task.supports, task.known, 3)
    assert len(x) <= 3 * len(task.supports) and set(y.tolist()) <= set(task.novel)
    assert len({i.numpy().tobytes() for i in x}) == len(x)
    known = {i.numpy().tobytes() for i in task.known.images}
    assert all(i.numpy().tobytes() in known for i in x)
    one = task.supports.take(torch.tensor([0]))
    d = (task.base.features(task.known.images) - task.base.features(one.images)).norm(dim=1)
    best = retrieved(task.base, one, task.known, 1)[0]
    assert torch.equal(best[0], task.known.images[d.argmin()])


def test_the_floor_works_with_one_support_and_with_few_base_images(task):
    one = task.supports.take(torch.tensor([task.supports.labels.tolist().index(c) for c in task.novel]))
    g = shared_floor(task.known.take(torch.arange(30)), one, 64)
    x, y = drawn(g, task.novel, 5, 0, {})
    assert x.shape == (5 * len(task.novel), *task.supports.images.shape[1:]) and g.trained == task.novel


def test_features_made_once_give_the_same_scores(task):
    net, _ = ready(task.base.net, "head", "moving")
    with torch.no_grad():
        net.head.weight[task.novel] += 0.3
    c = type(task.base)(net, task.base.classes, task.base.shape, task.base.recipe, task.base.machine)
    x, y = task.supports.images, task.supports.labels
    fast, slow = (Exam(task.base, x, y, still) for still in (True, False))
    assert torch.allclose(fast.logits(c), slow.logits(c), atol=1e-5) and fast.scores(c, task.novel) == slow.scores(c, task.novel)


def test_looks_keep_what_they_must(tmp_path):
    net = nn.Linear(2, 2)
    for every, kept in ((True, [1, 2, 3, 4]), (False, [2, 4])):
        looks = Looks(tmp_path / str(every), ["weight"], every)
        for step, val in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.6)):
            looks.add(step, net, val=val, fakeval=None)
        assert [r["step"] for r in looks.kept()] == kept and looks.best == 2
        again = Looks(tmp_path / str(every), ["weight"], every)
        again.add(3, net, val=0.9, fakeval=None)  # a training that went back to an earlier checkpoint
        assert [r["step"] for r in again.rows] == [1, 2, 3] and again.best == 3  # the later of equals


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, None, 2, 3], [1, 5, 2, 3]) == 1


@pytest.fixture(scope="module")
def whole(base_run, tmp_path_factory):
    """The stage run without a break."""
    copied = shutil.copytree(base_run, tmp_path_factory.mktemp("whole") / "run")
    stage = opened(copied)
    return stage, run_fewclassify(stage)


def files(stage) -> dict:
    return load_json(stage.dir / "manifest.json")["artefacts"]


def test_the_stage(whole):
    stage, result = whole
    rows = load_table(stage.dir / "scores.parquet").to_pylist()
    assert len(rows) == 6 * 2 and [r["row"] for r in result["rows"]] == SMALL["rows"]
    assert all(r["test"] <= r["test_novel"] and 0 <= r["base_val"] <= 1 for r in rows)
    first = [r for r in rows if r["seed"] == 0]
    assert all(r["by_test"] >= max(r["test"], r["by_val"]) - 1e-12 for r in first)
    assert all(r["by_test"] is None for r in rows if r["seed"] == 1)  # look_seeds = 1: the other seed kept no looks
    looks = load_table(stage.dir / "looks.parquet").to_pylist()
    assert len(looks) == 12 * 3 and [r["step"] for r in looks[:3]] == [4, 8, 12] and all(r["fakeval"] is not None for r in looks)
    mine = [o for o in openings(result["test_digest"]) if o["who"] == f"{stage.run.name}/{stage.dir.name}"]  # others may have opened the same cut
    assert [o["why"].startswith("novel classes") for o in mine] == [True]
    assert not (stage.dir / "checkpoints" / "looks").exists() and {"step"} < set(load_table(stage.dir / "history.parquet").column_names)
    c = load_classifier(stage.dir)
    label = result["classifier"]
    job = next(j for j in jobs_of(stage.cfg, result["generators"]) if j.label == label and j.seed == 0)
    head = load_tensors(tuned_path(stage.dir, job))[0]["head.weight"]
    assert torch.equal(c.net.head.weight, head)


def test_what_was_kept_has_the_score_that_stands_in_the_table(whole):
    stage, result = whole
    t = task_of(stage)
    for r in load_table(stage.dir / "scores.parquet").to_pylist():
        c = restored(t.base, tuned_path(stage.dir, Job(r["row"], r["generator"], r["seed"])))
        assert t.exams["val"].scores(c, t.novel) == (r["val"], r["val_novel"])


@pytest.mark.parametrize("stop", [1, 5, 18, 61, 100])
def test_a_killed_stage_goes_on_to_the_same_bits_and_repeats_nothing(whole, base_run, tmp_path, monkeypatch, stop):
    import synthlit.fewclassify as module

    copied = shutil.copytree(base_run, tmp_path / "run")
    steps = dict(done=0)
    step = Training.step

    def counted(self, *a):
        steps["done"] += 1
        if steps["done"] == stop:
            raise KeyboardInterrupt
        return step(self, *a)

    monkeypatch.setattr(Training, "step", counted)
    before = len(openings(whole[1]["test_digest"]))
    with pytest.raises(KeyboardInterrupt):
        run_fewclassify(opened(copied))
    assert len(openings(whole[1]["test_digest"])) == before  # nobody has looked at test
    stop, steps["done"] = -1, 0
    done = len(list((copied / "fewclassify" / "tuned").glob("*.safetensors"))) if (copied / "fewclassify" / "tuned").exists() else 0
    stage = opened(copied)
    module.run_fewclassify(stage)
    assert files(stage) == files(whole[0])
    assert steps["done"] <= (12 - done) * 12  # what was finished is not trained again
    steps["done"] = 0
    run_fewclassify(opened(copied))
    assert steps["done"] == 0 and len(openings(whole[1]["test_digest"])) == before  # the same work is the same look


def test_the_best_look_is_chosen_on_val(base_run, tmp_path):
    copied = shutil.copytree(base_run, tmp_path / "run")
    stage = opened(copied, rows=["supports"], keep="best")
    run_fewclassify(stage)
    for r in load_table(stage.dir / "scores.parquet").to_pylist():
        mine = [x for x in load_table(stage.dir / "looks.parquet").to_pylist() if x["seed"] == r["seed"]]
        assert r["val"] == max(x["val"] for x in mine) and r["by_val"] in (None, r["test"])


def test_without_an_adapted_generator_only_the_real_rows_are_there(run, capsys):
    shutil.rmtree(run / "fewshot")
    stage = opened(run)
    t = task_of(stage)
    assert "was not adapted" in capsys.readouterr().out and not t.generators
    assert {j.row for j in jobs_of(t.cfg, t.generators)} == {"supports", "supports + mixup", "retrieved real", "Gaussian floor"}
    shutil.rmtree(run / "gan")
    result = run_fewclassify(opened(run, rows=["supports", "sample"]))
    assert result["left_out"] == ["sample"] and result["rows"][0]["fakeval"] is None
    with pytest.raises(SettingError, match="add a fewshot stage"):
        task_of(opened(run, rows=["sample"]))


def test_a_generator_without_a_novel_class_or_of_other_supports_is_refused(run):
    g = load_generator(run / "fewshot")
    whole = list(g.trained)
    g.trained = whole[:-1] if whole[-1] in load_json(run / "splits" / "fewshot.json")["novel"] else whole[1:]
    novel = load_json(run / "splits" / "fewshot.json")["novel"]
    g.trained = [c for c in whole if c != novel[0]]
    g.save(run / "fewshot")
    with pytest.raises(SettingError, match=f"cannot draw the novel classes .*{g.classes[novel[0]]}"):
        task_of(opened(run))
    g.trained = whole
    g.save(run / "fewshot")
    m = load_json(run / "fewshot" / "manifest.json")
    save_json(run / "fewshot" / "manifest.json", {**m, "saw": ["0" * 64]})
    with pytest.raises(SettingError, match="other supports"):
        task_of(opened(run))


def test_a_classifier_that_knows_the_novel_classes_is_refused(run):
    from synthlit.core import small_stage

    small_stage(run, "classifier", "everything", epochs=1)
    with pytest.raises(SettingError, match="classifier.classes = base"):
        task_of(opened(run, inputs=dict(classifier="everything")))


@pytest.mark.parametrize("change", [dict(novel=[]), dict(supports=[])])
def test_splits_without_novel_classes_or_supports_are_refused(run, change):
    save_json(run / "splits" / "fewshot.json", {**load_json(run / "splits" / "fewshot.json"), **change})
    with pytest.raises(SettingError, match="splits.novel and splits.k"):
        task_of(opened(run))


def test_nothing_that_saw_val_or_test_is_judged_by_them(run):
    from synthlit.fewclassify import refuse_seen

    digests = load_json(run / "splits" / "result.json")["digests"]
    m = load_json(run / "fewshot" / "manifest.json")
    for part in ("val", "test"):
        save_json(run / "fewshot" / "manifest.json", {**m, "saw": [*m["saw"], digests[part]]})
        with pytest.raises(SettingError, match=f"trained on the {part} images"):
            refuse_seen(opened(run), digests)
    pool = {**m["settings"], "pool": "published", "alpha": 1.0}  # its unlabelled images are the novel part of val, by name
    save_json(run / "fewshot" / "manifest.json", {**m, "settings": pool, "saw": [*m["saw"], digests["val"]]})
    assert refuse_seen(opened(run), digests) == ["fewshot"]
    idle = {**pool, "alpha": 0.0}  # with no weight nothing was looked at, so val has no business there
    save_json(run / "fewshot" / "manifest.json", {**m, "settings": idle, "saw": [*m["saw"], digests["val"]]})
    with pytest.raises(SettingError, match="trained on the val images"):
        refuse_seen(opened(run), digests)
    save_json(run / "fewshot" / "manifest.json", {**m, "settings": pool, "saw": [*m["saw"], digests["test"]]})
    with pytest.raises(SettingError, match="trained on the test images"):
        refuse_seen(opened(run), digests)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(rows=["suports"]), "did you mean 'supports'"),
        (dict(rows=["supports + augment"]), "did you mean 'augmentation'"),
        (dict(rows=["supports + mixup + cutmix"]), "two ways"),
        (dict(rows=["supports", "supports"]), "said twice"),
        (dict(n_generated=0), "at least 1"),
        (dict(n_generated=0, rows=["generated alone"]), "generated alone would have nothing"),
        (dict(std=0.0), "std"),
        (dict(std=-1.0), "std"),
        (dict(seeds=[1, 1]), "no second measurement"),
        (dict(mixup=3.0), "at most 1"),
        (dict(mixup=0.0), "mixup"),
        (dict(batch_norm="frozen"), "moving"),
        (dict(keep="test"), "last"),
        (dict(steps=0), "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, words):
    with pytest.raises(SettingError, match=words):
        resolve(FewclassifyConfig, wrong).check({})


def test_a_part_that_is_not_there_is_refused_before_training(run):
    with pytest.raises(SettingError, match="did you mean 'body.4'|known|head"):
        task_of(opened(run, moves="body.44"))


def test_rows_and_jobs():
    assert read_row("sample+mixup") == ("sample", ("mixup",))
    cfg = resolve(FewclassifyConfig)
    jobs = jobs_of(cfg, ["a", "b"])
    assert len(jobs) == 5 * (6 + 2 * 4) and len({j.stem for j in jobs}) == len(jobs)
    assert digest([j.stem for j in jobs]) == digest([j.stem for j in jobs_of(cfg, ["a", "b"])])
    assert not any(set(j.stem) & set("() /") for j in jobs)


def test_the_gain_is_paired():
    few = dict(generator="", source="supports", n=15, val=0.5, val_novel=0.6, base_val=0.1, fakeval=None, by_val=0.5, by_fakeval=None, by_test=0.6)
    few |= dict(fakeval_with_val=0.9, fakeval_with_test=None, fakeval_with_test_late=None)
    rows = [
        dict(few, row=r, label=r, seed=s, test=v + 0.1 * s, test_novel=v + 0.2) for r, v in (("supports", 0.3), ("sample", 0.4)) for s in range(3)
    ]
    a, b = summary(rows)
    assert a["rival"] == "supports" and abs(b["gain"] - 0.1) < 1e-12 and abs(b["gain_high"] - b["gain_low"]) < 1e-9 and a["test_high"] > a["test"]
    assert b["fakeval_with_val_n"] == 3 and b["fakeval_with_test"] is None


FOUR = dict(
    splits=dict(novel=3, k=5), classifier=dict(classes="base"), base_gan=dict(stage="gan", classes="base", pack=1), fewshot={}, fewclassify={}
)


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(fewclassify=dict(k=9)), r"fewclassify\.k = 9: the splits have 5 supports.*splits\.k"),
        (dict(classifier=dict(classes="all")), r"fewclassify needs a classifier of the base classes alone.*classes = base"),
        (dict(diffusion={}, fewshot=dict(uses="diffusion")), r"fewshot\.uses = 'diffusion': stage diffusion made it.*classes: base"),
        (dict(fewclassify=dict(uses="base_gan")), r"fewclassify\.uses = 'base_gan': stage gan made it.*of stage fewshot"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(changed, words):
    preflight(plan(read_params(dict(stages=FOUR))))
    with pytest.raises(SettingError, match=words):
        preflight(plan(read_params(dict(stages={**FOUR, **changed}))))
