"""Few-shot fine-tuning: exactly what a mode names changes, base classes stay, pools share nothing, runs resume to the same bits, refusals come first."""

import itertools
import json
import os
import re
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from synthlit.classifier import load_classifier
from synthlit.core import (
    Checkpoints,
    History,
    SettingError,
    digest,
    load_json,
    load_tensors,
    read_manifest,
    resolve,
    run_machine,
    save_json,
    small_stage,
)
from synthlit.fewshot import (
    FEWSHOT_PRESETS,
    FewshotConfig,
    NovelWatch,
    WithPool,
    adapt,
    check_source,
    check_tables,
    keep_rows,
    names_of,
    unlabelled_images,
)
from synthlit.gan.film import of_kind
from synthlit.gan.models import DCGenerator, build_gan
from synthlit.gan.train import GanConfig, Watcher, across, as_generator, gan_step, judge, new_batches, train_gan
from synthlit.generator import load_generator
from synthlit.plan import plan, preflight, read_params
from synthlit.splits import SplitsConfig, data_facts, load_split, supports_of

TOP = Path(__file__).parents[1]
MACHINE = dict(device="cpu", threads=1, channels_last=False)
MODES = ("embed", "linear", "all")
FILM = dict(network="film", width_g=16, width_d=4, z=8, pack=1, info=1.0, g_first=True, batch=16)
PAIR = dict(network="pair", width_g=8, width_d=8, z=8, pack=2, batch=16)


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """Splits, a classifier of the base classes, and two GANs of them that were trained for a moment."""
    folder = tmp_path_factory.mktemp("fewshot") / "run"
    run_machine(folder, device="cpu", threads=1, channels_last=False)
    small_stage(folder, "splits")
    small_stage(folder, "classifier", classes="base", epochs=2)
    for name, settings in (("film", FILM), ("small", PAIR)):
        small_stage(folder, "gan", name, classes="base", **settings, steps=4, eval_every=4, n_eval=10)
    return folder


@pytest.fixture(scope="module")
def parts(run):
    """train, val, fewshot.json and the classifier of the run."""
    train, val = [load_split(run / "splits", p) for p in ("train", "val")]
    return SimpleNamespace(train=train, val=val, fs=load_json(run / "splits" / "fewshot.json"), classifier=load_classifier(run / "classifier"))


def asked(**settings):
    return resolve(FewshotConfig, dict(steps=4, batch=16, eval_every=4, n_eval=5, weight_decay=0.1, optimizer="adamw"), settings)


def begun(run, parts, gan, cfg):
    """(state ready to train, its batches)."""
    s = adapt(run / gan, cfg, (1, 8, 8), 10, parts.fs["novel"], MACHINE)
    supports = parts.train.take(supports_of(parts.fs, cfg.k))
    batches, pool = new_batches(s.cfg, supports, parts.fs["novel"], cfg.batch, "cpu"), unlabelled_images(cfg, parts.fs, parts.train, parts.val)
    return s, WithPool(batches, pool, cfg.batch, cfg.seed) if pool else batches


