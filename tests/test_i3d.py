"""I3D: its padding and layers against naive implementations, its checks, and a scripted network in its place."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from metric_files import ScriptedStandIn, moving_squares, save_scripted, weights_or_skip

from latentcast.metrics import I3D
from latentcast.metrics.i3d import InceptionI3D, MaxPool, Unit, same_padding

# Channels of the six convolutions of each Inception module: a tenth of the published widths, so that tests are quick.
MIXED = {
    "3b": (6, 9, 12, 2, 3, 3),
    "3c": (12, 13, 19, 3, 9, 6),
    "4b": (19, 9, 20, 2, 4, 6),
    "4c": (16, 11, 22, 2, 6, 5),
    "4d": (12, 13, 25, 2, 6, 7),
    "4e": (11, 14, 28, 3, 6, 6),
    "4f": (25, 16, 32, 3, 12, 13),
    "5b": (25, 16, 32, 3, 12, 11),
    "5c": (38, 19, 38, 4, 12, 12),
}


def small_weights():
    """Random arrays under the names of the published file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def random(*shape):
        return torch.randn(shape, generator=generator)

    def unit(name, size, n_in, n_out):
        tensors[f"params.{name}.Conv_0.kernel"] = random(*size, n_in, n_out) * (2 / (n_in * np.prod(size))) ** 0.5
        tensors[f"params.{name}.BatchNorm_0.bias"] = random(n_out) * 0.3
        tensors[f"batch_stats.{name}.BatchNorm_0.mean"] = random(1, 1, 1, 1, n_out) * 0.3
        tensors[f"batch_stats.{name}.BatchNorm_0.var"] = random(1, 1, 1, 1, n_out).square() + 0.2
        return n_out

    width = unit("Conv3d_1a_7x7", (7, 7, 7), 3, 6)
    width = unit("Conv3d_2b_1x1", (1, 1, 1), width, 6)
    width = unit("Conv3d_2c_3x3", (3, 3, 3), width, 19)
    for name, (a, b, c, d, e, f) in MIXED.items():
        unit(f"Mixed_{name}.Branch_0/Conv3d_0a_1x1", (1, 1, 1), width, a)
        unit(f"Mixed_{name}.Branch_1/Conv3d_0a_1x1", (1, 1, 1), width, b)
        unit(f"Mixed_{name}.Branch_1/Conv3d_0b_3x3", (3, 3, 3), b, c)
        unit(f"Mixed_{name}.Branch_2/Conv3d_0a_1x1", (1, 1, 1), width, d)
        unit(f"Mixed_{name}.Branch_2/Conv3d_0b_3x3", (3, 3, 3), d, e)
        unit(f"Mixed_{name}.Branch_3/Conv3d_0b_1x1", (1, 1, 1), width, f)
        width = a + c + e + f
    tensors["params.Logits/Conv3d_0c_1x1.Conv_0.kernel"] = random(1, 1, 1, width, 400)
    tensors["params.Logits/Conv3d_0c_1x1.Conv_0.bias"] = random(400)
    return tensors


def tensorflow_padding(size, kernel, stride):
    """TensorFlow's documentation of "SAME" -> (before, after)"""
    remainder = size % stride
    total = max(kernel - stride, 0) if remainder == 0 else max(kernel - remainder, 0)
    return total // 2, total - total // 2


def naive_windows(x, kernel, stride):
    """Each output position of a "SAME" operation on (C, T, H, W) -> (position, window that is zero outside x)"""
    befores = [tensorflow_padding(n, k, s)[0] for n, k, s in zip(x.shape[1:], kernel, stride)]
    sizes = [int(np.ceil(n / s)) for n, s in zip(x.shape[1:], stride)]
    for position in itertools.product(*map(range, sizes)):
        window = np.zeros((x.shape[0], *kernel))
        for offset in itertools.product(*map(range, kernel)):
            source = [p * s - b + o for p, s, b, o in zip(position, stride, befores, offset)]
            if all(0 <= i < n for i, n in zip(source, x.shape[1:])):
                window[(slice(None), *offset)] = x[(slice(None), *source)]
        yield position, window


