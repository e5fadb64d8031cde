"""The FiLM-ResNet pair of the few-shot GAN and the small modern pair: sizes, FiLM and projection by hand, heads, fine-tuning modes, refusals."""

import copy

import pytest
import torch
from torch import nn

from synthlit.core import SettingError, global_rng, load_tensors, randn, save_tensors
from synthlit.gan.film import (
    MODES,
    FilmBlock,
    FilmDiscriminator,
    FilmGenerator,
    TinyR3Discriminator,
    TinyR3Generator,
    class_parameters,
    halvings,
    linear_parameters,
    trainable,
)
from synthlit.gan.models import build_gan
from synthlit.networks import size_of, summary

PAIRS = [(FilmGenerator, FilmDiscriminator), (TinyR3Generator, TinyR3Discriminator)]
SHAPES = [(3, 32), (1, 28), (1, 8), (3, 64)]


def new(kind, *args, seed=0, **kw):
    with global_rng(seed, "test"):
        return kind(*args, **kw)


def names(net, params) -> set:
    ids = {id(p) for p in params}
    return {n for n, p in net.named_parameters() if id(p) in ids}


@pytest.mark.parametrize(
    "kind, kw, size",
    [
        (FilmGenerator, dict(classes=47), 120_091),
        (FilmDiscriminator, dict(classes=47), 671_921),
        (FilmGenerator, dict(classes=1623, width=1024), 17_708_163),
    ],
)
def test_published_parameter_counts(kind, kw, size):
    with torch.device("meta"):
        assert size_of(kind(3, 32, **kw)) == size


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0].__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_networks_fit_the_interface(pair, shape, capsys):
    G, D = (new(k, *shape, 5) for k in pair)
    z, y = randn((3, G.z), 0, "z"), torch.tensor([0, 4, 4])
    x = G(z, y)
    assert x.shape == (3, shape[0], shape[1], shape[1]) and x.dtype == torch.float32 and x.abs().max() <= 1
    assert D.pack == 1 and D(x, y).shape == D(x, None).shape == (3,)
    assert D.features(x).shape[0] == 3 and D.features(x).ndim == 2
    summary(G, z, y)
    assert f"{size_of(G):,}" in capsys.readouterr().out
    assert torch.allclose(G(z[:1], y[:1]), x[:1], atol=1e-5), "an image does not depend on its neighbours"
    (D(x, y).sum() + D(x, None).sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in G.parameters())


@pytest.mark.parametrize("up", [False, True])
def test_film_by_hand(up):
    block = new(FilmBlock, 6, 6, 4, 3, up).double()
    h, z, y = randn((2, 6, 4, 4), 0, "h").double(), randn((2, 3), 0, "z").double(), torch.tensor([1, 3])
    out = block(h, z, block.embed(y))
    for n in range(2):
        code = torch.cat([z[n], block.embed.weight[y[n]]])
        vector = [max(0.0, (block.film.weight[k] @ code + block.film.bias[k]).item()) for k in range(12)]
        inner, short = block.second(block.first(h[n : n + 1]))[0], block.shortcut(h[n : n + 1])[0]
        for c in range(6):
            assert torch.allclose(out[n, c], (vector[c] * inner[c] + vector[6 + c] + short[c]).clamp(min=0), atol=1e-12)


def test_each_block_has_its_own_embedding():
    G = new(FilmGenerator, 3, 32, 5)
    z, y = randn((1, G.z), 0, "z"), torch.tensor([2])
    before = G(z, y)
    assert len(G.blocks) == 8
    for b in G.blocks:
        changed = copy.deepcopy(G)
        with torch.no_grad():
            changed.blocks[list(G.blocks).index(b)].embed.weight[2] += 5
        assert not torch.equal(changed(z, y), before)
        assert torch.equal(changed(z, torch.tensor([1])), G(z, torch.tensor([1])))


def test_mixed_classes():
    G = new(FilmGenerator, 1, 8, 5)
    z, a, b = randn((3, G.z), 0, "z"), torch.tensor([0, 1, 2]), torch.tensor([3, 4, 3])
    assert torch.equal(G(z, a, b, share=1.0), G(z, a)) and torch.equal(G(z, a, b, share=0.0), G(z, b))
    half, table = G(z, a, b, share=0.5), copy.deepcopy(G)
    with torch.no_grad():
        for m in table.blocks:
            m.embed.weight[a] = (m.embed.weight[a] + m.embed.weight[b]) / 2
    assert torch.allclose(half, table(z, a), atol=1e-6)