def state_of(net) -> dict:
    return {k: v.clone() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("gan", ["film", "small"])
@pytest.mark.parametrize("mode_g, mode_d", list(itertools.product(MODES, MODES)))
def test_exactly_what_the_modes_name_changes(run, parts, gan, mode_g, mode_d):
    """Table 4.5: all other numbers are bit-identical, statistics of batch norms and vectors of frozen spectral norms among them; base rows too."""
    cfg = asked(mode_g=mode_g, mode_d=mode_d)
    s, batches = begun(run, parts, gan, cfg)
    before = [state_of(net) for net in (s.G, s.D)]
    for i in range(3):
        gan_step(s, batches, i, 4)
        judge(s, new_batches(s.cfg, parts.val, parts.fs["novel"], 16, "cpu", True), s.E)  # a look in between changes nothing
    for net, old, mode in ((s.G, before[0], mode_g), (s.D, before[1], mode_d)):
        named, now = set(names_of(net, mode)), net.state_dict()
        changed = {k for k in old if not torch.equal(old[k], now[k])}
        vectors = {k for k in changed if k.split(".")[-1] in ("_u", "_v")}
        assert changed - vectors - (set(old) if mode == "all" else set()) <= named
        assert all(k.rsplit(".", 2)[0] + ".original" in named for k in vectors)
        assert {k for k in named if "embed" in k} <= changed and (mode == "embed" or changed - {k for k in named if "embed" in k})
        tables = [k for k in names_of(net, "embed") if mode == "embed"]
        for k in tables:
            assert torch.equal(old[k][parts.fs["base"]], now[k][parts.fs["base"]]) and (old[k] != now[k]).any(1)[parts.fs["novel"]].all()


def test_linear_is_embeddings_film_linears_and_heads(run, parts):
    s, batches = begun(run, parts, "film", asked(mode_g="linear", mode_d="linear"))
    g, d = state_of(s.G), state_of(s.D)
    gan_step(s, batches, 0, 4)
    changed = {k for old, net in ((g, s.G), (d, s.D)) for k in old if not torch.equal(old[k], net.state_dict()[k])}
    assert {k.split(".")[0] for k in changed} == {"blocks", "embed", "psi", "phi", "info"}
    assert {k.split(".")[2] for k in changed if k.startswith("blocks")} == {"embed", "film"}


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("gan", ["film", "small"])
def test_the_published_decay_pulls_all_rows(run, parts, gan, optimizer):
    """By name only: in the reference the base classes' rows decay in embed mode, too. Moments of rows without a gradient stay zero otherwise."""
    base, moved = parts.fs["base"], {}
    for decay in ("rows", "published"):
        s, batches = begun(run, parts, gan, asked(decay=decay, optimizer=optimizer))
        old = {k: v for k, v in state_of(s.G).items() if k in names_of(s.G, "embed")}
        for i in range(2):
            gan_step(s, batches, i, 4)
        moved[decay] = [bool((old[k][base] != s.G.state_dict()[k][base]).any()) for k in old]
        if decay == "rows":
            assert all(not m[base].any() and m[parts.fs["novel"]].any() for t in s.opt_g.state.values() for m in (t["exp_avg"], t["exp_avg_sq"]))
    assert not any(moved["rows"]) and all(moved["published"])


@pytest.mark.parametrize("gan", ["film", "small"])
def test_embed_leaves_base_images_as_they_were(run, parts, gan):
    s, batches = begun(run, parts, gan, asked(mode_d="all", lr_g=0.01))
    before = load_generator(run / gan / "last")
    for i in range(4):
        gan_step(s, batches, i, 4)
    after = as_generator(s, parts.val, list(range(10)))
    y, i = torch.tensor(parts.fs["base"]).repeat(6), torch.arange(6).repeat_interleave(7)
    assert torch.equal(before.sample(y, i, seed=3), after.sample(y, i, seed=3))
    s.E.load_state_dict(s.G.state_dict())
    assert torch.equal(before.sample(y, i, seed=3), as_generator(s, parts.val, list(range(10))).sample(y, i, seed=3))


@pytest.mark.parametrize("network", ["biggan", "biggan_deep"])
def test_a_spectral_norm_over_a_table_moves_no_other_rows(network):
    """Its scale is of all rows, and so is the gradient through it."""
    for kept in (False, True):
        _, D = build_gan(network, (1, 32, 32), 10, 8, 8, 16)
        table = of_kind(D, torch.nn.Embedding)[0]
        if kept:
            keep_rows([table], [7, 8, 9])
        D(torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([7, 7, 8, 8])).square().sum().backward()
        assert bool(table.grad[:7].any()) != kept and table.grad[7:9].any()


def test_the_optimisers_begin_anew_with_their_own_settings(run, parts):
    s, _ = begun(run, parts, "film", asked(beta1=0.9, beta2=0.91, eps=1e-7, lr_g=0.02, mode_g="linear", ema=0.5, augment="shift", augment_p=0.3))
    tables, rest = s.opt_g.param_groups
    assert (tables["betas"], tables["eps"], tables["lr"], tables["weight_decay"], tables["rows"]) == ((0.9, 0.91), 1e-7, 0.02, 0.0, 0.1)
    assert rest["weight_decay"] == 0.1 and "rows" not in rest and not s.opt_g.state and isinstance(s.opt_g, torch.optim.AdamW)
    assert (s.cfg.ema, s.cfg.augment, s.cfg.augment_p, s.cfg.info) == (0.5, "shift", 0.3, 1.0)
    p = resolve(FewshotConfig, FEWSHOT_PRESETS["published"])
    assert (p.mode_g, p.mode_d, p.beta2, p.weight_decay, p.decay, p.batch, p.lr_g) == ("linear", "embed", 0.9, 1e-6, "published", 32, 2e-4)


# ---- unlabelled images


def test_pools_share_nothing_unless_asked(run, parts, capsys):
    fs, train, val = parts.fs, parts.train, parts.val
    bytes_of = lambda s: {x.numpy().tobytes() for x in s.images}
    assert unlabelled_images(asked(), fs, train, val) is None and unlabelled_images(asked(pool="apart"), fs, train, val) is None
    apart = unlabelled_images(asked(pool="apart", alpha=1.0), fs, train, val)
    assert set(apart.labels.tolist()) == set(fs["novel"]) and len(apart) > 200
    assert not bytes_of(apart) & (bytes_of(train.take(fs["supports"])) | bytes_of(val)) and not set(fs["pool"]) & set(fs["supports"])
    assert not capsys.readouterr().out
    same = unlabelled_images(asked(pool="published", alpha=1.0), fs, train, val)
    assert same.digest == val.only(fs["novel"]).digest and "choose the best step" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="shares images"):
        unlabelled_images(asked(pool="apart", alpha=1.0), dict(fs, pool=fs["supports"]), train, val)


