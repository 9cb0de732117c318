"""Does `images` decode as torchvision does, and refuse what it cannot decode?"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ptq.config import PreprocessingConfig
from ptq.data.images import decode_image, network_input, png_from_pixels, resize_pixels
from ptq.errors import ManifestError

# Through `models`, which makes torchvision importable beside a torch without CUDA.
from ptq.networks.factory import torchvision

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MODES = {
    "nearest": torchvision.transforms.InterpolationMode.NEAREST,
    "bilinear": torchvision.transforms.InterpolationMode.BILINEAR,
    "bicubic": torchvision.transforms.InterpolationMode.BICUBIC,
}


def rgb(*, resize=16, crop=16, interpolation="bilinear"):
    return PreprocessingConfig(channels=3, resize=resize, crop=crop, interpolation=interpolation)


def grey(*, resize=16, crop=16):
    return PreprocessingConfig(channels=1, resize=resize, crop=crop, mean=(0.5,), std=(0.5,))


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def file_from(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def torchvision_pixels(data, *, resize, crop, interpolation="bilinear"):
    transforms = torchvision.transforms
    steps = [transforms.Resize(resize, interpolation=MODES[interpolation]), transforms.CenterCrop(crop)]
    return np.asarray(transforms.Compose(steps)(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("interpolation", sorted(MODES))
@pytest.mark.parametrize("size", [(37, 53), (53, 37), (40, 40), (32, 71), (9, 14), (101, 64)])
def test_rgb_pixels_are_torchvisions(size, interpolation):
    data = file_from(Image.fromarray(noise(*size)))
    found = decode_image(data, preprocessing=rgb(resize=32, crop=27, interpolation=interpolation), source="a.png")
    expected = torchvision_pixels(data, resize=32, crop=27, interpolation=interpolation)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("crop", [20, 21, 22, 23])
def test_an_odd_margin_is_cropped_as_torchvision_does(crop):
    data = file_from(Image.fromarray(noise(24, 35)))
    found = decode_image(data, preprocessing=rgb(resize=24, crop=crop), source="a.png")
    np.testing.assert_array_equal(found, torchvision_pixels(data, resize=24, crop=crop))


def test_a_jpeg_is_decoded_as_torchvision_does():
    data = file_from(Image.fromarray(noise(50, 61)), "JPEG", quality=80)
    found = decode_image(data, preprocessing=rgb(resize=32, crop=28), source="a.jpg")
    np.testing.assert_array_equal(found, torchvision_pixels(data, resize=32, crop=28))


def test_grey_pixels_are_torchvisions_grayscale():
    data = file_from(Image.fromarray(noise(30, 41)))
    transforms = torchvision.transforms
    steps = transforms.Compose([transforms.Grayscale(1), transforms.Resize(16), transforms.CenterCrop(16)])
    expected = np.asarray(steps(Image.open(io.BytesIO(data))))
    found = decode_image(data, preprocessing=grey(), source="a.png")
    assert found.shape == (16, 16, 1)
    np.testing.assert_array_equal(found[:, :, 0], expected)


def test_a_grey_file_gives_three_equal_channels_where_rgb_is_asked():
    pixels = noise(16, 16, channels=1)
    found = decode_image(file_from(Image.fromarray(pixels)), preprocessing=rgb(), source="a.png")
    np.testing.assert_array_equal(found, np.stack([pixels] * 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_pixels_keep_their_high_byte(kind):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 7
    found = decode_image(file_from(Image.fromarray(values), kind), preprocessing=grey(), source="a")
    np.testing.assert_array_equal(found[:, :, 0], np.arange(256).reshape(16, 16))


def test_16_bit_pixels_are_read_into_rgb_too():
    values = np.full((16, 16), 200 * 256, dtype=np.uint16)
    found = decode_image(file_from(Image.fromarray(values)), preprocessing=rgb(), source="a.png")
    assert found.shape == (16, 16, 3)
    assert np.unique(found).tolist() == [200]


def test_a_transparent_palette_gives_its_colours():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    data = file_from(image, transparency=b"\x80\x40")
    found = decode_image(data, preprocessing=rgb(), source="a.png")
    assert found[3, 5].tolist() == [10, 20, 30]


def test_alpha_is_dropped():
    pixels = noise(16, 16, channels=4)
    found = decode_image(file_from(Image.fromarray(pixels)), preprocessing=rgb(), source="a.png")
    np.testing.assert_array_equal(found, pixels[:, :, :3])


def test_a_transparent_colour_of_a_grey_image_changes_no_pixel():
    pixels = noise(16, 16, channels=1)
    data = file_from(Image.fromarray(pixels), transparency=3)
    found = decode_image(data, preprocessing=grey(), source="a.png")
    np.testing.assert_array_equal(found[:, :, 0], pixels)


def test_cmyk_is_converted_to_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = decode_image(file_from(image, "TIFF"), preprocessing=rgb(), source="a.tif")
    assert found[0, 0].tolist() == [255, 0, 0]


def test_black_and_white_bits_become_0_and_255():
    image = Image.fromarray(np.eye(16, dtype=np.uint8) * 255).convert("1")
    found = decode_image(file_from(image), preprocessing=grey(), source="a.png")
    np.testing.assert_array_equal(found[:, :, 0], np.eye(16) * 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_file_cut_short_is_refused_by_name(kind):
    data = file_from(Image.fromarray(noise(40, 40)), kind)
    with pytest.raises(ManifestError, match=r"Image cats/7\.img .*copy it again|Image cats/7\.img .*replace or remove"):
        decode_image(data[: len(data) // 2], preprocessing=rgb(), source="cats/7.img")


def test_a_damaged_png_says_that_it_is_damaged():
    data = bytearray(file_from(Image.fromarray(noise(40, 40))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ManifestError, match="damaged or cut short, so copy it again"):
        decode_image(bytes(data), preprocessing=rgb(), source="a.png")


def test_bytes_that_are_no_image_are_shown():
    with pytest.raises(ManifestError, match=r"a\.png is not in a format.* 11 bytes begin with 68 65 6c 6c"):
        decode_image(b"hello there", preprocessing=rgb(), source="a.png")


def test_an_empty_file_is_refused():
    with pytest.raises(ManifestError, match=r"Image a\.png is empty \(0 bytes\)"):
        decode_image(b"", preprocessing=rgb(), source="a.png")


def test_an_image_of_gigapixels_is_refused_for_its_size(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = file_from(Image.new("L", (20, 20)), "PNG")
    with pytest.raises(ManifestError, match="more pixels than is safe to decode.*400 pixels.*at most 200"):
        decode_image(data, preprocessing=grey(), source="a.png")


def test_floating_point_pixels_are_refused():
    data = file_from(Image.fromarray(np.ones((16, 16), dtype=np.float32)), "TIFF")
    with pytest.raises(ManifestError, match="floating-point values, which have no defined white"):
        decode_image(data, preprocessing=grey(), source="a.tif")


def test_integers_beyond_16_bits_are_refused():
    data = file_from(Image.fromarray(np.full((16, 16), 70_000, dtype=np.int32)), "TIFF")
    with pytest.raises(ManifestError, match="integers from 70000 to 70000. Expected 8 or 16 bits"):
        decode_image(data, preprocessing=grey(), source="a.tif")


def test_the_networks_input_has_torchvisions_bits_for_every_pixel_value():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    transforms = torchvision.transforms
    expected = transforms.Normalize(MEAN, STD)(transforms.ToTensor()(pixels[0]))
    np.testing.assert_array_equal(network_input(pixels, mean=MEAN, std=STD)[0], expected.numpy())


def test_the_networks_input_of_a_batch_has_torchs_bits():
    pixels = np.stack([noise(17, 13, seed=seed) for seed in range(5)])
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div(255)
    expected = (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    found = network_input(pixels, mean=MEAN, std=STD)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected.numpy())


def test_the_pixels_are_left_as_they_were():
    pixels = noise(4, 4)[np.newaxis]
    before = pixels.copy()
    network_input(pixels, mean=MEAN, std=STD)
    np.testing.assert_array_equal(pixels, before)


def test_pixels_of_another_type_are_refused():
    with pytest.raises(ValueError, match=r"uint8 \(n, h, w, c\), got float32 \(1, 2, 2, 3\)"):
        network_input(np.zeros((1, 2, 2, 3), dtype=np.float32), mean=MEAN, std=STD)


def test_a_mean_for_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="pixels have 1 channels, mean 3 values"):
        network_input(np.zeros((1, 2, 2, 1), dtype=np.uint8), mean=MEAN, std=STD)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_gives_back_the_pixels_it_was_made_from(channels):
    pixels = noise(8, 8, channels=channels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_from_pixels(pixels)))), pixels)


def test_a_flat_image_stays_flat_when_enlarged():
    assert np.unique(resize_pixels(np.full((8, 8), 77, dtype=np.uint8), side=32)).tolist() == [77]
