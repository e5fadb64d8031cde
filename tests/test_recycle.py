"""Sets that change while they are used, and searches: what a killed one goes on with is what an unbroken one has; nothing is tried twice."""

import threading
import time

import numpy as np
import pytest
import torch

from synthlit.classifier import CLASSIFIER_PRESETS, CPU, Classifier, ClassifierConfig, Fixed, epoch_order, load_classifier, train_classifier
from synthlit.cli import main
from synthlit.core import (
    Checkpoints,
    SettingError,
    digest,
    load_json,
    load_table,
    load_tensors,
    open_stage,
    preset_of,
    resolve,
    save_json,
    save_table,
    save_tensors,
    small_stage,
)
from synthlit.evaluate import EvaluateConfig, recycled_rows, sources_of
from synthlit.filter import RULES, Pool, Scores, accept, images_at, keep_rule
from synthlit.generator import Generator, fit_floor, load_generator
from synthlit.networks import build_net
from synthlit.recycle import ImageSet, Member, Recycled, load_member, share_out, stream_class
from synthlit.search import (
    SEARCH_PRESETS,
    Middle,
    Ridges,
    SearchConfig,
    Searcher,
    kept_checkpoints,
    middle_of,
    proposed,
    published_search,
    ridge,
    ridge_accuracy,
    run_search,
    trial_accuracies,
)
from synthlit.splits import SplitsConfig, cut_data, load_data, load_split

RECIPE = resolve(ClassifierConfig, CLASSIFIER_PRESETS["tiny"], dict(batch=16, seed=3))


@pytest.fixture(scope="module")
def floor():
    """A Gaussian floor of the digits, and a classifier to filter with."""
    parts = cut_data(load_data(SplitsConfig()), SplitsConfig())
    train = parts["train"]
    judge = train_classifier(Fixed(train.images, train.labels), RECIPE, train.classes, 150)
    return fit_floor(train.images, train.labels, train.classes, 2, 16), judge, train


def member(floor, tau=0.5, **more) -> Member:
    g, judge, _ = floor
    return Member(g, keep_rule("confident", tau), Scores(judge), dict(std=1.3), **more)


def weights(c) -> str:
    return digest(*[x for k, v in c.net.state_dict().items() for x in (k, v)])


@pytest.mark.parametrize("how", [dict(), dict(factor=0.5), dict(period=2, factor=0.3)])
def test_a_killed_training_on_a_changing_set_goes_on_to_the_same_bits(floor, tmp_path, how):
    make = lambda: Recycled([member(floor), member(floor, 0.0, seed=2)], 6, RECIPE.seed, shares=[2, 1], **how)
    steps, classes = 12, floor[0].classes  # three batches an epoch
    good = weights(train_classifier(make(), RECIPE, classes, steps))
    for stop in range(1, steps):
        kept = Checkpoints(tmp_path / f"{stop}")

        def until(it, *_, n=stop):
            for i in it:
                if i == n:
                    raise KeyboardInterrupt
                yield i

        with pytest.raises(KeyboardInterrupt):
            train_classifier(make(), RECIPE, classes, steps, checkpoints=kept, track=until, every=1)
        assert weights(train_classifier(make(), RECIPE, classes, steps, checkpoints=kept, every=1)) == good


def test_a_small_factor_still_replaces_an_image(floor):
    """A hundredth of forty images is less than half of one."""
    source = Recycled([member(floor)], 40, RECIPE.seed, factor=0.01)
    before = source.epoch(0)[0].clone()
    changed = (source.epoch(1)[0] != before).flatten(1).any(1)
    assert 0 < changed.sum() <= len(source.labels.unique())


def test_the_first_generation_is_the_filtered_set(floor):
    m = member(floor, 0.8)
    rows, _ = accept(Pool(m.g, m.scores, m.seed, m.dials), m.rule, 20, m.draws)
    want, y = images_at(m.g, rows, m.seed, m.dials)
    got, labels = Recycled([m], 20, 0).epoch(0)
    assert torch.equal(labels, y) and torch.equal(got, want)


