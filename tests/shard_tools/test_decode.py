"""Decoding: seeking, resampling, agreement of the libraries, and decoders that hang or crash."""

import errno
import json
import os
import platform
import re
import resource
import signal
import struct
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from shard_tools import catalogs, ffmpeg_codecs, guard
from shard_tools.build import build
from shard_tools.decode import DecodeError, MachineError, decode, decode_whole
from shard_tools.forms import vggsound
from shard_tools.forms.entries import Asked
from shard_tools.guard import DecoderProcess
from shard_tools.plan import BuildOptions
from shard_tools.write import AudioOptions
from tests.shard_tools.corpus import encode, sound

RATE = 16000


def test_a_segment_of_an_hour_is_sought_not_decoded(tmp_path):
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        for minute in range(60):
            file.write(np.full(8000 * 60, minute / 100))
    decoded = decode(str(path), 59 * 60 + 10, None, rate=8000, seconds=10)
    assert decoded.duration == pytest.approx(3600)
    assert decoded.waveform == pytest.approx(np.full(80000, 0.59), abs=1e-4)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
def test_a_segment_of_a_wav_of_unknown_size_is_sought(tmp_path, monkeypatch, subtype):
    """Of a recorder that was switched off, or of more than 4 GB: all before the segment was read for each."""
    path, read, count = tmp_path / "a.wav", os.pread, [0]
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (60 * RATE, 2)), RATE, subtype=subtype)
    wanted = [decode(str(path), start, start + 1, rate=RATE, seconds=1) for start in (0.0, 31.4, 58.9)]
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = content[4:8] = bytes(4)
    path.write_bytes(content)

    def counted(handle, size, offset):
        found = read(handle, size, offset)
        count[0] += len(found)
        return found

    monkeypatch.setattr(os, "pread", counted)
    found = [decode(str(path), start, start + 1, rate=RATE, seconds=1) for start in (0.0, 31.4, 58.9)]
    assert count[0] < 0.8 * len(content)  # 1.6 times without seeking
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one.waveform, other.waveform)
        assert (one.decoder, other.decoder, one.cut) == ("pyav", "soundfile", False)
        assert one.duration == pytest.approx(60, abs=0.001)
    assert decode(str(path), 59.5, 61, rate=RATE, seconds=9).cut
    with pytest.raises(DecodeError, match=r"outside: the segment from 70 s begins after the end of a 60\.00 s"):
        decode(str(path), 70.0, 71.0, rate=RATE, seconds=1)


def test_gsm_in_a_wav_is_read(tmp_path):
    """As telephones record; libsndfile reads it from front to back, and refused to seek."""
    path = tmp_path / "call.wav"
    soundfile.write(path, sound(), 8000, format="WAV", subtype="GSM610")
    with soundfile.SoundFile(path) as file:
        file.seekable = lambda: False
        whole = file.read(len(sound()), dtype="float32")
    for start in (0.0, 1.25):
        decoded = decode(str(path), start, start + 0.5, rate=8000, seconds=10.0)
        assert np.array_equal(decoded.waveform, whole[round(start * 8000) :][:4000])


def test_resampling_does_not_alias(tmp_path):
    """A 9 kHz tone has no place at 16 kHz: nothing of it folds back."""
    high = 0.5 * np.sin(2 * np.pi * 9000 * np.arange(44100) / 44100)
    soundfile.write(tmp_path / "a.wav", high, 44100, subtype="FLOAT")
    folded = decode(str(tmp_path / "a.wav"), 0.0, None, rate=RATE, seconds=1).waveform[2000:-2000]
    assert 20 * np.log10(np.abs(folded).max()) < -90


def test_real_m4a_is_the_original(shared, tmp_path):
    """AAC of a real 44.1 kHz recording stays close to the recording itself."""
    source = next((shared / "data" / "esc50_44k_sample").glob("*.wav"))
    encode(source, tmp_path / "clip.m4a", "-c:a", "aac", "-b:a", "256k")
    clean = decode(str(source), 1.0, 3.0, rate=RATE, seconds=10).waveform
    coded = decode(str(tmp_path / "clip.m4a"), 1.0, 3.0, rate=RATE, seconds=10).waveform
    assert abs(len(clean) - len(coded)) <= 2
    lag = int(np.correlate(coded, clean[2000:22000]).argmax()) - 2000
    assert abs(lag) <= 1100
    assert np.corrcoef(clean[2000:22000], coded[2000 + lag : 22000 + lag])[0, 1] > 0.7


