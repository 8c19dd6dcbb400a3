"""SVG's DCGAN and VGG16 networks: published sizes, levels, skip connections, initial weights."""

import pytest
import torch
from torch import nn

from latentcast.layers.dcgan import DCGANDecoder, DCGANEncoder
from latentcast.layers.vgg import VGGDecoder, VGGEncoder

PAIRS = {"dcgan": (DCGANEncoder, DCGANDecoder), "vgg": (VGGEncoder, VGGDecoder)}
LATENT_DIM = {"dcgan": 10, "vgg": 64}  # |z| for SM-MNIST and BAIR
VGG16 = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]  # configuration D of the paper


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]


def svg_lstms(z, h=128, cells=256):
    """The recurrent parts of SVG-LP: an embedding, LSTM cells and output layers each."""
    predictor = [nn.Linear(h + z, cells), nn.LSTMCell(cells, cells), nn.LSTMCell(cells, cells), nn.Linear(cells, h)]
    gaussian = [nn.Linear(h, cells), nn.LSTMCell(cells, cells), nn.Linear(cells, z), nn.Linear(cells, z)]
    return n_parameters(nn.ModuleList(predictor)) + 2 * n_parameters(nn.ModuleList(gaussian))  # posterior and prior


@pytest.mark.parametrize(("name", "channels", "published"), [("dcgan", 1, 12.6e6), ("vgg", 3, 22.8e6)])
def test_svg_lp_has_its_published_size(name, channels, published):
    encoder, decoder = PAIRS[name]
    total = n_parameters(encoder(channels)) + n_parameters(decoder(channels, joined=1)) + svg_lstms(LATENT_DIM[name])
    assert total == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("size", "widths"), [(64, [64, 128, 256, 512]), (128, [64, 128, 256, 512, 512])])
def test_dcgan_halves_and_doubles_down_to_four_by_four(size, widths):
    encoder, decoder = DCGANEncoder(3, size, size), DCGANDecoder(3, size, size)
    found = convolutions(encoder)
    assert [m.out_channels for m in found] == [*widths, 128]
    assert {(m.kernel_size, m.stride) for m in found[:-1]} == {((4, 4), (2, 2))}
    assert found[-1].kernel_size == (4, 4)
    mirrored = {m.out_channels: m.in_channels for m in convolutions(decoder)}
    assert mirrored[3] == 64 and 128 in mirrored.values()
    with torch.no_grad():
        h, features = encoder.eval()(torch.zeros(2, 3, size, size))
    assert h.shape == (2, 128)
    assert [tuple(f.shape[1:]) for f in features] == [(n, size >> i, size >> i) for i, n in enumerate(widths, 1)]
    assert features[-1].shape[2:] == (4, 4)


@pytest.mark.parametrize(("size", "n"), [(64, 10), (128, 13)])
def test_vgg_has_the_convolutions_of_vgg16(size, n):
    encoder = VGGEncoder(3, size, size)
    *found, last = convolutions(encoder)
    assert [m.out_channels for m in found] == VGG16[:n]
    assert {(m.kernel_size, m.stride) for m in found} == {((3, 3), (1, 1))}
    assert (last.kernel_size, last.out_channels) == ((4, 4), 128)
    with torch.no_grad():
        h, features = encoder.eval()(torch.zeros(1, 3, size, size))
    widths = [64, 128, 256, 512, 512][: len(features)]
    assert [tuple(f.shape[1:]) for f in features] == [(c, size >> i, size >> i) for i, c in enumerate(widths)]
    assert features[-1].shape[2:] == (8, 8) and h.shape == (1, 128)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 128), (48, 80), (18, 30), (8, 32)])