def test_no_candidate_is_used_twice_and_totals_are_exact(floor):
    source = Recycled([member(floor), member(floor, 0.9, draws=2, seed=5)], 7, 0, shares=[0.4, 0.6])
    sets = [source.epoch(e)[0].clone() for e in range(4)]
    assert len(torch.unique(torch.cat(sets).flatten(1), dim=0)) == 4 * 70
    assert all(np.bincount(source.member[source.labels.numpy() == c], minlength=2).tolist() in ([3, 4], [2, 5]) for c in range(10))


def test_a_set_that_is_left_early_is_built_anew(floor):
    source = Recycled([member(floor)], 6, 0)
    feed = source.batches(epoch_order(0, 0, 60), 16, 0, 0)
    next(feed), feed.close()  # new images were moving in already
    assert torch.equal(source.epoch(0)[0], Recycled([member(floor)], 6, 0).epoch(0)[0])


def test_new_images_move_in_while_the_old_ones_are_used(floor):
    """The generator must have been at work before the epoch ends, and only where the epoch has been."""
    seen = []

    class Slow(Generator):
        trained, classes, shape, dials = [0], ["a"], (1, 2, 2), {}

        def sample(self, labels, index, *, seed=0, **dials):
            seen.append((threading.current_thread() is threading.main_thread(), int(index[0])))
            return torch.full((len(index), 1, 2, 2), int(index[0]) // 128, dtype=torch.uint8)

    source = Recycled([Member(Slow())], 256, 0)
    feed = source.batches(order := epoch_order(0, 0, 256), 64, 0, 0)
    for _ in range(3):
        x, _ = next(feed)
        assert (x <= 1).all()  # generation 0 is candidates 0 to 255
    for _ in range(200):
        if (source.images[order[:128]] >= 2).all():
            break
        time.sleep(0.02)
    assert (source.images[order[:128]] >= 2).all() and (source.images[order[192:]] <= 1).all()
    assert not any(main for main, _ in seen)
    feed.close()


def test_a_class_that_is_never_believed_ends_as_was_asked(floor):
    for short in ("likeliest", "any"):
        m = member(floor, 0.999, short=short, draws=2)
        assert len(list(stream_class(m, 3, 0, 10, tally := {}))) == 10 and tally["fallback"] > 0
    with pytest.raises(RuntimeError, match="class 3: .* images are lacking"):
        list(stream_class(member(floor, 0.999, short="stop", draws=2), 3, 0, 10, {}))


def test_what_cannot_be_recycled_is_refused(floor):
    g, judge, train = floor
    small = ImageSet(train.images[:, :, :4, :4], train.labels, train.classes)
    for bad, why in (([member(floor), Member(small)], "one size"), ([member(floor)], "shares")):
        with pytest.raises(SettingError, match=why):
            Recycled(bad, 4, 0, shares=[1, 1])
    for shares in ([0, 0], [-1, 2], [float("nan"), 1]):
        with pytest.raises(SettingError, match="not all 0"):
            share_out(5, shares)


def test_rules_depend_on_nothing_but_the_candidate_and_its_window(floor):
    g, judge, train = floor
    scores = Scores(judge, [judge], judge.features(train.images))
    for name in RULES:
        a, b = [Pool(g, scores, 0, dict(std=1.3), chunk) for chunk in (128, 512)]
        rule = keep_rule(name, 0.4)
        assert torch.equal(a.kept(4, 0, 512, rule), torch.cat([b.kept(4, i, i + 128, rule) for i in range(0, 512, 128)]))
        assert 0 < a.kept(4, 0, 512, rule).float().mean() <= 1
    pool = Pool(g, scores, 0, {})
    per_window = pool.kept(4, 0, 512, keep_rule("best_share", 0.25)).view(-1, 128).sum(1)
    assert per_window.tolist() == [32] * 4


# ---- the search


class Ledger:
    """A searcher whose answers are computed, not trained: it notes what was asked."""

    def __init__(self, cfg, ckpts=("best", "100")):
        self.cfg, self.ckpts, self.asked = cfg, dict.fromkeys(ckpts, ""), []
        self.generator = lambda ckpt: type("G", (), dict(dials=dict(std=1.0)))

    def worth(self, s):
        self.asked.append((*s.values(),))
        return 0.5 * (s["ckpt"] == "100") - abs(s["std"] - 1.3) - abs(s["tau"] - 0.4)


def test_the_published_search_walks_the_published_grids():
    cfg = resolve(SearchConfig, preset_of(SEARCH_PRESETS, "gafi"))
    best = published_search(s := Ledger(cfg, [str(e) for e in range(150, 501, 10)][:-1] + ["100"]))
    assert len(s.asked) == 36 + 21 + 10 and cfg.share == 1.0
    assert best == dict(ckpt="100", std=1.3, rule="confident", tau=0.4)
    assert all(a[1:] == (1.0, "confident", 0.0) for a in s.asked[:36])  # checkpoints at std 1, threshold 0
    alone = published_search(s := Ledger(resolve(SearchConfig, SEARCH_PRESETS["gafi"], dict(only=["tau"]))))
    assert len(s.asked) == 10 and alone["ckpt"] == "best" and alone["tau"] == 0.4  # a step on its own
    later = published_search(s := Ledger(resolve(SearchConfig, SEARCH_PRESETS["gafi"], dict(only=["tau"], ckpts=["100"], stds=[1.3])), ["100"]))
    assert later == dict(ckpt="100", std=1.3, rule="confident", tau=0.4) and {a[1] for a in s.asked} == {1.3}  # where another has ended


def test_a_published_search_that_is_interrupted_trains_nothing_twice(tiny_copy, monkeypatch):
    """Stopped in the middle of its third training: the same winner, and as many trainings as settings in all."""
    inputs = dict(generator="gan-seed0", classifier="classifier")
    cfg = resolve(SearchConfig, dict(method="published", per_class=10, draws=2, share=0.2, stds=[1.0, 1.3], taus=[0.0, 0.5]))
    done: list = []

    def counted(source, recipe, *args, stop=None, **more):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(recipe)
        return train_classifier(source, recipe, *args, **more)

    monkeypatch.setattr("synthlit.filter.train_classifier", lambda *a, **k: counted(*a, stop=2, **k))
    stage = open_stage("search", cfg, tiny_copy, "broken", inputs)
    with pytest.raises(KeyboardInterrupt):
        run_search(stage)
    assert len(load_table(stage.dir / "ledger.parquet")) == 2
    stage.lock.release()
    monkeypatch.setattr("synthlit.filter.train_classifier", counted)
    again = run_search(open_stage("search", cfg, tiny_copy, "broken", inputs))
    assert len(done) == again["trials"] == 3  # checkpoint, std 1.3, threshold 0.5: what was met before is looked up
    whole = run_search(open_stage("search", cfg, tiny_copy, "whole", inputs))
    assert {k: v for k, v in whole.items()} == again


def test_shares_count_by_their_ratios():
    assert share_out(10, [2, 2]) == share_out(10, [0.5, 0.5]) == [5, 5]


def test_the_fast_search_looks_at_few_places_and_the_same_each_time():
    """All places where there are no more than may be looked at; else the last checkpoint with the middle spread, then where the Gaussian process says."""
    grids = dict(ckpt=[str(i) for i in range(12)], std=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0])

    loss = lambda p, t: 1 - 0.01 * int(p["ckpt"]) + (p["std"] - 1.25 - 0.2 * t) ** 2 + 0.1 * abs(t - 0.4)
    look = lambda p: [dict(p, tau=t, val_loss=loss(p, t)) for t in (0.0, 0.4)]

    def searched(most, seed=1, grids=grids):
        asked = [*proposed(grids, most, seed, look)]
        return [(p["ckpt"], p["std"]) for p in asked], min((r for p in asked for r in look(p)), key=lambda r: r["val_loss"])

    every, best = searched(96)
    assert len({*every}) == len(every) == 96
    asked, found = searched(16)
    assert asked == searched(16)[0] != searched(16, 2)[0] and asked[0] == ("11", 1.4) and 10 <= len({*asked}) == len(asked) <= 16
    few = dict(ckpt=["1", "2", "3"], std=[1.0, 1.2, 1.4])
    assert len({*searched(8, grids=few)[0]}) == len(searched(8, grids=few)[0]) >= 4  # a place that is proposed again is no new one
    assert found["ckpt"] == "11" and found["tau"] == 0.4 and found["val_loss"] - best["val_loss"] < 0.005


