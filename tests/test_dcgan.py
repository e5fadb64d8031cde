"""The networks of the DCGAN/WGAN study: published sizes, every norm in every network, virtual batch norm, errors that say what is possible."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synthlit.core import SettingError, global_rng, load_tensors, randn, save_tensors
from synthlit.gan.dcgan import (
    DCGAN_KINDS,
    DISCRIMINATORS,
    GENERATORS,
    NORMS,
    DCGANDiscriminator,
    DCGANGenerator,
    VirtualBatchNorm,
    build_dcgan,
    first_map,
    mixes_batch,
    norm_names,
    shapes,
)
from synthlit.networks import size_of, summary

NORM_NAMES = [*NORMS, "none", "batch+dropout", "virtualbatch+dropout"]
SIZES = [(3, 32), (1, 28), (1, 8)]


def images(n, channels=3, size=32, address=0):
    return randn((n, channels, size, size), address, "test.x").tanh()


def discriminator(kind, norm, channels=3, size=32, width=4):
    with global_rng(0, "test.init"):
        D = DCGANDiscriminator(channels, size, 10, kind, width, norm, reference=4)
    if D.needs_reference:
        D.set_reference(images(4, channels, size, address=9), torch.arange(4))
    return D


def generator(kind="dcgan", norm="batch", channels=3, size=32):
    with global_rng(0, "test.init"):
        return DCGANGenerator(channels, size, 10, kind, 4, 8, 16, norm, reference=4)


def test_published_sizes():
    assert [size_of(n) for n in build_dcgan("dcgan", width_g=64, width_d=64)] == [3_809_184, 674_560]
    assert [size_of(n) for n in build_dcgan("dcgan")] == [1_249_312, 178_560]
    assert [size_of(n) for n in build_dcgan("wgan_gp")] == [4_727_808, 673_792]


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("channels, size", SIZES)
def test_generators_make_images(kind, channels, size):
    if (kind, size) == ("dcgan_4x4_conv", 28):
        with pytest.raises(SettingError, match="size = 28.*8, 16, 32, 64"):
            generator(kind, "none", channels, size)
        return
    for norm in NORM_NAMES:
        G = generator(kind, norm, channels, size)
        x = G(randn((3, G.z), 0, "test.z"), torch.tensor([0, 4, 9]))
        assert x.shape == (3, channels, size, size) and x.isfinite().all() and x.abs().max() <= 1
        assert G.eval()(randn((1, G.z), 0, "test.z"), torch.tensor([4])).shape == (1, channels, size, size)  # one image alone


@pytest.mark.parametrize("kind", DISCRIMINATORS)
@pytest.mark.parametrize("channels, size", SIZES)
def test_discriminators_score(kind, channels, size):
    x, y = images(3, channels, size), torch.tensor([0, 4, 9])
    for norm in NORM_NAMES:
        D = discriminator(kind, norm, channels, size).eval()
        maps = D.features(x, y)
        assert D(x, y).shape == (3,) and D.pack == 1 and all(len(m) == 3 and m.dim() == 4 for m in maps)
        assert maps[-1][0].numel() > 1  # features are maps, never the score itself
        assert torch.equal(D.head(maps[-1]).flatten(), D(x, y)) and not torch.equal(D(x, y), D(x, y.flip(0)))


def test_widths_are_those_of_the_study():
    x, y = images(2), torch.tensor([0, 1])
    seen = {k: [tuple(m.shape[1:3]) for m in discriminator(k, "none", width=2).features(x, y)] for k in DISCRIMINATORS}
    assert seen["dcgan"] == seen["wgan"] == seen["dcgan_spectral"] == seen["wgan_spectral"] == [(2, 16), (4, 8), (8, 4)]
    assert seen["dcgan_fc"] == [(8, 16), (16, 8), (16, 4), (32, 2)]
    assert seen["dcgan_deeper"] == [(12, 32), (12, 32), (12, 16), (24, 16), (24, 16), (24, 8), (24, 4)]
    z = {k: [s[1:3] for n, s, _ in shapes(G, randn((2, G.z), 0, "z"), y) if n.startswith("Conv")] for k in GENERATORS for G in [generator(k)]}
    assert z["dcgan"] == [(32, 4), (16, 8), (8, 16), (3, 32)] and z["dcgan_fc"] == [(16, 8), (8, 16), (3, 32)]
    assert z["dcgan_4x4"] == [(32, 7), (16, 14), (8, 28), (3, 32)] and z["dcgan_4x4_conv"] == [(32, 8), (32, 16), (32, 34), (3, 32)]


@pytest.mark.parametrize("kind, norm", [*itertools.product(DISCRIMINATORS, NORM_NAMES)])
def test_mixes_batch_is_true_exactly_where_a_score_depends_on_others(kind, norm):
    D, x, y, scores = discriminator(kind, norm), images(4), torch.arange(4), []
    for last in (x[-1:], -x[-1:]):
        with global_rng(0, "test.dropout"):
            scores.append(copy.deepcopy(D)(torch.cat([x[:-1], last]), y)[:-1])
    assert torch.equal(*scores) != mixes_batch(D)
    assert mixes_batch(D) == ("batch" in norm_names(norm))


@pytest.mark.parametrize("kind, norm", [*itertools.product(DISCRIMINATORS, NORM_NAMES)])
def test_gradient_of_a_gradient(kind, norm):
    """What a gradient penalty needs, in every network; it must reach the first layer."""
    D, x = discriminator(kind, norm), images(2).requires_grad_()
    (g,) = torch.autograd.grad(D(x, torch.tensor([1, 2])).sum(), x, create_graph=True)
    (g.flatten(1).norm(dim=1) - 1).square().mean().backward()
    first = next(p for p in D.blocks.parameters())
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.abs().max() > 0


def test_no_label_no_embedding():
    D, x = discriminator("wgan", "instance"), images(2)
    a = D(x, None)
    nn.init.normal_(D.embed.weight)
    assert torch.equal(D(x), a)


def test_virtual_batch_norm_is_batch_norm_with_the_reference():
    h = randn((9, 3, 4, 5), 0, "test.h") * 4 + 100  # far from zero: no cancellation
    norm = VirtualBatchNorm(3, 6)
    nn.init.normal_(norm.gain), nn.init.normal_(norm.bias)
    w, b = norm.gain.flatten(), norm.bias.flatten()
    out = norm(h)
    for i in range(6, 9):
        want = F.batch_norm(torch.cat([h[:6], h[i : i + 1]]), None, None, w, b, training=True)[-1]
        assert torch.allclose(out[i], want, atol=1e-4)
    assert torch.allclose(out[:6], F.batch_norm(h[:6], None, None, w, b, training=True), atol=1e-4)


def test_virtual_batch_norm_has_no_memory():
    """Equal inputs give equal outputs, call after call, in training and evaluation, alone or together."""
    for kind in GENERATORS:
        G = generator(kind, "virtualbatch")
        z, y = randn((4, G.z), 0, "test.z"), torch.arange(4)
        G(z, y)  # the batch norm of dcgan_fc's linear layer has a memory of its own: it is asked in evaluation only
        assert torch.allclose(G.eval()(z, y)[:1], G(z[:1], y[:1]), atol=1e-6) and torch.equal(G(z, y), G(z, y))
    D = discriminator("dcgan", "virtualbatch")
    x = images(3)
    assert torch.equal(D(x, y[:3]), D(x, y[:3])) and torch.equal(D.eval()(x, y[:3]), D.train()(x, y[:3]))


def test_reference_is_set_once_and_said():
    D, x, y = DCGANDiscriminator(3, 32, 10, width=4, norm="virtualbatch", reference=4), images(4), torch.arange(4)
    with pytest.raises(SettingError, match="set_reference"):
        D(x, y)
    with pytest.raises(SettingError, match=r"expected \(4, 3, 32, 32\)"):
        D.set_reference(x[:3], y[:3])
    assert D.needs_reference
    D.set_reference(x, y)
    with pytest.raises(SettingError, match="already"):
        D.set_reference(-x, y)
    assert not D.needs_reference and torch.equal(D.ref_x, x)
    plain = DCGANDiscriminator(3, 32, 10, width=4)
    assert not plain.needs_reference
    with pytest.raises(SettingError, match="only a network with norm = virtualbatch"):
        plain.set_reference(x, y)


@pytest.mark.parametrize("kind", DCGAN_KINDS)
def test_saved_and_loaded(kind, tmp_path):
    """All that a network is goes through a file of tensors: reference batch, power iteration, running statistics."""
    small = dict(width_g=4, width_d=4, latent=8, reference=4)
    if kind == "default":
        small.update(norm_g="virtualbatch", norm_d="virtualbatch")
    pair, fresh = build_dcgan(kind, seed=1, **small), build_dcgan(kind, seed=2, **small)
    if pair[1].needs_reference:
        pair[1].set_reference(images(4), torch.arange(4))
    x, y = images(2), torch.tensor([3, 5])
    pair[1](x, y)  # moves the power iteration and the running statistics
    for name, net, other in zip("GD", pair, fresh):
        save_tensors(tmp_path / f"{name}.safetensors", net.state_dict())
        other.load_state_dict(load_tensors(tmp_path / f"{name}.safetensors")[0])
    z = randn((2, pair[0].z), 0, "test.z")
    assert torch.equal(pair[0].eval()(z, y), fresh[0].eval()(z, y)) and torch.equal(pair[1].eval()(x, y), fresh[1].eval()(x, y))


def test_weights_come_from_the_address():
    a, b, c = [build_dcgan("deep_dcgan", seed=s, width_g=4, width_d=4)[1].state_dict() for s in (0, 0, 1)]
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_initialisation():
    """Convolutions N(0, 0.02²), also under weight and spectral norm; gains of batch norm N(1, 0.02²)."""
    for G, D in (build_dcgan("wgan_gp"), build_dcgan("deep_dcgan", norm_d="dropout+batch")):
        for net in (G, D):
            convs = [m.weight.detach() if not hasattr(m, "parametrizations") else drawn(m) for m in net.modules() if hasattr(m, "kernel_size")]
            assert len(convs) >= 3 and all(abs(w.std() - 0.02) < 0.003 for w in convs if w.numel() > 1000)
            norms = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
            assert all(abs(w.mean() - 1) < 0.01 and abs(w.std() - 0.02) < 0.01 for w in norms)
    assert all(m.eps == 1e-5 for m in DCGANGenerator(3, 32, 10, "dcgan_fc", 4).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def drawn(m):
    """The tensor that was drawn, under weight norm (gain, direction) or spectral norm."""
    p = m.parametrizations.weight
    if hasattr(p, "original"):
        return p.original.detach()
    assert torch.allclose(m.weight, p.original1, atol=1e-6)  # weight norm starts as the identity
    assert p.original0.numel() == m.out_channels  # one gain per output channel
    return p.original1.detach()


def test_spectral_norm_is_one():
    D, x = discriminator("wgan_spectral", "instance"), images(2)
    for _ in range(30):
        D(x, torch.tensor([0, 1]))
    D.eval()
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 4 and all(abs(torch.linalg.matrix_norm(m.weight.flatten(1), 2) - 1) < 1e-2 for m in convs)


def test_dropout_of_the_deeper_one_has_its_own_places():
    D = discriminator("dcgan_deeper", "dropout")
    assert [m.p for m in D.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.5, 0.5]
    assert [m.p for m in discriminator("dcgan", "batch+dropout").modules() if isinstance(m, nn.Dropout)] == [0.4, 0.4]
    assert [type(m) for m in discriminator("dcgan", "batch+dropout").blocks[1][1:3]] == [nn.BatchNorm2d, nn.Dropout]


def test_names_of_the_study():
    ours = build_dcgan("wgan_gp", width_g=4, width_d=4)
    theirs = build_dcgan(
        "wgan_gp",
        width_g=4,
        width_d=4,
        generator="DCGAN_Generator",
        discriminator="WGAN_Spectral_Discriminator",
        norm_g="BatchNorm2d",
        norm_d="InstanceNorm2d",
    )
    assert all(torch.equal(a, b) for n, m in zip(ours, theirs) for a, b in zip(n.state_dict().values(), m.state_dict().values()))
    for name in ("DCGAN_4x4_Generator", "DCGAN_4x4_Generator_Conv", "DCGAN_Generator_FC"):
        build_dcgan(generator=name, width_g=2, latent=2)
    for name in ("DCGAN_Discriminator", "DCGAN_Spectral_Discriminator", "WGAN_Discriminator", "DCGAN_Discriminator_FC", "DCGAN_Discriminator_Deeper"):
        build_dcgan(discriminator=name, width_d=2)
    assert norm_names("BatchNorm2d+Dropout+LayerNorm+VirtualBatchNorm") == ["batch", "dropout", "layer", "virtualbatch"]


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(kind="wgangp"), "kind = 'wgangp' is unknown; did you mean 'wgan_gp'"),
        (dict(generator="dcgan_44"), "did you mean 'dcgan_4x4'"),
        (dict(generator="WGAN_Discriminator"), "generator = 'WGAN_Discriminator' is unknown"),
        (dict(discriminator="wgan_spectrl"), "did you mean 'wgan_spectral'"),
        (dict(norm_g="batch+instnce"), "unknown 'instnce'; did you mean 'instance'"),
        (dict(norm_d="batch,layer"), "norm = 'batch,layer'"),
        (dict(norm_d="none+batch"), "unknown 'none'"),
        (dict(shape=(3, 36, 36)), "size = 36"),
        (dict(shape=(3, 4, 4)), "size = 4"),
        (dict(shape=(3, 33, 33)), "size = 33"),
        (dict(shape=(3, 32, 28)), "must be square"),
        (dict(shape=(0, 32, 32)), "channels = 0"),
        (dict(generator="dcgan_4x4", shape=(3, 24, 24)), "size = 24"),
        (dict(generator="dcgan_4x4_conv", shape=(3, 4, 4)), "size = 4"),
        (dict(generator="dcgan_4x4", embed=17), "embed = 17.*multiple of 16"),
        (dict(width_g=0), "width_g = 0"),
        (dict(width_d=-1), "width_d = -1"),
        (dict(reference=0), "reference = 0"),
        (dict(gen_features=3), "unknown setting 'gen_features'"),
    ],
)
def test_what_cannot_be(settings, says):
    with pytest.raises(SettingError, match=says):
        build_dcgan(**{"latent": 4, "width_g": 2, "width_d": 2, **settings})


def test_inputs_that_do_not_fit():
    G, D = generator(), discriminator("dcgan", "batch")
    with pytest.raises(SettingError, match="noise of N×8, got"):
        G(torch.zeros(2, 9), torch.tensor([0, 1]))
    with pytest.raises(SettingError, match=r"images of \(3, 32, 32\), got \(1, 28, 28\)"):
        D(torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]))


@pytest.mark.parametrize("size", range(4, 129))
def test_a_size_is_made_or_refused(size):
    try:
        side, ups = first_map(size)
    except SettingError as e:
        assert f"size = {size}" in str(e)
        return
    assert 3 <= side <= 8 and ups >= 1 and side * 2**ups == size


def test_summary_counts_everything(capsys):
    x, y = images(2), torch.tensor([0, 1])
    for kind in DISCRIMINATORS:
        D = discriminator(kind, "layer")
        assert sum(n for *_, n in shapes(D, x, y)) == size_of(D) and not any(m._forward_hooks for m in D.modules())
    summary(D, x, y)
    assert f"{size_of(D):,}" in capsys.readouterr().out
