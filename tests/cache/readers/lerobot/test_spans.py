"""Which frames of a video belong to which episode and row, where a dataset's own lists contradict each other."""

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from dvla.cache.readers import open_source
from dvla.cache.readers.episode import CorruptEpisode
from dvla.errors import Failed
from support.lerobot_files import CAMERA, FPS, LENGTHS, VIDEO, numbers, put, rows_of, write_v2, write_v3, write_video

FROM, TO = (f"videos/{CAMERA}/{n}_timestamp" for n in ("from", "to"))


def listed_at(starts, stops=None):
    """Change of the listed times: episode → seconds from (and to; by default from + length)."""

    def change(episode, row):
        if episode in starts:
            row |= {FROM: starts[episode], TO: starts[episode] + LENGTHS[episode] / FPS}
        if stops and episode in stops:
            row[TO] = stops[episode]
        return row

    return change


def all_right(source):
    assert [numbers(source, e) for e in range(3)] == [rows_of(e) for e in range(3)]


def notes(source, episode):
    return [n.text for n in source.load(episode).views[0].notes]


# --- [from, to) of v3.0 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "wrong"),
    [
        ({2: 1.2}, [2]),  # two episodes claim the same frames
        ({2: 1.1}, [2]),
        ({1: 1.5}, [1]),  # by three frames, into the next one
        ({1: 9.0}, [1]),  # behind the end of the file
        ({1: 1.1}, [1]),  # by one frame, into the one before
        ({0: 0.1, 1: 1.3, 2: 2.7}, [0, 1, 2]),  # all by one frame, so that the last ends behind the file
        ({0: 0.0, 1: 0.0, 2: 0.0}, [1, 2]),
        ({2: 1e30}, [2]),
    ],
)
def test_frame_counts_prove_the_place_where_listed_times_are_wrong(tmp_path, starts, wrong):
    source = open_source(write_v3(tmp_path / "d", listed=listed_at(starts)))
    all_right(source)
    assert [e for e in range(3) if notes(source, e)] == wrong
    (note,) = notes(source, wrong[-1])
    right = [0.0, 1.2, 2.6][wrong[-1]]
    assert f"listed at {starts[wrong[-1]]:.3f} s" in note and f"it is at {right:.3f} s" in note


def test_episodes_in_another_order_than_their_numbers(tmp_path):
    source = open_source(write_v3(tmp_path / "d", order=(2, 0, 1)))
    all_right(source)
    assert not any(notes(source, e) for e in range(3))


def test_two_orders_that_fit_equally_are_refused(tmp_path):
    """Episodes 0 and 1 are listed the other way round, with places that overlap: which one is first is not known."""
    source = open_source(write_v3(tmp_path / "d", listed=listed_at({0: 1.2, 1: 0.0})))
    assert numbers(source, 2) == rows_of(2)
    for episode, start in ((0, 1.2), (1, 0.0)):
        with pytest.raises(
            CorruptEpisode, match=f"listed at {start:.3f} s, {LENGTHS[episode]} frames.*36 frames for 36"
        ):
            source.load(episode)


def test_overlap_in_a_file_with_other_frames_costs_only_the_episodes_concerned(tmp_path):
    """Five frames more than rows: nothing proves which of the two episodes is there."""
    film = lambda path, shown: write_video(path, [*shown, 36, 37, 38, 39, 39])  # noqa: E731
    source = open_source(write_v3(tmp_path / "d", film=film, listed=listed_at({2: 1.3})))
    assert numbers(source, 0) == rows_of(0)
    for episode in (1, 2):
        with pytest.raises(CorruptEpisode, match="41 frames for 36 rows of 3 episodes"):
            source.load(episode)
    hole = open_source(write_v3(tmp_path / "hole", film=film, listed=listed_at({1: 1.5})))  # 14 frames between 0 and 2
    all_right(hole)


def test_listed_end_that_is_wrong_is_a_note(tmp_path):
    source = open_source(write_v3(tmp_path / "d", listed=listed_at({}, {2: 99.0})))
    all_right(source)
    assert "from 2.600 to 99.000 s, with 10 frames" in notes(source, 2)[0]