def test_a_search_that_was_killed_repeats_no_trial(tiny_copy):
    """The folder of a finished search with its last place and all that followed taken away: the same ledger, the same choice."""
    folder = tiny_copy / "search"
    ledger, result, before = load_table(folder / "ledger.parquet").to_pylist(), load_json(folder / "result.json"), load_json(folder / "manifest.json")
    first = {p.name: p.stat().st_mtime_ns for p in (folder / "trials").glob("*")}
    last = [r for r in ledger if (r["ckpt"], r["std"]) == (ledger[-1]["ckpt"], ledger[-1]["std"])]
    assert 0 < len(last) < len(ledger)
    save_table(folder / "ledger.parquet", ledger[: -len(last)])
    for gone in ("manifest.json", "result.json", "accepted.parquet", *[f"trials/{r['trial']}.safetensors" for r in last]):
        (folder / gone).unlink()
    assert main(["run", str(tiny_copy / "params.yaml"), "--out", str(tiny_copy), "--only", "search"]) == 0
    assert load_table(folder / "ledger.parquet").to_pylist() == ledger and load_json(folder / "result.json") == result
    assert load_json(folder / "manifest.json")["digest"] == before["digest"]
    again = {p.name for p in (folder / "trials").glob("*") if first[p.name] != p.stat().st_mtime_ns}
    assert again == {f"{r['trial']}.safetensors" for r in last}


