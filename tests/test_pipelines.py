"""Text-to-image pipelines as generators: folders that are refused, addresses, side files by digest, versions, LoRA, the stage."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from synthlit import pipelines as P
from synthlit.captions import (
    by_digest,
    caption_prompts,
    captions_of,
    embed_images,
    image_digests,
    load_encoder,
    read_vectors,
    vectors_for,
    write_vectors,
)
from synthlit.conditions import class_prompts, conditions, encode_prompts
from synthlit.core import DamagedFile, SettingError, digest, load_json, open_stage, read_manifest, resolve, rng, small_stage
from synthlit.data import DataError, encode
from synthlit.diffusion import steps_left, strength_of
from synthlit.folders import (
    SCHEDULERS,
    check_folder,
    drawn_size,
    find_folder,
    licence_of,
    load_pipeline,
    pipeline_facts,
    quiet,
    random_lora,
    read_lora,
)
from synthlit.generate import Maker, Rows, addresses
from synthlit.generator import load_generator
from synthlit.splits import Split, load_split
from synthlit.tiny import random_pipeline
from synthlit.versions import index_ranges, version_index

pytestmark = pytest.mark.usefixtures("no_network")
CLASSES = ["cat", "dog", "tree"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with quiet():
        return random_pipeline(tmp_path_factory.mktemp("pipelines") / "base", [*CLASSES, "photo, best quality"], size=16)


@pytest.fixture
def mine(folder, tmp_path):
    """A copy that may be broken."""
    return shutil.copytree(folder, tmp_path / "mine")


@pytest.fixture(scope="module")
def facts(folder):
    return pipeline_facts(str(folder))


@pytest.fixture(scope="module")
def real():
    """Seven RGB images of 12 pixels: 3 cats, 1 dog, 3 trees."""
    images = torch.from_numpy(rng(0, "test.images").integers(0, 256, (7, 3, 12, 12), dtype=np.uint8))
    labels = torch.tensor([0, 2, 0, 1, 2, 0, 2])
    return Split("toy/train", images, labels, CLASSES, digest(images, labels), "cut")


def generator(facts, real, lora=None, ranges=None, tokens=None, images=True, **draw) -> P.PipelineGenerator:
    d = P.Drawing(**{**dict(size=16, steps=3, batch=3), **draw})
    counts = torch.bincount(real.labels).tolist()
    prompts = class_prompts(CLASSES)
    held = dict(labels=real.labels, images=real.images if images else None, tokens=tokens)
    return P.PipelineGenerator(d, facts, CLASSES, (3, 12, 12), prompts, counts, **held, lora=lora, ranges=ranges)


@pytest.fixture(scope="module")
def g(facts, real):
    return generator(facts, real)


Y, I = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 70, 3, 1, 64])


# --- folders


def test_a_local_folder_loads_without_a_network(folder):
    pipe = load_pipeline(folder, scheduler="ddim")
    assert type(pipe).__name__ == "StableDiffusionPipeline" and type(pipe.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(mine, part):
    shutil.rmtree(mine / part)
    with pytest.raises(DataError, match=f"component {part} is missing"):
        load_pipeline(mine)


def test_missing_weights_are_named(mine):
    (mine / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataError, match="component vae has no weights"):
        check_folder(mine)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_pickles_are_refused_with_the_way_to_convert(mine, suffix):
    weights = mine / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(suffix))
    with pytest.raises(SettingError, match="pickles.*save_pretrained"):
        load_pipeline(mine)


def test_other_checkpoints_are_refused(mine, tmp_path):
    single = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, single)
    for place in (single, mine / "unet"):
        with pytest.raises(SettingError, match="no diffusers pipeline.*from_single_file"):
            load_pipeline(place)
    index = mine / "model_index.json"
    was = json.loads(index.read_text())
    index.write_text(json.dumps({**was, "_class_name": "FluxPipeline"}))
    with pytest.raises(SettingError, match="FluxPipeline; expected a pipeline like Stable Diffusion"):
        check_folder(mine)
    index.write_text(json.dumps({**was, "unet": ["my_code", "Net"]}))
    with pytest.raises(SettingError, match="code of its own"):
        check_folder(mine)
    index.write_text("{")
    with pytest.raises(DamagedFile, match="model_index.json"):
        check_folder(mine)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    class GatedRepoError(Exception):
        pass

    def fails(error):
        def fetch(source, revision):
            raise error

        return fetch

    with pytest.raises(SettingError, match="cannot be reached.*hf download some/model --local-dir FOLDER"):
        find_folder("some/model", fetch=fails(ConnectionError("x")))
    with pytest.raises(SettingError, match="gated.*hf auth login"):
        find_folder("some/model", fetch=fails(GatedRepoError("x")))
    with pytest.raises(SettingError, match="pickles only"):
        find_folder("some/model", fetch=fails(OSError("Could not find the necessary `safetensors` weights")))
    with pytest.raises(SettingError, match="no such folder"):
        find_folder("not/a/folder")


def test_the_real_fetcher_fails_with_the_same_words(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SettingError, match="--local-dir FOLDER"):
        load_pipeline("nobody/no-such-model-here")


def test_sizes_and_schedulers(facts, folder):
    assert drawn_size(None, facts) == 16
    with pytest.raises(SettingError, match="multiples of 4 pixels.*28 and 32"):
        drawn_size(30, facts)
    with pytest.raises(SettingError, match="did you mean 'ddim'"):
        load_pipeline(folder, scheduler="ddimm")


def test_licence_and_weights_are_recorded(mine, facts):
    (mine / "README.md").write_text("---\nlicense: openrail\n---\n# Model\n")
    found = pipeline_facts(str(mine))
    assert found["licence"] == "openrail" and found["weights"] == facts["weights"]
    (mine / "README.md").write_text("---\n: [\n---\n")
    assert licence_of(mine) == ""
    config = mine / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert pipeline_facts(str(mine))["weights"] != facts["weights"]


# --- prompts


def test_long_prompts_are_cut_and_counted(folder):
    pipe = load_pipeline(folder)
    e, cut = encode_prompts(pipe, ["cat", "cat " * 40])
    assert e.shape == (2, 16, 64) and cut == [0, 40 + 2 - 16]


def test_the_token_takes_the_last_place_only(folder):
    pipe = load_pipeline(folder)
    plain, _ = encode_prompts(pipe, ["cat", "dog"])
    token = torch.ones(2, 64)
    with_it, _ = encode_prompts(pipe, ["cat", "dog"], token)
    assert torch.equal(with_it[:, :-1], plain[:, :-1]) and torch.equal(with_it[:, -1], token)
    call = conditions(pipe, ["cat", "dog"], "bad", token)
    assert torch.equal(call["negative_prompt_embeds"], encode_prompts(pipe, ["bad"] * 2)[0])  # the other branch keeps its own last token
    with pytest.raises(SettingError, match="5 numbers.*64"):
        encode_prompts(pipe, ["cat", "dog"], token[:, :5])


def test_prompts_by_class(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(dict(cat=["a cat", "two cats"], dog=["a dog"], tree=["a tree"])))
    assert class_prompts(CLASSES, file=str(file))[0] == ["a cat", "two cats"]
    file.write_text(json.dumps(dict(cat=["a cat"])))
    with pytest.raises(DataError, match="no prompts for dog, tree"):
        class_prompts(CLASSES, file=str(file))
    assert class_prompts(["sea_lion"]) == {0: ["sea lion, photo, best quality"]}
    assert class_prompts(CLASSES, names=dict(cat="Felis {x}"))[0] == ["Felis {x}, photo, best quality"]
    with pytest.raises(SettingError, match="did you mean 'cat'"):
        class_prompts(CLASSES, names=dict(kat="x"))
    with pytest.raises(SettingError, match="'cat' has no words"):
        class_prompts(["cat", "dog"], names=dict(cat=" "))
    with pytest.raises(SettingError, match="both called 'dog'"):
        class_prompts(["cat", "dog"], names=dict(cat="dog"))


@pytest.mark.parametrize(
    "said, what",
    [
        (dict(template="a {clas}"), "unknown {clas}; did you mean 'class'"),
        (dict(template="a photo"), "all classes would get one prompt"),
        (dict(template="{class} {caption}"), "captions says nothing"),
        (dict(scheduler="unicorn"), "scheduler"),
        (dict(strength=0.01), "take at least steps = 100"),
        (dict(part=2, parts=2), "parts are counted from 0"),
        (dict(lora="nowhere.safetensors"), "lora.*no such file"),
        (dict(model="./nowhere"), "no such folder"),
        (dict(captions="./nowhere.json"), "captions.*no such file"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(said, what):
    with pytest.raises(SettingError, match=what):
        resolve(P.Text2imageConfig, dict(model="random"), said).check({})


# --- side files


def test_side_files_are_keyed_by_image_and_resume(tmp_path):
    images = torch.arange(11, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    images[10] = images[3]  # the same image twice
    calls = []

    def make(block, stop=None):
        calls.append([int(x[0, 0, 0]) for x in block])
        if len(calls) == stop:
            raise KeyboardInterrupt
        return [x.float().mean().view(1) for x in block]

    args = dict(write=write_vectors, read=read_vectors, meta=dict(model="mean"), batch=2, every=1)
    path = tmp_path / "values.safetensors"
    with pytest.raises(KeyboardInterrupt):
        by_digest(path, images, lambda b: make(b, 3), **args)
    assert len(list(tmp_path.glob("values.part-*"))) == 2 and not path.exists()
    calls.clear()
    values = by_digest(path, images, make, **args)
    assert calls == [[4, 5], [6, 7], [8, 9]]  # what was written is not made again, nor is an image that is there twice
    assert [p.name for p in tmp_path.iterdir()] == ["values.safetensors"] and len(values) == 10
    some = torch.tensor([7, 2, 10])
    assert vectors_for(images[some], values)[:, 0].tolist() == [7, 2, 3]
    more = by_digest(path, torch.cat([images, images[:1] + 50]), make, **args)  # one more image: only that one is worked on
    assert calls[3:] == [[50, 50]] and len(more) == 11
    with pytest.raises(SettingError, match="another model"):
        by_digest(path, images, make, **{**args, "meta": dict(model="median")})


def test_image_embeddings_do_not_depend_on_the_batch(folder, real, tmp_path):
    values = embed_images(real.images, str(folder), tmp_path / "e.safetensors", batch=4)
    flipped = embed_images(real.images.flip(0), str(folder), tmp_path / "f.safetensors", batch=4)
    assert values.keys() == flipped.keys() and all(torch.equal(values[k], flipped[k]) for k in values)
    grey = embed_images(real.images[:, :1], str(folder), tmp_path / "g.safetensors", batch=4)
    assert next(iter(grey.values())).shape == (64,)
    back, meta = read_vectors(tmp_path / "e.safetensors")
    assert meta["weights"] and torch.equal(vectors_for(real.images, back), vectors_for(real.images, values))


def test_an_encoder_without_safetensors_is_refused(mine):
    weights = mine / "image_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(SettingError, match="pickles"):
        load_encoder(str(mine))


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A BLIP with random weights."""
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"a red blue cat dog tree on the".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    text = dict(vocab_size=len(words), hidden_size=16, encoder_hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text |= dict(projection_dim=16, max_position_embeddings=64, bos_token_id=5, sep_token_id=3, eos_token_id=3, pad_token_id=0)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=16)
    torch.manual_seed(0)
    with quiet():
        BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
        BlipProcessor(BlipImageProcessor(size=dict(height=16, width=16)), tokenizer).save_pretrained(folder)
    return folder