@pytest.mark.parametrize("drift", [0.02, 0.049, -0.03, 0.06, -0.08])
def test_times_that_drift_by_part_of_a_frame(tmp_path, drift):
    """Durations that ffmpeg rounded and that were added up, from a part of a frame to more than one."""
    times = lambda e: sum(LENGTHS[:e]) / FPS + drift * e  # noqa: E731
    source = open_source(write_v3(tmp_path / "d", listed=listed_at({e: times(e) for e in range(3)})))
    all_right(source)


def test_drift_keeps_the_hash(tmp_path):
    plain, drifting = (
        open_source(write_v3(tmp_path / name, listed=listed_at({2: 2.6 + d})))
        for name, d in (("plain", 0.0), ("drift", 0.07))
    )
    assert [plain.load(e).source_hash for e in range(3)] == [
        drifting.load(e).source_hash.replace("plain", "drift") for e in range(3)
    ]


def test_file_with_gaps_between_its_episodes(tmp_path):
    """Segments that were concatenated with a pause: listed times are those of the frames, not of their number."""
    starts = {0: 0.0, 1: 1.5, 2: 3.9}
    pts = [round(1000 * (starts[e] + k / FPS)) for e in range(3) for k in range(LENGTHS[e])]
    film = lambda path, shown: write_video(path, shown, pts)  # noqa: E731
    all_right(open_source(write_v3(tmp_path / "d", film=film, listed=listed_at(starts))))


def test_film_cut_short_costs_its_last_episode(tmp_path):
    film = lambda path, shown: write_video(path, shown[:-3])  # noqa: E731
    source = open_source(write_v3(tmp_path / "d", film=film))
    assert [numbers(source, e) for e in (0, 1)] == [rows_of(0), rows_of(1)]
    with pytest.raises(CorruptEpisode, match=r"33 frames for 36 rows|7 frames for 10 rows"):
        source.load(2)


@pytest.mark.parametrize(
    ("offsets", "lead", "extra", "lengths", "options"),
    [
        ({2: 0.06}, 0, 1, {}, {}),  # nearer to the next frame, and room for it
        ({1: 0.1, 2: 99}, 2, 4, {}, {}),  # room between 0 and 1, and 2 is behind the end
        ({0: 1.2, 1: -1.2, 2: -0.3}, 0, 1, {}, {}),
        ({1: 0.1, 2: -3.5}, 0, 1, {}, {}),
        ({}, 0, 1, {0: 1}, {}),  # a length that makes the rows as many as the frames
        ({1: -0.1}, 0, 1, {}, {}),
        ({2: 0.1}, 0, 4, {}, {}),
        ({}, 2, 0, {}, {"use_editlist": "0"}),  # fits counted from 0 and from the first frame, which is late
    ],
)
def test_never_a_frame_of_another_episode(tmp_path, offsets, lead, extra, lengths, options):
    """Several faults in one file whose frames are more than its rows: what is not proven is refused."""

    def listed(episode, row):
        row |= {FROM: max(row[FROM] + lead / FPS + offsets.get(episode, 0), 0), TO: row[TO] + lead / FPS}
        return row | {"length": row["length"] + lengths.get(episode, 0)}

    def film(path, shown):
        write_video(path, [39] * lead + [*shown] + [38] * extra, None, {"bf": "2", "g": "12"}, options)

    source = open_source(write_v3(tmp_path / "d", film=film, listed=listed))
    found = {e: source.attempt(lambda n: numbers(source, n), e) for e in range(3)}
    assert {e: f for e, f in found.items() if not isinstance(f, Failed)} == {
        e: rows_of(e) for e, f in found.items() if not isinstance(f, Failed)
    }
    assert all(f.kind == "row-count" for f in found.values() if isinstance(f, Failed))


# --- files of other episodes ---