def test_one_place_serves_all_rules_and_thresholds(tiny_copy):
    """What a ridge learned from is what the stage would accept with the setting; its pool is drawn once; what it says of val is in the ledger."""
    inputs = dict(generator="gan-seed0", classifier="classifier")
    cfg = resolve(SearchConfig, dict(per_class=20, draws=2, stds=[1.4], rules=["confident", "best_share"], taus=[0.0, 0.6]))
    s = Searcher(stage := open_stage("search", cfg, tiny_copy, "other", inputs))
    ridges, place = Ridges(s), dict(ckpt="best", std=1.4)
    rows = ridges.at(place)
    assert [(r["rule"], r["tau"]) for r in rows] == [("confident", 0.0), ("confident", 0.6), ("best_share", 0.6)]
    price = load_json(stage.dir / "times.json")
    assert [*price] == [rows[0]["trial"]] and 200 <= price[rows[0]["trial"]]["drawn"] <= 10 * 128
    assert Ridges(Searcher(stage)).at(place) == rows and load_table(stage.dir / "ledger.parquet").to_pylist() == rows  # from the ledger
    for r in rows:
        accepted, _ = accept(Pool(s.generator("best"), s.scores(r["rule"]), cfg.seed, dict(std=1.4)), keep_rule(r["rule"], r["tau"]), 20, 2)
        x, y = images_at(s.generator("best"), accepted, cfg.seed, dict(std=1.4))
        again = ridge(ridges.middle(x).half(), y, 10)
        np.testing.assert_allclose(load_tensors(stage.dir / "trials" / f"{r['trial']}.safetensors")[0]["weight"], again["weight"], atol=1e-4)
        assert ridge_accuracy(again, ridges.features, s.val.labels) == pytest.approx(r["val_accuracy"], abs=0.01)
    stage.finish({})
    assert trial_accuracies(stage.dir, rows, s.val, stage.machine) == {r["trial"]: r["val_accuracy"] for r in rows}


def test_the_middle_layer_of_any_network():
    """The last map but one, at most 3x3 and at most 4096 wide; the last vector where a body makes fewer than two maps."""
    x = torch.zeros(1, 3, 32, 32)
    for name, width, shape in (("small", 8, (16, 8, 8)), ("fast", 8, (32, 4, 4)), ("resnet20", 8, (32, 8, 8)), ("resnet18", 8, (64, 4, 4))):
        seen: list = []
        net = build_net(name, 3, 4, width).eval()
        middle_of(net, x)[0].register_forward_hook(lambda m, a, out, seen=seen: seen.append(tuple(out.shape[1:])))
        net(x)
        assert seen == [shape], name
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    assert middle_of(flat, torch.zeros(1, 3, 4, 4)) is None
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    wide = Classifier(build_net("resnet18", 3, 4, 128), list("abcd"), (3, 32, 32), ClassifierConfig(), CPU)
    assert Middle(wide)(images).shape == (6, 1024 * 4)
    narrow = Classifier(build_net("fast", 3, 4, 8), list("abcd"), (3, 32, 32), ClassifierConfig(), CPU)
    assert Middle(narrow)(images).shape == (6, 32 * 9)
    assert torch.equal(Middle(narrow)(images)[:2], Middle(narrow)(images[:2]))