def reference_i3d(tensors, x):
    """The network as its authors describe it, normalisation not folded in: (B, 3, T, H, W) -> (B, 400)."""

    def same(x, kernel, stride):
        sides = [tensorflow_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride)]
        return F.pad(x, [side for pair in reversed(sides) for side in pair])

    def unit(x, name, stride=1):
        kernel = tensors[f"params.{name}.Conv_0.kernel"].permute(4, 3, 0, 1, 2)
        x = F.conv3d(same(x, kernel.shape[2:], [stride] * 3), kernel, stride=stride)
        mean, variance = (tensors[f"batch_stats.{name}.BatchNorm_0.{key}"].flatten() for key in ("mean", "var"))
        return F.batch_norm(x, mean, variance, None, tensors[f"params.{name}.BatchNorm_0.bias"], eps=1e-3).relu()

    def pool(x, kernel, stride):
        return F.max_pool3d(same(x, kernel, stride), kernel, stride)

    def mixed(x, name):
        first = unit(x, f"Mixed_{name}.Branch_0/Conv3d_0a_1x1")
        second = unit(
            unit(x, f"Mixed_{name}.Branch_1/Conv3d_0a_1x1"),
            f"Mixed_{name}.Branch_1/Conv3d_0b_3x3",
        )
        third = unit(
            unit(x, f"Mixed_{name}.Branch_2/Conv3d_0a_1x1"),
            f"Mixed_{name}.Branch_2/Conv3d_0b_3x3",
        )
        fourth = unit(pool(x, (3, 3, 3), (1, 1, 1)), f"Mixed_{name}.Branch_3/Conv3d_0b_1x1")
        return torch.cat([first, second, third, fourth], 1)

    x = pool(unit(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    x = pool(mixed(mixed(x, "3b"), "3c"), (3, 3, 3), (2, 2, 2))
    for name in ("4b", "4c", "4d", "4e", "4f"):
        x = mixed(x, name)
    x = mixed(mixed(pool(x, (2, 2, 2), (2, 2, 2)), "5b"), "5c")
    x = F.avg_pool3d(x, (2, 7, 7), stride=1)
    kernel = tensors["params.Logits/Conv3d_0c_1x1.Conv_0.kernel"].permute(4, 3, 0, 1, 2)
    logits = F.conv3d(x, kernel, tensors["params.Logits/Conv3d_0c_1x1.Conv_0.bias"])
    return logits.squeeze(4).squeeze(3).mean(2)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """Path of a scripted network."""
    path = tmp_path_factory.mktemp("scripted") / "i3d_torchscript.pt"
    return save_scripted(path)


@pytest.fixture(scope="module")
def i3d():
    weights_or_skip("i3d_k400")
    return I3D()


@pytest.mark.parametrize("size", [1, 4, 5, 6, 7])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (2, 2), (3, 2), (7, 2)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    sides = same_padding(torch.empty(2, 3, size, 5, 8), (kernel, 1, kernel), (stride, 1, stride))
    time, width = tensorflow_padding(size, kernel, stride), tensorflow_padding(8, kernel, stride)
    assert sides == [*width, 0, 0, *time]
    assert (size + sum(time) - kernel) // stride + 1 == -(-size // stride)


@pytest.mark.parametrize("shape", [(5, 4, 6), (4, 7, 5)])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), 1), ((3, 2, 5), 2), ((7, 7, 7), 2)])
def test_a_convolution_equals_the_naive_one(shape, kernel, stride):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, *shape)), rng.standard_normal((*kernel, 2, 3))
    mean, variance, bias = rng.standard_normal(3), rng.uniform(0.1, 2, 3), rng.standard_normal(3)
    unit = Unit(
        {
            "params.x.Conv_0.kernel": torch.tensor(weight),
            "params.x.BatchNorm_0.bias": torch.tensor(bias),
            "batch_stats.x.BatchNorm_0.mean": torch.tensor(mean).view(1, 1, 1, 1, 3),
            "batch_stats.x.BatchNorm_0.var": torch.tensor(variance).view(1, 1, 1, 1, 3),
        },
        "x",
        stride,
    )
    found = unit(torch.tensor(x[None]).float())[0].numpy()
    assert found.shape == (3, *(-(-n // stride) for n in shape))
    for position, window in naive_windows(x, kernel, (stride,) * 3):
        expected = np.einsum("cthw,thwco->o", window, weight)
        expected = np.maximum((expected - mean) / np.sqrt(variance + 1e-3) + bias, 0)
        np.testing.assert_allclose(found[(slice(None), *position)], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))],
)
def test_pooling_equals_the_naive_one(kernel, stride):
    x = np.random.default_rng(0).random((2, 5, 4, 7))
    found = MaxPool(kernel, stride)(torch.tensor(x[None]))[0].numpy()
    for position, window in naive_windows(x, kernel, stride):
        np.testing.assert_array_equal(found[(slice(None), *position)], window.max((1, 2, 3)))


