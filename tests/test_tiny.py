"""The tiny pipeline: nothing to unpickle, nothing fetched, every part resumes to the same bits, refusals come first."""

import ast
import json
import math
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from synthlit.classifier import to_device
from synthlit.core import (
    Checkpoints,
    History,
    SettingError,
    digest,
    file_digest,
    load_json,
    load_table,
    read_manifest,
    resolve,
    run_machine,
    small_stage,
)
from synthlit.plan import plan, read_params
from synthlit.splits import Split, load_split
from synthlit.tiny import (
    TEMPLATES,
    TINY_PRESETS,
    TinyConfig,
    TinyState,
    captioned,
    class_embeddings,
    clip_loss,
    draw,
    encode_text,
    image_embeddings,
    latent_scale,
    numbers_of,
    open_pipeline,
    random_pipeline,
    together,
    train_tiny,
    unet_loss,
    word_merges,
)

MACHINE = dict(device="cpu", threads=1, channels_last=False)
WORDS = ["airplane", "AnnualCrop", "sea lake", "7"]


def files_of(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach a host fails, whatever the libraries' own switches say."""

    def refuse(*a, **k):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def twin(home, tmp_path_factory):
    return random_pipeline(tmp_path_factory.mktemp("twin"), WORDS)


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """Splits and a pipeline of one update a part that never saw two classes."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    run_machine(folder, **MACHINE)
    small_stage(folder, "splits")
    small_stage(folder, "tiny", **(TINY_PRESETS["smoke"] | dict(held_out="3, 5", size=8, patch=4, latent=4)))
    return folder


def asked(**settings) -> TinyConfig:
    smoke = dict(size=8, patch=4, context=8, latent=2, steps_vae=3, steps_clip=3, steps_unet=3, shift=1)
    return resolve(TinyConfig, TINY_PRESETS["smoke"], smoke, settings)


def images(n=12, classes=("cat", "dog", "sea lake")) -> Split:
    x = torch.arange(n * 3 * 64).mul(37).remainder(256).byte().reshape(n, 3, 8, 8)
    return Split("few", x, torch.arange(n) % len(classes), list(classes), "", "")


def test_the_twin_is_the_standard_layout_and_nothing_to_unpickle(twin):
    names = set(files_of(twin))
    assert {n.rsplit(".", 1)[1] for n in names} == {"json", "safetensors"}
    assert {n.split("/")[0] for n in names} == {
        *("model_index.json", "tokenizer", "text_encoder", "image_encoder", "feature_extractor", "vae", "unet", "scheduler"),
    }
    index = json.loads((twin / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["safety_checker"] == [None, None]
    assert sum(len(b) for b in files_of(twin).values()) < 8e6


def test_the_twin_is_a_function_of_its_seed(twin, tmp_path):
    same, other = random_pipeline(tmp_path / "a", WORDS), random_pipeline(tmp_path / "b", WORDS, seed=1)
    assert files_of(same) == files_of(twin)
    changed = {k for k, v in files_of(other).items() if v != files_of(twin)[k]}
    assert changed == {k for k in files_of(twin) if k.endswith(".safetensors")}
    pipes = [open_pipeline(f) for f in (twin, same, other)]
    drawn = [draw(p, ["a photo of airplane", "7"], [4, 9], num_inference_steps=2) for p in pipes]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    alone = draw(pipes[0], ["7"], [9], num_inference_steps=2)
    assert (alone[0].int() - drawn[0][1].int()).abs().max() <= 1  # the noise is that of the number; rounding may differ with the batch


def test_other_pipelines_and_the_towers_load_it(twin):
    from diffusers import StableDiffusionImg2ImgPipeline
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(twin)
    pipe.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert pipe("airplane", image=start, strength=0.5, num_inference_steps=4, output_type="pt").images.shape == (1, 3, 32, 32)
    text = CLIPTextModel.from_pretrained(twin / "text_encoder")
    tower, processor = (
        CLIPVisionModelWithProjection.from_pretrained(twin / "image_encoder"),
        CLIPImageProcessor.from_pretrained(twin / "feature_extractor"),
    )
    embedded = tower(**processor(list((start * 255).byte()), return_tensors="pt")).image_embeds
    assert embedded.shape[1] == text.config.hidden_size == pipe.unet.config.cross_attention_dim
    for kind in (CLIPTokenizer, AutoTokenizer):
        t = kind.from_pretrained(twin / "tokenizer")
        assert isinstance(t, CLIPTokenizer) and t.model_max_length == text.config.max_position_embeddings == 16
        assert len(t) == text.config.vocab_size and t.eos_token_id == text.config.eos_token_id


def test_the_vae_divides_by_four(twin):
    pipe = open_pipeline(twin)
    assert pipe.vae_scale_factor == 4 and pipe.unet.config.sample_size == 8
    assert pipe.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean.shape == (1, pipe.unet.config.in_channels, 8, 8)


def test_words_are_tokens_and_other_words_survive(twin):
    t = open_pipeline(twin).tokenizer
    for word in ("airplane", "annualcrop", "sea", "lake", "photo", "7"):
        assert len(t.tokenize(word)) == 1
    for text in ("zeppelin", "über", "猫", "a photo of zyx", "sea-lake_42!"):
        ids = t(text)["input_ids"]
        pieces = t.convert_ids_to_tokens(ids[1:-1])
        assert pieces and t.eos_token not in pieces
        bare = "".join(pieces).replace("</w>", "")
        assert t.backend_tokenizer.decoder.decode([bare]).replace(" ", "") == text.replace(" ", "")  # no letter is lost
    long = t("airplane " * 50, truncation=True, max_length=16, padding="max_length")["input_ids"]
    assert len(long) == 16 and long[-1] == t.eos_token_id


@pytest.mark.parametrize(
    "bad, name",
    [
        (dict(size=4), "size"),
        (dict(size=20), "size"),
        (dict(words=[]), "words"),
        (dict(words=[" "]), "words"),
    ],
)
def test_a_twin_that_cannot_be_is_refused(bad, name, tmp_path):
    with pytest.raises(SettingError, match=name):
        random_pipeline(tmp_path / "x", **(dict(words=WORDS) | bad))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "bad, name",
    [
        (dict(size=10), "multiple of 4; try 8"),
        (dict(patch=3), "tiny.patch"),
        (dict(vae_widths=[8, 12]), "tiny.vae_widths: 12"),
        (dict(unet_widths=[9]), "tiny.unet_widths: 9"),
        (dict(templates=["a photo"]), "no {}"),
    ],
)
def test_settings_that_cannot_be_are_refused(bad, name):
    with pytest.raises(SettingError, match=name):
        asked(**bad).check({})


def test_held_out_classes_are_named_and_known():
    assert numbers_of("", ["cat", "dog"]) == [] and numbers_of(" dog,ship ", ["cat", "dog", "ship", "eel"]) == [1, 2]
    with pytest.raises(SettingError, match="did you mean 'dog'"):
        numbers_of("dogs", ["cat", "dog", "eel"])
    with pytest.raises(SettingError, match="at least two must stay"):
        numbers_of("cat,dog", ["cat", "dog", "eel"])


class Stopped(Exception):
    pass


def go(cfg, folder, data, stop=None):
    """Train in a folder, perhaps only so many steps, as if the process had been killed then."""

    def track(steps, *a):
        for k, i in enumerate(steps):
            if k == stop:
                raise Stopped
            yield i

    s = TinyState(cfg, data.classes, MACHINE)
    stage = SimpleNamespace(
        dir=folder, device="cpu", checkpoints=Checkpoints(folder / "checkpoints"), history=History(folder / "history.parquet"), track=track
    )
    try:
        train_tiny(s, data, stage, lambda *a: None)
    except Stopped:
        pass
    return s, stage


@pytest.fixture(scope="module")
def uncut(home, tmp_path_factory):
    return go(asked(), tmp_path_factory.mktemp("whole"), images())


@pytest.mark.parametrize("cuts", [(1,), (3, 2), (2, 3, 3)], ids=str)  # within each part, and between two
def test_each_part_resumes_to_the_same_bits(uncut, tmp_path, cuts):
    cfg, data, (whole, stage) = asked(), images(), uncut
    for cut in cuts:
        go(cfg, tmp_path / "cut", data, cut)
    again, resumed = go(cfg, tmp_path / "cut", data)
    for name in whole.nets:
        assert digest(*whole.nets[name].state_dict().values()) == digest(*again.nets[name].state_dict().values()), name
    assert whole.nets["vae"].config.scaling_factor == again.nets["vae"].config.scaling_factor
    rows = [load_table(s.history.path).to_pylist() for s in (stage, resumed)]
    assert rows[0] == rows[1] and len(rows[0]) == 9
    last = [s.checkpoints.paths()[-1] for s in (stage, resumed)]
    assert last[0].name == "step-000000009.safetensors" and last[0].read_bytes() == last[1].read_bytes()


def test_the_tokenizer_is_the_same_in_every_process():
    """(The trainer of the `tokenizers` package settles ties by chance.)"""
    words = ["airplane", "AnnualCrop", "sea lake", "banana"]
    code = f"from synthlit.tiny import word_merges; print(word_merges({words}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(other.stdout) == word_merges(words) and ("a", "n") in word_merges(words)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    go(asked(), tmp_path, images(), 2)
    with pytest.raises(SettingError, match="another architecture"):
        go(asked(vae_widths=[16, 8]), tmp_path, images())


def test_each_part_trains_alone():
    cfg, data = asked(), images()
    s = TinyState(cfg, data.classes, MACHINE)
    for part, named in dict(vae=["vae"], clip=["text", "image", "scale"], unet=["unet"]).items():
        s.begin(part, data)
        assert [k for k, net in s.nets.items() if all(p.requires_grad for p in net.parameters())] == named
        assert not [k for k, net in s.nets.items() if k not in named and any(p.requires_grad for p in net.parameters())]


def test_scaled_latents_have_mean_square_one():
    data, s = images(64), TinyState(asked(), ["cat", "dog", "eel"], MACHINE)
    q = s.nets["vae"].encode(to_device(data.images, MACHINE)).latent_dist
    expected = (q.mean.square() + q.var).mean().item()
    assert math.isclose(latent_scale(s, data) ** 2 * expected, 1, rel_tol=0.1)


def test_an_empty_caption_hides_the_label():
    data = images()
    s = TinyState(asked(), data.classes, MACHINE)
    s.begin("unet", data)
    x, y = to_device(data.images, MACHINE), data.labels
    blind, told = [[unet_loss(s, x, labels, 0, drop=d).item() for labels in (y, (y + 1) % 3)] for d in (1.0, 0.0)]
    assert blind[0] == blind[1] and told[0] != told[1]
    h = encode_text(s.tokenizer, s.nets["text"], ["", "a photo of a cat"]).last_hidden_state
    assert torch.allclose(s.table[0][0], h[0], atol=1e-6) and torch.allclose(s.table[1][0, 0], h[1], atol=1e-6)


def test_captions_of_one_class_are_no_rivals():
    """With one class in the batch every caption is right: the loss is then that of chance, whatever the towers say."""
    data = images(8, ["cat", "dog", "eel"])
    s = TinyState(asked(templates=["{}"]), data.classes, MACHINE)
    x = to_device(data.images, MACHINE)
    assert math.isclose(clip_loss(s, x[:1].expand(8, -1, -1, -1), torch.zeros(8, dtype=torch.long), 0).item(), math.log(8), rel_tol=1e-4)
    unit = class_embeddings(s.tokenizer, s.nets["text"], data.classes, TEMPLATES), image_embeddings(s.nets["image"], data.images, MACHINE)
    assert all(torch.allclose(u.norm(dim=1), torch.ones(len(u)), atol=1e-5) for u in unit)


def test_the_stage_makes_a_folder_that_says_what_it_saw(run):
    folder, result, manifest = run / "tiny" / "pipeline", load_json(run / "tiny" / "result.json"), read_manifest(run / "tiny")
    facts, train = load_json(folder / "synthlit.json"), load_split(run / "splits", "train")
    part = train.only([c for c in range(10) if c not in (3, 5)])
    assert manifest["saw"] == facts["saw"] == list(part.saw) and result["n_train"] == len(part)
    assert facts["held_out"] == result["held_out"] == ["3", "5"] and "3" not in facts["trained"] and len(result["recall"]) == 10
    assert facts["digest"] == result["digest"] and all(file_digest(folder / k) == v for k, v in facts["files"].items())
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    pipe = open_pipeline(folder)
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.vae.config.scaling_factor == result["scaling_factor"]
    assert draw(pipe, ["a photo of a 4"], [0], num_inference_steps=1).shape == (1, 3, 8, 8)


def test_the_towers_are_one_clip_too(run):
    from transformers import CLIPModel

    folder, x = run / "tiny" / "pipeline", torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe, clip = open_pipeline(folder), CLIPModel.from_pretrained(folder / "clip")
    ids = pipe.tokenizer(["a photo of a 4", "7"], padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        both = clip(pixel_values=x, input_ids=ids)
        image, hidden = pipe.image_encoder(x).image_embeds, pipe.text_encoder(ids)
    assert torch.allclose(both.image_embeds, torch.nn.functional.normalize(image, dim=1), atol=1e-5)
    assert torch.allclose(both.text_embeds, torch.nn.functional.normalize(hidden.pooler_output, dim=1), atol=1e-5)
    assert 0.5 < image.norm(dim=1).mean() / hidden.last_hidden_state.norm(dim=-1).mean() < 2


def test_a_finished_folder_is_repeated_from_its_settings(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "tiny")
    small_stage(copy, "tiny", **(TINY_PRESETS["smoke"] | dict(held_out="3, 5", size=8, patch=4, latent=4)))
    assert load_json(copy / "tiny" / "result.json") == load_json(run / "tiny" / "result.json")


def test_two_data_sets_are_learned_as_one(run, tmp_path):
    """All classes of both, the smaller set repeated in training and whole in what is said of it; other stages stand on one of them each."""
    copy = shutil.copytree(run, tmp_path / "run")
    small_stage(copy, "splits", "letters", dataset="mnist", smoke=40)
    with pytest.raises(SettingError, match="tiny.uses: .* both have a class '0'"):
        small_stage(copy, "tiny", "both", dict(splits=["splits", "letters"]), **TINY_PRESETS["smoke"])
    small_stage(copy, "splits", "clothes", dataset="fashion_mnist", smoke=40)
    settings = TINY_PRESETS["smoke"] | dict(held_out="3, Bag", size=8, patch=4, latent=4)
    small_stage(copy, "tiny", "both", dict(splits=["splits", "clothes"]), **settings)
    result, facts = load_json(copy / "both" / "result.json"), load_json(copy / "both" / "pipeline" / "synthlit.json")
    parts = [load_split(copy / k, "train") for k in ("splits", "clothes")]
    known = [s.only([i for i, c in enumerate(s.classes) if str(c) not in ("3", "Bag")]) for s in parts]
    assert result["held_out"] == ["3", "Bag"] and len(result["recall"]) == 20 and result["n_train"] == sum(map(len, known))
    assert facts["saw"] == [d for s in known for d in s.saw] and len(facts["cuts"]) == 2
    both = together([captioned(s, 8, []) for s in parts], level=True)
    first = both.labels < 10
    assert abs(int(first.sum()) - int((~first).sum())) <= min(map(len, parts)) / 2 and both.classes[10] == "T-shirt"
    assert torch.equal(both.images[~first][: len(parts[1])], captioned(parts[1], 8, []).images)


def test_what_stands_on_a_pipeline_of_two_data_sets_is_made_for_each():
    stages = dict(splits=dict(dataset=["digits", "mnist"]), tiny={}, text2image={}, generate={}, tuning={})
    nodes = {n.name: n for n in plan(read_params(dict(stages=stages)))}
    assert [n.name for n in nodes["tiny"].reads["splits"]] == ["splits-datasetdigits", "splits-datasetmnist"]
    for d in ("datasetdigits", "datasetmnist"):
        reads = nodes[f"tuning-{d}"].reads
        assert [n.name for n in reads["splits"]] == [f"splits-{d}"] and [n.name for n in reads["set"]] == [f"generate-{d}"]
        assert [n.name for n in nodes[f"text2image-{d}"].reads["pipeline"]] == ["tiny"]
    assert len(nodes) == 9
