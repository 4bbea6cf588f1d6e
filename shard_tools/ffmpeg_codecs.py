"""What FFmpeg's libraries read (mp3, AAC, Opus, Vorbis, video files and the rest): blocks of samples and their places.

In: an open file. Out: mono blocks from front to back, each with its place in the file, and what is damaged.

PyAV's wheel carries FFmpeg, so every machine decodes to the same samples and needs no system package. Only the one file
is opened: its content comes through a file object, only the formats of `DEMUXERS` are read (a playlist is none), and no
protocol is allowed by which a container could name another file or host.

A place is counted in decoded samples: sample 0 is the first that the codec gives after its declared priming, whatever
time stamps the container begins with. What lies before the wanted samples is not decoded where that is provably the
same: the time stamps of an Ogg stream count samples, and packets of other codecs are skipped while all are as long as
the decoded ones before them. Elsewhere everything is decoded from the front. Skipping costs about 5 us a
packet (an hour of mp3: 0.7 s; decoding it: 5 s); in an mp4, whose index lists all packets, and in a WAV of PCM a seek
takes its place.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import av
import numpy as np
import soxr
from av.stream import Discard, Disposition

from shard_tools.segment import DecodeError, down_mix, reason_of

# Containers and raw streams that lie in one file. None of them opens another one: no playlists, scripts, devices or
# picture sequences, and a movie's references to other files are not followed.
DEMUXERS = (
    "aac,ac3,ac4,adx,aiff,amr,amrnb,amrwb,ape,asf,asf_o,au,avi,avr,caf,dsf,dss,dts,dtshd,dv,eac3,flac,flv,gsm,iff,"
    "ircam,ivf,loas,matroska,webm,mlp,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpc,mpc8,mpeg,mpegts,mxf,nistsphere,nut,ogg,oma,paf,"
    "pvf,qcp,qoa,rm,sbc,shn,sox,tak,truehd,tta,voc,vqf,w64,wav,wsd,wtv,wv,wve,xwma"
)
OPTIONS = {"format_whitelist": DEMUXERS, "protocol_whitelist": "", "enable_drefs": "0", "use_absolute_path": "0"}
# Where no header says how long the file is, or one of several files joined with `cat` does: packets are counted.
COUNTED = frozenset({
    "aac", "ac3", "ac4", "adx", "amr", "amrnb", "amrwb", "dts", "dtshd", "eac3", "flac", "gsm", "loas", "mlp", "mp3",
    "mpeg", "mpegts", "ogg", "sbc", "truehd",
})  # fmt: skip
# Of those, the ones whose last time stamp tells how long they are at least.
ENDED_BY_TIME = frozenset({"ogg", "flac"})
# A jump of the time stamps by so many seconds is a loss there, as encoders leave nothing out; elsewhere it is one only
# beside an error of the decoder.
CLOCKS = {"flac": 0.02, "asf": 0.15, "ogg": 0.15}
# Codecs whose packets each give as many samples as the last one, unless their duration is another.
EVEN_CODECS = frozenset({
    "aac", "ac3", "amrnb", "amrwb", "mp1", "mp1float", "mp2", "mp2float", "mp3", "mp3float", "opus", "libopus",
    "amr_nb", "amr_wb", "libopencore_amrnb", "libopencore_amrwb",
})  # fmt: skip
OGG_CODECS = frozenset({"opus", "libopus", "vorbis"})  # whose packets' places Ogg has in samples
# Checksums of these are compared, as their decoders would give a damaged frame as if it were sound.
CHECKED_CODECS = frozenset({"flac", "ac3", "eac3", "tta", "wavpack", "ape", "tak", "shorten", "mlp", "truehd"})
PREROLL = 1.0  # seconds decoded before the wanted samples and dropped: Opus, AAC and mp3 need their past
STEADY = 8  # packets decoded alike before any is skipped
BLOCK = 1 << 16  # samples of a block, about
JUMP = 0.02  # seconds by which time stamps may be off
TAGS = (
    b"ID3",
    b"TAG",
    b"APETAGEX",
    b"LYRICSBEGIN",
)  # between the frames of raw streams that were joined, and behind them
LONGEST_GAP = 600.0  # seconds: a longer jump of the time stamps is no loss but another clock
READ_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class Gap:
    """A damaged place: `samples` are lost at `place`; 0: nothing tells how many."""

    place: int
    samples: int
    reason: str


class Content:
    """The bytes of an open file as FFmpeg reads them; some may be laid over those of the file.

    Args:
        handle: File descriptor; stays the caller's.
        overlay: (offset, bytes) of what a header should say.
    """

    def __init__(self, handle: int, overlay: Sequence[tuple[int, bytes]] = ()) -> None:
        self._handle, self._overlay, self._at = handle, overlay, 0
        self._size = os.fstat(handle).st_size
        self.error: OSError | None = None  # demuxers take one for the end of the file

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        try:
            data = os.pread(self._handle, size, self._at)
        except OSError as error:
            self.error = error
            raise
        for offset, content in self._overlay:
            if self._at < offset + len(content) and offset < self._at + len(data):
                patched = bytearray(data)
                low, high = max(offset, self._at), min(offset + len(content), self._at + len(data))
                patched[low - self._at : high - self._at] = content[low - offset : high - offset]
                data = bytes(patched)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """New position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Position."""
        return self._at


class FFmpegSource:
    """The default audio track of a file, read once from front to back by each call of `blocks`.

    Attributes:
        rate: Hz; that of the first samples.
        channels: Of the first samples.
        place: Of the next sample.
        ended: All was read; `place` is the length.
        gaps: Damaged places that were passed.

    Args:
        path: For messages.
        handle: File descriptor; stays the caller's.
        overlay: See `Content`.

    Raises:
        DecodeError: no audio that FFmpeg reads.
        MachineError: the file cannot be read now.
    """

    decoder = "pyav"

    def __init__(self, path: str, handle: int, overlay: Sequence[tuple[int, bytes]] = ()) -> None:
        self._path, self._handle, self._overlay = path, handle, overlay
        self._may_seek = True
        self._open()

    def _open(self) -> None:
        self._content = Content(self._handle, self._overlay)
        try:
            opened = av.open(self._content, options=OPTIONS, metadata_errors="ignore", buffer_size=READ_SIZE)
        except (av.FFmpegError, OSError) as error:
            self._check_reading()
            raise DecodeError(f"undecodable: {_words(error)}") from error
        self._container: Any = opened
        self._stream = _default_track(self._container)
        self._codec = self._stream.codec_context
        self._codec.thread_count = 1
        if self._codec.name in CHECKED_CODECS:
            self._codec.options = {"err_detect": "crccheck+explode"}
        self.rate, self.channels = int(self._codec.sample_rate or 0), int(self._codec.channels or 0)
        self.place, self.ended, self.gaps = 0, False, list[Gap]()
        self._begin_time = self._end_time = 0.0  # of the first and the last frame, seconds by the container's clock
        self._first: float = 0  # first wanted sample; what reaches beyond it is decoded
        self._used = False

    def _stated(self) -> float:
        """Seconds that the header says the file has; infinite: it does not."""
        if self._stream.duration is not None and self._stream.time_base is not None:
            return float(self._stream.duration * self._stream.time_base)
        if len(self._container.streams) == 1 and self._container.duration:
            return float(self._container.duration / av.time_base)
        return math.inf

    @property
    def missing(self) -> float:
        """Seconds that the header promises beyond those that were read to the end; 0 where it promises none."""
        form = self._container.format.name
        if form in COUNTED - ENDED_BY_TIME or not math.isfinite(stated := self._stated()):
            return 0.0
        there = self.place / self.rate + self._begin_time
        if form == "matroska,webm":  # encoders leave silence out
            there = max(there, self._end_time)
        return max(0.0, stated - there)

    def length(self) -> float:
        """Seconds of the whole file; where no header can be believed, its packets are counted to the end."""
        stated = math.inf if self._container.format.name in COUNTED else self._stated()
        if not self.ended and not math.isfinite(stated):
            self._first = math.inf
            for _ in self._running:
                pass
        if self.ended:
            return self.place / self.rate
        return stated - (self._begin_time if self._container.format.name == "matroska,webm" else 0.0)

    def blocks(self, start: float, seconds: float = math.inf) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of at least so many seconds from one on: place of the first sample, float32 [n], mono.

        A jump of the places is a gap.

        Raises:
            DecodeError: there is nothing to decode.
            MachineError: the file cannot be read now.
        """
        if self._used:
            self._open()
        self._used = True
        self._running = self._blocks(start)
        return self._running

    def _blocks(self, start: float) -> Iterator[tuple[int, np.ndarray]]:
        held: list[np.ndarray] = []  # [channels, n] of one number of channels and one rate, one after the other
        begin = count = own = 0
        for place, samples, rate in self._frames(start):
            if held and (place != begin + count or len(samples) != len(held[0]) or rate != own or count >= BLOCK):
                yield begin, self._mono(held, own)
                held = []
            if not held:
                begin, count, own = place, 0, rate
            held.append(samples)
            count += samples.shape[1] if rate == self.rate else round(samples.shape[1] * self.rate / rate)
        if held:
            yield begin, self._mono(held, own)

    def _mono(self, held: list[np.ndarray], rate: int) -> np.ndarray:
        mono = down_mix((np.concatenate(held, axis=1) if len(held) > 1 else held[0]).T)
        return mono if rate == self.rate else np.asarray(soxr.resample(mono, rate, self.rate, quality="HQ"))

    def _frames(self, start: float) -> Iterator[tuple[int, np.ndarray, int]]:
        """Decoded frames that reach into the wanted part: place, float32 [channels, n], rate."""
        even = self._codec.name in EVEN_CODECS or self._codec.name.startswith("pcm_")
        timed = self._container.format.name == "ogg" and self._codec.name in OGG_CODECS
        clock = CLOCKS.get(self._container.format.name, math.inf)
        tick = float(self._stream.time_base or 0)
        packets: Any = self._container.demux(self._stream)
        unit = usual = steady = 0  # samples and duration of a packet; packets in a row that were so
        due: float | None = None  # time stamp of the next frame, if nothing is lost
        skipped = resumed = decoded = False
        self._damaged = False
        while (packet := self._next(packets)) is not None:
            if steady >= STEADY and not self._damaged and self.place + PREROLL * self.rate < self._first:
                if not skipped and even and (there := self._seek(packet, unit, usual)):
                    packets.close()
                    packets = self._container.demux(self._stream)
                    packet = self._next(packets)
                    if packet is None or packet.pts != there:
                        self._may_seek = False
                        yield from self._again(start)
                        return
                    due = there
                plain = self._plain(packet, unit, usual) if even or timed else 0
                if plain and timed and packet.pts is not None:  # its time stamps are exact, its durations are not
                    step = (packet.pts + packet.duration - (packet.pts if due is None else due)) * tick
                    plain = round((step if 0 < step < LONGEST_GAP else packet.duration * tick) * self.rate)
                if plain and self.place + plain + PREROLL * self.rate <= self._first:
                    self.place += plain
                    due = None if packet.pts is None else packet.pts + packet.duration
                    skipped = True
                    continue
            if skipped:
                self._codec.flush_buffers()
                skipped, resumed = False, True
            if packet.is_corrupt and not self._overlay:  # whose sizes are no promises
                self._damage("a packet is marked as damaged")
            try:
                frames = self._codec.decode(packet)
            except av.FFmpegError:
                steady = 0
                if bytes(packet).startswith(TAGS):
                    due = None  # time stamps count it as sound
                else:
                    self._damage(f"the {self._codec.name} decoder refuses a packet")
                continue
            for frame in frames:
                samples, own, stamp = frame.samples, int(frame.sample_rate), frame.pts
                if not decoded:
                    self.rate, self.channels = own, len(frame.layout.channels)
                    self._first = max(self._first, round(start * self.rate))
                    self._begin_time = max(0.0, (stamp or 0) * tick)
                    decoded, self._damaged = True, False
                    self.gaps.clear()  # what comes before the first sample is not of the recording
                if stamp is not None:
                    lost = 0.0 if due is None else (stamp - due) * tick
                    if resumed:  # a decoder gives nothing for the first packet or packets after others were skipped
                        self.place += round(lost * self.rate) if abs(lost) > 2 * tick else 0
                        resumed = False
                    elif lost > (max(JUMP, 2 * tick) if self._damaged else clock):
                        self._lose(lost)
                    self._damaged = False
                    due = float(stamp)
                if due is None or not tick:
                    self._damaged = False  # no time stamps: nothing will tell how much is lost
                else:
                    due += samples / own / tick
                    self._end_time = due * tick
                count = samples if own == self.rate else round(samples * self.rate / own)
                if self.place + count > self._first:
                    yield self.place, _floats(frame), own
                self.place += count
            if timed or not even:
                steady += len(frames)
            elif len(frames) == 1 and samples == unit and own == self.rate and abs((packet.duration or 0) - usual) <= 1:
                steady += 1
            elif frames:
                steady, unit, usual = 0, samples, packet.duration or 0
        self._check_reading()
        if not decoded:
            reason = self.gaps[0].reason if self.gaps else "no samples in its audio track"
            raise DecodeError(f"undecodable: {reason}")
        self.ended = True

    def _again(self, start: float) -> Iterator[tuple[int, np.ndarray, int]]:
        self._open()
        return self._frames(start)

    def _next(self, packets: Any) -> Any:
        """The next packet; None: the end, or the rest cannot be read."""
        try:
            return next(packets, None)
        except (av.FFmpegError, OSError) as error:
            self._check_reading()
            self._damage(f"the rest cannot be read: {_words(error)}")
            return None

    def _damage(self, reason: str) -> None:
        """Notes a damaged place; the time stamps after it tell how much is lost."""
        if not self._damaged:
            self.gaps.append(Gap(self.place, 0, reason))
        self._damaged = True

    def _lose(self, seconds: float) -> None:
        """Moves on by what the time stamps say is lost."""
        self._damage("its time stamps jump")
        samples = round(seconds * self.rate) if seconds <= LONGEST_GAP else 0
        self.gaps[-1] = replace(self.gaps[-1], samples=samples)
        self.place += samples

    def _plain(self, packet: Any, unit: int, usual: int) -> int:
        """Samples of a packet that need not be decoded to know them; 0: it must be."""
        duration = packet.duration or 0
        if not packet.size or packet.is_corrupt or packet.is_discard or packet.has_sidedata("skip_samples"):
            return 0
        if self._codec.name in OGG_CODECS and self._container.format.name == "ogg":
            return duration
        if self._codec.name.startswith("mp") and memoryview(packet)[0] != 0xFF:
            return 0  # no frame
        return unit if duration and abs(duration - usual) <= 1 else 0

    def _seek(self, packet: Any, unit: int, usual: int) -> int | None:
        """Jumps where an mp4's index, or PCM in a WAV, proves that only like packets lie between; their time stamp."""
        index, form = self._stream.index_entries, self._container.format.name
        counted = form == "wav" and self._codec.name.startswith("pcm_")
        if not self._may_seek or not (counted or form == "mov,mp4,m4a,3gp,3g2,mj2") or not usual:
            return None
        count = int((min(self._first, 1 << 62) - PREROLL * self.rate - self.place) // unit)
        if count < STEADY or packet.pts is None:
            return None
        there = packet.pts + count * usual
        here = 0 if counted else index.search_timestamp(packet.pts, any_frame=True)
        if not counted and (here < 0 or here + count >= len(index) or index[here + count].timestamp != there):
            return None
        self._container.seek(there, stream=self._stream)
        self.place += count * unit
        return int(there)

    def _check_reading(self) -> None:
        """A demuxer takes an error of the disk for the end of the file.

        Raises:
            MachineError, DecodeError: there was one.
        """
        if self._content.error is not None:
            raise reason_of(self._path, self._content.error) from self._content.error


def identity() -> str:
    """What decodes here: another version of FFmpeg's may give other samples."""
    return f"ffmpeg {av.ffmpeg_version_info.partition('-')[0]}"


def _default_track(container: Any) -> Any:
    """The audio track that players and the ffmpeg program take; the others are not read.

    Raises:
        DecodeError: no audio track, or no decoder for it.
    """
    tracks = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not tracks:
        raise DecodeError(f"undecodable: no {'decoder for its audio' if container.streams.audio else 'audio track'}")
    track = max(
        tracks,
        key=lambda one: (bool(one.disposition & Disposition.default), one.codec_context.channels or 0, -one.index),
    )
    for stream in container.streams:
        if stream is not track:
            stream.discard = Discard.all
    return track


SCALES = {"u8": 128, "s16": 1 << 15, "s32": 1 << 31, "s64": 1 << 63}


def _floats(frame: Any) -> np.ndarray:
    """float32 [channels, n] of a frame, full scale 1."""
    samples = frame.to_ndarray()
    if len(samples) == 1:  # packed, or one channel
        samples = samples.reshape(frame.samples, -1).T
    if samples.dtype == np.float32:
        return np.asarray(samples)
    scale = SCALES.get(frame.format.name.removesuffix("p"), 1)
    with np.errstate(over="ignore"):  # `decode` looks for what is not finite
        floats = samples.astype(np.float32)
    return np.asarray((floats - 128 if scale == 128 else floats) * np.float32(1 / scale))


def _words(error: Exception) -> str:
    """FFmpeg's reason for not opening a file."""
    if isinstance(error, av.error.ArgumentError):
        return "no format that is read: a playlist, a script, pictures or text"
    return getattr(error, "strerror", None) or type(error).__name__