def test_captions_of_a_model(captioner, real, tmp_path):
    captions = captions_of(real.images, str(captioner), tmp_path / "c.parquet", batch=4)
    assert set(captions) == set(image_digests(real.images)) and all(isinstance(t, str) for t in captions.values())
    assert captions_of(real.images, str(tmp_path / "c.parquet")) == {k: v for k, v in captions.items() if v} or not all(captions.values())
    assert captions_of(real.images.flip(0), str(captioner), tmp_path / "d.parquet", batch=4) == captions


def test_captions_of_files(real, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"number {i}" for i in range(7)]
    want = dict(zip(image_digests(real.images), texts))
    (tmp_path / "c.json").write_text(json.dumps(want))
    images = tmp_path / "images"
    images.mkdir()
    rows = []
    for i in (3, 1, 0, 2, 6, 5, 4):  # another order than the split's
        (images / f"{i}.png").write_bytes(encode(real.images[i]))
        rows.append(dict(file_name=f"{i}.png", text=texts[i]))
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cells = [dict(bytes=encode(x), path="") for x in real.images]
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}}}}
    table = pa.table(dict(image=cells, label=real.labels.numpy(), words=texts)).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path / "train-0.parquet")
    for source, column in (
        (tmp_path / "c.json", "text"),
        (images, "text"),
        (images / "metadata.jsonl", "text"),
        (tmp_path / "train-0.parquet", "words"),
    ):
        assert captions_of(real.images, str(source), column=column) == want
    prompts = caption_prompts(real, want)
    assert prompts[2] == [f"photo of tree, number {i}, best quality" for i in (1, 4, 6)]
    with pytest.raises(DataError, match="no column 'text'"):
        captions_of(real.images, str(tmp_path / "train-0.parquet"))
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(DataError, match="cannot be read as captions"):
        captions_of(real.images, str(tmp_path / "bad.json"))


