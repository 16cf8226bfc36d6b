"""Image files are what they say: orientation, palettes, depth, alpha, many frames; too large ones are not decoded."""

import hashlib
import io
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.images import decode, decode_all, survey

ROWS, COLUMNS = np.mgrid[:24, :40]
RGB = np.stack([6 * COLUMNS, 10 * ROWS, 255 - 3 * ROWS - 3 * COLUMNS], axis=-1).astype(np.uint8)  # [24, 40, 3]
TURNS = {  # EXIF's orientation → the image as it is to be seen, by the standard's "0th row, 0th column"
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def oriented(kind, orientation, **options):
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(RGB, kind, exif=exif, **options)


def plain_hash(*files):
    digest = hashlib.sha256()
    for data in files:
        digest.update(f"{len(data)};".encode() + data)
    return digest.hexdigest()


def png16(values):
    """A PNG of 16 bits per channel, uint16 [H, W, C]: what Pillow cannot write."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((16, kind, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation(kind, orientation):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data, wanted = oriented(kind, orientation, **options), TURNS[orientation](RGB)
    image = decode(data, "x", None)
    assert image.shape == wanted.shape and np.abs(image.astype(int) - wanted).max() <= (4 if kind == "JPEG" else 0)
    count, height, width, sha256 = survey([("a", data)], None)
    assert (count, height, width) == (1, *wanted.shape[:2])
    assert (sha256 == plain_hash(data)) == (orientation == 1 or kind == "TIFF")  # which PIL has always turned


def test_orientation_of_a_later_image_shows_in_the_hash():
    plain, turned = encoded(RGB), oriented("PNG", 3)
    assert survey([("a", plain), ("b", plain)], None)[3] == plain_hash(plain, plain)
    assert survey([("a", plain), ("b", turned)], None)[3] != plain_hash(plain, turned)


def test_damaged_exif_is_no_damaged_image():
    data = encoded(RGB, "JPEG", quality=100, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data, "x", None).shape == RGB.shape
    assert survey([("x", data)], None)[1:3] == (24, 40)


def test_palette_with_and_without_transparency():
    image = Image.fromarray(RGB).quantize(64)
    wanted = np.asarray(image.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"transparency": 3}, {"transparency": bytes(range(64))}):
            assert np.array_equal(decode(encoded(image, **options), "x", None), wanted)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_many_frames(kind):
    frames = [Image.fromarray(np.full((24, 40, 3), v, np.uint8)) for v in (10, 120, 230)]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (decode(data, "x", None) == 10).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_eight_bits(mode):
    image = Image.fromarray(RGB).convert(mode)
    found = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), "x", None)
    assert found.dtype == np.uint8 and np.array_equal(found, np.asarray(image.convert("RGB")))


def test_alpha_leaves_the_stored_colors():
    alpha = np.where(COLUMNS < 20, 0, 255).astype(np.uint8)[..., None]
    assert np.array_equal(decode(encoded(np.concatenate([RGB, alpha], 2)), "x", None), RGB)


@pytest.mark.parametrize("channels", [3, 4])
def test_color_of_sixteen_bits_is_scaled(channels):
    values = np.random.default_rng(0).integers(0, 65536, (24, 40, channels)).astype(np.uint16)
    values[0, :2] = [[0] * channels, [65535] * channels]
    found = decode(png16(values), "x", None)
    assert np.abs(found - np.rint(values[..., :3] / 257)).max() <= 1
    assert np.array_equal(decode(png16(RGB.astype(np.uint16) * 257), "x", None), RGB)


@pytest.mark.parametrize(
    "image, kind",
    [
        (np.full((24, 40), 40_000, np.uint16), "PNG"),
        (np.full((24, 40), 40_000, np.uint16), "TIFF"),
        (np.full((24, 40), 70_000, np.int32), "TIFF"),
        (np.full((24, 40), 0.5, np.float32), "TIFF"),
    ],
)
def test_one_channel_of_more_bits_is_a_depth_map(image, kind):
    for read in (lambda d: decode(d, "image 3", None), lambda d: survey([("image 3", d)], None)):
        with pytest.raises(
            CorruptEpisode, match="image 3 has one channel of more than 8 bits .* depth map; leave that"
        ):
            read(encoded(image, kind))


@pytest.mark.parametrize("size", [(24_000, 1), (1, 24_000), (8_193, 500), (20, 650), (8_000, 3_000)])
def test_impossible_sizes_are_refused_before_decoding(size):
    data = encoded(Image.new("1", size))
    with pytest.raises(CorruptEpisode, match=rf"x is {size[0]}x{size[1]} pixels; at most 8192 a side and 32:1"):
        decode(data[: len(data) // 2], "x", None)  # the rest of it is never missed


def test_an_image_of_another_size():
    files = [("a", encoded(RGB)), ("b", encoded(RGB[:, :30]))]
    with pytest.raises(CorruptEpisode, match="b is 30x24, the first is 40x24"):
        list(decode_all(files, (24, 40), None))


def test_a_flipped_bit_of_a_png_is_found_though_pillow_decodes_it() -> None:
    """Of the bits of the pixels, every one: a PNG carries checksums."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(buffer, "PNG")
    whole = buffer.getvalue()
    begin = whole.index(b"IDAT") + 4
    end = begin + int.from_bytes(whole[begin - 8 : begin - 4], "big")
    assert survey([("it", whole)], None)[0] == 1
    for at in range(begin, end):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        with pytest.raises(CorruptEpisode, match="it is damaged: its checksum differs"):
            survey([("it", bytes(damaged))], None)


def test_scans_that_pass_over_the_image_again_and_again_are_not_decoded():
    data = encoded(RGB, "JPEG", progressive=True)
    first, second = (data.find(b"\xff\xda", at) for at in (0, data.find(b"\xff\xda") + 2))
    bomb = data[:second] + data[first:second] * 1000 + data[second:]
    assert decode(data, "x", None).shape == RGB.shape
    with pytest.raises(CorruptEpisode, match="x is made of 1010 scans; at most 64 are read"):
        decode(bomb, "x", None)


def test_no_program_is_run_for_an_image(monkeypatch):
    """Pillow gives EPS to Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    data = encoded(RGB, "EPS")
    for read in (lambda: decode(data, "x", None), lambda: survey([("x", data)], None)):
        with pytest.raises(CorruptEpisode, match="^x is not an image"):
            read()