def test_unlabelled_batches_are_addressed(run, parts):
    cfg = asked(pool="apart", alpha=0.5)
    s, batches = begun(run, parts, "film", cfg)
    again = begun(run, parts, "film", cfg)[1]
    x, y, u = batches(7)
    assert x.shape == u.shape and set(y.tolist()) <= set(parts.fs["novel"]) and torch.equal(u, again(7)[2]) and not torch.equal(u, batches(8)[2])
    pool = {i.numpy().tobytes() for i in parts.train.take(parts.fs["pool"]).images}
    assert {i.numpy().tobytes() for i in u} <= pool and not {i.numpy().tobytes() for i in x} & pool


def folder_of(path):
    return SimpleNamespace(
        dir=path,
        checkpoints=Checkpoints(path / "checkpoints"),
        history=History(path / "history.parquet"),
        track=lambda items, *a: items,
        device="cpu",
    )


def bits(s) -> str:
    """Digest of all that a step changes, moments included."""
    flat = [t for k, part in s.parts().items() if not k.startswith("opt") for t in part.state_dict().values()]
    return digest(*flat, *[t for k in ("opt_g", "opt_d") for m in s.parts()[k].state_dict()["state"].values() for t in m.values()])


def trained(run, parts, path, cfg, pressed=lambda number: None):
    s, batches = begun(run, parts, "film", cfg)
    stage, every = folder_of(path), list(range(10))
    watch = NovelWatch(parts.val, parts.classifier, parts.fs["novel"], 5, parts.train.take(parts.fs["supports"]))
    train_gan(
        s,
        lambda n: (pressed(n), batches(n))[1],
        cfg.steps,
        stage,
        Watcher(stage, s.cfg, parts.val, parts.classifier, every, parts.fs["novel"], watch),
    )
    return s


@pytest.mark.parametrize("mode_g, mode_d", [("embed", "linear"), ("all", "all")])
def test_stopped_after_every_step_it_ends_with_the_same_bits(run, parts, tmp_path, mode_g, mode_d):
    """With unlabelled images and evaluations in between; `linear` has modules that rest beside some that train."""
    cfg = asked(mode_g=mode_g, mode_d=mode_d, pool="apart", alpha=0.7, steps=5, eval_every=2)
    whole, stops, calls = bits(trained(run, parts, tmp_path / "whole", cfg)), 0, []

    def pressed(number):
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(number)

    for _ in range(8):
        calls.clear()
        try:
            trained(run, parts, tmp_path / "stopped", cfg, pressed)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 5 and bits(trained(run, parts, tmp_path / "stopped", cfg)) == whole
    one, other = [History(tmp_path / f / "history.parquet").rows for f in ("whole", "stopped")]
    assert [r["frechet"] for r in one if r["frechet"] is not None] == [r["frechet"] for r in other if r["frechet"] is not None]


# ---- the stage