def test_missing_captions(real, capsys):
    some = dict(list(zip(image_digests(real.images), "abcdefg"))[1:])
    with pytest.raises(DataError, match=r"1 of 7 training images have no caption, the first is image 0 \(class cat\)"):
        caption_prompts(real, some)
    prompts = caption_prompts(real, some, missing="template")
    assert prompts[0][0] == "cat, photo, best quality" and "1 of 7" in capsys.readouterr().out
    with pytest.raises(DataError, match="belong to other images"):
        caption_prompts(real, {"0" * 64: "x"}, missing="template")


# --- the generator


@pytest.mark.parametrize("dials", [{}, dict(strength=0.7), dict(guidance=1.0), dict(strength=0.4, guidance=0.0)])
def test_an_image_does_not_depend_on_its_batch(g, dials):
    whole = g.sample(Y, I, seed=5, **dials)
    assert whole.shape == (5, 3, 12, 12) and whole.dtype == torch.uint8
    for some in ([4, 2], [3], [1, 1, 0, 2]):
        assert torch.equal(g.sample(Y[some], I[some], seed=5, **dials), whole[some])
    assert not torch.equal(g.sample(Y, I, seed=6, **dials), whole)


@pytest.mark.parametrize("scheduler", [k for k in SCHEDULERS if k != "unipc"])
def test_every_scheduler_draws_by_address(facts, real, scheduler):
    h = generator(facts, real, scheduler=scheduler, steps=4)
    for dials in ({}, dict(strength=0.5)):
        whole = h.sample(Y[:4], I[:4], seed=1, **dials)
        assert torch.equal(h.sample(Y[[3, 0]], I[[3, 0]], seed=1, **dials), whole[[3, 0]])


