"""The filter with an image-text model as its judge, and the published choice of He et al. in a run: wired, resumable, one look at each image."""

import shutil

import numpy as np
import pytest
import torch

from synthlit import filter as F
from synthlit.classifier import ClassifierConfig, Fixed, load_classifier, train_classifier
from synthlit.core import SettingError, load_json, load_table, load_tensors, open_stage, resolve, save_tensors, small_stage
from synthlit.evaluate import drawing_flops
from synthlit.gan.train import GanConfig, stage_splits
from synthlit.generator import load_generator
from synthlit.imagetext import ImageText, random_image_text
from synthlit.multigen import Mixer, MultigenConfig, drawn_alike
from synthlit.plan import plan, preflight
from synthlit.recycle import load_member
from synthlit.splits import load_split


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Splits, a classifier, a diffusion model and a tiny pipeline with its CLIP, as small as they go."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    small_stage(folder, "splits")
    small_stage(folder, "classifier", epochs=1)
    small_stage(folder, "diffusion", channels=[8, 8], steps=2, warmup=0, batch=4, eval_every=2, n_eval=2, sample_steps=1, shots=2)
    small_stage(
        folder, "tiny", vae_widths=[8, 8], unet_widths=[8, 8], steps_vae=1, steps_clip=1, steps_unet=1, batch_vae=4, batch_clip=4, batch_unet=4
    )
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return random_image_text(tmp_path_factory.mktemp("clip") / "clip", [*"0123456789", "a photo of a"], 16)


def filtered(run, name, **settings):
    few = dict(per_class=6, draws=2, proxy=0.01, candidates=128)
    stage = open_stage("filter", resolve(F.FilterConfig, F.FILTER_PRESETS["tiny"], few, settings), run, name)
    return stage, F.run_filter(stage)


def test_the_published_filter_in_a_run(run, clip):
    stage, r = filtered(run, "published", rule="published", tau=None, judge=str(clip), names={"3": "three"}, templates=["a photo of a {class}"])
    assert r["rule"] == "published" and r["tau"] == pytest.approx(0.1) and r["candidates"] == 128 and r["judge"]["source"] == str(clip)
    assert r["judge"]["names"] == {"3": "three"} and r["judge"]["weights"] and r["judge"]["model"] == "clip" and r["look"] > 0
    rows = load_table(stage.dir / "accepted.parquet").to_pydict()
    assert np.bincount(rows["label"]).tolist() == [6] * 10 and max(rows["index"]) < 128
    g = load_generator(run / "diffusion")
    model = ImageText(clip, g.classes, ["a photo of a {class}"], {"3": "three"})
    x, y = F.images_at(g, rows, stage.cfg.seed, {})
    own = model.probs(x).gather(1, y[:, None])[:, 0].numpy()
    assert np.allclose(own, rows["score"], atol=1e-5) and (np.array(rows["passed"]) == (np.array(rows["score"]) > 0.1)).all()
    for c in range(10):  # fewer than six pass: the likeliest; else six of those that pass
        every = model.probs(g.sample([c] * 128, range(128), seed=stage.cfg.seed))[:, c]
        mine = np.sort([s for s, k in zip(rows["score"], rows["label"]) if k == c])
        passing = int((every > 0.1).sum())
        if passing < 6:
            assert np.allclose(mine, np.sort(every.topk(6).values.numpy()), atol=1e-5)
        else:
            assert (mine > 0.1).all()


def test_ordinary_rules_take_another_judge(run):
    """The CLIP of the run's own pipeline, by name; a set that is drawn anew asks the same judge."""
    stage, r = filtered(run, "tiny_judge", rule="above", tau=[0.05, 0.1], judge="tiny", templates=["a photo of a {class}"])
    assert r["judge"]["source"] == "tiny" and stage.inputs["pipeline"] == [run / "tiny"]
    classifier, train = load_classifier(run / "classifier"), load_split(run / "splits", "train")
    member = load_member(stage.dir, classifier, train)
    assert isinstance(member.scores.classifier, ImageText) and member.scores.classifier.facts["weights"] == r["judge"]["weights"]
    plain, p = filtered(run, "no_judge", rule="above", tau=[0.1])
    assert "judge" not in p and load_member(plain.dir, classifier, train).scores.classifier is classifier
    per = lambda f, look: (load_generator(run / "diffusion").flops + look) * sum(s["candidates"] for s in load_json(f / "result.json")["stats"]) / 60
    assert drawing_flops(stage.dir, classifier, "cpu") == per(stage.dir, r["look"])
    assert drawing_flops(plain.dir, classifier, "cpu") == per(plain.dir, classifier.flops * (1 + classifier.recipe.tta))
    moved = shutil.copytree(run, run.parent / "moved")
    assert load_member(moved / "tiny_judge", classifier, train).scores.classifier.facts["weights"] == r["judge"]["weights"]