def test_a_file_that_is_gone_is_a_reason(tmp_path):
    with pytest.raises(DecodeError, match="vanished"):
        decode(str(tmp_path / "gone.wav"), 0.0, None, rate=RATE, seconds=1)


def steps(seconds: float) -> np.ndarray:
    """A tone whose frequency tells the second: 200 Hz in the first, 250 Hz in the next ..."""
    time_axis = np.arange(round(seconds * RATE)) / RATE
    return 0.3 * np.sin(2 * np.pi * (200 + 50 * np.floor(time_axis)) * time_axis)


def second_of(waveform: np.ndarray) -> int:
    """Of the middle of a waveform."""
    middle = waveform[len(waveform) // 2 - 3000 : len(waveform) // 2 + 3000]
    peak = np.abs(np.fft.rfft(middle * np.hanning(len(middle)))).argmax()
    return round((peak * RATE / len(middle) - 200) / 50)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.m4a", "a.mp3", "a.ogg", "a.aac"])
@pytest.mark.parametrize(
    ("file", "start", "end", "trimmed", "begin", "length"),
    [
        (25, 20, 30, False, 20, 5),  # cut at the end
        (25, 20, 30, None, 20, 5),
        (38, 30, 40, None, 30, 8),  # a whole video
        (25, 30, 40, None, None, None),  # and a bad download
        (12, 100, 105, False, None, None),
        (5, 20, 25, False, None, None),  # as long as the segment, and a table says where it is
        (10, 30, 40, None, 0, 10),  # the segment itself
        (9.7, 30, 40, None, 0, 9.7),
        (9.2, 30, 40, None, None, None),
        (10.8, 30, 40, None, None, None),
        (10, 5, 15, None, 0, 10),  # likewise: the file has no other five seconds to begin with
        (40, 30, 40, None, 30, 10),
    ],
)
def test_a_segment_never_comes_from_another_place(tmp_path, name, file, start, end, trimmed, begin, length):
    soundfile.write(tmp_path / "source.wav", steps(file), RATE)
    encode(tmp_path / "source.wav", tmp_path / name)
    if begin is None:
        with pytest.raises(
            DecodeError, match=rf"outside: the segment from {start} s begins after the end of a [\d.]+ s"
        ):
            decode(str(tmp_path / name), start, end, rate=RATE, seconds=10, trimmed=trimmed)
        return
    decoded = decode(str(tmp_path / name), start, end, rate=RATE, seconds=10, trimmed=trimmed)
    assert len(decoded.waveform) / RATE == pytest.approx(length, abs=0.12)  # a delay that no header declares
    assert second_of(decoded.waveform) == pytest.approx(begin + length / 2, abs=1)
    assert decoded.begin == begin
    assert decoded.cut == (length < end - start - 0.2)
    # Of a clip that is shorter than the segment, the segment's length still says whether the file is the segment.
    short = decode(str(tmp_path / name), start, end, rate=RATE, seconds=1, trimmed=trimmed)
    assert (short.begin, second_of(short.waveform)) == (begin, begin)


def test_shards_say_what_was_read(tmp_path):
    for name, seconds in (("whole", 38), ("short", 25), ("segment", 10)):
        soundfile.write(tmp_path / f"{name}.wav", steps(seconds), RATE)
    lines = "\n".join(f'{name}, 30.000, 40.000, "/m/a"' for name in ("whole", "short", "segment"))
    (tmp_path / "segments.csv").write_text(f"# {lines}\n{lines}\n")
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/a,A\n")
    catalog = catalogs.audioset(tmp_path, tmp_path / "segments.csv", tmp_path / "labels.csv", None, "train")
    build(catalog, tmp_path / "out", BuildOptions(AudioOptions()), workers=1)
    (failure,) = map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines())
    assert failure["reason"] == "outside: the segment from 30 s begins after the end of a 25.00 s file"
    told = {}
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                about = json.loads(tar.extractfile(member).read())
                told[about["source"]] = tuple(
                    about[key] for key in ("trimmed", "read_from", "cut_by_file_end", "seconds")
                )
    assert told == {"whole.wav": (False, 30, True, 8), "segment.wav": (True, 0, False, 10)}