def test_the_global_state_is_left_alone(g):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    g.sample(Y[:2], I[:2], strength=0.7)
    assert torch.equal(torch.get_rng_state(), before)


def test_references_are_used_equally(g, real, monkeypatch):
    asked = []
    monkeypatch.setattr(P, "to_pipeline", lambda images, size: asked.append(images) or torch.zeros(len(images), 3, size, size))
    g.sample([0] * 6, [*range(6)], strength=0.5)
    cats = real.images[real.labels == 0]
    assert torch.equal(torch.cat(asked)[:6], torch.cat([cats, cats]))


def test_prompt_reference_and_token_belong_together(facts, real, monkeypatch):
    tokens = torch.arange(7.0).view(-1, 1).repeat(1, 64)
    h = generator(facts, real, tokens=tokens).altered(prompts={0: ["p0", "p2", "p5"], 1: ["p3"], 2: ["p1", "p4", "p6"]})
    seen = []
    monkeypatch.setattr(P, "conditions", lambda pipe, prompts, neg, t: seen.append((prompts, t)) or conditions(pipe, prompts, neg, t))
    h.sample([0, 2, 0, 1, 2, 0], [1, 3, 5, 9, 1, 0])
    got = [(p, int(v)) for prompts, t in seen for p, v in zip(prompts, t[:, 0])]
    assert got == [(f"p{k}", k) for k in (2, 1, 5, 3, 4, 0)]


def test_the_token_moves_pictures(facts, real):
    token = torch.from_numpy(rng(0, "token").standard_normal((7, 64)).astype(np.float32))
    one, other = (generator(facts, real, tokens=t, guidance=1.0).sample(Y, I) for t in (token, 3 * token))
    assert not torch.equal(one, other)


def test_save_and_load(g, tmp_path):
    g.save(tmp_path / "g")
    again = load_generator(tmp_path / "g")
    assert again.digest == g.digest and again.trained == [0, 1, 2] and again.dials == g.dials
    assert torch.equal(again.sample(Y, I, strength=0.7), g.sample(Y, I, strength=0.7))
    assert (tmp_path / "g" / "generator.safetensors").stat().st_size < 20_000  # never the pipeline's weights


def test_digest_is_of_what_decides_the_pictures(g, mine, tmp_path):
    moved = g.altered(facts=pipeline_facts(str(mine)) | dict(licence="x"))
    assert moved.digest == g.digest
    assert g.altered(draw=replace(g.draw, offload=True)).digest == g.digest
    for draw in (dict(guidance=3.0), dict(scheduler="ddim"), dict(negative=""), dict(batch=4), dict(steps=4)):
        assert g.altered(draw=replace(g.draw, **draw)).digest != g.digest
    assert g.altered(ranges={0: (0, 1), 1: (0, 1), 2: (0, 1)}).digest != g.digest
    assert g.altered(prompts={**g.prompts, 1: ["x"]}).digest != g.digest


def test_a_changed_pipeline_is_refused(facts, real, mine, tmp_path):
    h = generator(pipeline_facts(str(mine)), real)
    h.save(tmp_path / "g")
    config = mine / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    with pytest.raises(SettingError, match="other weights"):
        load_generator(tmp_path / "g").sample(Y, I)
    shutil.rmtree(mine)
    with pytest.raises(SettingError, match="no such folder"):
        load_generator(tmp_path / "g").sample(Y, I)


def test_dials_are_checked(g, facts, real):
    for dials, what in (
        (dict(strength=0.1), "leaves no step"),
        (dict(strength=1.5), "above 0"),
        (dict(steps=0), "steps = 0"),
        (dict(guidance=-1), "guidance = -1"),
        (dict(std=1), "unknown dial"),
    ):
        with pytest.raises(SettingError, match=what):
            g.sample(Y, I, **dials)
    with pytest.raises(SettingError, match="made without real images"):
        generator(facts, real, images=False).sample(Y, I, strength=0.5)
    assert torch.equal(g.sample(Y, I, strength=1), g.sample(Y, I))  # 1 is the same as none: from noise
    none = real.only([0, 1])
    with pytest.raises(SettingError, match="training split has none of tree"):
        generator(facts, replace(none, labels=none.labels), images=True).altered(counts=[3, 1, 0])


def test_flops_are_counted(g):
    few, many = (g.altered(draw=replace(g.draw, steps=s)).flops for s in (3, 6))
    assert 0 < few < many < 2 * few  # the decoder is called once


def test_it_takes_part_in_sets(g):
    y, i = addresses(g.trained, 2)
    rows = Rows([Maker(g, 3, dict(strength=0.7))], y, i)
    assert rows.draw().shape == (6, 3, 12, 12) and rows.digest


