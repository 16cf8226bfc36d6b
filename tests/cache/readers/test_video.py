"""Video frames are what their file says: colors, orientation, the right stream; what cannot be said is refused."""

import dataclasses
import hashlib
import shutil
import subprocess

import av
import numpy as np
import pytest

from dvla.cache.readers.episode import CorruptEpisode
from dvla.cache.readers.video import decode, find_extent
from support.video_samples import FPS, add_cover, patches, to_yuv, turn, write_h264, write_video

SIZE = (48, 96)
TIMES = np.arange(6) / FPS


def read(path, times=TIMES):
    extent = find_extent(path, times, "e")
    images = list(decode(extent, "e", 0, len(times)))
    assert all(i.shape == (extent.height, extent.width, 3) and i.dtype == np.uint8 for i in images)
    assert all(i.flags.c_contiguous for i in images)
    return extent, images


def off(image, wanted):
    """Greatest difference away from the borders of the patches, where chroma is mixed."""
    inner = np.arange(wanted.shape[1]) % 16
    return np.abs(image.astype(int) - wanted)[:, (inner > 3) & (inner < 12)].max()


def ordinary_hash(path):
    """What the hash of a whole untagged file was before tags were read."""
    with av.open(str(path)) as container:
        packets = sorted((p.pts, bytes(p)) for p in container.demux(video=0) if p.pts is not None)
    digest = hashlib.sha256()
    for pts, data in packets:
        digest.update(f"{pts - packets[0][0]}:{len(data)};".encode())
        digest.update(data)
    return digest.hexdigest()


def images(count=6):
    return [patches(*SIZE, shift=k) for k in range(count)]


@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [1, 4, 6, 7, 9])
def test_colors_by_matrix_and_range(tmp_path, codec, matrix, full):
    planes = [to_yuv(i, matrix, full) for i in images()]
    path = tmp_path / ("x.mkv" if codec == "ffv1" else "x.mp4")
    lossless = {"qp": "0"} if codec == "libx264" else None
    write_video(path, planes, "yuv420p", SIZE, codec, matrix, 2 if full else 1, lossless)
    extent, found = read(path)
    assert all(off(f, i) <= 3 for f, i in zip(found, images(), strict=True))
    ordinary = matrix == 6 and (codec == "libx264" or not full)  # H.264 of full range has a pixel format that says it
    assert (extent.sha256 == ordinary_hash(path)) == ordinary


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [2, 1, 9])
@pytest.mark.parametrize("pix_fmt, bits", [("yuv420p10le", 10), ("yuv444p10le", 10), ("yuv420p12le", 12)])
def test_colors_of_more_bits(tmp_path, pix_fmt, bits, matrix, full):
    planes = [to_yuv(i, matrix, full, bits, "420" in pix_fmt) for i in images()]
    path = write_video(tmp_path / "x.mkv", planes, pix_fmt, SIZE, "ffv1", matrix, 2 if full else 1)
    assert all(off(f, i) <= 4 for f, i in zip(read(path)[1], images(), strict=True))  # libswscale's own rounding


def test_untagged_video_is_what_it_was(tmp_path):
    path = write_h264(tmp_path / "x.mp4", images())
    extent, found = read(path)
    with av.open(str(path)) as container:
        before = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert all(np.array_equal(f, b) for f, b in zip(found, before, strict=True))
    assert extent.sha256 == ordinary_hash(path)