def stale(root, listed, sizes=((0,), (1, 2))):
    """The only video split into files of these episodes; episode → the number of the file it is listed in."""
    path = root / VIDEO.format(video_key=CAMERA, chunk_index=0, file_index=0)
    table = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet")
    starts, stops = [0.0] * 3, [0.0] * 3
    for number, episodes in enumerate(sizes):
        write_video(path.with_name(f"file-{number:03d}.mp4"), [r for e in episodes for r in rows_of(e)])
        for e in episodes:
            starts[e] = sum(LENGTHS[x] for x in episodes if x < e) / FPS
            stops[e] = starts[e] + LENGTHS[e] / FPS
    for name, values in ((FROM, starts), (TO, stops), (f"videos/{CAMERA}/file_index", listed)):
        table = put(table, name, values)
    pq.write_table(table, root / "meta/episodes/chunk-000/file-000.parquet")
    return root


@pytest.mark.parametrize(
    ("listed", "sizes", "wrong"),
    [
        ([0, 0, 1], [(0,), (1, 2)], 1),  # the first one of a new file is listed with the old file
        ([0, 1, 1], [(0,), (1,), (2,)], 2),
        ([0, 7, 1], [(0,), (1, 2)], 1),  # a file that does not exist
        ([0, 0, 1], [(0, 1), (2,)], None),
        ([1, 0, 1], [(0, 1), (2,)], 0),
    ],
)
def test_stale_number_of_a_video_file(tmp_path, listed, sizes, wrong):
    source = open_source(stale(write_v3(tmp_path / "d"), listed, sizes))
    for order in ((0, 1, 2), (2, 1, 0)):
        assert [numbers(source, e) for e in order] == [rows_of(e) for e in order]
        source = open_source(tmp_path / "d")
    assert [e for e in range(3) if notes(source, e)] == ([] if wrong is None else [wrong])
    assert (
        wrong is None or "its frames are in videos/observation.images.front/chunk-000/file-" in notes(source, wrong)[0]
    )


def test_number_of_a_video_file_that_two_files_fit_is_refused(tmp_path):
    """Two other files have as many frames that belong to nobody."""
    root = stale(write_v3(tmp_path / "d"), [0, 0, 3], [(0,), (1,), (1,), (2,)])
    source = open_source(root)
    for episode in (0, 1):
        with pytest.raises(CorruptEpisode, match="12 frames for 26 rows of 2 episodes"):
            source.load(episode)
    assert numbers(source, 2) == rows_of(2)