# --- real guidance


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "unipc", "euler", "dpm++"])
def test_the_published_steps(facts, real, scheduler):
    """Of 100 steps exactly the table's k are done, from the level of the k-th last one; for every other k too."""
    h = generator(facts, real, scheduler=scheduler, steps=100)
    clock = h.editor.scheduler
    clock.set_timesteps(100)
    for k in range(1, 100):
        go, n = h.editor.get_timesteps(100, (steps_left(100, k / 100) + 0.5) / 100, "cpu")
        assert len(go) == n == k and go[0] == clock.timesteps[-k]


def test_a_reference_is_noised_to_the_step_of_the_table(facts, real, monkeypatch):
    """diffusers is asked for k steps, and the U-Net runs k times, whatever floats say of 0.29 times 100."""
    h = generator(facts, real, scheduler="ddpm", steps=100, guidance=1.0, batch=2)
    calls, forward = [], h.pipe.unet.forward
    monkeypatch.setattr(h.pipe.unet, "forward", lambda z, t, **kw: calls.append(int(t)) or forward(z, t, **kw))
    for shots, k in {16: 15, 8: 20}.items():
        calls.clear()
        h.sample([0], [0], strength=strength_of(dict(shots=shots, strength=None)))
        assert len(calls) == k and calls == h.pipe.scheduler.timesteps[-k:].tolist()
    calls.clear()
    h.sample([0], [0], strength=0.29)
    assert len(calls) == 29


def test_a_reference_that_is_no_square_is_cut_to_its_middle():
    x = torch.zeros(1, 1, 12, 20, dtype=torch.uint8)
    x[..., 4:16] = 255
    assert P.to_pipeline(x, 12).min() == 1 and P.to_pipeline(x, 24).shape == (1, 3, 24, 24)
    assert P.from_pipeline(torch.ones(1, 3, 16, 16), (3, 12, 20)).shape == (1, 3, 12, 20)


@pytest.mark.parametrize("guidance", [0.5, -1.0, 101.0])
def test_guidance_has_one_meaning(g, guidance):
    """1 and 0 are off in every chapter, what lies between is refused in every chapter."""
    from synthlit.diffusion import DiffusionConfig
    from synthlit.tiny import TinyConfig

    with pytest.raises(SettingError, match=f"guidance = {guidance}"):
        g.sample(Y, I, guidance=guidance)
    for cfg in (P.Text2imageConfig(model="random", guidance=guidance), TinyConfig(guidance=guidance), DiffusionConfig(guidance=guidance, batch=4)):
        with pytest.raises(SettingError, match="1 .or 0. is off"):
            cfg.check(dict(n_train=1000))


def test_guidance_off(g):
    assert torch.equal(g.sample(Y, I, guidance=0), g.sample(Y, I, guidance=1))


# --- versions and parts


def test_versions_are_complete_copies(g, real):
    seen = set()
    for v in range(3):
        i = version_index(real.labels, v)
        cells = list(zip(real.labels.tolist(), i.tolist()))
        assert not seen & set(cells)
        seen |= set(cells)
        rows = torch.tensor([g.rows[c][k % len(g.rows[c])] for c, k in cells])
        assert torch.equal(rows, torch.arange(7))  # each image once, with its own label, in the split's order
    assert len(seen) == 21


def test_a_version_ends_and_parts_make_it_whole(g):
    one = g.altered(ranges=index_ranges(g.counts, 1))
    assert [one.limit(c) for c in g.trained] == [3, 1, 3] and g.limit(0) is None and one.endless().limit(0) is None
    assert torch.equal(one.sample([0, 2], [2, 0]), g.sample([0, 2], [5, 3]))
    parts = [g.altered(ranges=index_ranges(g.counts, 1, k, 2)) for k in range(2)]
    assert [sum(h.limit(c) for h in parts) for c in g.trained] == g.counts
    together = sorted((c, h.ranges[c][0] + j) for h in parts for c in g.trained for j in range(h.limit(c)))
    assert together == sorted((c, one.ranges[c][0] + j) for c in g.trained for j in range(one.limit(c)))
    assert g.altered(prompts={**g.prompts, 0: ["a", "b"]}, ranges=one.ranges).prompts_of([0, 0, 1], [0, 1, 0]) == ["b", "a", *g.prompts[1]]
    with pytest.raises(SettingError, match="ends before"):
        one.sample([1], [1])


