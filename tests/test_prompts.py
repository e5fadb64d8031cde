"""Prompts: names, the grammar, language models, the file, the stage; image-text models and the published filter."""

import json

import numpy as np
import pytest
import torch

from synthlit import imagetext as I
from synthlit import prompts as P
from synthlit.conditions import class_prompts
from synthlit.core import SettingError, load_json, resolve, rng, small_stage, stage_parts
from synthlit.data import DataError
from synthlit.filter import Pool, Scores, accept, keep_rule
from synthlit.generator import fit_floor
from synthlit.splits import load_split

pytestmark = pytest.mark.usefixtures("no_network")
CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """A random language model of each kind."""
    place = tmp_path_factory.mktemp("writers")
    return {kind: P.random_writer(place / kind, [*CLASSES, "a photo of"], kind) for kind in P.ASK}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return I.random_image_text(tmp_path_factory.mktemp("clip") / "clip", [*CLASSES, "a photo of a"], 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    small_stage(folder, "splits")
    return folder


# --- names


@pytest.mark.parametrize(
    "classes, names, text",
    [
        (["cat", "dog", "cat"], {}, r"classes 0 \(cat\) and 2 \(cat\)"),
        (["cat", "Cat"], {}, "both called"),
        (["crane_bird", "crane"], dict(crane_bird="crane"), "both called"),
        (["cat", ""], {}, "class 1 .* empty name"),
        (["cat", "_"], {}, "empty name"),
        (["cat"], dict(cta="x"), "no class; did you mean 'cat'"),
    ],
)
def test_bad_names(classes, names, text):
    with pytest.raises(SettingError, match=text):
        P.names_of(classes, names)


def test_names_become_words():
    row = P.prompt_data()["sets"]["eurosat"]["names"]
    assert P.names_of(["SeaLake", "AnnualCrop"], {}, row) == ["a lake or sea", "annual crop land"]
    assert P.names_of(["SeaLake"], dict(SeaLake="the sea"), row) == ["the sea"]
    assert P.say("{a} and {class}", "an owl") == "an owl and owl"
    assert not P.holds("scattered", "cat") and P.holds("Cats.", "cat") and P.holds("a Sea  Lake", "Sea Lake")


# --- grammar


@pytest.mark.parametrize("domain", P.prompt_data()["grammar"])
def test_grammar_never_repeats(domain):
    n = P.grammar_size(domain)
    every = P.from_grammar("oak tree", n, domain)
    assert len({P.sentence_key(s) for s in every}) == n and all(P.holds(s, "oak tree") for s in every)
    with pytest.raises(SettingError, match="smaller prompts.n"):
        P.from_grammar("oak tree", n + 1, domain)
    assert n >= 200 and not any("{" in s or "  " in s or s != s.strip() for s in every)


def test_grammar_has_addresses():
    some = P.from_grammar("cat", 50)
    assert P.from_grammar("cat", 10) == some[:10]
    assert P.from_grammar("cat", 10, seed=1) != some[:10]
    assert [s.replace("dog", "cat") for s in P.from_grammar("dog", 10)] != some[:10]


def test_every_templates_row_is_whole():
    data = P.prompt_data()
    for row in data["sets"].values():
        assert row["source"] and row["domain"] in data["grammar"] and all("{class}" in t or "{a}" in t for t in row["templates"])


# --- language models


@pytest.mark.parametrize("kind", P.ASK)
def test_models_of_each_kind(writers, kind):
    cfg = P.PromptsConfig(source="model", model=str(writers[kind]), batch=5, max_tokens=6)
    w, state = P.Writer(cfg), torch.get_rng_state()
    first = w("cat", 0)
    assert w.kind == kind and len(first) == 5 and all("\n" not in s for s in first)
    assert w("cat", 0) == first == P.Writer(cfg)("cat", 0)  # an address
    assert w("cat", 1) != first and w("dog", 0) != first
    assert torch.equal(torch.get_rng_state(), state)
    if kind == "causal":
        assert all(s.startswith("A photo of a cat") for s in first if s)


@pytest.mark.parametrize(
    "kind, answer, want",
    [
        ("text-to-text", ' "A cat  sleeps." \nmore', "A cat sleeps."),
        ("chat", "\n1. A cat on a roof\n2. A dog", "A cat on a roof"),
        ("causal", " on a roof. It is old.", "A cat on a roof."),
        ("causal", " \n", ""),
        ("chat", "  ", ""),
    ],
)
def test_tidy(kind, answer, want):
    assert P.tidy(answer, kind, "A cat") == want


def test_a_model_that_repeats_itself_is_asked_again_and_topped_up():
    calls = []

    def write(name, call):
        calls.append(call)
        return ["A cat.", "a  cat", "Two cats"]

    cfg = P.PromptsConfig(n=10, spare=2, rounds=3)
    found, facts = P.enhance(write, "cat", cfg)
    assert found[:2] == ["A cat.", "Two cats"] and len({P.sentence_key(s) for s in found}) == 10
    assert calls == list(range(12)) and facts == dict(drawn=36, different=2, odd=0, grammar=8)


def test_enough_is_enough():
    calls = []
    write = lambda name, call: calls.append(call) or [f"cat {call} {i}" for i in range(6)]
    found, facts = P.enhance(write, "cat", P.PromptsConfig(n=10, spare=2))
    assert len(calls) == 2 and len(found) == 10 and facts["grammar"] == 0 and facts["different"] == 12
    assert found == P.enhance(write, "cat", P.PromptsConfig(n=10, spare=2))[0] != P.enhance(write, "cat", P.PromptsConfig(n=10, spare=2, seed=1))[0]


def test_a_model_that_says_nothing():
    calls = []
    with pytest.raises(DataError, match="class cat: .* empty answers"):
        P.enhance(lambda name, call: calls.append(call) or ["", ""], "cat", P.PromptsConfig(n=4, spare=0))
    assert len(calls) <= 8


def test_sentences_that_do_not_fit_are_dropped():
    write = lambda name, call: [f"cat {call}", f"dog {call}"]
    found, facts = P.enhance(write, "cat", P.PromptsConfig(n=4, spare=0, only_named=True, prefix="look: "), lambda s: len(s) < 20)
    assert all(s.startswith("look: cat") for s in found) and facts["odd"] == facts["drawn"] // 2
    long, facts = P.enhance(write, "cat", P.PromptsConfig(n=4, spare=0), lambda s: False)
    assert facts["different"] == 0 and facts["grammar"] == 4


def test_not_a_language_model(clip, tmp_path):
    with pytest.raises(SettingError, match="writes no text"):
        P.Writer(P.PromptsConfig(model=str(clip)))
    with pytest.raises(SettingError, match="no config.json"):
        P.Writer(P.PromptsConfig(model=str(tmp_path)))


# --- the file


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"cat": ["a"], "dgo": ["b"]}', "'dgo', which is no class; did you mean 'dog'"),
        ('{"cat": ["a"]}', "no prompts for dog"),
        ('{"cat": ["a"], "cat": ["b"], "dog": ["c"]}', "'cat' is there twice"),
        ('{"cat": ["a"], "dog": []}', "class 'dog' has no sentences"),
        ('{"cat": "a", "dog": ["b"]}', "class 'cat' has no sentences"),
        ('{"cat": ["a", " "], "dog": ["b"]}', "number 1 of its list is no sentence"),
        ('{"cat": ["a", 3], "dog": ["b"]}', "number 1 of its list is no sentence"),
        ('{"cat": ["A b.", "a  b"], "dog": ["b"]}', "more than once"),
        ('["a"]', "no JSON object"),
        ('{"cat"', "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path, text, said):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(DataError, match=said):
        P.load_prompts(tmp_path / "p.json", ["cat", "dog"])


def test_context(writers):
    beyond = P.context_of(str(writers["causal"]))
    assert beyond("a photo of cat") == 0 and beyond("cat " * 70) == 8
    with pytest.raises(DataError, match="class 'cat'.* 8 tokens longer"):
        P.check_lengths(dict(cat=["cat", "cat " * 70]), beyond, "here")


# --- the stage


def read(folder):
    return json.loads((folder / "prompts.json").read_text()), load_json(folder / "result.json")


def test_stage_with_the_grammar(run):
    small_stage(run, "prompts")
    prompts, r = read(run / "prompts")
    classes = load_split(run / "splits", "train").classes
    assert list(prompts) == list(classes) and all(len(set(v)) == 20 for v in prompts.values())
    assert r["named"] == 1 and r["shared"] == 0 and r["sentences"] == 200
    assert class_prompts(classes, file=str(run / "prompts" / "prompts.json"))[3] == prompts["3"]


def test_stage_with_a_model_repeats(run, writers):
    settings = dict(source="model", model=str(writers["text-to-text"]), n=6, spare=0, batch=4, rounds=2, max_tokens=5)
    for name in ("one", "two"):
        small_stage(run, "prompts", name, **settings)
    (a, r), (b, _) = read(run / "one"), read(run / "two")
    assert a == b and r["model"]["kind"] == "text-to-text" and r["model"]["weights"]
    assert all(s["sentences"] == 6 and s["drawn"] >= 6 for s in r["stats"])


def test_an_edited_file_is_another_key(run, tmp_path):
    from synthlit.core import open_stage, resolve

    key = lambda file: open_stage("prompts", resolve(P.PromptsConfig, dict(source="file", file=str(file))), run, "keyed").identity  # noqa: E731
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for p in (one, two):
        p.write_text(json.dumps({str(c): [f"my {c}"] for c in range(10)}))
    was = key(one)
    assert was == key(two)
    one.write_text(one.read_text().replace("my 3", "your 3"))
    assert key(one) != was == key(two)


def test_stage_with_an_edited_file(run, tmp_path):
    classes = load_split(run / "splits", "train").classes
    said = {c: [f"my {c}", f"your {c}"] for c in reversed(classes)} | {"7": ["a bird"]}
    (tmp_path / "mine.json").write_text(json.dumps(said))
    small_stage(run, "prompts", "mine", source="file", file=str(tmp_path / "mine.json"))
    prompts, r = read(run / "mine")
    assert list(prompts) == list(classes) and prompts["7"] == ["a bird"] and r["stats"][7]["named"] == 0


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(source="templates"), "needs prompts.templates"),
        (dict(templates="eurosta"), "did you mean 'eurosat'"),
        (dict(domain="fotos"), "prompts.domain"),
        (dict(source="file", file="nowhere.json"), "no such file"),
        (dict(source="model", ask="a photo"), "would be asked for the same"),
        (dict(source="model", ask="a {klass}"), "unknown {klass}"),
        (dict(n=5000), "at most"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    config, presets, _ = stage_parts("prompts")
    with pytest.raises(SettingError, match=text):
        resolve(config, presets["tiny"], settings).check({})


# --- image-text models


@pytest.fixture(scope="module")
def noise():
    return torch.from_numpy(rng(0, "test.noise").integers(0, 256, (21, 3, 20, 20), dtype=np.uint8))


def test_probabilities_are_those_of_the_model(clip, noise):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    m = I.ImageText(clip, CLASSES, ["a photo of {a}"], batch=8)
    model, tok, proc = AutoModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip), AutoImageProcessor.from_pretrained(clip)
    x = tok(["a photo of a cat", "a photo of a dog", "a photo of an owl"], padding=True, return_tensors="pt")
    with torch.no_grad():
        want = model(**x, pixel_values=proc(images=list(noise), return_tensors="pt").pixel_values).logits_per_image.softmax(1)
    assert torch.allclose(m.probs(noise), want, atol=1e-5)
    assert torch.allclose(m.probs(noise[5:6]), want[5:6], atol=1e-5)
    assert torch.equal(m.probs(noise), I.ImageText(clip, CLASSES, ["a photo of {a}"], batch=8).probs(noise))