@pytest.mark.parametrize("pix_fmt, codec", [("bgr0", "ffv1"), ("gbrp", "libx264rgb"), ("gray", "ffv1")])
def test_rgb_and_gray(tmp_path, pix_fmt, codec):
    gray = pix_fmt == "gray"
    wanted = images() if not gray else [np.repeat(i.mean(2, keepdims=True).astype(np.uint8), 3, 2) for i in images()]
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=FPS, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "rgb24" if codec == "libx264rgb" else pix_fmt
        for number, image in enumerate(wanted):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts = number
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    assert all(np.abs(f.astype(int) - w).max() <= 1 for f, w in zip(read(path)[1], wanted, strict=True))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg command line is not installed")
@pytest.mark.parametrize("matrix", [2, 1, 6, 9])
@pytest.mark.parametrize("color_range", [0, 1, 2])
@pytest.mark.parametrize("pix_fmt, bits", [("yuv420p", 8), ("yuv444p", 8), ("yuv420p10le", 10), ("yuv444p12le", 12)])
def test_equals_the_ffmpeg_command_line(tmp_path, pix_fmt, bits, color_range, matrix):
    rng = np.random.default_rng(0)
    rgb = [np.kron(rng.integers(0, 256, (12, 24, 3)), np.ones((4, 4, 1))).astype(np.uint8) for _ in range(2)]
    planes = [to_yuv(i, matrix, color_range == 2, bits, "420" in pix_fmt) for i in rgb]
    path = write_video(tmp_path / "x.mkv", planes, pix_fmt, SIZE, "ffv1", matrix, color_range)
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    wanted = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8)
    found = np.stack(read(path, np.arange(2) / FPS)[1])
    assert np.abs(found.astype(int) - wanted.reshape(found.shape)).max() <= 3


MATRICES = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0)]


@pytest.mark.parametrize("matrix", [*MATRICES, (0, -1, -1, 0)])
def test_display_matrix(tmp_path, matrix):
    """Each pixel goes where the matrix says."""
    a, b, c, d = matrix
    corner = images()
    for number, image in enumerate(corner):
        image[:24, :16] = 40 * number  # so that no flip or turn looks like another
    path = turn(write_h264(tmp_path / "x.mp4", corner), *matrix)
    untouched = write_h264(tmp_path / "y.mp4", corner)
    extent, found = read(path)
    plain = read(untouched)[1]
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    wanted = np.zeros((to_y.max() - to_y.min() + 1, to_x.max() - to_x.min() + 1, 3), np.uint8)
    for image, shown in zip(plain, found, strict=True):
        wanted[to_y - to_y.min(), to_x - to_x.min()] = image
        assert np.array_equal(shown, wanted)
    assert (extent.height, extent.width) == wanted.shape[:2]
    assert (extent.sha256 == ordinary_hash(untouched)) == (matrix == (1, 0, 0, 1))
    assert np.array_equal(list(decode(extent, "e", 4, 5))[0], found[4])


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG"), (14, "")])
def test_hdr_is_named(tmp_path, transfer, name):
    planes = [to_yuv(i, 9, False, 10) for i in images()]
    path = write_video(tmp_path / "x.mkv", planes, "yuv420p10le", SIZE, matrix=9, color_range=1, transfer=transfer)
    extent, found = read(path)
    assert [n.text for n in extent.notes] == (
        [f"x.mkv is HDR ({name}): read without tone mapping, pale"] if name else []
    )
    assert all(off(f, i) <= 4 for f, i in zip(found, images(), strict=True))


def test_a_slanted_display_matrix_is_refused(tmp_path):
    path = turn(write_h264(tmp_path / "x.mp4", images()), 0.866, 0.5, -0.5, 0.866)
    with pytest.raises(CorruptEpisode, match=r"e: x\.mp4 is shown turned by 30 degrees; only quarter turns"):
        find_extent(path, TIMES, "e")


def test_a_cover_is_not_the_video(tmp_path):
    plain = write_h264(tmp_path / "plain.mp4", images())
    before = read(plain)[1]
    covered = add_cover(write_h264(tmp_path / "x.mp4", images()))
    with av.open(str(covered)) as container:
        assert len(container.streams.video) == 2 and container.streams.video[0].width == 320
    assert all(np.array_equal(f, b) for f, b in zip(read(covered)[1], before, strict=True))


