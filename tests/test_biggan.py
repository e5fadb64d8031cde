"""BigGAN and BigGAN-deep: parameter counts of the published networks, spectral norm beside PyTorch's, who is told what, and what cannot be built."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from synthlit.core import SettingError, global_rng, load_tensors, randn, save_tensors
from synthlit.gan import biggan
from synthlit.gan.biggan import Attention, BigGANDeepDiscriminator, BigGANDeepGenerator, BigGANDiscriminator, BigGANGenerator, Blur, CondNorm, Stage
from synthlit.networks import size_of, summary

DEEP, PLAIN = (BigGANDeepGenerator, BigGANDeepDiscriminator), (BigGANGenerator, BigGANDiscriminator)
VARIANTS = [
    (DEEP, {}, {}),
    (DEEP, dict(skip="identity", depth=1), dict(skip="identity", depth=3)),
    (DEEP, dict(join="concat", hier=False), dict(join="concat", blur=True)),
    (DEEP, dict(attention=False), dict(attention=False, skip="identity", join="concat")),
    (PLAIN, {}, {}),
    (PLAIN, dict(hier=False, join="concat"), dict(wide=False, blur=True)),
    (PLAIN, dict(attention=False), dict(attention=False, join="concat")),
]


def built(make, *a, seed=0, **k):
    """A network of width 8 at an address."""
    with global_rng(seed, "test.biggan"):
        return make(*a, **{"width": 8, **k})


def count(make, *a, **k) -> int:
    with torch.device("meta"):
        return size_of(make(*a, **k))


def noise(n=4, z=128, stream="z"):
    return randn((n, z), 0, stream), torch.arange(n)


@pytest.mark.parametrize(
    "channels, classes, g, d",
    [(3, 10, 9338884, 3177730), (3, 100, 9350404, 3223810), (1, 10, 9329666, 3175426)],
)
def test_published_sizes(channels, classes, g, d):
    assert count(BigGANDeepGenerator, channels, 32, classes) == g and count(BigGANDeepDiscriminator, channels, 32, classes) == d


def test_sizes_that_others_counted():
    """compare_gan asserts the first two; 1809.11096 (appendix B) gives millions for BigGAN-deep, whose released generator has 125 channels too many."""
    assert count(BigGANGenerator, 3, 128, 1000, width=96, z=120) == 70433988
    assert count(BigGANDiscriminator, 3, 128, 1000, width=96) == 87982370
    deep = count(BigGANDeepGenerator, 3, 128, 1000, skip="identity") + 125 * (128 * 9 + 1)
    assert (round(deep / 1e6, 1), round(count(BigGANDeepDiscriminator, 3, 128, 1000, skip="identity") / 1e6, 1)) == (50.4, 34.6)


@pytest.mark.parametrize("nets, of_g, of_d", VARIANTS)
def test_every_variant_plays_and_every_part_learns(nets, of_g, of_d):
    G, D = built(nets[0], 3, 32, 10, **of_g), built(nets[1], 3, 32, 10, **of_d)
    for net in (G, D):
        for m in net.modules():
            if isinstance(m, Attention):
                nn.init.constant_(m.sigma, 0.5)
    z, y = noise()
    fake = G(z, y)
    assert fake.shape == (4, 3, 32, 32) and fake.abs().max() <= 1 and D.pack == 1 and G.z == 128
    score = D(fake, y)
    assert score.shape == (4,)
    params = [*G.named_parameters(), *D.named_parameters()]
    grads = torch.autograd.grad(score.sum(), [p for _, p in params], allow_unused=True)
    assert not [n for (n, _), g in zip(params, grads) if g is None or not g.isfinite().all() or not g.abs().sum()]
    x = fake.detach().requires_grad_()
    (slope,) = torch.autograd.grad(D(x, y).sum(), x, create_graph=True)  # R1 differentiates this once more
    slope.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in D.parameters())


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("nets", [DEEP, PLAIN])
def test_larger_ladders(nets, size):
    z = 128 if nets is DEEP else 120
    G, D = built(nets[0], 1, size, 3, z=z).eval(), built(nets[1], 1, size, 3).eval()
    with torch.no_grad():
        x = G(*noise(2, z))
        maps = D.features(x)
    assert x.shape == (2, 1, size, size) and maps[-1].shape[2:] == (4, 4) and D(x, torch.zeros(2, dtype=torch.int64)).shape == (2,)
    looks = [i for net in (G, D) for i, s in enumerate(net.stages) if s.attention is not None]
    assert looks == [{64: 3, 128: 4}[size] - 1, 0]  # the map of half the image's side


def test_spectral_norm_finds_the_largest_singular_value():
    """After many passes the weight in use is that of PyTorch's spectral norm, and so is its gradient."""
    w = randn((12, 5, 3, 3), 0, "w") * 4
    ours, theirs = biggan.conv(5, 12, 3), spectral_norm(nn.Conv2d(5, 12, 3), n_power_iterations=1, eps=1e-12)
    grads = []
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.parametrizations.weight.original.copy_(w)
            for _ in range(300):
                used = layer.weight
        assert abs(torch.linalg.matrix_norm(used.flatten(1), 2) - 1) < 1e-4
        grads += torch.autograd.grad((layer.weight * randn(w.shape, 0, "g")).sum(), layer.parametrizations.weight.original)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-4) and torch.allclose(*grads, atol=1e-4)