@pytest.fixture(scope="module")
def stages(run):
    """Three fine-tunings: no pool, a pool of weight 0, val as the pool."""
    quick = dict(steps=4, batch=16, eval_every=2, n_eval=5)
    small_stage(run, "fewshot", "plain", {"generator": "film"}, **quick)
    small_stage(run, "fewshot", "off", {"generator": "film"}, **quick, pool="apart", alpha=0.0)
    small_stage(run, "fewshot", "apart", {"generator": "film"}, **quick, pool="apart", alpha=1.0, k=2)
    small_stage(run, "fewshot", "published", {"generator": "film"}, **quick, pool="published", alpha=1.0, mode_g="all", mode_d="all")
    return run


def test_packs_do_not_tell_which_images_are_unlabelled():
    """A labelled pack is of one class, one of the pool hardly ever: in the term without labels both go across the classes, and hold all images once."""
    y = torch.arange(5).repeat_interleave(4)
    packs = across(y, 2).view(-1, 2)
    assert (packs[:, 0] != packs[:, 1]).all() and torch.equal(packs.flatten().sort().values, y)


def test_a_weight_of_zero_is_no_pool(stages):
    last = {f: [load_tensors(stages / f / "last" / f"{n}.safetensors")[0] for n in ("generator", "discriminator")] for f in ("plain", "off", "apart")}
    assert digest(*[t for d in last["plain"] for t in d.values()]) == digest(*[t for d in last["off"] for t in d.values()])
    assert any(not torch.equal(last["plain"][1][k], last["apart"][1][k]) for k in last["plain"][1])
    rows = [[{k: v for k, v in r.items()} for r in History(stages / f / "history.parquet").rows] for f in ("plain", "off")]
    assert rows[0] == rows[1]


def test_what_was_seen_is_said(stages, parts):
    saw = {f: set(read_manifest(stages / f)["saw"]) for f in ("plain", "apart", "published")}
    assert parts.train.digest in saw["plain"] and parts.val.digest not in saw["plain"] | saw["apart"] and parts.val.digest in saw["published"]
    assert set(read_manifest(stages / "film")["saw"]) <= saw["plain"]
    m, r = read_manifest(stages / "published"), load_json(stages / "published" / "result.json")
    assert (m["settings"]["pool"], m["settings"]["mode_g"], r["base_gan"]) == ("published", "all", "film") and list(m["inputs"]["generator"]) == [
        "film"
    ]
    assert r["pool"] == len(parts.val.only(parts.fs["novel"])) and load_json(stages / "plain" / "result.json")["pool"] == 0
    assert load_json(stages / "apart" / "result.json")["k"] == 2 and load_json(stages / "apart" / "result.json")["n_train"] == 6


def test_measures_of_the_best_and_of_each_class(stages, parts):
    r, h = load_json(stages / "plain" / "result.json"), History(stages / "plain" / "history.parquet")
    for k in ("frechet", "frechet_supports", "precision", "recall", "density", "coverage", "variety"):
        assert len(h.column(k)[0]) == 3 and (k not in r or r[k] in h.column(k)[1])
    assert r["best_step"] == int(h.column("frechet")[0][h.column("frechet")[1].argmin()]) and "agreement" not in r  # a base classifier cannot say
    watch = NovelWatch(parts.val, parts.classifier, parts.fs["novel"], 5, parts.train.take(parts.fs["supports"]))
    best = load_generator(stages / "plain")
    assert watch(best)["frechet"] == r["frechet"] and watch.per_class(best) == r["per_class"] and best.trained == list(range(10))
    assert [c["label"] for c in r["per_class"]] == parts.fs["novel"] and all(
        c["images"] > 30 and c["frechet"] > 0 and "density" in c for c in r["per_class"]
    )
    assert r["base"]["before"] == r["base"]["after"] > 0
    assert (stages / "plain" / "last" / "generator.safetensors").exists() and (stages / "plain" / "film.png").exists()


def test_a_classifier_of_the_base_classes(run, parts):
    r = load_json(run / "classifier" / "result.json")
    assert r["trained"] == parts.fs["base"] and len(r["recall"]) == 7 and r["n_train"] == len(parts.train.only(parts.fs["base"]))
    c = parts.classifier
    assert c.net.head.out_features == 10 and c.recipe.classes == "base" and r["val_accuracy"] == c.accuracy(parts.val.only(parts.fs["base"]))
    assert not (c.logits(parts.val.images).argmax(1)[:, None] == torch.tensor(parts.fs["novel"])).any()  # it never learned to say a novel class
    small_stage(run, "classifier", "whole", epochs=1)
    assert load_json(run / "whole" / "result.json")["trained"] == list(range(10))
    small_stage(run, "fewshot", "judged", {"generator": "film", "classifier": "whole"}, steps=2, batch=16, eval_every=2, n_eval=5)
    assert 0 <= load_json(run / "judged" / "result.json")["agreement"] <= 1