def test_fixed_sets_can_be_left_out(tiny_copy):
    """Half of an evaluation's price where only sets that change matter; sets as they were generated have no such form and stay."""
    rows = {}
    for fixed in (True, False):
        s = open_stage("evaluate", resolve(EvaluateConfig, dict(fixed=fixed, recycle=5)), tiny_copy, f"fixed-{fixed}")
        train, classifier = load_split(tiny_copy / "splits", "train"), load_classifier(tiny_copy / "classifier")
        rows[fixed] = {k: r.kind for k, r in {**sources_of(s, train), **recycled_rows(s, train, classifier, 100)}.items()}
    left_out = rows[True].keys() - rows[False].keys()
    assert rows[False].items() < rows[True].items() and "mixture" in left_out and {rows[True][k] for k in left_out} == {"filtered", "mixture"}
    assert {"floor", "synthetic", "filtered", "mixture"} == {*rows[False].values()}
    with pytest.raises(SettingError, match="evaluate.recycle"):
        resolve(EvaluateConfig, dict(fixed=False)).check({})


def test_shares_that_are_given_are_kept(tiny_copy):
    """One mixture, no other is tried; a set without a share is not in it, one that is not there is named."""
    sets = ("filter-seed0", "filter-seed1")

    def mix_of(name, *shares, **how):
        inputs = dict(accepted=[*sets], classifier="classifier")
        small_stage(tiny_copy, "multigen", name, inputs, per_class=20, proxy=0.02, shares=dict(zip(sets, shares)), **how)
        return load_json(tiny_copy / name / "result.json")

    r = mix_of("uneven", 0.75, 0.25)
    rows = load_table(tiny_copy / "uneven" / "mixture.parquet").to_pydict()
    assert r["chosen"] == "given" and len(r["trials"]) == 1 and rows["source"].count("filter-seed0") == 150 and len(rows["label"]) == 200
    r = mix_of("one", 0.0, 1.0, at_least=1)
    assert r["sources"] == ["filter-seed1"] and r["shares"] == {"filter-seed1": 1.0}
    with pytest.raises(SettingError, match="no filtered set is called 'filter-sed0'"):
        with_typo = dict(accepted=["filter-seed0", "filter-seed1"], classifier="classifier")
        small_stage(tiny_copy, "multigen", "typo", with_typo, per_class=20, shares={"filter-sed0": 0.5, "filter-seed1": 0.5})


def test_checkpoints_that_were_not_kept_are_named(tiny_run):
    with pytest.raises(SettingError, match="kept no generator '500', only best, last"):
        kept_checkpoints(tiny_run.run / "gan-seed0", ["best", "500"])


def test_all_checkpoints_stand_in_the_order_of_their_steps(tmp_path):
    """The best among them at its step, or not at all where it is one of them."""
    for step in ("20", "100"):
        save_tensors(tmp_path / "steps" / step.zfill(9) / "generator.safetensors", {})
    for best, names in (("60", ["20", "best", "100"]), ("100", ["20", "100"]), ("5", ["best", "20", "100"])):
        save_json(tmp_path / "result.json", dict(best_step=int(best)))
        assert [*kept_checkpoints(tmp_path, ["all"])] == names


def test_a_stage_s_member_makes_what_the_stage_accepted(tiny_run):
    from synthlit.classifier import load_classifier
    from synthlit.filter import load_accepted

    train = load_split(tiny_run.run / "splits", "train")
    for name in ("search", "filter-seed0"):
        g, rows, r = load_accepted(tiny_run.run / name)
        m = load_member(tiny_run.run / name, load_classifier(tiny_run.run / "classifier"), train)
        want, y = images_at(g, rows, r["seed"], r["dials"])
        got, labels = Recycled([m], r["per_class"], 0).epoch(0)
        assert torch.equal(got, want) and torch.equal(labels, y)


