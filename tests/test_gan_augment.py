"""What the discriminator sees: each part's range and exactness, chances, addresses, gradients, half precision, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthlit.core import SettingError, randn, rng
from synthlit.gan.augment import AUGMENTS, check_policy, diff_augment, flip, offsets, recolour, rotate, rotate90, shift, translate

DIFF, ADA = "colour+translate+cutout", "flip+rotate90+shift+rotate"


def images(n=16, c=3, s=32) -> torch.Tensor:
    return randn((n, c, s, s), 0, "test.images").tanh()


def windows(image: torch.Tensor, most: int, mode: str) -> set:
    s, padded = image.shape[-1], np.pad(image.numpy(), ((0, 0), (most, most), (most, most)), mode)
    return {padded[:, i : i + s, j : j + s].tobytes() for i in range(2 * most + 1) for j in range(2 * most + 1)}


@pytest.mark.parametrize("part, mode", [(translate, "constant"), (shift, "symmetric")])
@pytest.mark.parametrize("s, most", [(8, 1), (20, 3), (27, 3), (28, 4), (32, 4)])
def test_translations_are_windows_of_the_padded_image(part, mode, s, most):
    x = images(1, 2, s)
    out = part(x.expand(1200, -1, -1, -1), rng(0, "a")).contiguous()
    assert {t.numpy().tobytes() for t in out} == windows(x[0], most, mode)


def test_translation_moves_by_the_drawn_pixels():
    x = images()
    for part, mode in ((translate, "constant"), (shift, "symmetric")):
        moved, places = part(x, rng(3, "a")), (offsets(x, rng(3, "a"))[:, :, 2] * 16).round().int()
        assert places.abs().max() == 4
        for t, out, (dx, dy) in zip(x, moved, places.tolist()):
            padded = torch.from_numpy(np.pad(t.numpy(), ((0, 0), (4, 4), (4, 4)), mode))
            assert torch.equal(out, padded[:, 4 + dy : 36 + dy, 4 + dx : 36 + dx])


def test_all_translations_are_equally_likely():
    places = offsets(torch.empty(81 * 400, 1, 32, 32), rng(0, "a"))[:, :, 2] * 16
    counts = torch.bincount(((places[:, 0] + 4) * 9 + places[:, 1] + 4).round().long(), minlength=81)
    assert len(counts) == 81 and ((counts - 400).float().square().sum() / 400) < 140  # chi-square, 80 degrees of freedom


def test_flipping_twice_is_nothing():
    x = images(64)
    y = flip(x, rng(0, "a"))
    assert torch.equal(flip(y, rng(0, "a")), x)
    assert all(torch.equal(b, a) or torch.equal(b, a.flip(2)) for a, b in zip(x, y)) and not torch.equal(x, y)


@pytest.mark.parametrize("s", [7, 8, 28, 32, 33, 64])
def test_quarter_turns_are_exact(s):
    x = images(32, 2, s)
    turns = rng(0, "a").integers(0, 4, 32)
    assert set(turns) == {0, 1, 2, 3}
    assert torch.equal(rotate90(x, rng(0, "a")), torch.stack([t.rot90(int(k), (1, 2)) for t, k in zip(x, turns)]))


class Turned:
    """A stand-in for the generator: one angle for all."""

    def __init__(self, angle: float):
        self.angle = angle

    def uniform(self, low, high, shape):
        assert (low, high) == (-np.pi, np.pi)
        return np.full(shape, self.angle)


def test_rotation_turns_about_the_centre_and_nothing_comes_from_outside():
    x = images(3)
    for k in range(4):
        assert torch.allclose(rotate(x, Turned(k * np.pi / 2)), x.rot90(k, (2, 3)), atol=1e-4)
    assert torch.allclose(rotate(torch.full((50, 1, 28, 28), 0.3), rng(0, "a")), torch.tensor(0.3), atol=1e-5)
    smooth = F.interpolate(images(1, 1, 4), size=32, mode="bicubic")
    there_and_back = rotate(rotate(smooth, Turned(0.5)), Turned(-0.5))
    assert (there_and_back - smooth)[..., 8:24, 8:24].abs().max() < 0.1


def test_colour_by_hand_and_its_ranges():
    x, r = images(2000, 3, 4), rng(0, "a")
    b, s, c = (torch.from_numpy(r.uniform(lo, hi, (2000, 1, 1, 1))).float() for lo, hi in ((-0.5, 0.5), (0, 2), (0.5, 1.5)))
    y = x + b
    y = y.mean(1, keepdim=True) + s * (y - y.mean(1, keepdim=True))
    y = y.mean((1, 2, 3), keepdim=True) + c * (y - y.mean((1, 2, 3), keepdim=True))
    out = recolour(x, rng(0, "a"))
    assert torch.allclose(out, y, atol=1e-5)
    shift = (out - x).mean((1, 2, 3))
    assert -0.5001 < shift.min() < -0.49 and 0.49 < shift.max() < 0.5001


def test_saturation_leaves_grey_alone():
    grey = images(50, 1, 8)
    tripled = recolour(grey.expand(-1, 3, -1, -1), rng(0, "a"))
    one = recolour(grey, rng(0, "a"))
    assert torch.allclose(tripled, one.expand(-1, 3, -1, -1), atol=1e-5)
    ratio = (one - one.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1) / (grey - grey.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1)
    assert 0.499 < ratio.min() and ratio.max() < 1.501, "contrast only"


@pytest.mark.parametrize("s", [8, 27, 32])
def test_cutout_is_a_clipped_square_of_half_the_side(s):
    out, side = AUGMENTS["cutout"](torch.ones(3000, 2, s, s), rng(0, "a")), int(s / 2 + 0.5)
    hole = out[:, 0] == 0
    assert torch.equal(out[:, 0], out[:, 1]) and ((out == 0) | (out == 1)).all()
    high, wide = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), high * wide) and high.max() == wide.max() == side
    assert min(high.min(), wide.min()) == side - side // 2


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name, moves", [("cutout", 1), ("colour", 1), ("rotate", 1), ("flip", 1 / 2), ("rotate90", 3 / 4), ("translate", 8 / 9)])
def test_each_image_is_changed_with_its_chance(name, moves, p):
    n = 5000
    x = images(1, 1, 8).expand(n, -1, -1, -1)
    share = (diff_augment(x, name, p, rng(0, "count")) != x).flatten(1).any(1).float().mean().item()
    chance = p * moves
    assert abs(share - chance) <= 4.5 * (chance * (1 - chance) / n) ** 0.5


def test_parts_are_applied_independently():
    x = images(1, 1, 8).abs().add(0.1).expand(20000, -1, -1, -1)
    out = diff_augment(x, "cutout+colour", 0.5, rng(0, "count"))
    plain = (out == x).flatten(1).all(1).float().mean().item()
    holed = diff_augment(x, "colour+cutout", 0.5, rng(1, "count"))
    only_hole = ((holed == x) | (holed == 0)).flatten(1).all(1).float().mean().item()
    assert abs(plain - 0.25) < 0.015 and abs(only_hole - 0.5) < 0.02


@pytest.mark.parametrize("policy", [DIFF, ADA, *AUGMENTS])
@pytest.mark.parametrize("p", [0.6, 1.0])
def test_same_address_same_images(policy, p):
    x = images()
    state = torch.get_rng_state()
    a = diff_augment(x, policy, p, rng(1, "a", 7))
    assert a.shape == x.shape and a.dtype == x.dtype and a.isfinite().all()
    assert torch.equal(a, diff_augment(x, policy, p, rng(1, "a", 7)))
    assert not torch.equal(a, diff_augment(x, policy, p, rng(1, "a", 8)))
    assert torch.equal(state, torch.get_rng_state()), "global randomness is not touched"
    assert torch.equal(x, images()), "the input is not touched"


@pytest.mark.parametrize("policy", [DIFF, ADA, *AUGMENTS])
def test_gradients_flow_and_are_right(policy):
    f = lambda x: diff_augment(x, policy, 0.7, rng(0, "a"))  # noqa: E731
    x = images(3, 3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(f, x)
    x = images().requires_grad_()
    f(x).square().sum().backward()
    assert (x.grad.flatten(1).norm(dim=1) > 0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize("policy", [DIFF, ADA, *AUGMENTS])
def test_half_precision(policy):
    x = images(64)
    half = x.bfloat16().requires_grad_()
    out = diff_augment(half, policy, 0.7, rng(0, "a"))
    out.float().square().sum().backward()
    assert out.dtype == half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()
    assert (out.detach().float() - diff_augment(x, policy, 0.7, rng(0, "a"))).abs().max() < 0.06


@pytest.mark.parametrize("policy", [DIFF, ADA])
def test_autocast_does_not_blur_the_places(policy):
    x = images()
    expected = diff_augment(x, policy, 0.7, rng(0, "a"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(diff_augment(x, policy, 0.7, rng(0, "a")), expected)


def test_nothing_to_do_returns_the_same_object():
    x = images(2)
    assert diff_augment(x, "", 1.0, rng(0, "a")) is x and diff_augment(x, f"{DIFF}+{ADA}", 0.0, rng(0, "a")) is x
    assert check_policy("") == []


def test_known_policies():
    assert check_policy(DIFF) == ["colour", "translate", "cutout"]
    assert check_policy(ADA) == ["flip", "rotate90", "shift", "rotate"]
    assert set(check_policy("+".join(AUGMENTS))) == set(AUGMENTS)


@pytest.mark.parametrize(
    "policy, said",
    [("colour+cutuot", "did you mean 'cutout'"), ("color", "did you mean 'colour'"), ("flip+", "known: colour"), ("flip rotate", "flip")],
)
def test_unknown_names_are_refused(policy, said):
    for call in (lambda: check_policy(policy), lambda: diff_augment(images(1), policy, 0.0, rng(0, "a"))):
        with pytest.raises(SettingError, match=said):
            call()


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_impossible_chances_are_refused(p):
    with pytest.raises(SettingError, match="between 0 and 1"):
        diff_augment(images(1), "flip", p, rng(0, "a"))


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_quarter_turns_mix_orientations_as_the_formula_says(p):
    x = images(1, 1, 8).expand(8000, -1, -1, -1)
    out = diff_augment(x, "rotate90", p, rng(0, "count"))
    seen = [(out == x[0].rot90(k, (1, 2))).flatten(1).all(1).float().mean().item() for k in range(4)]
    assert np.allclose(seen, [1 - 0.75 * p, p / 4, p / 4, p / 4], atol=0.025)