@pytest.mark.parametrize("joined", [0, 1])
def test_any_even_size_with_and_without_skips(name, height, width, joined):
    encoder, decoder = PAIRS[name]
    sizes = (1, height, width, 7, 2)
    encoder, decoder = encoder(*sizes), decoder(*sizes, joined=joined)
    h, features = encoder(torch.rand(2, 1, height, width))
    assert h.shape == (2, 7) and h.abs().max() <= 1
    assert [tuple(f.shape[1:]) for f in features] == encoder.level_shapes == decoder.level_shapes
    frames = decoder(h, features if joined else None)
    assert frames.shape == (2, 1, height, width) and frames.abs().max() <= 1
    frames.sum().backward()
    for module in (encoder, decoder):
        assert [n for n, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", PAIRS)
def test_every_level_of_the_features_reaches_the_frames(name):
    encoder, decoder = PAIRS[name]
    sizes = (1, 32, 32, 7, 2)
    encoder, decoder = encoder(*sizes).eval(), decoder(*sizes, joined=1).eval()
    h, features = encoder(torch.rand(2, 1, 32, 32))
    features = [f.detach().requires_grad_() for f in features]
    frames = decoder(h.detach(), features)
    for gradient in torch.autograd.grad(frames[0].square().sum(), features):
        assert gradient[0].any() and not gradient[1].any()  # and only those of the same frame


@pytest.mark.parametrize("name", PAIRS)
def test_levels_join_what_they_are_given(name):
    """Three levels: none, the encoder's features, and the features with another map, as an aligner gives."""
    encoder, decoder = PAIRS[name]
    sizes = (1, 32, 32, 7, 2)
    encoder, decoder = encoder(*sizes).eval(), decoder(*sizes, joined=[0, 1, 2]).eval()
    h, features = encoder(torch.rand(2, 1, 32, 32))
    met = []

    def join(level, own, given):
        assert own.shape == given.shape == (2, *decoder.level_shapes[level])
        assert given is features[level]
        met.append(level)
        return torch.cat([own, given, own * given][: 1 + decoder.joined[level]], 1)

    assert decoder(h, features, join).shape == (2, 1, 32, 32)
    assert met == [2, 1]
    skips = PAIRS[name][1](*sizes, joined=1).eval()
    side_by_side = skips(h, features, lambda level, own, given: torch.cat([own, given], 1))
    assert torch.equal(skips(h, features), side_by_side)


@pytest.mark.parametrize("name", PAIRS)
def test_initial_weights_are_those_of_dcgan(name):
    torch.manual_seed(0)
    for module in (PAIRS[name][0](), PAIRS[name][1]()):
        weights = torch.cat([m.weight.flatten() for m in convolutions(module)])
        assert abs(weights.mean()) < 1e-4
        assert weights.std().item() == pytest.approx(0.02, rel=0.01)
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        scales = torch.cat([m.weight for m in norms])
        assert scales.mean().item() == pytest.approx(1, abs=0.005)
        assert scales.std().item() == pytest.approx(0.02, rel=0.1)
        assert not any(m.bias.any() for m in (*norms, *convolutions(module)) if m.bias is not None)
        assert sum(m.bias is not None for m in convolutions(module)) == (module.__class__ is PAIRS[name][1])


@pytest.mark.parametrize("name", PAIRS)
def test_bad_arguments(name):
    encoder, decoder = PAIRS[name]
    for sizes in ((1, 15, 16), (1, 6, 16), (1, 16, 0)):
        for network in (encoder, decoder):
            with pytest.raises(ValueError, match="height, width: expected even numbers of at least 8 pixels, found"):
                network(*sizes)
    for joined in (-1, [1], [1, 1, -1]):
        with pytest.raises(ValueError, match="joined: expected numbers of at least 0 for 3 levels"):
            decoder(1, 32, 32, 7, 2, joined=joined)
    with pytest.raises(ValueError, match="output_activation: expected 'tanh' or 'linear', found 'relu'"):
        decoder(output_activation="relu")
    h, features = encoder(1, 32, 32, 7, 2).eval()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"features: expected None .*, found some"):
        decoder(1, 32, 32, 7, 2)(h, features)
    with pytest.raises(ValueError, match="features: expected one tensor a level, found None"):
        decoder(1, 32, 32, 7, 2, joined=1)(h)