def test_an_averaged_u_does_not_enlarge_the_weights():
    ours, theirs = biggan.linear(6, 9).eval(), spectral_norm(nn.Linear(6, 9)).eval()
    before = ours.weight, theirs.weight
    for state in (ours.state_dict(), theirs.state_dict()):
        for k in state:
            if k.endswith((".u", "._u", "._v")):
                state[k].mul_(0.5)
    assert torch.allclose(ours.weight, before[0]) and torch.allclose(theirs.weight, 4 * before[1])


@pytest.mark.parametrize("make", [*DEEP, *PLAIN])
def test_all_weights_in_use_have_norm_one(make):
    net = built(make, 1, 32, 10)
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding)) and m is not (net.embed if hasattr(net, "z") else None)]
    assert all(hasattr(m, "parametrizations") for m in layers)
    for m in layers:
        w = m.parametrizations.weight.original
        gram = w.flatten(1) @ w.flatten(1).T if len(w) <= w[0].numel() else w.flatten(1).T @ w.flatten(1)
        assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-4)  # orthogonal at the start
        assert getattr(m, "bias", None) is None or not m.bias.any()
        with torch.no_grad():
            w.mul_(3).add_(randn(w.shape, 0, "spoil") * w.std() * 3)
            for _ in range(100):
                used = m.weight
        assert 1 - 1e-4 < torch.linalg.matrix_norm(used.flatten(1), 2) < 1.03


def test_u_moves_in_training_only_and_a_zero_weight_is_no_nan():
    layer = biggan.linear(5, 7)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(randn((7, 5), 0, "w"))
    u = layer.parametrizations.weight[0].u
    start = u.clone()
    layer.eval().weight  # noqa: B018 looking at the weight is a pass
    assert torch.equal(u, start)
    layer.train().weight  # noqa: B018
    assert not torch.equal(u, start)
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    assert not layer.weight.any()


def test_norm_is_single_precision_under_autocast():
    layer = biggan.linear(64, 64).eval()
    plain = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, plain) and layer(torch.zeros(2, 64)).dtype == torch.bfloat16


def test_attention_starts_as_the_identity():
    att, x = Attention(16), randn((2, 16, 8, 8), 0, "x")
    assert torch.equal(att(x), x)
    with torch.no_grad():
        att.sigma.fill_(2)
        q, k, v = (f(x).flatten(2) for f in (att.eval().query, lambda x: F.max_pool2d(att.key(x), 2), lambda x: F.max_pool2d(att.value(x), 2)))
        seen = F.scaled_dot_product_attention(q.mT, k.mT, v.mT, scale=1.0).mT.reshape(2, 8, 8, 8)
        assert torch.allclose(att(x), x + 2 * att.out(seen), atol=1e-5)


def test_cond_norm_is_one_plus_linear():
    cn, h, c = CondNorm(4, 6).eval(), randn((3, 4, 5, 5), 0, "h"), randn((3, 6), 0, "c")
    gain, bias = c @ cn.gain.weight.T, c @ cn.bias.weight.T
    assert torch.allclose(cn(h, c), cn.bn(h) * (1 + gain)[:, :, None, None] + bias[:, :, None, None])
    assert torch.equal(cn(h, 0 * c), cn.bn(h)) and (cn.bn.eps, cn.bn.momentum, cn.bn.affine) == (1e-5, 0.1, False)


@pytest.mark.parametrize("make", [BigGANDeepDiscriminator, BigGANDiscriminator])
def test_the_label_enters_through_the_embedding_alone(make):
    D, x = built(make, 1, 32, 10).eval(), randn((4, 1, 32, 32), 0, "x").clamp(-1, 1)
    a, b = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 5, 9, 3])
    with torch.no_grad():
        h = F.relu(D.features(x)[-1]).sum((2, 3))
        e = D.embed.weight
        assert torch.allclose(D(x, a) - D(x, b), ((e[a] - e[b]) * h).sum(1), rtol=1e-3, atol=1e-3)
        alone = D(x)
        D.embed.parametrizations.weight.original.mul_(-1)
        assert torch.equal(D(x), alone) and not torch.allclose(D(x, a), alone)


def stage_maps(G, z, y) -> list:
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in (G.linear, *G.stages)]
    with torch.no_grad():
        G(z, y)
    for h in hooks:
        h.remove()
    return seen