@pytest.mark.parametrize("kind", [FilmDiscriminator, TinyR3Discriminator])
def test_unconditional_score_ignores_the_labels(kind):
    D = new(kind, 3, 32, 5).eval()
    x, y = randn((4, 3, 32, 32), 0, "x").tanh(), torch.tensor([0, 1, 2, 4])
    free, bound = D(x, None), D(x, y)
    D(x, None).sum().backward()
    assert D.embed.weight.grad is None
    with torch.no_grad():
        D.embed.weight.mul_(3).add_(1)
    assert torch.equal(D(x, None), free) and not torch.allclose(D(x, y), bound)
    with torch.no_grad():
        D.embed.weight.zero_()
    assert torch.allclose(D(x, y), free), "what the labels add is the projection alone"


def test_projection_by_hand():
    D = new(FilmDiscriminator, 3, 32, 5).eval().double()
    x, y = randn((3, 3, 32, 32), 0, "x").double(), torch.tensor([0, 4, 2])
    psi = (D.features(x) @ D.psi.weight.T + D.psi.bias).relu()
    by_hand = psi @ D.phi.weight[0] + D.phi.bias + (psi * D.embed.weight[y]).sum(1)
    assert torch.allclose(D(x, y), by_hand)


def test_infogan_head():
    D = new(FilmDiscriminator, 3, 32, 5, z=7).eval()
    x = randn((3, 3, 32, 32), 0, "x")
    mean, log_std = D.posterior(D.features(x))
    assert mean.shape == log_std.shape == (3, 7)
    assert torch.equal(torch.cat([log_std, mean], 1), D.info(D.features(x))), "the mean is the second half"
    mean.square().sum().backward()
    grads = {n: p.grad for n, p in D.named_parameters()}
    assert all(g is not None for n, g in grads.items() if n.startswith(("info", "body")))
    assert all(g is None for n, g in grads.items() if n.startswith(("psi", "phi", "embed")))


def test_every_weight_of_the_discriminator_but_the_table_is_normalised():
    D = new(FilmDiscriminator, 3, 32, 5)
    for _ in range(20):
        D.posterior(D.features(torch.zeros(1, 3, 32, 32))), D(torch.zeros(1, 3, 32, 32), None)
    layers = [m for m in D.eval().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 5 * 2 + 4 + 2 + 3
    for m in layers:
        assert torch.linalg.matrix_norm(m.weight.detach().flatten(1), 2) == pytest.approx(1, abs=0.05)


def test_modes_partition_as_published():
    G, D = new(FilmGenerator, 3, 32, 5), new(FilmDiscriminator, 3, 32, 5)
    assert names(G, class_parameters(G)) == {f"blocks.{i}.embed.weight" for i in range(8)}
    assert names(G, linear_parameters(G)) == {f"blocks.{i}.film.{w}" for i in range(8) for w in ("weight", "bias")}
    assert names(D, class_parameters(D)) == {"embed.weight"}
    assert {n.split(".")[0] for n in names(D, linear_parameters(D))} == {"psi", "phi", "info"}
    for net in (G, D, *(new(k, 3, 32, 5) for k in PAIRS[1])):
        parts = [names(net, trainable(net, m)) for m in MODES]
        assert parts[0] < parts[1] < parts[2] == {n for n, _ in net.named_parameters()}
        assert not names(net, class_parameters(net)) & names(net, linear_parameters(net))
        assert all(len(trainable(net, m)) == len({id(p) for p in trainable(net, m)}) for m in MODES), "none twice"
        convs = {
            n for n, _ in net.named_parameters() if n.startswith(("body", "first", "last")) or ".first." in n or ".second." in n or ".shortcut." in n
        }
        assert parts[2] - parts[1] == convs | (parts[2] & {"start", "basis"})


def test_modes_of_the_dcgan():
    G, D = build_gan("pair", (1, 8, 8), 10, 8, 8, 8)
    assert names(G, trainable(G, "embed")) == {"embed.weight", "norms.0.gain.weight", "norms.0.bias.weight"}
    assert names(D, trainable(D, "linear")) == {"embed.weight", "linear.weight", "linear.bias"}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_moves_what_the_mode_allows(mode):
    G, D = new(FilmGenerator, 1, 8, 6, width=16, z=8), new(FilmDiscriminator, 1, 8, 6, width=4, z=8)
    z, y = randn((4, 8), 0, "z"), torch.tensor([4, 5, 4, 5])
    for net in (G, D):
        old = copy.deepcopy(dict(net.named_parameters()))
        opt = torch.optim.AdamW(trainable(net, mode), 1e-2, weight_decay=0)
        h = D.features(G(z, y))
        mean, log_std = D.posterior(h)
        loss = (D.score(h, y) + ((z - mean) / log_std.exp()).square().sum(1) / 2 + log_std.sum(1)).mean()
        opt.zero_grad(), loss.backward(), opt.step()
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, old[n])}
        allowed = names(net, trainable(net, mode))
        assert moved <= allowed and (moved == allowed or mode == "all")
        for n, p in net.named_parameters():
            if "embed" in n:
                assert torch.equal(p[:4], old[n][:4]), "classes that were not seen stay as they were"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: p[0].__name__)