@pytest.mark.parametrize("form", ["audioset", "vggsound"])
def test_one_file_is_not_each_of_two_segments(tmp_path, form):
    """A file named after the video alone, as long as a segment: of one listed it is that, of two it is neither."""
    folder, names = tmp_path / "audio", {"-one_video_": (30,), "_two_of_it-": (30, 60), "-whole_two_": (2, 30)}
    folder.mkdir()
    for name in names:
        soundfile.write(folder / f"{name}.wav", steps(45 if "whole" in name else 10), RATE)
    listed = [(name, start) for name, starts in names.items() for start in starts]
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/0,A\n1,/m/1,B\n")
    if form == "audioset":
        rows = [f'{name}, {start}.000, {start + 10}.000, "/m/{n % 2}"' for n, (name, start) in enumerate(listed)]
        (tmp_path / "s.csv").write_text("\n".join([*rows, rows[0]]))  # a row twice is one segment
        catalog = catalogs.audioset(folder, tmp_path / "s.csv", tmp_path / "labels.csv", None, "train")
    else:
        (tmp_path / "vggsound.csv").write_text("".join(f"{name},{start},{n % 2},train\n" for n, (name, start)
                                                       in enumerate(listed)))  # fmt: skip
        catalog = vggsound.read(Asked(folder, tmp_path / "vggsound.csv"))
    build(catalog, tmp_path / "out", BuildOptions(AudioOptions()), workers=1, engine="inline")
    failures = list(map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines()))
    assert [line["path"] for line in failures] == ["_two_of_it-.wav"] * 2
    assert {line["reason"].split(":")[0] for line in failures} == {"outside"}
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        found = [json.loads(tar.extractfile(member).read()) for member in tar if member.name.endswith(".json")]
    assert sorted((one["source"], one["start"], one["read_from"]) for one in found) == [
        ("-one_video_.wav", 30, 0), ("-whole_two_.wav", 2, 2), ("-whole_two_.wav", 30, 30),
    ]  # fmt: skip