def test_texts_are_encoded_once(clip, noise, monkeypatch):
    m = I.ImageText(clip, CLASSES, batch=7)
    calls, image = [], m.model.get_image_features
    monkeypatch.setattr(m.model, "get_text_features", None)
    monkeypatch.setattr(m.model, "get_image_features", lambda **kw: calls.append(len(kw["pixel_values"])) or image(**kw))
    m.probs(noise)
    assert calls == [7, 7, 7]


def test_a_siglip(noise, tmp_path, clip):
    from transformers import AutoTokenizer, SiglipConfig, SiglipModel

    from synthlit.tiny import make_image_processor

    t = AutoTokenizer.from_pretrained(clip)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    text = dict(small, vocab_size=len(t), max_position_embeddings=24, projection_size=32)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=dict(small, image_size=16, patch_size=4)))
    for part in (model, t, make_image_processor(16)):
        part.save_pretrained(tmp_path)
    p = I.ImageText(tmp_path, CLASSES).probs(noise)
    assert p.shape == (21, 3) and torch.allclose(p.sum(1), torch.ones(21))


def test_models_and_texts_that_are_refused(clip, noise, tmp_path, writers):
    from synthlit.tiny import make_image_processor

    for more, text in (
        (dict(templates=["a photo"]), "names no class"),
        (dict(templates=[]), "empty"),
        (dict(templates=["{class} " * 40]), "longer than the 24 tokens"),
        (dict(names=dict(cat="dog")), "both called"),
    ):
        with pytest.raises(SettingError, match=text):
            I.ImageText(clip, CLASSES, **more)
    with pytest.raises(SettingError, match="has a tower for each"):
        I.ImageText(writers["causal"], CLASSES)
    odd = I.random_image_text(tmp_path / "odd", [*CLASSES, "a photo of a"], 16)
    make_image_processor(24).save_pretrained(odd)
    with pytest.raises(SettingError, match="24×24 pixels, but the model takes 16×16"):
        I.ImageText(odd, CLASSES).probs(noise)