def test_state_travels_exactly(pair, tmp_path):
    x, y = randn((2, 3, 32, 32), 0, "x"), torch.tensor([1, 2])
    for kind in pair:
        a, b = new(kind, 3, 32, 5), new(kind, 3, 32, 5, seed=1)
        args = (randn((2, a.z), 0, "z"), y) if kind is pair[0] else (x, y)
        a(*args)  # in training spectral norm moves its vectors
        save_tensors(tmp_path / "net.safetensors", a.state_dict())
        b.load_state_dict(load_tensors(tmp_path / "net.safetensors")[0])
        twin = copy.deepcopy(a)
        for _ in range(2):
            out = a(*args)
            assert torch.equal(out, b(*args)) and torch.equal(out, twin(*args))


def test_tiny_r3_has_no_normalisation_and_starts_as_the_identity():
    nets = [new(k, 3, 32, 5) for k in PAIRS[1]]
    assert not [m for net in nets for m in net.modules() if "Norm" in type(m).__name__]
    D = nets[1]
    x = randn((2, 3, 32, 32), 0, "x")
    assert torch.allclose(D(3 * x, None), 3 * D(x, None), rtol=1e-3, atol=1e-4)
    blocks = [m for net in nets for m in net.body if type(m).__name__ == "Bottleneck"]
    assert len(blocks) == 6 and all(m.mix.groups == m.mix.in_channels // 16 for m in blocks)
    one, many = new(TinyR3Discriminator, 3, 32, 5, blocks=1), new(TinyR3Discriminator, 3, 32, 5, blocks=16)
    spread = (many.body[0].mix.weight.std() / one.body[0].mix.weight.std()).item()
    assert spread == pytest.approx(16**-0.25, rel=0.05)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_gradient_penalty_reaches_every_weight_of_tiny_r3(stride):
    D = new(TinyR3Discriminator, 3, 32, 5, width=8, stride=stride)
    with torch.no_grad():
        for m in D.modules():
            if hasattr(m, "narrow"):
                m.narrow.weight.normal_(std=0.1)
    x = randn((2, 3, 32, 32), 0, "x").requires_grad_()
    (g,) = torch.autograd.grad(D(x, torch.tensor([0, 1])).sum(), x, create_graph=True)
    g.square().sum().backward()
    silent = {n for n, p in D.named_parameters() if p.grad is None}
    assert silent == {"linear.bias"}


def test_halvings():
    assert [halvings(s, 2) for s in (2, 3, 4, 8, 27, 28, 32, 64)] == [0, 0, 1, 2, 0, 2, 4, 4]


@pytest.mark.parametrize(
    "kind, kw, said",
    [
        (FilmGenerator, dict(size=27), "size = 27.*28"),
        (FilmGenerator, dict(size=2), "size = 2.*4"),
        (FilmGenerator, dict(width=40), "width = 40.*try 48"),
        (FilmGenerator, dict(levels=5), "levels = 5.*4 times"),
        (FilmGenerator, dict(levels="2"), "levels = 2"),
        (FilmGenerator, dict(blocks=[1, 1]), "blocks.*4"),
        (FilmGenerator, dict(blocks=-1), "blocks"),
        (FilmGenerator, dict(channels=0), "channels = 0"),
        (FilmGenerator, dict(classes=2.5), "classes = 2.5"),
        (FilmDiscriminator, dict(size=3), "size = 3"),
        (FilmDiscriminator, dict(width=0), "width = 0"),
        (TinyR3Generator, dict(size=27), "size = 27.*28"),
        (TinyR3Discriminator, dict(size=6), "size = 6.*8"),
        (TinyR3Discriminator, dict(stride=3), "stride = 3"),
        (TinyR3Generator, dict(width=12), "group = 16.*try 8"),
        (TinyR3Generator, dict(blocks=0), "blocks = 0"),
    ],
)
def test_what_cannot_be_built_is_refused(kind, kw, said):
    with pytest.raises(SettingError, match=said):
        kind(**(dict(channels=3, size=32, classes=5) | kw))


def test_unknown_mode_is_refused():
    with pytest.raises(SettingError, match="did you mean 'linear'"):
        trainable(nn.Linear(1, 1), "lineer")