def test_film_of_another_rate_than_the_rows(tmp_path):
    """30 images a second for 10 rows, with ordinary times and with a clock that runs on."""

    def film(path, shown):
        write_video(path, [n for n in shown for _ in range(3)], [100 * i // 3 for i in range(3 * len(shown))])

    all_right(open_source(write_v3(tmp_path / "d", film=film)))
    all_right(open_source(write_v3(tmp_path / "e", film=film, change=CLOCKS["runs on"])))
    all_right(open_source(write_v2(tmp_path / "f", film=film, change=CLOCKS["epoch"])))


# --- rows and frames -------------------------------------------------------------------------------------------------


def clock(change):
    """All timestamps through `change(seconds, row of the dataset)`, float64."""

    def apply(table):
        times = [change(t, i) for t, i in zip(table["timestamp"].to_pylist(), table["index"].to_pylist())]
        return put(table, "timestamp", np.array(times))

    return apply


CLOCKS = {
    "begins at 1/fps": clock(lambda t, i: t + 1 / FPS),
    "runs on": clock(lambda t, i: i / FPS),
    "epoch": clock(lambda t, i: 1.7e9 + i / FPS),
    "epoch without resolution": clock(lambda t, i: float(np.float32(1.7e9 + i / FPS))),
    "milliseconds": clock(lambda t, i: 1000 * t),
    "nanoseconds since 1970": clock(lambda t, i: 1e9 * (1000 + t)),
    "negative": clock(lambda t, i: t - 5),
    "repeated": clock(lambda t, i: t - (0.1 if i == 5 else 0)),
    "backwards": clock(lambda t, i: t - (3 if i % 5 == 4 else 0)),
    "not a number": clock(lambda t, i: float("nan") if i % 7 == 3 else t),
    "jitter": clock(lambda t, i: t + (0.06 if i % 3 == 1 else 0)),
    "another rate": clock(lambda t, i: 1.7 * t),
    "one long pause": clock(lambda t, i: t + (4 if t > 0.45 else 0)),
}


@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_as_many_frames_as_rows_belong_to_each_other_whatever_the_clock(tmp_path, write, name):
    source = open_source(write(tmp_path / "d", change=CLOCKS[name]))
    all_right(source)
    for episode in range(3):
        loaded = source.load(episode)
        assert loaded.timestamps[0] == 0 and (np.diff(loaded.timestamps) > 0).all()
        assert loaded.timestamps[-1] < 10 and list(loaded.action[:, 0]) == rows_of(episode)


@pytest.mark.parametrize("name", ["runs on", "epoch", "milliseconds"])
def test_one_more_frame_with_another_clock(tmp_path, name):
    """A final image without a row: the first one is still that of row 0, where the clock cannot mean the video's."""
    film = lambda path, shown: write_video(path, [*shown, 39])  # noqa: E731
    source = open_source(write_v2(tmp_path / "d", change=CLOCKS[name], film=film))
    assert numbers(source, 2) == rows_of(2)


def test_one_more_frame_and_times_from_one_step(tmp_path):
    """Times of the end of each step, and an image after the last: the order of rows and frame_index outvote them."""
    film = lambda path, shown: write_video(path, [*shown, shown[-1]])  # noqa: E731
    source = open_source(write_v2(tmp_path / "d", change=CLOCKS["begins at 1/fps"], film=film))
    assert numbers(source, 2) == rows_of(2) and [n.rule for n in source.table(2).notes] == ["time-start"]


def test_more_frames_than_rows_where_witnesses_disagree(tmp_path):
    """Two frames more, timestamps from 1/fps, frame_index from 0: row 0 is frame 1 by one and frame 0 by the other."""
    film = lambda path, shown: write_video(path, [*shown, shown[-1], shown[-1]])  # noqa: E731
    source = open_source(write_v2(tmp_path / "d", change=CLOCKS["begins at 1/fps"], film=film))
    with pytest.raises(CorruptEpisode, match="14 frames for 12 rows: row 0 is frame 1 by its timestamp and frame 0"):
        source.load(0)


def test_trimmed_rows_whose_timestamps_and_frame_index_agree(tmp_path):
    """The first three rows were cut off, the video was not."""

    def film(path, shown):
        write_video(path, [39, 39, 39, *shown])

    def change(table):
        table = put(table, "frame_index", [i + 3 for i in table["frame_index"].to_pylist()])
        return put(table, "timestamp", np.array(table["frame_index"]) / FPS)

    all_right(open_source(write_v2(tmp_path / "d", change=change, film=film)))


def test_dropped_rows_are_found_by_time(tmp_path):
    """Every third row is missing, the video has all frames."""

    def change(table):
        return put(table, "timestamp", [k // 2 * 3 / FPS + k % 2 / FPS for k in range(table.num_rows)])

    def film(path, shown):
        write_video(path, [n for k, n in enumerate(shown) for n in ([n] if k % 2 == 0 else [n, 39])])

    all_right(open_source(write_v2(tmp_path / "d", change=change, film=film)))


@pytest.mark.parametrize("missing", [["timestamp"], ["frame_index"], ["timestamp", "frame_index"], ["index"]])
@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_missing_columns(tmp_path, write, missing):
    source = open_source(write(tmp_path / "d", change=lambda t: t.drop_columns(missing)))
    all_right(source)
    assert source.load(1).timestamps == pytest.approx(np.arange(14) / FPS)


def test_more_frames_and_no_column_that_tells(tmp_path):
    film = lambda path, shown: write_video(path, [*shown, 39])  # noqa: E731
    missing = ["timestamp", "frame_index"]
    source = open_source(write_v2(tmp_path / "d", change=lambda t: t.drop_columns(missing), film=film))
    with pytest.raises(CorruptEpisode, match="13 frames for 12 rows and no timestamps"):
        source.load(0)
    all_right(open_source(write_v2(tmp_path / "e", change=lambda t: t.drop_columns(["timestamp"]), film=film)))


@pytest.mark.parametrize(
    "pts", [lambda k: 200 + 100 * k, lambda k: 100 * k + 30 * (k % 3), lambda k: 33 * k, lambda k: 100 * k + 40]
)
def test_frame_times_that_are_not_those_of_the_rows(tmp_path, pts):
    """A start other than 0, a variable rate (a phone), another rate: as many frames as rows."""
    film = lambda path, shown: write_video(path, shown, [pts(k) for k in range(len(shown))])  # noqa: E731
    all_right(open_source(write_v2(tmp_path / "d", film=film)))


def test_late_start_with_a_frame_more(tmp_path):

    def film(path, shown):
        write_video(path, [*shown, 39], [200 + 100 * k for k in range(len(shown) + 1)])

    all_right(open_source(write_v2(tmp_path / "d", film=film)))


def test_reordered_frames_in_files_of_many_episodes(tmp_path):
    film = lambda path, shown: write_video(path, shown, options={"bf": "2", "g": "12"})  # noqa: E731
    all_right(open_source(write_v3(tmp_path / "d", film=film)))
    all_right(open_source(write_v2(tmp_path / "e", film=film)))


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_reordered_frames_of_a_file_without_an_edit_list(tmp_path, write):
    """Its first frame is shown at 0.2 s, and with it every frame later than is listed."""

    def film(path, shown):
        write_video(path, shown, options={"bf": "2", "g": "12"}, container={"use_editlist": "0"})

    source = open_source(write(tmp_path / "d", film=film))
    (path,) = list((tmp_path / "d").glob("videos/**/*.mp4"))[:1]
    with av.open(str(path)) as opened:
        assert opened.streams.video[0].start_time * opened.streams.video[0].time_base > 0.1
    all_right(source)
    all_right(open_source(write(tmp_path / "e", film=film, change=CLOCKS["runs on"])))


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_frames_before_the_start_of_an_edit_list_are_not_shown(tmp_path, write):

    def film(path, shown):
        write_video(path, [39, 39, 39, *shown], [100 * k - 300 for k in range(len(shown) + 3)])

    source = open_source(write(tmp_path / "d", film=film))
    all_right(source)
    all_right(open_source(write(tmp_path / "e", film=film, change=CLOCKS["begins at 1/fps"])))


def test_film_with_fewer_frames_costs_that_episode_only(tmp_path):
    film = lambda path, shown: write_video(path, shown[:-2] if len(shown) == 14 else shown)  # noqa: E731
    source = open_source(write_v2(tmp_path / "d", film=film))
    assert [numbers(source, e) for e in (0, 2)] == [rows_of(0), rows_of(2)]
    with pytest.raises(CorruptEpisode, match="episode 1: episode_000001.mp4 has 12 frames for 14 rows"):
        source.load(1)


def test_one_video_file_for_all_episodes_of_v2(tmp_path):
    """A path without the episode's number: row counts share its frames out; without them, nothing is guessed."""

    def film(path, shown, extra=()):
        write_video(path, [*range(36), *extra])

    path = "videos/{video_key}/all.mp4"
    for name, extra in (("d", []), ("more", [39])):
        root = write_v2(tmp_path / name, video_path=path)
        film(root / path.format(video_key=CAMERA), None, extra)
    all_right(open_source(tmp_path / "d"))
    for episode in range(3):
        with pytest.raises(CorruptEpisode, match="37 frames for 36 rows of 3 episodes"):
            open_source(tmp_path / "more").load(episode)


def test_a_healthy_file_is_opened_once(tmp_path, monkeypatch):
    from dvla.cache.readers.lerobot import spans

    source = open_source(write_v3(tmp_path / "d"))
    monkeypatch.setattr(spans, "stored_times", lambda *a: pytest.fail("looked through the whole file"))
    all_right(source)