# --- the published filter


def test_threshold_is_strict():
    own = torch.tensor([0.25, 0.2500001, 0.9, 0.1])
    assert I.likelier_than_guessing(4)(None, None, dict(own=own)).tolist() == [False, True, True, False]
    for c in (3, 7, 10, 100, 1000):
        even = torch.zeros(2, c).softmax(1)[:, 0]
        assert not I.likelier_than_guessing(c)(None, None, dict(own=even)).any()


@pytest.mark.parametrize("passing", [800, 801, 1500])
def test_enough_pass_a_random_800(passing):
    own = torch.cat([torch.full((2000 - passing,), 0.05), torch.linspace(0.2, 1, passing)])
    take, passed = I.chosen(own, 0.1)
    assert len(set(take.tolist())) == 800 and passed.all() and (own[take] > 0.1).all()
    if passing == 1500:
        assert take.tolist() == I.chosen(own, 0.1)[0].tolist() != I.chosen(own, 0.1, seed=1)[0].tolist()
        assert not torch.equal(own[take].sort().values, own.sort().values[-800:])  # not the easiest
        hits = torch.zeros(2000)
        for s in range(60):
            hits[I.chosen(own, 0.1, seed=s)[0]] += 1
        assert abs(float(hits[500:1250].mean() - hits[1250:].mean())) < 2  # of 32 expected: likely images are not preferred