def test_recycled_rows_are_in_the_table(tiny_run):
    rows = {r["row"]: r for r in load_json(tiny_run.run / "evaluate" / "result.json")["table"]}
    assert {"mixture", "mixture, recycled", "filtered, recycled (search)", "filtered, recycled (filter-seed0)"} <= set(rows)
    assert len(list((tiny_run.run / "evaluate" / "classifiers").glob("*"))) == len(load_table(tiny_run.run / "evaluate" / "scores.parquet"))


def test_a_recycled_evaluation_with_a_teacher_and_real_images(tiny_copy):
    """Also the published protocol: of the real row and the mixture the best epoch by test, kept until test is open and no longer."""
    more = dict(teacher=True, real_share=0.3, published=True)
    small_stage(
        tiny_copy, "evaluate", "more", dict(classifier="classifier", set=[], accepted=[], mixture=["multigen"]), seeds=[0], n_measure=50, **more
    )
    rows = {r["row"]: r for r in load_json(tiny_copy / "more" / "result.json")["table"]}
    assert rows["mixture, taught"]["kind"] == "taught" and rows["mixture, 30% real"]["kind"] == "with-real"
    assert {k for k, r in rows.items() if "published_test" in r} == {"real", "mixture"} and not (
        tiny_copy / "more" / "checkpoints" / "epochs"
    ).exists()
    assert all(rows[k]["published_test"] >= rows[k]["test"] for k in ("real", "mixture"))
    assert rows["mixture"]["published_gap"] == rows["real"]["published_test"] - rows["mixture"]["published_test"]


def test_the_price_of_a_row(tiny_run):
    """A set drawn anew costs more than a fixed one, a filtered one more than a plain one, by what is drawn and looked at."""
    rows = {r["row"]: r for r in load_json(tiny_run.run / "evaluate" / "result.json")["table"]}
    judge, r = load_classifier(tiny_run.run / "classifier"), load_json(tiny_run.run / "filter-seed0" / "result.json")
    g, steps = load_generator(tiny_run.run / "gan-seed0"), load_json(tiny_run.run / "evaluate" / "result.json")["steps"]
    training = 3 * judge.flops * steps * judge.recipe.batch
    seen = sum(s["candidates"] for s in r["stats"])
    assert rows["real"]["flops"] == training and rows["real"]["choice_flops"] == 0
    assert rows["filtered (filter-seed0)"]["flops"] == training + seen * (g.flops + judge.flops) and g.flops > 0
    assert rows["filtered, recycled (filter-seed0)"]["flops"] > rows["filtered (filter-seed0)"]["flops"]
    assert rows["mixture"]["choice_flops"] > rows["filtered (filter-seed0)"]["choice_flops"] > 0


def test_taking_turns_is_a_setting_of_the_evaluation(tiny_copy):
    train, classifier = load_split(tiny_copy / "splits", "train"), load_classifier(tiny_copy / "classifier")
    for turns in (False, True):
        s = open_stage("evaluate", resolve(EvaluateConfig, dict(recycle=1, one_per_epoch=turns)), tiny_copy, f"turns-{turns}")
        source = recycled_rows(s, train, classifier, 100)["mixture, recycled"].make()(0)
        assert source.one is turns and len(source.members) > 1


def test_shares_are_learned_in_a_stage(tiny_copy):
    """All alike first, then one share doubled or halved at a time; what has won is what the mixture is made of."""
    small_stage(tiny_copy, "multigen", "learned", dict(classifier="classifier"), candidates="learned", per_class=20, proxy=0.02)
    r, ledger = load_json(tiny_copy / "learned" / "result.json"), load_table(tiny_copy / "learned" / "ledger.parquet").to_pylist()
    assert ledger[0]["trial"] == "all" and len(ledger) > 2 and r["chosen"] in {t["trial"] for t in ledger}
    assert r["val_accuracy"] == max(t["val_accuracy"] for t in ledger if t["generators"] > 1) >= ledger[0]["val_accuracy"]
    source = load_table(tiny_copy / "learned" / "mixture.parquet")["source"].to_pylist()
    whole = sum(r["shares"].values())
    assert all(abs(source.count(k) / len(source) - v / whole) < 0.05 for k, v in r["shares"].items())