@pytest.mark.parametrize("picture", [0, 300, 3_000_000])
def test_a_cut_mp3_is_told_behind_tags_of_any_size(tmp_path, picture):
    """Of one with a picture of more than 64 kB the part that was there was taken for all of it."""
    soundfile.write(tmp_path / "source.wav", steps(4), RATE)
    encode(tmp_path / "source.wav", tmp_path / "bare.mp3", "-id3v2_version", "0")
    sizes = bytes((picture >> shift) & 127 for shift in (21, 14, 7, 0))
    tagged = b"ID3\3\0\0" + sizes + bytes(picture) if picture else b""
    content = (tmp_path / "bare.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(tagged + content)
    whole = decode(str(tmp_path / "a.mp3"), 0.0, None, rate=RATE, seconds=10)
    assert np.array_equal(whole.waveform, decode(str(tmp_path / "bare.mp3"), 0.0, None, rate=RATE, seconds=10).waveform)
    (tmp_path / "a.mp3").write_bytes(tagged + content[: len(content) // 2])
    with pytest.raises(DecodeError, match="truncated: the mp3 header promises"):
        decode(str(tmp_path / "a.mp3"), 0.0, None, rate=RATE, seconds=10)


def test_what_is_longer_than_a_clip_is_said(tmp_path, caplog):
    """Hours of a recording of which ten seconds are stored; and again where the other shards are written anew."""
    (tmp_path / "a").mkdir()
    for name, seconds in (("long", 3.0), ("short", 0.7), ("about", 1.2), ("cut", 3.0)):
        soundfile.write(tmp_path / "a" / f"{name}.wav", steps(seconds), RATE)
    rows = ["long.wav,,", "short.wav,,", "about.wav,,", "cut.wav,1,2", "cut.wav,0,2.5", "late.wav,,"]
    (tmp_path / "t.csv").write_text("path,labels,start,end\n" + "".join(
        "{},x,{},{}\n".format(*row.split(",")) for row in rows))  # fmt: skip
    said = "split 'train': 2 clips are longer than the 1 s that are stored: 4 s after these are left out"
    (tmp_path / "a" / "late.wav").write_bytes(b"RIFF")

    def built(**words):
        caplog.clear()
        catalog = catalogs.table(tmp_path / "a", tmp_path / "t.csv", None, None)
        return build(catalog, tmp_path / "out", BuildOptions(AudioOptions(seconds=1.0), 3), 1, engine="inline", **words)

    built()
    assert said in caplog.text
    soundfile.write(tmp_path / "a" / "late.wav", steps(1), RATE)
    assert not built(retry=True).failures
    assert said in caplog.text


def test_a_table_never_guesses(tmp_path):
    soundfile.write(tmp_path / "a.wav", steps(5), RATE)
    (tmp_path / "t.csv").write_text("path,labels,start,end\na.wav,x,20,25\n")
    (clip,) = catalogs.table(tmp_path, tmp_path / "t.csv", None, None).clips
    assert clip.trimmed is False


def test_the_default_track_is_heard(tmp_path):
    """Of three: the one that is marked; of none marked, the one of most channels, as the ffmpeg program does."""
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", 0.3 * np.sin(np.arange(2 * RATE) * (0.1 + 0.1 * number)), RATE)
    inputs = [word for number in (1, 2) for word in ("-i", str(tmp_path / f"{number}.wav"))]
    tracks = ("-map", "0", "-map", "1", "-map", "2", "-c:a", "aac", "-ac", "1")
    encode(tmp_path / "0.wav", tmp_path / "marked.mkv", *inputs, *tracks,
           "-disposition:a:0", "0", "-disposition:a:2", "default")  # fmt: skip
    encode(tmp_path / "0.wav", tmp_path / "wide.mkv", *inputs, *tracks, "-ac:a:1", "2", "-default_mode", "passthrough",
           "-disposition:a", "0")  # fmt: skip
    for name, number in (("marked.mkv", 2), ("wide.mkv", 1)):
        waveform = decode(str(tmp_path / name), 0.5, 1.5, rate=RATE, seconds=10).waveform
        peak = np.abs(np.fft.rfft(waveform)).argmax() * 2 * np.pi / len(waveform)
        assert peak == pytest.approx(0.1 + 0.1 * number, abs=0.01), name


def disguises(secret: Path) -> dict[str, bytes]:
    """Files that would have a player open another one."""
    name, url = secret.name, f"file://{secret}"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT3S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
        '<AdaptationSet mimeType="audio/mp4">'
        f'<Representation id="1" bandwidth="1000"><BaseURL>{name}</BaseURL></Representation></AdaptationSet></Period>'
        "</MPD>"
    )
    sdp = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n"
    texts = {
        "hls": hls.format(name), "hls_url": hls.format(url), "hls_bom": "\ufeff" + hls.format(name),
        "hls_concat": hls.format(f"concat:{secret}"), "hls_map": hls.format(name).replace(
            "#EXTINF", f'#EXT-X-MAP:URI="{name}"\n#EXTINF'),
        "ffconcat": f"ffconcat version 1.0\nfile {name}\n", "ffconcat_url": f"ffconcat version 1.0\nfile '{url}'\n",
        "concat_plain": f"file '{name}'\n", "dash": dash, "sdp": sdp, "rtsp": "RTSP/1.0 200 OK\n" + sdp,
        "asx": f'<asx version="3.0"><entry><ref href="{name}"/></entry></asx>', "pls": f"[playlist]\nFile1={name}\n",
        "ted": '{"captions":[{"duration":3000,"content":"x","startOfParagraph":true,"startTime":0}]}',
        "lavfi": f"amovie={secret}", "ffmetadata": ";FFMETADATA1\n", "sbg": "-SE\n" + "a: pink/40\nNOW a\n",
    }  # fmt: skip
    found = {what: text.encode() for what, text in texts.items()}
    for what in ("hls", "hls_url", "ffconcat", "dash", "concat_plain"):
        found |= {
            f"{what}_{start.hex()}": start + found[what] for start in (b"\0", b"\x01", b"\x1b", b"ID3\4\0\0\0\0\0\0")
        }
    return found


def test_no_file_opens_another_one(tmp_path, monkeypatch):
    """Playlists and scripts of any ending and behind any byte; a movie whose samples lie in another file."""
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, sound(), RATE)
    encode(secret, tmp_path / "ts.ts", "-c:a", "mp2")
    found = disguises(secret) | {f"ts_{what}": data for what, data in disguises(tmp_path / "ts.ts").items()}
    assert len(found) > 60
    for what, content in found.items():
        for ending in ("wav", "mp3", "m3u8", "m4a"):
            path = tmp_path / f"{what}.{ending}"
            path.write_bytes(content)
            for name in (str(path), path.name):
                with pytest.raises(DecodeError, match="undecodable"):
                    decode(name, 0.0, None, rate=RATE, seconds=3)
                with pytest.raises(DecodeError, match="undecodable"):
                    list(decode_whole(name, RATE, []))
            path.unlink()


@pytest.mark.parametrize("form", [b"url ", b"alis"])
def test_a_movie_whose_samples_are_said_to_lie_elsewhere(tmp_path, monkeypatch, form):
    """PCM in a movie's own data, and a data reference to a neighbour of the same layout: the neighbour stays closed."""
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "silence.wav", np.zeros(3 * RATE), RATE)
    encode(tmp_path / "silence.wav", tmp_path / "a.mov", "-c:a", "pcm_s16le")
    soundfile.write(tmp_path / "noise.wav", sound(), RATE)
    encode(tmp_path / "noise.wav", tmp_path / "secret.mov", "-c:a", "pcm_s16le")
    content = bytearray((tmp_path / "a.mov").read_bytes())
    at = content.index(b"dref")
    size = int.from_bytes(content[at - 4 : at], "big")
    entry = b"file:secret.mov\0" if form == b"url " else bytes(10) + b"secret.mov"
    body = struct.pack(">I4sI", 12 + len(entry), form, 0) + entry  # flags 0: not in this file
    table = bytes(4) + struct.pack(">I", 1) + body
    longer = 8 + len(table) - size
    content[at - 4 : at - 4 + size] = struct.pack(">I4s", 8 + len(table), b"dref") + table
    for name in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):  # the boxes around it
        place = content.rindex(name, 0, at) if name != b"dinf" else at - 8
        place = content.rindex(name, 0, at)
        old = int.from_bytes(content[place - 4 : place], "big")
        content[place - 4 : place] = (old + longer).to_bytes(4, "big")
    (tmp_path / "linked.mov").write_bytes(bytes(content))
    try:
        waveform = decode("linked.mov", 0.0, None, rate=RATE, seconds=3).waveform
    except DecodeError:
        return
    assert not waveform.any()