def test_latents_reach_every_block():
    z, y = noise()
    for make in (BigGANDeepGenerator, BigGANGenerator):
        G = built(make, 1, 32, 10).eval()
        told = []
        for m in G.modules():
            if isinstance(m, CondNorm):
                m.register_forward_hook(lambda m, args, out, told=told: told.append(args[1]))
        base = stage_maps(G, z, y)
        e = G.embed(y)
        if make is BigGANDeepGenerator:
            assert len(told) == 24 and all(torch.equal(c, torch.cat([z, e], 1)) for c in told)
        else:
            assert len(told) == 6 and all(torch.equal(c, torch.cat([e, z[:, 32 * (n // 2 + 1) : 32 * (n // 2 + 2)]], 1)) for n, c in enumerate(told))
        for piece in range(4):
            other = z.clone()
            other[:, 32 * piece : 32 * (piece + 1)] *= -1
            changed = [not torch.equal(a, b) for a, b in zip(base, stage_maps(G, other, y))]
            assert changed == [make is BigGANDeepGenerator or n >= piece for n in range(4)]


def test_without_hierarchy_the_norms_hear_the_label_alone():
    z, y = noise()
    for make in (BigGANDeepGenerator, BigGANGenerator):
        G = built(make, 1, 32, 10, hier=False)
        first, told = G.latents(z, G.embed(y))
        assert torch.equal(first, z) and len(told) == 3 and all(torch.equal(c, G.embed(y)) for c in told)


def test_skip_convolutions_commute_with_resizing():
    """The reference runs them on the larger map in some places; the result is the same, for the blur too."""
    f, x = biggan.conv(4, 6, 1).eval(), randn((2, 4, 8, 8), 0, "x")
    assert torch.allclose(f(biggan.double(x)), biggan.double(f(x)), atol=1e-6)
    assert torch.allclose(f(Blur()(x)), Blur()(f(x)), atol=1e-6) and torch.allclose(f(F.avg_pool2d(x, 2)), F.avg_pool2d(f(x), 2), atol=1e-6)


@pytest.mark.parametrize("make", [*DEEP, *PLAIN])
def test_state_is_plain_tensors_and_complete(make, tmp_path):
    net, twin = built(make, 1, 32, 10), built(make, 1, 32, 10, seed=1).eval()
    args = noise() if hasattr(net, "z") else (randn((4, 1, 32, 32), 0, "x"), torch.arange(4))
    with torch.no_grad():
        net(*args)  # moves u and the running statistics
        save_tensors(tmp_path / "net.safetensors", net.state_dict())
        twin.load_state_dict(load_tensors(tmp_path / "net.safetensors")[0])
        assert torch.equal(net.eval()(*args), twin(*args)) and torch.equal(copy.deepcopy(net)(*args), twin(*args))


def test_equal_addresses_give_equal_networks():
    a, b, c = (built(BigGANDeepGenerator, 1, 32, 10, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["embed.weight"], c["embed.weight"])


def test_summary_leaves_the_network_as_it_was(capsys):
    G = built(BigGANDeepGenerator, 3, 32, 10)
    before = {k: v.clone() for k, v in G.state_dict().items()}
    rows = summary(G, *noise())
    assert G.training and all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    assert not any(m._forward_hooks for m in G.modules())
    assert sum(n for name, *_, n in rows if "." not in name) + sum(size_of(s) for s in G.stages) == size_of(G)
    assert capsys.readouterr().out.count("\n") == len(rows) + 1 and sum(r[1] == Stage.__name__ for r in rows) == 3


@pytest.mark.parametrize(
    "make, args, kw, named, way_out",
    [
        (BigGANDeepGenerator, (1, 28, 10), {}, "size=28", "32"),
        (BigGANDeepDiscriminator, (1, 512, 10), {}, "size=512", "256"),
        (BigGANGenerator, (1, 32, 10), dict(width=30), "width=30", "24"),
        (BigGANDiscriminator, (1, 32, 10), dict(width=0), "width=0", "8"),
        (BigGANGenerator, (1, 64, 10), {}, "z=128", "125"),
        (BigGANDeepGenerator, (0, 32, 10), {}, "channels=0", "1"),
        (BigGANDeepDiscriminator, (0, 32, 10), {}, "channels=0", "1"),
        (BigGANDiscriminator, (0, 32, 10), {}, "channels=0", "1"),
        (BigGANGenerator, (1, 32, 0), {}, "classes=0", "1"),
        (BigGANDeepGenerator, (1, 32, 10), dict(depth=0), "depth=0", "1"),
        (BigGANDeepGenerator, (1, 32, 10), dict(z=0), "z=0", "1"),
        (BigGANGenerator, (1, 32, 10), dict(z=0), "z=0", "1"),
        (BigGANDeepGenerator, (1, 32, 10), dict(skip="none"), "skip='none'", "identity"),
        (BigGANDiscriminator, (1, 32, 10), dict(join="mul"), "join='mul'", "concat"),
    ],
)
def test_what_cannot_be_built_is_named(make, args, kw, named, way_out):
    with pytest.raises(SettingError) as e:
        make(*args, **{"width": 8, **kw})
    assert named in str(e.value) and way_out in str(e.value).replace(named, "")