def test_sets_of_the_same_candidates_are_named():
    """Two filters of one generator choose among the same images unless their seeds, or their dials, are their own."""
    of = lambda seed=1, digest="a", **dials: (None, None, dict(digest=digest, seed=seed, dials=dials))
    sets = dict(one=of(), two=of(), wide=of(std=1.3), other=of(2), elsewhere=of(digest="b"))
    assert drawn_alike(sets) == [["one", "two"]]


def test_an_image_is_looked_at_once(run, clip, monkeypatch):
    """Three thresholds and the list of the rejected: one pass of the image tower each candidate, none of the text tower after the start."""
    seen, texts = [], []
    features, encode = ImageText.features, ImageText.encode
    monkeypatch.setattr(ImageText, "features", lambda self, x: seen.append(len(x)) or features(self, x))
    monkeypatch.setattr(ImageText, "encode", lambda self, t: texts.append(t) or encode(self, t))
    _, r = filtered(run, "once", rule="above", tau=[0.01, 0.1, 0.2], judge=str(clip))
    assert sum(seen) == 10 * 128 and len(texts) == 10


def test_a_stopped_filter_draws_nothing_twice(run, clip, monkeypatch):
    drawn, kept = [], []
    draw = F.Pool.draw

    def deadly(self, c, index):
        if stop and len(drawn) == stop:
            raise KeyboardInterrupt
        drawn.append((c, len(index)))
        return draw(self, c, index)

    monkeypatch.setattr(F.Pool, "draw", deadly)
    stop = 0
    stage, whole = filtered(run, "whole", rule="published", tau=None, judge=str(clip))
    kept, stop = load_table(stage.dir / "accepted.parquet").to_pydict(), 4
    once, drawn[:] = len(drawn), []
    with pytest.raises(KeyboardInterrupt):
        filtered(run, "again", rule="published", tau=None, judge=str(clip))
    place = run / "again" / "checkpoints" / "scores"
    assert len(list(place.iterdir())) == 4
    drawn[:], stop = [], 0
    (run / "locks" / "again.lock").unlink(missing_ok=True)
    stage, r = filtered(run, "again", rule="published", tau=None, judge=str(clip))
    assert len(drawn) == once - 4 and not place.exists()
    assert load_table(stage.dir / "accepted.parquet").to_pydict() == kept and r["tau"] == whole["tau"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rule="published", per_class=200), "looks at filter.candidates = 128"),
        (dict(judge="/not/there"), "no such folder"),
        (dict(judge="tiny", pipeline=False), "no stage tiny"),
        (dict(judge="a/b", templates=["a photo"]), "names no class"),
        (dict(rule="publishd"), "did you mean 'published'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    facts = dict(n_train=1000, classes=10, pipeline=settings.pop("pipeline", True))
    with pytest.raises(SettingError, match=message):
        resolve(F.FilterConfig, dict(candidates=128), settings).check(facts)


def test_a_chain_without_the_pipeline_is_refused_before_it_runs():
    chain = dict(splits={}, classifier={}, gan={}, filter=dict(judge="tiny"))
    with pytest.raises(SettingError, match="no stage tiny before the filter"):
        preflight(plan(dict(stages=chain)))
    preflight(plan(dict(stages=chain | dict(tiny={}))))


def test_too_few_candidates_are_named(run, clip):
    from synthlit.imagetext import accept_published

    g = load_generator(run / "diffusion")
    pool = F.Pool(g, F.Scores(ImageText(clip, g.classes)), 0, {})
    with pytest.raises(SettingError, match="200 images are wanted of 128 candidates"):
        accept_published(pool, 128, 200)


def test_texts_of_published_rows():
    from synthlit.imagetext import class_texts, texts_for

    templates, names = texts_for(["eurosat"], {}, ["AnnualCrop", "Forest"])
    assert class_texts(["AnnualCrop", "Forest"], templates, names) == [
        ["a centered satellite photo of annual crop land."],
        ["a centered satellite photo of forest."],
    ]
    assert texts_for(["plain"], dict(cat="lion"), ["cat"])[1] == dict(cat="lion")


def test_the_preset_is_the_published_one():
    c = resolve(F.FilterConfig, F.FILTER_PRESETS["published"])
    assert (c.rule, c.tau, c.per_class, c.candidates, c.templates) == ("published", None, 800, 2000, ["a photo of {a}."])


def test_an_ensemble_that_agrees(run, tmp_path):
    """Two more classifiers: what they do not both see is not kept, a set that is drawn anew asks them too, and one of other classes is refused."""
    classifier, train = load_classifier(run / "classifier"), load_split(run / "splits", "train")
    second = train_classifier(Fixed(train.images, train.labels), resolve(ClassifierConfig, dict(width=4)), train.classes, 60)
    second.save(tmp_path / "second" / "classifier.safetensors")
    both = [str(run / "classifier"), str(tmp_path / "second")]
    stage, r = filtered(run, "agreed", rule="agreed", tau=[0.6], ensemble=both)
    g, rows = load_generator(run / "diffusion"), load_table(stage.dir / "accepted.parquet").to_pydict()
    x, y = F.images_at(g, rows, stage.cfg.seed, {})
    agree = torch.stack([load_classifier(p).probs(x).argmax(1) == y for p in both]).all(0)
    assert torch.equal(agree, torch.tensor(rows["passed"])) and r["ensemble"] == both
    again = load_member(stage.dir, classifier, train).scores(x, y)["agree"]
    assert torch.equal(again > 0.6, agree)
    five = train.only(range(5))
    other = train_classifier(Fixed(five.images, five.labels), resolve(ClassifierConfig, dict(width=4)), list("abcde"), 1)
    other.save(tmp_path / "classifier.safetensors")
    with pytest.raises(SettingError, match="knows other classes"):
        filtered(run, "strange", rule="agreed", tau=[0.6], ensemble=[str(tmp_path)])


def test_the_upper_end_of_the_entropy_window_is_kept(run):
    """In the stage, in what it says of itself, and where the set is drawn anew."""
    stage, r = filtered(run, "window", rule="doubtful", tau=[0.0], most=0.9, draws=20)
    classifier, train = load_classifier(run / "classifier"), load_split(run / "splits", "train")
    m = load_member(stage.dir, classifier, train)
    x = m.draw(3, torch.arange(128))
    s = m.scores(x, y := torch.full((128,), 3))
    assert r["most"] == 0.9 and torch.equal(m.rule(x, y, s), s["top"] & (s["entropy"] <= 0.9))


def test_what_fills_up_is_not_thrown_away(run):
    """A class that runs short is named with the number of images, and these are not among the pictures of the rejected."""
    stage, r = filtered(run, "short", rule="above", tau=[0.99], draws=2)
    rows, gone = [load_table(stage.dir / f"{f}.parquet").to_pydict() for f in ("accepted", "rejected")]
    assert sum(r["short_of"].values()) == rows["passed"].count(False) > 0
    assert not set(zip(rows["label"], rows["index"])) & set(zip(gone["label"], gone["index"])) and len(gone["label"]) > 0


def test_a_classifier_of_other_classes_is_refused(run, tmp_path):
    """Before a filter, a search or a GAN asks it; and a generator of other classes before it is mixed."""
    train = load_split(run / "splits", "train")
    five = train.only(range(5))
    shutil.copytree(run / "classifier", tmp_path / "five")
    c = train_classifier(Fixed(five.images, five.labels), resolve(ClassifierConfig, dict(width=4)), list("abcde"), 1)
    c.save(tmp_path / "five" / "classifier.safetensors")
    theirs = dict(classifier=str(tmp_path / "five"))
    for stage, cfg, inputs in (("filter", F.FilterConfig, dict(theirs, generator="diffusion")), ("gan", GanConfig, theirs)):
        with pytest.raises(SettingError, match=r"five knows 5 classes \(a, b, c, d, e, ...\) of images 1x8x8, splits has 10 classes"):
            stage_splits(open_stage(stage, resolve(cfg), run, "refused", inputs))
    filtered(run, "mine", rule="above", tau=[0.0])
    stage = open_stage("multigen", resolve(MultigenConfig), run, "mix", dict(accepted=["mine"], classifier="classifier"))
    path = run / "diffusion" / "generator.safetensors"
    t, m = load_tensors(path)
    save_tensors(path, t, m | dict(classes=[*"abcdefghij"]))
    try:
        with pytest.raises(SettingError, match="mine makes other classes"):
            Mixer(stage)
    finally:
        save_tensors(path, t, m)