def test_prompts_times_images(g):
    """Image i of class c always has the same prompt; there are exactly so many of each prompt; then it ends."""
    prompts = {0: ["a", "b", "c"], 1: ["d"], 2: ["e", "f"]}
    cfg = P.Text2imageConfig(per_prompt=4)
    h = g.altered(prompts=prompts, ranges=P.ranges_of(cfg, prompts, g.counts))
    assert [h.limit(c) for c in range(3)] == [12, 4, 8]
    for c, ps in prompts.items():
        asked = h.prompts_of([c] * h.limit(c), range(h.limit(c)))
        assert asked == ps * 4 and {asked.count(p) for p in ps} == {4}
    more = g.altered(prompts=prompts, ranges=P.ranges_of(replace(cfg, per_prompt=9), prompts, g.counts))
    assert more.prompts_of([0] * 12, range(12)) == h.prompts_of([0] * 12, range(12))
    assert torch.equal(more.sample([0, 2], [7, 3]), h.sample([0, 2], [7, 3]))
    parts = [g.altered(prompts=prompts, ranges=P.ranges_of(replace(cfg, part=k, parts=3), prompts, g.counts)) for k in range(3)]
    assert [sum(p.limit(c) for p in parts) for c in range(3)] == [12, 4, 8] and torch.equal(parts[1].sample([0], [0]), h.sample([0], [4]))
    again = g.altered(prompts=prompts, ranges=P.ranges_of(replace(cfg, version=1), prompts, g.counts))
    assert again.prompts_of([0], [1]) == ["b"] and torch.equal(again.sample([0], [1]), g.altered(prompts=prompts).sample([0], [13]))


def test_a_set_goes_on_where_it_stopped(g, tmp_path):
    """Killed within a shard, what was drawn is not drawn again, the prompts stand beside the images, and the bytes are those of an undisturbed set."""
    from synthlit.core import load_table
    from synthlit.generate import write_shards

    h = g.altered(prompts={0: ["a", "b"], 1: ["c"], 2: ["d"]}, draw=replace(g.draw, steps=1, batch=16))
    y, i = addresses(h.trained, 30)
    rows = Rows([Maker(h, 3)], y, i, known=dict(prompt=h.prompts_of(y, i)))
    write_shards(tmp_path / "whole", rows, 60)
    calls, block = [], h.block

    def deadly(labels, index, seed, d):
        calls.append(len(labels))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return block(labels, index, seed, d)

    h.block, stop = deadly, 4
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "stopped", rows, 60)
    assert not list((tmp_path / "stopped").glob("train-*"))
    calls.clear()
    stop = 0
    write_shards(tmp_path / "stopped", rows, 60)
    assert len(calls) == 2 + 2  # of 90 images in calls of 16, two and two for each shard of 60 and 30: the first two calls were kept
    for p in (tmp_path / "whole").iterdir():
        assert p.read_bytes() == (tmp_path / "stopped" / p.name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == sorted(p.name for p in (tmp_path / "stopped").iterdir())
    t = load_table(tmp_path / "whole" / "train-00000-of-00002.parquet", ["label", "index", "prompt"]).to_pylist()
    assert all(r["prompt"] == h.prompts[r["label"]][r["index"] % len(h.prompts[r["label"]])] for r in t)


def test_versions_of_one_reference_differ(g):
    """Same prompt, same reference, other noise: what buries the reference is addressed too."""
    one, other = g.sample([0, 0], [0, 3], strength=0.7)
    assert not torch.equal(one, other)
    draws = {torch.randn(4, generator=P.noise_of(s, c, i)).sum().item() for s in (0, 1) for c in (0, 1) for i in (0, 1, 64)}
    assert len(draws) == 12


# --- LoRA


def test_lora_scale_and_off(g, tmp_path):
    h = g.altered(lora=random_lora(g.pipe))
    base = g.sample(Y, I)
    assert torch.equal(h.sample(Y, I, lora_scale=0), base)  # bit for bit
    half, full = h.sample(Y, I, lora_scale=0.5), h.sample(Y, I, lora_scale=1)
    assert not torch.equal(half, base) and not torch.equal(half, full)
    assert torch.equal(h.sample(Y, I, lora_scale=0), base) and torch.equal(g.sample(Y, I), base)
    h.save(tmp_path / "h")
    again = load_generator(tmp_path / "h")
    assert again.digest == h.digest != g.digest and torch.equal(again.sample(Y, I, lora_scale=1), full)
    assert torch.equal(h.sample(Y, I, lora_scale=1, strength=0.7)[:2], h.sample(Y[:2], I[:2], lora_scale=1, strength=0.7))


def test_lora_of_another_model_is_refused(g):
    lora = random_lora(g.pipe)
    for wrong in (
        {k: v.repeat(2, 2) for k, v in lora.items()},
        {k.replace("down_blocks.0", "down_blocks.9"): v for k, v in lora.items()},
        {"text_encoder.x.lora_A.weight": torch.zeros(2, 2)},
    ):
        with pytest.raises(SettingError, match="another base model"):
            g.altered(lora=wrong).sample(Y, I)


def test_lora_files(g, tmp_path):
    lora = random_lora(g.pipe)
    save_file(lora, tmp_path / "pytorch_lora_weights.safetensors")
    assert read_lora(tmp_path).keys() == lora.keys()
    head = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4})}
    save_file(lora, tmp_path / "twice.safetensors", head)
    twice = read_lora(tmp_path / "twice.safetensors")
    assert all(torch.equal(twice[k], v * (2 if "lora_B" in k else 1)) for k, v in lora.items())
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(SettingError, match="others are pickles"):
        read_lora(tmp_path / "x.bin")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(DamagedFile, match="x.safetensors"):
        read_lora(tmp_path / "x.safetensors")