def test_fewer_pass_the_likeliest_800():
    own = torch.from_numpy(rng(0, "test.own").random(2000)).float() * 0.1
    own[:799] += 0.2
    take, passed = I.chosen(own, 0.2)
    assert set(take.tolist()) == set(own.argsort(descending=True)[:800].tolist()) and int(passed.sum()) == 799
    with pytest.raises(SettingError, match="800 images are wanted of 700"):
        I.chosen(own[:700], 0.2)


def test_whole_sets():
    labels = torch.arange(3).repeat(40)
    own = torch.from_numpy(rng(1, "test.own").random(120)).float()
    keep = I.clip_filter(own, labels, 3, 10)
    assert torch.bincount(labels[keep]).tolist() == [10, 10, 10] and (own[keep] > 1 / 3).all()
    assert torch.equal(keep, I.clip_filter(own, labels, 3, 10)) and not torch.equal(keep, I.clip_filter(own, labels, 3, 10, seed=1))


def test_in_the_interface_of_the_filter(clip, noise):
    g = fit_floor(noise, torch.arange(21) % 3, CLASSES, 1, 2)
    pool = Pool(g, Scores(I.ImageText(clip, CLASSES)), 0, {})
    rows, stats = I.accept_published(pool, 60, 20)
    plain, plain_stats = accept(pool, keep_rule("above", 1 / 3), 20, 3)
    assert set(rows) == set(plain) and [set(s) for s in stats] == [set(s) for s in plain_stats]
    assert {k: v.dtype for k, v in rows.items()} == {k: v.dtype for k, v in plain.items()}
    assert (np.bincount(rows["label"]) == 20).all() and rows["index"].max() < 60
    for s in stats:
        own = pool.columns[s["label"]]["own"][:60]
        assert s["acceptance"] == pytest.approx(float((own > 1 / 3).float().mean()))
        assert s["fallback"] == max(0, 20 - int((own > 1 / 3).sum()))
    rule = I.likelier_than_guessing(3)
    assert torch.equal(pool.kept(0, 0, 128, rule), pool.kept(0, 0, 128, keep_rule("above", 1 / 3)))