def test_the_network_equals_the_description_of_its_authors():
    tensors = small_weights()
    network = InceptionI3D(tensors)
    for n_frames in (10, 13):
        videos = torch.rand(1, 3, n_frames, 224, 224, generator=torch.Generator().manual_seed(n_frames)) * 2 - 1
        found = network(videos)
        assert found.shape == (1, 400) and network.features(videos).shape[2:] == (2, 7, 7)
        expected = reference_i3d(tensors, videos)
        torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
        grey = videos[:, :1]
        repeated = network(grey.repeat(1, 3, 1, 1, 1))
        torch.testing.assert_close(network(grey), repeated, atol=1e-4 * repeated.abs().max().item(), rtol=0)


def test_the_published_widths_and_logits(i3d):
    assert sum(parameter.numel() for parameter in i3d.parameters()) == 12_689_984
    assert not any(parameter.requires_grad for parameter in i3d.parameters())
    assert i3d.fingerprint == "52bb50fbff7605257da170f201bd526548678622fc527b1ffd1b2dc496c5fdb5"
    videos = moving_squares(2)
    logits = i3d(videos)
    assert logits.shape == (2, 400) and (logits[0] - logits[1]).abs().max() > 1
    resized = F.interpolate(videos.flatten(0, 1), size=(224, 224), mode="bilinear", align_corners=False)
    resized = resized.unflatten(0, (2, 10)).repeat(1, 1, 3, 1, 1)
    torch.testing.assert_close(i3d(resized), logits, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(i3d(videos), logits)
    i3d.batch_size = 1
    torch.testing.assert_close(i3d(videos), logits, atol=1e-4, rtol=1e-4)


def test_a_scripted_network_takes_its_place(scripted):
    model = I3D(scripted, batch_size=2)
    assert model.fingerprint == hashlib.sha256(scripted.read_bytes()).hexdigest()
    videos = moving_squares(3, n_frames=12)
    expected = []
    for chunk in videos.split(2):
        frames = F.interpolate(chunk.flatten(0, 1), size=(224, 224), mode="bilinear", align_corners=False)
        x = frames.unflatten(0, (-1, 12)).repeat(1, 1, 3, 1, 1).transpose(1, 2)
        expected.append(ScriptedStandIn()(x, False, False, True))
    torch.testing.assert_close(model(videos), torch.cat(expected), atol=1e-4, rtol=1e-5)


def test_a_file_that_is_no_scripted_network_is_one_line(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    with pytest.raises(FileNotFoundError, match=str(path)):
        I3D(path)
    path.write_bytes(b"not a network" * 100)
    with pytest.raises(ValueError, match=r"i3d_torchscript.pt: not a scripted network \(.+\)$"):
        I3D(path)


def test_bad_videos_are_one_line(scripted):
    model = I3D(scripted)
    good = moving_squares(1)
    cases = [
        (good[:, :8], r"^I3D: expected videos of at least 9 frames, found 8$"),
        (good.repeat(1, 1, 2, 1, 1), r"^I3D: expected videos of 1 or 3 channels, found 2$"),
        (good * torch.nan, r"^I3D: videos: expected values in \[-1, 1\], found NaN$"),
        (good * 2, r"^I3D: videos: expected values in \[-1, 1\], found \[-2, 1.8\]$"),
        (good[0], r"^I3D: videos: expected a tensor of shape \(B, T, C, H, W\), found \(10, 1, 32, 32\)$"),
        ((good * 127).to(torch.uint8), r"^I3D: videos: expected floats in \[-1, 1\], found torch.uint8"),
    ]
    for videos, message in cases:
        with pytest.raises(ValueError, match=message):
            model(videos)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_logits(i3d):
    videos = moving_squares(3, n_frames=16)
    expected = i3d(videos)
    torch.testing.assert_close(I3D().cuda()(videos.cuda()).cpu(), expected, atol=1e-3, rtol=1e-4)