def test_the_default_stream_is_the_video(tmp_path):
    """Of two recordings in one file the default one, though it is the second and smaller."""
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("ffv1", rate=FPS) for _ in range(2)]
        for stream, (height, width) in zip(streams, ((96, 96), SIZE)):
            stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
        streams[0].disposition, streams[1].disposition = 0, av.stream.Disposition.default.value
        for number in range(6):
            for stream, color in zip(streams, (0, 200)):
                image = np.full((stream.height, stream.width, 3), color, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="bgr0")
                frame.pts = number
                for packet in stream.encode(frame):
                    out.mux(packet)
        for stream in streams:
            for packet in stream.encode():
                out.mux(packet)
    extent, found = read(path)
    assert (extent.height, extent.width) == SIZE and (found[0] == 200).all()


@pytest.mark.parametrize("suffix", ["avi", "mov"])
def test_a_palette_is_kept_through_a_seek(tmp_path, suffix):
    """It comes with the first packet of the file, which a later episode does not read."""
    palette = np.zeros((256, 4), np.uint8)
    palette[:] = [(255, k, 255 - k, 7 * k % 256) for k in range(256)]  # ARGB
    indices = [((np.mgrid[:48, :96].sum(0) + 5 * k) % 256).astype(np.uint8) for k in range(12)]
    path = tmp_path / f"x.{suffix}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("rawvideo", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "pal8"
        for number, image in enumerate(indices):
            frame = av.VideoFrame.from_ndarray((image, palette), format="pal8")
            frame.pts = number
            for packet in stream.encode(frame):
                out.mux(packet)
    extent = find_extent(path, np.arange(6, 12) / FPS, "e")
    for image, shown in zip(indices[6:], decode(extent, "e", 0, 6), strict=True):
        assert np.array_equal(shown, palette[image][..., 1:])


def test_gray_of_more_bits_is_a_depth_map(tmp_path):
    planes = [np.full(48 * 96, 100 * k, np.uint16) for k in range(6)]
    path = write_video(tmp_path / "x.mkv", planes, "gray12le", SIZE)
    with pytest.raises(CorruptEpisode, match=r"x\.mkv is gray of 12 bits, a depth map; leave that camera out"):
        find_extent(path, TIMES, "e")


def test_a_matrix_without_a_conversion_is_refused(tmp_path):
    planes = [to_yuv(i, 6, False) for i in images()]
    path = write_video(tmp_path / "x.mkv", planes, "yuv420p", SIZE, matrix=8)  # YCgCo
    with pytest.raises(CorruptEpisode, match="colors of matrix 8"):
        find_extent(path, TIMES, "e")


@pytest.mark.parametrize("size", [(48, 94), (46, 96)])
def test_a_frame_of_another_size(tmp_path, size):
    extent = find_extent(write_h264(tmp_path / "x.mp4", images()), TIMES, "e")
    other = dataclasses.replace(extent, height=size[0], width=size[1])
    with pytest.raises(CorruptEpisode, match=f"frame 0 of x.mp4 is 96x48, the first is {size[1]}x{size[0]}"):
        next(decode(other, "e", 0, 1))


def test_a_narrow_video_is_refused_before_it_is_decoded(tmp_path):
    planes = [np.zeros(2 * 400, np.uint8) for _ in range(6)]
    path = write_video(tmp_path / "x.mkv", planes, "gray", (400, 2))
    with pytest.raises(CorruptEpisode, match=r"x\.mkv is 2x400 pixels; at most 8192 a side and 32:1"):
        find_extent(path, TIMES, "e")


@pytest.mark.parametrize(
    "content",
    [
        b"ffconcat version 1.0\nfile x.mp4\n",  # itself, until no file can be opened any more
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.mp4\n#EXT-X-ENDLIST\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    ],
    ids=["ffconcat", "HLS", "SDP"],
)
def test_a_list_of_other_files_is_no_video(tmp_path, content):
    write_h264(tmp_path / "other.mp4", images())
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(CorruptEpisode, match=r"^e: x\.mp4 cannot be read as video") as error:
        find_extent(tmp_path / "x.mp4", TIMES, "e")
    assert "open files" not in str(error.value) and error.value.kind == "unreadable-file"