def test_tags_that_are_not_utf8_do_not_matter(tmp_path):
    soundfile.write(tmp_path / "a.wav", sound(), RATE)
    encode(tmp_path / "a.wav", tmp_path / "a.mp3", "-metadata", "title=xxxxxxxx", "-id3v2_version", "3")
    content = (tmp_path / "a.mp3").read_bytes()
    place = content.index(b"TIT2")
    (tmp_path / "a.mp3").write_bytes(content[: place + 10] + b"\3\xff\xfe\xe4\xf6\xfc" + content[place + 16 :])
    assert len(decode(str(tmp_path / "a.mp3"), 0.0, None, rate=RATE, seconds=3).waveform) == 3 * RATE


DAMAGED = {"m.ogg": "libvorbis", "m.opus": "libopus", "m.m4a": "aac", "m.flac": "flac", "m.mp3": "libmp3lame",
           "m.webm": "libopus", "m.mkv": "aac", "m.ac3": "ac3"}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_eight_bytes_of_a_minute_cost_a_moment(tmp_path, name):
    """The rest is kept, the place is told, and times after it are right; a shard's clip there fails, others do not."""
    soundfile.write(tmp_path / "m.wav", steps(60), RATE)
    path = tmp_path / name
    encode(tmp_path / "m.wav", path, "-c:a", DAMAGED[name])
    content = bytearray(path.read_bytes())
    place = len(content) * 8 // 10
    content[place : place + 8] = bytes(8)
    path.write_bytes(bytes(content))
    problems: list[str] = []
    waveform = np.concatenate(list(decode_whole(str(path), RATE, problems)))
    assert len(waveform) / RATE == pytest.approx(60, abs=0.15)
    for second in (10, 40, 55, 58):
        assert second_of(waveform[second * RATE : (second + 1) * RATE]) == second
    if name in ("m.ogg", "m.opus", "m.m4a", "m.flac", "m.ac3"):  # of the others nothing tells
        (problem,) = problems
        found = re.fullmatch(r"damaged near (\d+\.\d) s: (\d+\.\d\d) s lost", problem)
        assert found, problem
        near, lost = map(float, found.groups())
        assert 46 < near < 50
        assert 0.02 < lost < 2
        with pytest.raises(DecodeError, match="damaged"):
            decode(str(path), near - 1.5, near + 2, rate=RATE, seconds=10, trimmed=False)
    for second in (10, 53):
        clip = decode(str(path), second, second + 1, rate=RATE, seconds=10, trimmed=False).waveform
        assert second_of(clip) == second