def test_a_lora_file_of_diffusers_is_read(g, tmp_path):
    """The file that diffusers itself writes from a peft adapter."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = load_pipeline(g.facts["at"])
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    h = g.altered(lora=read_lora(tmp_path))
    assert torch.equal(h.sample(Y[:2], I[:2], lora_scale=1), g.sample(Y[:2], I[:2]))  # a new LoRA changes nothing yet: its B is zero


# --- SDXL


@pytest.fixture(scope="module")
def xl(folder, tmp_path_factory):
    """A Stable Diffusion XL with random weights."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    base, out = load_pipeline(folder), tmp_path_factory.mktemp("xl") / "xl"
    n = len(base.tokenizer)
    text = dict(vocab_size=n, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16, projection_dim=32)
    text |= dict(eos_token_id=base.tokenizer.eos_token_id, bos_token_id=base.tokenizer.bos_token_id, hidden_size=32)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8, use_linear_projection=True,
    )  # fmt: skip
    one, two = CLIPTextModel(CLIPTextConfig(**text)), CLIPTextModelWithProjection(CLIPTextConfig(**text))
    parts = dict(vae=base.vae, text_encoder=one, text_encoder_2=two, tokenizer=base.tokenizer, tokenizer_2=base.tokenizer, unet=unet)
    with quiet():
        StableDiffusionXLPipeline(**parts, scheduler=base.scheduler, add_watermarker=False).save_pretrained(out)
    return out


def test_sdxl_draws_by_address(xl, real):
    h = generator(pipeline_facts(str(xl)), real)
    for dials in ({}, dict(strength=0.7)):
        whole = h.sample(Y, I, **dials)
        assert torch.equal(h.sample(Y[[3, 0]], I[[3, 0]], **dials), whole[[3, 0]]) and whole.float().std() > 1
    assert h.flops == 0
    lora = h.altered(lora=random_lora(h.pipe))
    assert torch.equal(lora.sample(Y, I, lora_scale=0), h.sample(Y, I)) and not torch.equal(lora.sample(Y, I, lora_scale=1), h.sample(Y, I))


def test_an_sdxl_refiner_is_refused(xl, tmp_path):
    mine = shutil.copytree(xl, tmp_path / "refiner")
    index = json.loads((mine / "model_index.json").read_text())
    (mine / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}))
    with pytest.raises(DataError, match="component text_encoder is missing"):
        check_folder(mine)


# --- the stage


def run(tmp_path, name="text2image", **settings):
    folder = tmp_path / "run"
    if not (folder / "splits" / "manifest.json").exists():
        small_stage(folder, "splits", per_class=6)
    stage = open_stage("text2image", resolve(P.Text2imageConfig, P.TEXT2IMAGE_PRESETS["tiny"], settings), folder, name)
    return stage, P.run_text2image(stage)


def test_the_stage(tmp_path, capsys):
    stage, r = run(tmp_path, strength=0.5, tokens=True)
    P.print_text2image(r)
    out = capsys.readouterr().out
    assert "pictures are noise" in out and "image tokens" in out
    train = load_split(tmp_path / "run" / "splits", "train")
    assert r["references"] == r["tokens"] == len(train) and not list(stage.dir.glob("*.part-*"))
    assert set(train.saw) <= set(read_manifest(stage.dir)["saw"])
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")  # the pipeline lies in the run: its place is relative
    g = load_generator(moved / "text2image")
    assert g.digest == r["digest"] == load_json(moved / "text2image" / "result.json")["digest"]
    assert g.sample([0, 1], [0, 0]).shape == (2, 1, 8, 8)
    assert str(tmp_path) not in json.dumps(g.state()[1])


def test_a_stage_without_real_images_has_seen_nothing(tmp_path):
    stage, r = run(tmp_path, version=2, part=1, parts=2)
    assert read_manifest(stage.dir)["saw"] == [] and r["references"] == 0
    assert load_generator(stage.dir).limit(0) == r["counts"][0] - r["counts"][0] // 2


def test_stage_refusals(tmp_path):
    with pytest.raises(SettingError, match="multiples of 4"):
        run(tmp_path, "a", model=str(random_pipeline(tmp_path / "p", CLASSES, size=16)), size=18)
    with pytest.raises(SettingError, match="the run makes no pipeline"):
        run(tmp_path, "b", model="")
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "l.safetensors")
    with pytest.raises(SettingError, match="another base model"):
        run(tmp_path, "c", lora=str(tmp_path / "l.safetensors"))


def test_captions_in_the_stage(tmp_path, captioner):
    stage, r = run(tmp_path, captions=str(captioner), template="{class} with {caption}")
    assert (stage.dir / "captions.parquet").exists() and " with " in r["example"]
    file = tmp_path / "captions.json"
    train = load_split(tmp_path / "run" / "splits", "train")
    file.write_text(json.dumps({k: "word " * 30 for k in image_digests(train.images)}))
    _, r = run(tmp_path, "from_file", captions=str(file))
    assert r["truncated"] == r["prompts"] == 10 and r["most_cut"] > 10


