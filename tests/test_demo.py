"""The page to try a model, in a browser: a file uploaded, a recording made, a file that is no audio."""

import json
import socket
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import soundfile

from launchers.demo_app import check_address
from pipeline.config import FinetuneRecipe
from pipeline.errors import UserError
from pipeline.serving import demo
from pipeline.serving.scorer import load_scorer
from pipeline.tracking.figures import confusion
from tests import browser, lab
from tests.ranks import ROOT, free_port
from tests.test_export import make_run

FINETUNED = "8-PSWaCL-SWaB-as_bal"


def test_the_envelope_keeps_every_click_of_a_long_recording():
    waveform = np.zeros(1_000_003, np.float32)
    waveform[[5, 999_999]] = 0.5, -0.25
    low, high = demo.envelope(waveform)
    assert len(low) == len(high) <= demo.COLUMNS
    assert (high.max(), low.min()) == (0.5, -0.25)
    assert np.flatnonzero(high).tolist() == [0]


def test_names_that_look_like_formulas_are_drawn_and_hops_are_bounded(tmp_path):
    run = tmp_path / "run"
    make_run(run, FinetuneRecipe, "finetune.method=ast")
    content = json.loads((run / "data.json").read_text())
    content["labels"][0]["name"] = r"$\frac$ and $x_"
    (run / "data.json").write_text(json.dumps(content))
    scorer = load_scorer(run)
    path = str(tmp_path / "x.wav")
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.2, 32000), 16000)
    scores, figure = demo.answer(scorer, path, 0.5)
    figure.savefig(tmp_path / "x.png")
    assert r"$\frac$ and $x_" in scores
    confusion(np.eye(6), np.eye(6), scorer.labels, tmp_path)
    for hop in (0.0, 1e-9, 11.0, float("nan")):
        with pytest.raises(UserError, match="seconds between windows"):
            demo.answer(scorer, path, hop)


def test_what_people_upload_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr(demo, "KEPT_SECONDS", 1)
    make_run(tmp_path / "run", FinetuneRecipe, "finetune.method=ast")
    page = demo.build_page(load_scorer(tmp_path / "run"), "run")
    _, url, _ = page.launch(server_port=free_port(), quiet=True, share=False, prevent_thread_lock=True)
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\nRIFF\r\n--x--\r\n'
    request = Request(f"{url}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
    try:
        with urlopen(request) as answer:
            place = Path(json.load(answer)[0])
        assert place.is_relative_to(tmp_path)
        end = time.monotonic() + 120
        while place.exists() and time.monotonic() < end:
            time.sleep(0.2)
        assert not place.exists()
    finally:
        page.close()


def test_an_address_that_cannot_be_had_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, number, message in (("127.0.0.1", port, "already in use"), ("127.0.0.1", 70000, "1 to 65535"),
                                      ("192.0.2.1", 7860, "Cannot assign")):  # fmt: skip
            with pytest.raises(UserError, match=f"--port {number}: .*{message}"):
                check_address(host, number)


def labels(page: browser.Page) -> str:
    return page.first("#labels").text


@pytest.mark.slow
@pytest.mark.needs(*browser.PROGRAMS)
def test_the_page_hears_a_file_a_recording_and_asks_nobody_else(chain, shared, tmp_path):
    scorer = load_scorer(chain.run_dir(FINETUNED))
    clip = sorted((shared / "data" / "esc50" / "audio").glob("*.flac"))[0]
    samples, rate = soundfile.read(clip, dtype="float32")
    voice = tmp_path / "voice.wav"
    soundfile.write(voice, np.random.default_rng(0).normal(0, 0.2, 2 * rate), rate)
    (tmp_path / "notes.wav").write_text("not audio at all\n" * 100)
    scores, figure = demo.answer(scorer, str(clip), scorer.seconds / 2)
    best = max(scores, key=scores.get)
    assert [axis.get_ylabel() for axis in figure.axes][:2] == ["waveform", "mel bin"]
    assert figure.axes[2].get_xlim() == pytest.approx((0, len(samples) / rate))
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, str(ROOT / "launchers" / "demo_app.py"), "--checkpoint",
               str(chain.run_dir(FINETUNED)), "--port", str(port)]  # fmt: skip
    with (
        lab.process(command, tmp_path / "demo.log", address),
        browser.browser(tmp_path / "profile", microphone=voice) as page,
    ):
        page.driver.get(address)
        page.first("#audio input[type=file]").send_keys(str(clip))
        page.first("#plot img")
        page.until(lambda: f"{best}\n" in labels(page) and f"{100 * scores[best]:.0f}%" in labels(page), best)
        page.shoot(tmp_path / "uploaded.png")
        before = labels(page)
        page.click(page.first('#audio button[aria-label="Clear"]'))
        page.until(lambda: not page.all("#plot img"), "an empty page")
        page.click(page.first('#audio button[aria-label="Record audio"]'))
        page.click(page.first("#audio button.record-button"))
        time.sleep(2)  # of recording
        page.click(page.first("#audio button.stop-button"))
        page.first("#plot img")
        page.until(lambda: labels(page) != before and "%" in labels(page), "labels of the recording")
        page.shoot(tmp_path / "recorded.png")
        page.click(page.first('#audio button[aria-label="Clear"]'))
        page.click(page.first('#audio button[aria-label="Upload file"]'))
        page.first("#audio input[type=file]").send_keys(str(tmp_path / "notes.wav"))
        page.until(lambda: "notes.wav: undecodable: text, not audio" in page.text(), "why the file was not heard")
        assert page.hosts() == {f"127.0.0.1:{port}"}