def test_damage_before_a_segment_that_has_to_be_decoded_moves_nothing(tmp_path, monkeypatch):
    """From the front, as where nothing may be skipped."""
    soundfile.write(tmp_path / "m.wav", steps(30), RATE)
    encode(tmp_path / "m.wav", tmp_path / "m.m4a")
    content = bytearray((tmp_path / "m.m4a").read_bytes())
    content[len(content) // 3 : len(content) // 3 + 8] = bytes(8)
    (tmp_path / "m.m4a").write_bytes(bytes(content))
    monkeypatch.setattr(ffmpeg_codecs, "STEADY", 1 << 30)
    assert second_of(decode(str(tmp_path / "m.m4a"), 25, 26, rate=RATE, seconds=10, trimmed=False).waveform) == 25


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
def test_too_many_open_files_are_the_machines_trouble(tmp_path, name):
    soundfile.write(tmp_path / "a.wav", sound(), RATE)
    encode(tmp_path / "a.wav", tmp_path / "a.m4a")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else 64
    held = [os.dup(0) for _ in range(highest + 1)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, hard))
        with pytest.raises(MachineError, match="Too many open files"):
            decode(str(tmp_path / name), 0.0, None, rate=RATE, seconds=3)
        with pytest.raises(MachineError, match="Too many open files"):
            DecoderProcess(RATE, 3.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in held:
            os.close(handle)
    assert len(decode(str(tmp_path / name), 0.0, None, rate=RATE, seconds=3).waveform) == 3 * RATE


def test_an_error_of_the_disk_is_no_end_of_the_file(tmp_path, monkeypatch):
    """Demuxers end there without a word."""
    soundfile.write(tmp_path / "a.wav", sound(), RATE)
    encode(tmp_path / "a.wav", tmp_path / "a.mp3")
    read = os.pread

    def broken(handle, size, offset):
        if offset > 5000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(handle, min(size, 4000), offset)

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(MachineError, match="Input/output error"):
        decode(str(tmp_path / "a.mp3"), 0.0, None, rate=RATE, seconds=3)


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """The decoder process, with a soundfile that does `what` to files named bad.wav; and a good file."""

    def make(what: str, limit: float) -> tuple[DecoderProcess, Path, Path]:
        plugin = tmp_path / "plugin"
        plugin.mkdir()
        (plugin / "sitecustomize.py").write_text(
            "import ctypes, os, time, soundfile\n"
            "real = soundfile.SoundFile.__init__\n"
            "def init(self, file, *words, **options):\n"
            "    if os.readlink(f'/proc/self/fd/{file}').endswith('bad.wav'):\n"
            f"        {what}\n"
            "    real(self, file, *words, **options)\n"
            "soundfile.SoundFile.__init__ = init\n"
        )
        monkeypatch.setenv("PYTHONPATH", f"{plugin}:{os.environ.get('PYTHONPATH', '')}")
        for name in ("good.wav", "bad.wav"):
            soundfile.write(tmp_path / name, sound(), RATE)
        return DecoderProcess(RATE, 3.0, limit), tmp_path / "good.wav", tmp_path / "bad.wav"

    return make


def test_a_hanging_decoder_costs_one_clip(patched):
    """It hangs in C, where no Python signal handler runs."""
    process, good, bad = patched("ctypes.CDLL(None).pause()", 3.0)
    with process:
        clean = process.decode(str(good), 0.0, None).waveform
        with pytest.raises(DecodeError, match="timeout: the decoder took longer than 3 s"):
            process.decode(str(bad), 0.0, None)
        assert np.array_equal(process.decode(str(good), 0.0, None).waveform, clean)
        assert np.array_equal(decode(str(good), 0.0, None, rate=RATE, seconds=3.0).waveform, clean)


def test_a_decoder_that_is_held_up_costs_no_clip(patched, monkeypatch):
    """A process that is stopped, as by a batch system, or waits for a disk, gets more time; then the shard does."""
    process, good, bad = patched("os.kill(os.getpid(), 19)", 1.0)
    with process:
        clean = process.decode(str(good), 0.0, None).waveform

        def go_on() -> None:
            while psutil.Process(process._process.pid).status() != psutil.STATUS_STOPPED:
                time.sleep(0.05)
            time.sleep(1.5)  # beyond its limit
            os.kill(process._process.pid, signal.SIGCONT)

        again = threading.Thread(target=go_on)
        again.start()
        assert np.array_equal(process.decode(str(bad), 0.0, None).waveform, clean)
        again.join()
        monkeypatch.setattr(guard, "START_LIMIT", 0.2)
        with pytest.raises(MachineError, match=r"the decoder was held up for \d+ s: does the disk answer"):
            process.decode(str(bad), 0.0, None)
        monkeypatch.undo()
        assert np.array_equal(process.decode(str(good), 0.0, None).waveform, clean)


def test_an_alarm_means_that_the_worker_was_stopped_too(patched):
    process, _, bad = patched("os.kill(os.getpid(), 14)", 60.0)
    with process, pytest.raises(MachineError, match="were stopped for minutes"):
        process.decode(str(bad), 0.0, None)


def test_a_decoder_that_is_killed_is_the_machines_trouble(patched):
    """As the kernel does where memory is short; the next clip gets another process."""
    process, good, bad = patched("os.kill(os.getpid(), 9)", 60.0)
    with process:
        with pytest.raises(MachineError, match=r"the decoder process was killed \(SIGKILL\)"):
            process.decode(str(bad), 0.0, None)
        assert len(process.decode(str(good), 0.0, None).waveform) == 3 * RATE


def test_a_decoder_process_needs_no_directory_for_temporary_files(patched, monkeypatch, tmp_path):
    process, good, _ = patched("pass", 60.0)
    process.close()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with DecoderProcess(RATE, 3.0) as another:
        assert len(another.decode(str(good), 0.0, None).waveform) == 3 * RATE


@pytest.mark.parametrize(
    ("what", "reason"),
    [("os.kill(os.getpid(), 11)", "crashed: the decoder died of SIGSEGV"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_crashing_decoder_costs_one_clip(patched, what, reason):
    process, good, bad = patched(what, 60.0)
    with process:
        with pytest.raises(DecodeError, match=reason):
            process.decode(str(bad), 0.0, None)
        assert len(process.decode(str(good), 0.0, None).waveform) == 3 * RATE


def test_a_decoder_ends_with_its_worker(patched):
    process, good, _ = patched("pass", 60.0)
    process.decode(str(good), 0.0, None)
    child = process._process
    process._pipe.close()  # what the kernel does when the worker is killed
    assert child.wait(60) == 0
    process.close()
    assert guard.TIME_LIMIT > 0
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL  # the alarm that ends an orphan


@pytest.mark.parametrize("pad", [b"", b"\0"])
@pytest.mark.parametrize(("bits", "sample"), [(24, b"\xe8\x03\0"), (8, b"\x90")])
def test_what_follows_an_odd_data_chunk_is_no_audio(tmp_path, bits, sample, pad):
    """Also where its writer left out the byte that fills it up."""
    width, data = bits // 8, sample * 8001
    form = struct.pack("<IHHIIHH", 16, 1, 1, RATE, RATE * width, width, bits)
    after = b"LIST" + struct.pack("<I", 400) + b"INFOISFT" + struct.pack("<I", 388) + bytes(range(97)) * 4
    body = b"WAVEfmt " + form + b"data" + struct.pack("<I", len(data)) + data + pad + after
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    decoded = decode(str(tmp_path / "a.wav"), 0.0, None, rate=RATE, seconds=1)
    assert decoded.decoder == "soundfile"
    assert len(decoded.waveform) == 8001
    assert np.ptp(decoded.waveform) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other limits")
def test_a_clip_costs_the_decoder_process_no_new_pages(tmp_path):
    """Else each one costs 900 page faults, a seventh of what a WAV takes."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (441000, 2)), 44100)

    def faults() -> int:
        return int(Path(f"/proc/{decoder._process.pid}/stat").read_text().rpartition(")")[2].split()[7])

    with DecoderProcess(RATE, 10.0) as decoder:
        for _ in range(5):
            decoder.decode(str(path), 0.0, None)
        before = faults()
        for _ in range(20):
            decoder.decode(str(path), 0.0, None)
        assert faults() - before < 20 * 50
