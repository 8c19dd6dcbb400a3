"""LPIPS against the reference pair of its authors, and against its formula written out plainly."""

import pytest
import torch
import torch.nn.functional as F
from metric_files import lpips_picture, weights_or_skip
from safetensors.torch import load_file

from latentcast.metrics import LPIPS, lpips

FILES = {"alex": "lpips_alex", "vgg": "lpips_vgg16"}


@pytest.fixture(scope="module", params=["alex", "vgg"])
def model(request):
    weights_or_skip(FILES[request.param])
    return LPIPS(request.param)


def random_videos(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain_lpips(net, x, y):
    """One pair of frames (3, H, W), layer by layer as in the paper, in float64."""
    weights = {name: value.double() for name, value in load_file(weights_or_skip(FILES[net])).items()}
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    if net == "alex":
        plan = [(11, 4, 2), "tap", "pool", (5, 1, 2), "tap", "pool", *[(3, 1, 1), "tap"] * 3]
    else:
        plan = []
        for n in (2, 2, 3, 3, 3):
            plan += ["pool"] * bool(plan) + [(3, 1, 1)] * n + ["tap"]
    prefix, pool = ("AlexNet_0", 3) if net == "alex" else ("VGG16_0", 2)
    x, y = (((image.double() - shift) / scale)[None] for image in (x, y))
    total, convolution, tap = 0, 0, 0
    for step in plan:
        if step == "pool":
            x, y = F.max_pool2d(x, pool, 2), F.max_pool2d(y, pool, 2)
        elif step == "tap":
            unit = [image / (image.square().sum(1, keepdim=True).sqrt() + 1e-10) for image in (x, y)]
            linear = weights[f"NetLinLayer_{tap}.Conv_0.kernel"].view(1, -1, 1, 1)
            total, tap = total + ((unit[0] - unit[1]).square() * linear).sum(1).mean(), tap + 1
        else:
            size, stride, padding = step
            kernel = weights[f"{prefix}.Conv_{convolution}.kernel"].permute(3, 2, 0, 1)
            assert kernel.shape[2:] == (size, size)
            bias = weights[f"{prefix}.Conv_{convolution}.bias"]
            x, y = (F.conv2d(image, kernel, bias, stride, padding).relu() for image in (x, y))
            convolution += 1
    assert tap == 5
    return total.item()


@pytest.mark.parametrize(("net", "first", "second"), [("alex", 0.7219, 0.1376), ("vgg", 0.5686, 0.4217)])
def test_the_reference_pair(net, first, second):
    weights_or_skip(FILES[net])
    reference = lpips_picture("ref")
    assert lpips(lpips_picture("p0"), reference, net=net).item() == pytest.approx(first, abs=1e-4)
    assert lpips(lpips_picture("p1"), reference, net=net).item() == pytest.approx(second, abs=1e-4)


def test_it_equals_the_formula_written_out(model):
    x, y = random_videos(1, 2, 3, 37, 45), random_videos(1, 2, 3, 37, 45, seed=1)
    y = 0.7 * x + 0.3 * y
    found = model(x, y)
    assert found.shape == (1, 2)
    for t in range(2):
        assert found[0, t].item() == pytest.approx(plain_lpips(model.net, x[0, t], y[0, t]), rel=1e-4)


def test_equal_frames_are_at_distance_zero_and_the_order_does_not_matter(model):
    x, y = random_videos(2, 2, 3, 32, 32), random_videos(2, 2, 3, 32, 32, seed=1)
    assert model(x, x).tolist() == [[0, 0], [0, 0]]
    torch.testing.assert_close(model(x, y), model(y, x))


def test_grey_counts_as_three_equal_channels(model):
    x, y = random_videos(1, 2, 1, 32, 32), random_videos(1, 2, 1, 32, 32, seed=1)
    torch.testing.assert_close(model(x, y), model(x.repeat(1, 1, 3, 1, 1), y.repeat(1, 1, 3, 1, 1)))


def test_features_and_any_batching_give_the_same_distances(model):
    target, samples = random_videos(2, 3, 3, 32, 40), random_videos(2, 4, 3, 3, 32, 40, seed=1)
    expected = torch.stack([model(sample, target) for sample in samples.unbind(1)], 1)
    assert expected.shape == (2, 4, 3) and expected.std() > 1e-3
    features = [layer[:, None] for layer in model.features(target)]
    of_samples = [layer.unflatten(0, (2, 4)) for layer in model.features(samples.flatten(0, 1))]
    torch.testing.assert_close(model.distance(of_samples, features), expected)
    for batch_size in (1, 4, 100):
        other = LPIPS(model.net, batch_size=batch_size)
        torch.testing.assert_close(other(samples[:, 0], target), expected[:, 0])
        torch.testing.assert_close(other.features(target)[2][:, None], features[2])


def test_autocast_and_bfloat16_frames_do_not_make_it_coarse(model):
    x, y = random_videos(1, 1, 3, 32, 32).bfloat16(), random_videos(1, 1, 3, 32, 32, seed=1).bfloat16()
    expected = model(x.float(), y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x, y)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_gradients_reach_the_frames(model):
    x, y = random_videos(1, 1, 3, 32, 32), random_videos(1, 1, 3, 32, 32, seed=1)
    x.requires_grad_()
    model(x, y).sum().backward()
    step = 1e-2 * x.grad / x.grad.norm()
    with torch.no_grad():
        change = (model((x + step).clamp(-1, 1), y) - model((x - step).clamp(-1, 1), y)).item()
    assert change == pytest.approx(2e-2 * x.grad.norm().item(), rel=0.05)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradients_are_finite_where_all_features_vanish():
    weights_or_skip("lpips_alex")
    model = LPIPS("alex")
    for bias in model.biases:
        bias.fill_(-100)
    x = random_videos(1, 1, 3, 32, 32).requires_grad_()
    distance = model(x, random_videos(1, 1, 3, 32, 32, seed=1)).sum()
    distance.backward()
    assert distance.item() == 0 and x.grad.abs().max() == 0


def test_bad_input_is_one_line(model):
    good = random_videos(1, 2, 3, 32, 32)
    side = model.min_size
    cases = [
        (good[:, :1], good, r"lpips: expected prediction and target of one shape, found \(1, 1, 3, 32, 32\) and"),
        (good * 127, good, r"lpips: prediction: expected values in \[-1, 1\], found \[-127, 12\d"),
        (good, good * torch.nan, r"lpips: target: expected values in \[-1, 1\], found NaN"),
        (good[:, :, :2], good[:, :, :2], r"expected frames of 1 or 3 channels .* \(C, H, W\) = \(2, 32, 32\)"),
        (
            good[..., : side - 1],
            good[..., : side - 1],
            rf"at least {side} x {side} pixels, found .* = \(3, 32, {side - 1}\)",
        ),
    ]
    for prediction, target, message in cases:
        with pytest.raises(ValueError, match=message):
            model(prediction, target)
    assert model(good[..., :side], good[..., :side]).shape == (1, 2)


def test_an_unknown_network_and_absent_weights_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected net alex or vgg, found 'squeeze'"):
        LPIPS("squeeze")
    monkeypatch.setenv("LATENTCAST_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"lpips_vgg16.safetensors: not in .*; get it by python tools/fetch"):
        LPIPS("vgg")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_distances(model):
    x, y = random_videos(2, 3, 3, 64, 64), random_videos(2, 3, 3, 64, 64, seed=1)
    on_gpu = LPIPS(model.net).cuda()(x.cuda(), y.cuda())
    torch.testing.assert_close(on_gpu.cpu(), model(x, y), atol=1e-5, rtol=1e-4)