# ---- bad input


FACTS = dict(data_facts(SplitsConfig()), pack=1)


@pytest.mark.parametrize(
    "settings, facts, words",
    [
        (dict(k=6), {}, ["fewshot.k = 6", "5 supports", "splits.k"]),
        (dict(alpha=1.0), {}, ["fewshot.alpha = 1.0", "no unlabelled images", "fewshot.pool"]),
        (dict(alpha=1.0, pool="apart"), dict(pool=0), ["fewshot.pool", "no unlabelled image", "splits.k"]),
        (
            dict(alpha=1.0, pool="apart"),
            data_facts(SplitsConfig(fewshot="published")),
            ["fewshot.pool", "pool = published", "splits.fewshot = disjoint"],
        ),
        (dict(batch=15), dict(pack=2), ["fewshot.batch = 15", "pack"]),
        (dict(), dict(gan=GanConfig()), ["gan.classes = base"]),
        (dict(alpha=1.0, pool="apart"), dict(gan=GanConfig(classes="base", loss="relativistic")), ["fewshot.alpha", "relativistic"]),
        (dict(alpha=1.0, pool="apart"), dict(gan=GanConfig(classes="base", loss_g="feature_matching")), ["fewshot.alpha", "feature matching"]),
        (dict(alpha=1.0, pool="apart"), dict(gan=GanConfig(classes="base", network="dcgan")), ["fewshot.alpha", "dcgan", "film"]),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_settings_that_cannot_be(settings, facts, words):
    with pytest.raises(SettingError) as e:
        resolve(FewshotConfig, settings).check(FACTS | facts)
    assert all(w in str(e.value) for w in words), str(e.value)


@pytest.mark.parametrize(
    "stages, words",
    [
        (dict(fewshot=dict(mode="embed")), ["fewshot", "unknown setting 'mode'", "mode_"]),
        (dict(fewshot=dict(mode_g="embeds")), ["mode_g = 'embeds'", "'embed'"]),
        (dict(fewshot=dict(k=[2, 9])), ["fewshot.k = 9", "5 supports"]),
        (dict(fewshot=dict(alpha=1)), ["fewshot.alpha", "fewshot.pool"]),
        (dict(fewshot=dict(alpha=1, pool="apart"), splits=dict(fewshot="published")), ["fewshot.pool", "splits.fewshot = disjoint"]),
        (dict(fewshot=dict(batch=15), base_gan=dict(stage="gan", classes="base", pack=2)), ["fewshot.batch = 15", "pack"]),
        (dict(splits=dict(k=500)), ["splits.k = 500", "smallest class"]),
        (dict(classifier=dict(classes="base", batch=1000)), ["classifier.batch = 1000", "base classes"]),
    ],
    ids=lambda x: json.dumps(x)[:60] if isinstance(x, dict) else "",
)
def test_refused_before_anything_runs(stages, words):
    chain = dict(splits={}, classifier={}, base_gan=dict(stage="gan", classes="base", pack=1), fewshot={}) | stages
    with pytest.raises(SettingError) as e:
        preflight(plan(read_params(dict(preset="tiny", stages=chain))))
    assert all(w in str(e.value) for w in words), str(e.value)


def facts_now(parts) -> dict:
    return dict(shape=(1, 8, 8), classes=10, names=parts.train.classes, novel_labels=parts.fs["novel"])


@pytest.mark.parametrize(
    "facts, words",
    [
        (dict(shape=(1, 16, 16)), ["shape (1, 8, 8)", "splits.size"]),
        (dict(classes=12, names=[str(i) for i in range(12)]), ["another label space", "10 classes", "12"]),
        (dict(names=list("abcdefghij")), ["another label space", "names and order"]),
        (dict(novel_labels=[0, 1, 2, 3, 4, 5, 6, 7, 8]), ["trained on novel classes", "splits.seed"]),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_generators_of_something_else(run, parts, facts, words):
    check_source(run / "film", facts_now(parts))
    with pytest.raises(SettingError) as e:
        check_source(run / "film", facts_now(parts) | facts)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_generators_that_cannot_be_adapted(run, stages, parts, tmp_path):
    with pytest.raises(SettingError, match="made by stage fewshot"):
        check_source(stages / "plain", facts_now(parts))
    shutil.copytree(run / "film", bare := tmp_path / "bare")
    (bare / "last" / "discriminator.safetensors").unlink()
    with pytest.raises(RuntimeError, match="no discriminator"):
        check_source(bare, facts_now(parts))
    with pytest.raises(SettingError, match="not class-conditional"):
        check_tables(nn.Sequential(nn.Linear(2, 2)), "generator")
    check_tables(DCGenerator(1, 8, 10, 4, 4), "generator")


def test_another_cut_of_the_same_data_is_refused(run, tmp_path):
    """The same data set with another seed: the base GAN has seen what is val, test or novel here."""
    from synthlit.core import open_stage

    run_machine(tmp_path, device="cpu", threads=1, channels_last=False)
    small_stage(tmp_path, "splits", seed=1)
    small_stage(tmp_path, "classifier", epochs=1)
    with pytest.raises(SettingError, match="contradicting splits"):
        open_stage("fewshot", asked(), tmp_path, inputs={"generator": str(run / "film")})
    assert not (tmp_path / "fewshot").exists()


def test_an_old_splits_folder_says_so(run, parts, tmp_path):
    fs = {k: v for k, v in parts.fs.items() if k != "pool"}
    save_json(tmp_path / "fewshot.json", fs)
    with pytest.raises(KeyError):
        unlabelled_images(asked(pool="apart", alpha=1.0), load_json(tmp_path / "fewshot.json"), parts.train, parts.val)


# ---- the published keys


KEYS = """load_strict epochs finetune save_every fid_every fid_N fid_pretrained semi_sup pretrained batch_size dataset name k_shot seed input_size pad_length
transform_kwargs optim lr beta1 beta2 weight_decay eps n_gen ngf_decoder blocks_per_res z_dim n_downsampling ndf alpha gamma augment_p d_finetune_mode
g_finetune_mode use_ema pretrain beta use_tanh pretrained_enc"""


KEYS_OF_CLASSIFICATION = """mode epochs pretrained n_samples_per_class dataset.k_shot dataset.transform_kwargs pad_length finetune.transform_kwargs batch_size
aug_batch_size N_fakeval use_mixup mixup.dist mixup.alpha mixup.mix_labels stdev ignore_dev_set bn_moving_avgs freeze_all_except lr beta1 beta2 weight_decay
optim.eps optim.step_size optim.gamma save_every validate_every ignore_k_shot_warning rnd"""


def table_rows(chapter: str) -> list:
    """(left, right) of the rows of a chapter's tables."""
    cells = json.loads((TOP / "nbs" / f"{chapter}.ipynb").read_text())["cells"]
    lines = [line for c in cells if c["cell_type"] == "markdown" for line in "".join(c["source"]).splitlines() if line.startswith("| ")]
    return [line.split("|")[1:3] for line in lines]


@pytest.mark.parametrize("chapter", ["04a_fewshot", "03b_gan_training"])
def test_published_keys_are_in_the_chapter(chapter):
    """Each key of the GAN's two stages stands in a left column, of fine-tuning with a name of ours or a reason."""
    rows = table_rows(chapter)
    assert not set(KEYS.split()) - {k for left, _ in rows for k in re.findall(r"`(\w+)`", left)} - {"model", "optim"}
    if chapter == "04a_fewshot":
        named = {n for left, right in rows for n in re.findall(r"`(\w+)`", right)}
        assert {f.name for f in fields(FewshotConfig)} - named == {"init"}  # the one that is ours alone


def test_published_keys_of_classification_are_in_the_chapter():
    """Each key of stage 3 stands in a left column of 08b1 with something on its right."""
    left = {k for a, b in table_rows("08b1_fewshot_classify") if b.strip() for k in re.findall(r"`([\w.]+)`", a)}
    assert not set(KEYS_OF_CLASSIFICATION.split()) - left - {k.rpartition(".")[2] for k in left}
