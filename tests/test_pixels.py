"""Files of every kind against pixels written out by hand: right, or refused by name."""

import io
import logging
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from bayesdiff.checks import UserError
from bayesdiff.data import sources
from bayesdiff.data.framing import Framing
from bayesdiff.data.pixels import read_pixels, readable_endings, readable_formats

RANDOM = np.random.RandomState(0)
COLOUR = RANDOM.randint(0, 256, (6, 6, 3)).astype(np.uint8)
GREY = RANDOM.randint(0, 256, (6, 6)).astype(np.uint8)
DEEP = RANDOM.randint(0, 65536, (5, 6, 4)).astype(np.uint16)


def encoded(picture, kind="png", **options) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def deep_png(values: np.ndarray) -> bytes:
    """PNG with 16 bits per channel, (H, W, C), byte by byte: Pillow writes none in colour."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(tag: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(tag + content))
        return struct.pack(">I", len(content)) + tag + content + check

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def read(content: bytes, **framing):
    return read_pixels(content, "a.png", Framing.of(**framing))


def exactly_rounded(values: np.ndarray, most: int) -> np.ndarray:
    return np.floor(values.astype(np.float64) * 255 / most + 0.5).astype(np.uint8)


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "tiff", "webp", "ppm", "tga", "jpeg2000"])
def test_lossless_formats_keep_every_pixel(kind):
    few = COLOUR // 128 * 255  # eight colours, which a palette holds
    options = {"lossless": True} if kind == "webp" else {}
    pixels = read(encoded(few, kind, **options))
    assert np.array_equal(pixels.values, few.transpose(2, 0, 1))


def test_all_formats_of_pillow_but_programs_films_and_containers():
    endings = readable_endings()
    for ending in "png jpg jpeg jfif jpe webp bmp gif tif tiff ppm pgm jp2 avif mpo ico".split():
        assert f".{ending}" in endings
    assert not endings & {".eps", ".ps", ".pdf", ".mpg", ".h5", ".grib", ".txt", ".npy"}
    assert "EPS" not in readable_formats()


def test_postscript_is_never_run_whatever_its_name():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match=r"cannot read a\.png \(its content is no picture"):
        read(program)


def test_folder_reads_files_of_many_formats(tmp_path):
    kinds = {"a.png": "png", "b.webp": "webp", "c.BMP": "bmp", "d.gif": "gif", "e.tif": "tiff"}
    for name, kind in kinds.items() | {("f.jfif", "jpeg"), ("g.jpeg", "jpeg")}:
        (tmp_path / name).write_bytes(encoded(COLOUR, kind))
    data = sources.folder("f", tmp_path)
    assert len(data.images) + len(data.test_images) == 7


def test_sixteen_bits_are_rounded_not_cut():
    edges = np.array([[0, 127, 128, 129, 256, 257, 65534, 65535]], np.uint16)
    expected = [0, 0, 0, 1, 1, 1, 255, 255]
    for content in (encoded(edges), encoded(edges, "tiff"), encoded(edges, "ppm")):
        pixels = read(content)
        assert pixels.values.tolist() == [[expected]] and pixels.deep


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_of_every_colour_type(channels):
    values = DEEP[..., :channels].copy()
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    colours = values[..., :-1] if channels in (2, 4) else values
    pixels = read(deep_png(values))
    assert np.array_equal(pixels.values, exactly_rounded(colours, 65535).transpose(2, 0, 1))
    assert pixels.deep


def tiff(bits: list[int], photometric: int, width: int, strip: bytes) -> bytes:
    """TIFF of one row and up to two values more than Pillow writes, byte by byte."""
    strip += b"\0" * (len(strip) % 2)
    after = 8 + len(strip) + 2 + 12 * 10 + 4  # where three numbers of bits find their place
    depth = (258, 3, 1, bits[0]) if len(bits) == 1 else (258, 3, len(bits), after)
    entries = [(256, 3, 1, width), (257, 3, 1, 1), depth, (259, 3, 1, 1), (262, 3, 1, photometric)]
    entries += [(273, 4, 1, 8), (277, 3, 1, len(bits)), (278, 3, 1, 1), (279, 4, 1, len(strip))]
    entries += [(339, 3, 1, 1)]
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip
    more = b"" if len(bits) == 1 else struct.pack(f"<{len(bits)}H", *bits)
    return head + struct.pack("<H", len(entries)) + tags + bytes(4) + more


def test_twelve_bits_of_a_tiff_are_twelve():
    # 0xfff and 0x800, packed into three bytes.
    pixels = read(tiff([12], 1, 2, bytes([0xFF, 0xF8, 0x00])))
    assert pixels.values.tolist() == [[[255, round(0x800 * 255 / 4095)]]]


def test_deep_tiffs_that_pillow_misreads_are_refused():
    values = np.array([0, 65535, 256], "<u2").tobytes()
    assert read(tiff([16], 1, 3, values)).values.tolist() == [[[0, 255, 1]]]
    with pytest.raises(UserError, match=r"a\.png has 16 bits of which 0 is white; convert"):
        read(tiff([16], 0, 3, values))
    with pytest.raises(UserError, match="16 bits per channel, of which Pillow reads 8"):
        read(tiff([16] * 3, 2, 1, values))


@pytest.mark.parametrize("white", [256, 1023, 4095, 65535])
def test_deep_ppm_in_colour_is_rounded_and_noted(white):
    values = (DEEP[..., :3].astype(np.int64) * white // 65535).astype(np.uint16)
    head = f"6 5\n{white}\n".encode()
    plain = b"P3\n" + head + " ".join(map(str, values.flatten())).encode()
    for content in (b"P6\n" + head + values.astype(">u2").tobytes(), plain):
        pixels = read(content)
        assert pixels.deep
        exact = values.transpose(2, 0, 1).astype(np.float64) * 255 / white
        assert np.abs(pixels.values - exact).max() <= 0.5
    assert not read(encoded(COLOUR, "ppm")).deep


@pytest.mark.parametrize("channels", [1, 3])
def test_deep_sgi_is_refused_packed_or_not(channels):
    head = struct.pack(">HBBHHHH", 474, 0, 2, 3 if channels == 3 else 2, 6, 5, channels)
    planes = DEEP[..., :channels].transpose(2, 0, 1).astype(">u2").tobytes()
    with pytest.raises(UserError, match=r"a\.png has 16 bits per channel, of which Pillow reads"):
        read(head.ljust(512, b"\0") + planes)
    assert np.array_equal(read(encoded(COLOUR, "sgi")).values, COLOUR.transpose(2, 0, 1))


def test_bitmaps_in_colour_are_colour_whatever_their_values():
    colour = np.stack([GREY] * 3, -1)
    for kind in ("bmp", "pcx", "png"):
        pixels = read(encoded(colour, kind))
        assert pixels.kind == "RGB" and not pixels.either, kind
    for content in (encoded(GREY, "bmp"), encoded(GREY, "gif"), palette_of(GREY // 64 * 85)):
        assert read(content).kind == "a palette of greys"


TRANSPARENT = np.dstack([COLOUR, np.full((6, 6), 255, np.uint8)])
TRANSPARENT[2, 3, 3] = 254
PALETTE = Image.fromarray(COLOUR).quantize(8)
REFUSED = {
    "one pixel not opaque": (encoded(TRANSPARENT), "mode RGBA and transparency"),
    "16 bits, not opaque": (deep_png(DEEP), "mode RGBA and transparency"),
    "grey, not opaque": (encoded(Image.merge("LA", [Image.fromarray(GREY)] * 2)), "mode LA and"),
    "palette with a hole": (encoded(PALETTE, transparency=0), "mode P and transparency"),
    "a colour that is transparent": (
        encoded(COLOUR, transparency=tuple(int(v) for v in COLOUR[0, 0])),
        "mode RGB and transparency",
    ),
    "CMYK": (encoded(Image.fromarray(COLOUR).convert("CMYK"), "jpeg"), "mode CMYK; convert"),
    "floats": (encoded(GREY.astype(np.float32), "tiff"), "mode F; convert"),
    "32 bits": (encoded(GREY.astype(np.int32), "tiff"), "mode I; convert"),
    "Lab": (encoded(Image.fromarray(COLOUR).convert("LAB"), "tiff"), "mode LAB; convert"),
    "not an image": (b"hello", r"cannot read a\.png \(its content is no picture that Pillow"),
    "cut": (encoded(RANDOM.randint(0, 256, (64, 64)).astype(np.uint8))[:-25], "cannot read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    content, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        read(content)
    assert "a.png" in str(error.value) and "BytesIO" not in str(error.value)


def test_transparency_that_hides_nothing_is_dropped():
    opaque = TRANSPARENT.copy()
    opaque[..., 3] = 255
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (6, 6), 255)])
    unused = encoded(COLOUR, transparency=(1, 2, 3))
    assert not (COLOUR == (1, 2, 3)).all(-1).any()
    for content in (encoded(opaque), unused):
        assert np.array_equal(read(content).values, COLOUR.transpose(2, 0, 1))
    assert np.array_equal(read(encoded(grey)).values[0], GREY)


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, kind):
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    # What the EXIF standard says of the stored rows and columns.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: upright.T[::-1], 7: upright[::-1, ::-1].T, 8: upright.T[:, ::-1],
    }[orientation]  # fmt: skip
    content = encoded(np.ascontiguousarray(stored), kind, exif=with_orientation(orientation))
    assert read(content).values[0].tolist() == upright.tolist()


def write(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.png").write_bytes(content)
    return folder


def palette_of(grey: np.ndarray) -> bytes:
    image = Image.fromarray(grey).convert("RGB").quantize(256)
    assert image.mode == "P"
    return encoded(image)


def test_palettes_of_greys_are_what_the_others_are(tmp_path):
    few = GREY // 64 * 85
    grey = sources.folder("f", write(tmp_path / "g", a=palette_of(few), b=encoded(few)))
    assert grey.channels == 1 and (grey.images == grey.test_images).all()
    colour = np.stack([few] * 3, -1)
    folder = write(tmp_path / "c", a=palette_of(few), b=encoded(colour), c=palette_of(few))
    data = sources.folder("f", folder)
    assert data.channels == 3 and (data.images == data.test_images).all()
    alone = sources.folder("f", write(tmp_path / "p", a=palette_of(few), b=palette_of(few)))
    assert alone.channels == 1
    mixed = write(tmp_path / "m", a=palette_of(few), b=encoded(few), c=encoded(COLOUR))
    with pytest.raises(UserError, match=r": c\.png is RGB, b\.png is grey; convert all"):
        sources.folder("f", mixed)


def test_sizes_are_said_of_the_files_that_have_them(tmp_path):
    few = GREY // 64 * 85
    wide = np.stack([few[:5]] * 3, -1)
    folder = write(tmp_path / "s", a=palette_of(few[:4, :4]), b=encoded(wide))
    with pytest.raises(UserError, match=r": b\.png is 6x5, a\.png is 4x4 \(width x height\)"):
        sources.folder("f", folder)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("colour_in", ["train", "test"])
def test_palettes_of_greys_are_decided_for_both_parts_together(colour_in, zipped, tmp_path):
    few = GREY // 64 * 85
    grey, colour = palette_of(few), encoded(np.stack([few] * 3, -1))
    parts = {
        part: {"a.png": colour if part == colour_in else grey, "b.png": grey}
        for part in ("train", "test")
    }

    def read(parts):
        if not zipped:
            for part, files in parts.items():
                (tmp_path / part).mkdir(exist_ok=True)
                for name, content in files.items():
                    (tmp_path / part / name).write_bytes(content)
            return sources.folder("f", tmp_path)
        for part, files in parts.items():
            with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        return sources.zip_images("z", tmp_path / "train.zip", tmp_path / "test.zip")

    data = read(parts)
    assert data.channels == 3
    for image in (*data.images, *data.test_images):
        assert np.array_equal(image, np.stack([few] * 3))
    parts["test" if colour_in == "train" else "train"]["b.png"] = encoded(few)  # grey for certain
    with pytest.raises(UserError, match="convert all to grey or all to RGB"):
        read(parts)


def test_frames_and_depth_are_said(tmp_path, caplog):
    frames = [Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1].copy())]
    moving = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").write_bytes(moving)
    (tmp_path / "b.png").write_bytes(
        deep_png(DEEP[:, :5, :3].repeat(2, 0)[:6].repeat(2, 1)[:, :6])
    )
    with caplog.at_level(logging.WARNING):
        sources.folder("f", tmp_path)
    assert "1 file(s) have several frames, of which the first is read (for example a.gif)" in (
        caplog.text
    )
    deep = "1 file(s) have more than 8 bits per channel, rounded to 8 (for example b.png)"
    assert deep in caplog.text
    caplog.clear()
    dark = write(tmp_path / "dark", a=encoded(DEEP[..., 0] // 16), b=encoded(DEEP[..., 1] // 16))
    with caplog.at_level(logging.WARNING):
        sources.folder("f", write(tmp_path / "x", a=encoded(GREY), b=encoded(GREY)))
        assert caplog.text == ""
        sources.folder("f", dark)
    assert "scale them first" in caplog.text
