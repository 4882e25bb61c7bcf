"""mclfast.data.augment against a loop over the images."""

import pytest
import torch
import torch.nn.functional as F

from mclfast.data.augment import Augmentation, augment, prepare

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def images(batch: int = 13, channels: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    shape = (batch, channels, height, width)
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def run(x: torch.Tensor, augmentation: Augmentation, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    c = x.shape[1]
    return augment(x, augmentation, mean=MEAN[:c], std=STD[:c], generator=generator)


def test_prepare_normalises_each_channel():
    x = images()
    expected = (x.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(
        STD
    ).double().view(3, 1, 1)
    out = prepare(x, MEAN, STD)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_inputs_are_left_alone():
    x = images()
    kept = x.clone()
    run(x, Augmentation(2, True))
    prepare(x, MEAN, STD)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_a_loop_over_images(pad, flip, channels):
    x = images(channels=channels)
    batch, _, height, width = x.shape
    generator = torch.Generator().manual_seed(3)
    mirrored = torch.randint(0, 2, (batch, 1), generator=generator) if flip else torch.zeros(batch)
    shift = torch.zeros(2, batch, 1).long()
    if pad:
        shift = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator)
    crops = []
    for i in range(batch):
        dy, dx = int(shift[0, i]), int(shift[1, i])
        crop = F.pad(x[i], (pad, pad, pad, pad))[:, dy : dy + height, dx : dx + width]
        crops.append(crop.flip(-1) if mirrored[i] else crop)
    expected = prepare(torch.stack(crops), MEAN[:channels], STD[:channels])
    assert torch.equal(run(x, Augmentation(pad, flip), seed=3), expected)


def test_all_shifts_and_both_directions_occur():
    x = torch.zeros(2000, 1, 3, 4, dtype=torch.uint8)
    x[:, :, 1, 1] = 255  # off centre, so that a mirrored image shows
    out = run(x, Augmentation(pad=1, flip=True)) > 0
    position = out.flatten(1).double().argmax(1).bincount(minlength=12).view(3, 4)
    # Column 1 moves to 0, 1, 2; mirrored, column 2 moves to 1, 2, 3.
    expected = 2000 / 3 / 6 * torch.tensor([1, 2, 2, 1]).expand(3, 4)
    assert (out.flatten(1).sum(1) == 1).all()
    assert ((position - expected).abs() < 5 * expected.sqrt()).all()


def test_padding_is_black_before_normalisation():
    x = torch.full((200, 3, 4, 4), 255, dtype=torch.uint8)
    out = run(x, Augmentation(pad=2))
    black, white = (prepare(torch.full((1, 3, 1, 1), v).byte(), MEAN, STD) for v in (0, 255))
    assert ((out == black) | (out == white)).all() and (out == black).any()


def test_no_augmentation_is_prepare():
    x = images()
    assert torch.equal(run(x, Augmentation()), prepare(x, MEAN, STD))


def test_the_generator_decides():
    x = images()
    preset = Augmentation(2, True)
    torch.manual_seed(0)
    first = run(x, preset, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(run(x, preset, seed=1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(run(x, preset, seed=2), first)
    generator = torch.Generator().manual_seed(1)
    pair = [augment(x, preset, mean=MEAN, std=STD, generator=generator) for _ in range(2)]
    assert torch.equal(pair[0], first) and not torch.equal(pair[1], first)


def test_batch_of_one_and_non_contiguous_images():
    x = images().permute(0, 1, 3, 2)
    assert torch.equal(run(x, Augmentation(1)), run(x.contiguous(), Augmentation(1)))
    assert run(images(batch=1), Augmentation(1, True)).shape == (1, 3, 9, 7)


@pytest.mark.parametrize(
    ("x", "mean", "error", "message"),
    [
        (images().float(), MEAN, TypeError, "images: expected torch.uint8, got torch.float32"),
        (images()[0], MEAN, ValueError, r"images: expected \[B, C, H, W\]"),
        (images(), MEAN[:1], ValueError, "mean: expected C=3 entries, got 1"),
    ],
)
def test_refuses(x, mean, error, message):
    with pytest.raises(error, match=message):
        prepare(x, mean, STD)
    with pytest.raises(error, match=message):
        augment(x, Augmentation(1), mean=mean, std=STD, generator=torch.Generator())


def test_negative_pad():
    with pytest.raises(ValueError, match="pad: expected at least 0, got -1"):
        Augmentation(pad=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestCuda:
    def test_host_never_waits(self):
        x = images().cuda()
        generator = torch.Generator("cuda").manual_seed(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = augment(x, Augmentation(2, True), mean=MEAN, std=STD, generator=generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert out.is_cuda and torch.equal(out, run(x, Augmentation(2, True)))

    def test_generator_on_another_device(self):
        with pytest.raises(ValueError, match="generator: expected the device of the images"):
            augment(
                images().cuda(), Augmentation(1), mean=MEAN, std=STD, generator=torch.Generator()
            )


def test_generator_on_another_kind_of_device():
    x = images().to("meta")
    with pytest.raises(ValueError, match="generator: expected the device of the images, meta"):
        augment(x, Augmentation(1), mean=MEAN, std=STD, generator=torch.Generator())