def test_the_stage_with_shots(tmp_path, capsys):
    """References by address, nested, the table's strength, the number in the result and in the facts of a set."""
    stage, r = run(tmp_path, "few", shots=4, steps=100)
    P.print_text2image(r)
    assert "4 real images of each class, strength 0.35" in capsys.readouterr().out
    train, g = load_split(tmp_path / "run" / "splits", "train"), load_generator(stage.dir)
    assert r["references"] == 40 and r["shots"] == 4 and g.dials["strength"] == 0.35 and g.guides({}) == 40 and not g.guides(dict(strength=None))
    more, _ = run(tmp_path, "more", shots=5, steps=100, shots_seed=0)
    larger = load_generator(more.dir)
    for c in g.trained:
        assert torch.equal(g.images[g.rows[c]], larger.images[larger.rows[c]][:4]) and (train.labels[torch.nonzero(train.labels == c)] == c).all()
    other, _ = run(tmp_path, "other", shots=4, steps=100, shots_seed=1)
    assert not torch.equal(load_generator(other.dir).images, g.images)
    deep, _ = run(tmp_path, "deep", shots=4, steps=10, strength=0.9)
    assert load_generator(deep.dir).dials["strength"] == 0.9
    assert set(train.saw) <= set(read_manifest(stage.dir)["saw"])
    small_stage(tmp_path / "run", "generate", inputs={"generator": "few"}, per_class=4, dials={"steps": 10})
    made = load_json(tmp_path / "run" / "generate" / "set.json")["makers"][0]
    assert made["guided_by"] == 40 and "40 of them" in (tmp_path / "run" / "generate" / "README.md").read_text()
    with pytest.raises(SettingError, match="shots = 50: class 0 has only"):
        run(tmp_path, "many", shots=50, steps=100)
    with pytest.raises(SettingError, match="smallest class of the training split has 6"):
        P.Text2imageConfig(model="random", shots=7, steps=100).check(dict(smallest=6))
    with pytest.raises(SettingError, match="leaves no step"):
        P.Text2imageConfig(model="random", shots=16, steps=4).check({})


def test_the_stage_reads_the_prompts_of_the_run(tmp_path):
    run(tmp_path, "bare")
    folder = tmp_path / "run"
    small_stage(folder, "prompts", n=3)
    said = json.loads((folder / "prompts" / "prompts.json").read_text())
    stage, r = run(tmp_path, "told")
    g = load_generator(stage.dir)
    assert {c: g.prompts[i] for i, c in enumerate(g.classes)} == said and r["prompts"] == 30 and read_manifest(stage.dir)["saw"] == []
    stage, r = run(tmp_path, "template", template="a picture of {class}")
    assert r["prompts"] == 10 and r["example"].startswith("a picture of")
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({c: [f"my {c}"] for c in said}))
    assert run(tmp_path, "mine", prompts=str(mine))[1]["example"].startswith("my ")
    stage, r = run(tmp_path, "counted", per_prompt=2)
    assert load_generator(stage.dir).limit(0) == 6
    small_stage(folder, "generate", inputs={"generator": "counted"}, per_class=None)
    from synthlit.core import load_table

    rows = [r for p in sorted((folder / "generate").glob("train-*.parquet")) for r in load_table(p, ["label", "index", "prompt"]).to_pylist()]
    assert len(rows) == 60
    assert all(r["prompt"] == said[g.classes[r["label"]]][r["index"] % 3] for r in rows)


def test_the_key_is_of_the_content_of_files(tmp_path):
    """Moved it is the same, changed by hand it is another; also where it lies in the run."""
    run(tmp_path, "bare")
    folder = tmp_path / "run"
    small_stage(folder, "prompts", n=3)
    key = lambda **said: open_stage("text2image", resolve(P.Text2imageConfig, P.TEXT2IMAGE_PRESETS["tiny"], said), folder, "key").identity
    one, two = tmp_path / "one.json", tmp_path / "elsewhere.json"
    one.write_text(json.dumps({c: [f"my {c}"] for c in "0123456789"}))
    two.write_text(one.read_text())
    first = key(prompts=str(one))
    assert first == key(prompts=str(two)) and str(tmp_path) not in json.dumps(first["settings"]["prompts"])
    one.write_text(one.read_text().replace("my 3", "your 3"))
    assert key(prompts=str(one)) != first == key(prompts=str(two))
    was, file = key(), folder / "prompts" / "prompts.json"
    file.write_text(file.read_text().replace("a", "e", 1))
    now = key()
    assert (
        was["settings"] == now["settings"]
        and was["inputs"]["prompts"] != now["inputs"]["prompts"]
        and was["inputs"]["splits"] == now["inputs"]["splits"]
    )
    lora = tmp_path / "l.safetensors"
    save_file({"a": torch.zeros(2)}, lora)
    before = key(lora=str(lora))
    save_file({"a": torch.ones(2)}, lora)
    assert key(lora=str(lora)) != before
