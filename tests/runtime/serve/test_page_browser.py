# SPDX-License-Identifier: Apache-2.0
"""The page in Chromium: a clip that plays as it is made, a cancel, refusals, a comparison, requests as code, a phone.

Skipped without playwright or a Chromium of the system. Pipelines are scripted (``page_worlds``); what is proven is the
way from the form to a picture, not the model.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import wave
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api")
#: For a machine that is busy with other things.
SLOW = 30_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
expect = playwright.expect
expect.set_options(timeout=SLOW)

HERE = Path(__file__).parent
# The servers of the tests take their pipelines from ``fake_worlds``; this one from ``page_worlds``.
PRELUDE = """
import ltxrt.serve.command as command
real = command.serve
command.serve = lambda settings, factory: real(settings, factory="page_worlds:gated")
"""


@dataclass
class Site:
    """A server without keys, whose pipeline waits where the prompt asks."""

    url: str
    data: Path

    def open_gate(self):
        """Let every job on that stands at it."""
        (self.data / "x.gate").touch()

    def newest(self):
        """The newest job."""
        return httpx2.get(f"{self.url}v1/videos?limit=1").json()["data"][0]

    def clip(self):
        """Its file."""
        return httpx2.get(f"{self.url}v1/videos/{self.newest()['id']}/content").content


@pytest.fixture(scope="module")
def site(serve_in, tmp_path_factory):
    """A server for the page."""
    with serve_in(tmp_path_factory.mktemp("site"), prelude=PRELUDE, api_keys=[], no_auth=True) as running:
        yield Site(f"{running.url}/", running.data)


@pytest.fixture(scope="module")
def chromium():
    """A browser with a microphone that beeps."""
    with playwright.sync_playwright() as engine:
        arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        opened = engine.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def open_page(chromium):
    """``open_page(address, **context)``: the page in a fresh profile, without a word in the console at the end."""
    contexts, said = [], []

    def opened(address, **context):
        contexts.append(chromium.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(SLOW)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    # What the network answers with an error status is told by the browser itself.
    assert not [text for text in said if not text.startswith("Failed to load resource")]


@pytest.fixture
def page(site, open_page):
    """The page, with its form there."""
    return ready(open_page(site.url))


@pytest.fixture(autouse=True)
def idle(site):
    """No job is left to the next test, whatever became of this one."""
    (site.data / "x.gate").unlink(missing_ok=True)
    yield
    for job in httpx2.get(f"{site.url}api/ai/queue").json()["generations"]:
        httpx2.delete(f"{site.url}api/ai/queue/{job['generation_id']}")
    site.open_gate()


def ready(page):
    expect(page.locator("body[data-state=open]")).to_be_attached()
    return page


def until(met, seconds=SLOW / 1000):
    """Wait, because the page's policy forbids playwright's own way of waiting for a condition."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)


def fill(page, speech, prompt="a face", **fields):
    """Fill the form: a file, a prompt, a fixed size and length."""
    page.set_input_files("#input_audio", str(speech))
    expect(page.locator("#audio-length")).to_contain_text(" s")
    page.fill("#prompt", prompt)
    page.select_option("#resolution", "free")
    for side in ("width", "height"):
        page.fill(f"#{side}", "128")
    page.evaluate("document.querySelector('#more').open = true")
    page.uncheck("#match_audio_length")
    for name, value in {"num_frames": "25", **fields}.items():
        page.fill(f"#{name}", value)


def generate(page):
    page.click("#generate")


def done(page):
    page.wait_for_selector("#result")
    page.wait_for_selector("#generate")


VIDEO = """name => {
  const video = document.getElementById(name), { buffered } = video, quality = video.getVideoPlaybackQuality();
  return { time: video.currentTime, paused: video.paused, length: video.duration, decoded: quality.totalVideoFrames,
    heard: video.webkitAudioDecodedByteCount, width: video.videoWidth, type: video.dataset.type ?? "", src: video.src,
    there: buffered.length ? buffered.end(buffered.length - 1) : 0 };
}"""


def video(page, name="a"):
    return page.evaluate(VIDEO, f"video-{name}")


# --- a generation ---


def test_clip_plays_from_its_first_fragment_while_it_is_made(site, page, speech):
    fill(page, speech, "gate=x", num_frames="121", seed="9223372036854775807")
    generate(page)
    expect(page.locator("#live")).to_be_visible()
    times = []
    until(lambda: times.append(video(page)["time"]) or times[-1] > 0.5)
    seen, now = video(page), site.newest()
    assert (now["status"], now["stage"]) == ("in_progress", "decode")
    assert seen["there"] == pytest.approx(32 / 24, abs=0.05)  # the first fragment, and no more
    assert len({time for time in times if time > 0}) > 1
    assert seen["decoded"] > 3
    assert seen["heard"] > 0
    assert seen["width"] == 128
    assert re.fullmatch(r'video/mp4; codecs="avc1\.64[0-9a-f]{4},mp4a\.40\.2"', seen["type"])
    expect(page.locator("#progress-text")).to_have_text("Decode · frame 32 of 121")
    assert page.locator("#bar").evaluate("bar => bar.value") > 0.8
    until(lambda: (at := video(page)["time"]) > 32 / 24 - 0.1 and at == video(page)["time"])  # it waits for more
    site.open_gate()
    done(page)
    until(lambda: video(page)["time"] > 1.6)  # and goes on
    assert video(page)["there"] == pytest.approx(121 / 24, abs=0.05)
    job = site.newest()
    assert (job["status"], job["seed"]) == ("completed", 2**63 - 1)
    expect(page.locator("#facts-one")).to_contain_text("9223372036854775807")
    expect(page.locator("#facts-one")).to_contain_text("121 frames")
    with page.expect_download() as download:
        page.click("#save")
    assert Path(download.value.path()).read_bytes() == site.clip()
    assert download.value.suggested_filename == "ltxrt-9223372036854775807.mp4"


def test_a_page_that_is_loaded_again_takes_up_its_clip(site, page, speech):
    fill(page, speech, "gate=x", num_frames="49")
    generate(page)
    expect(page.locator("#live")).to_be_visible()
    page.reload()
    expect(page.locator("#cancel")).to_be_visible()
    expect(page.locator("#live")).to_be_visible()
    until(lambda: video(page)["decoded"] > 0)
    site.open_gate()
    done(page)
    page.reload()  # and a finished one stays, clip and all
    page.click(".card-open")
    until(lambda: video(page)["width"] == 128)
    page.click("#reuse")
    expect(page.locator("#prompt")).to_have_value("gate=x")
    expect(page.locator("#audio-name")).to_have_text(speech.name)
    expect(page.locator("#seed")).not_to_have_value("")
    page.click("#clear")
    expect(page.locator(".card")).to_have_count(0)


def test_cancel(site, page, speech):
    fill(page, speech, "steps=400")
    generate(page)
    expect(page.locator("#progress-text")).to_contain_text(re.compile(r"step \d+ of 400"))
    assert page.evaluate("document.activeElement.id") == "cancel"
    page.keyboard.press("Enter")
    expect(page.locator("#empty-text")).to_have_text("Cancelled. No clip was made.")
    expect(page.locator("#generate")).to_be_focused()
    job = site.newest()
    assert (job["status"], job["error"]["code"]) == ("failed", "cancelled")
    expect(page.locator("#run-error")).to_be_hidden()


def test_cancel_before_the_server_has_answered(site, page, speech):
    held = []
    page.route(re.compile("/v1/videos$"), lambda route: held.append(route))
    fill(page, speech, "steps=400")
    generate(page)
    expect(page.locator("#progress-text")).to_contain_text("Sending files")
    until(lambda: held or page.wait_for_timeout(20))
    page.click("#cancel")
    held[0].continue_()
    expect(page.locator("#empty-text")).to_have_text("Cancelled. No clip was made.")
    assert site.newest()["error"]["code"] == "cancelled"


def test_a_recording_becomes_a_clip(site, page):
    page.click("#record")
    expect(page.locator("#level")).to_be_visible()
    page.wait_for_timeout(700)
    page.click("#record")
    expect(page.locator("#audio-name")).to_have_text("recording.webm")
    page.fill("#prompt", "a face")
    generate(page)
    done(page)
    assert 0.3 < float(site.newest()["seconds"]) < 4


def test_without_live_playback_and_storage_the_finished_file_plays(site, open_page, speech):
    page = open_page("about:blank")
    page.add_init_script(
        "for (const name of ['MediaSource', 'ManagedMediaSource', 'indexedDB']) delete globalThis[name]"
    )
    page.goto(site.url)
    fill(ready(page), speech)
    generate(page)
    done(page)
    until(lambda: video(page)["time"] > 0.1)
    assert video(page)["type"] == ""
    expect(page.locator(".card")).to_have_count(1)
    expect(page.locator("#history-note")).to_contain_text("keeps nothing")


# --- modules alone ---


def test_history_is_bounded(page):
    kept = """async () => {
      const { History } = await import("/page/history.js");
      const history = await History.open();
      const record = (created, clip) => ({ key: `k${created}`, created, clip, poster: null, media: {} });
      for (let at = 1; at <= 27; at++) await history.put(record(at, null));
      const many = (await History.open()).records.map(({ created }) => created);
      for (let at = 30; at <= 33; at++) await history.put(record(at, new Blob([new Uint8Array(15e7)])));
      return [many, (await History.open()).records.map(({ created }) => created)];
    }"""
    many, large = page.evaluate(kept)
    assert many == list(range(27, 3, -1))
    assert large == [33, 32]  # of 150 MB each


def test_type_of_a_stream_is_read_from_its_header(site, page, speech):
    """Null while the header is not whole, the codecs as soon as it is, nothing for what is unknown or broken."""
    fields = {"prompt": "a face", "resolution": "128x128", "seed": "1"}
    with speech.open("rb") as file:
        stream = httpx2.post(
            f"{site.url}v1/videos/stream", data=fields, files={"input_audio": file}, timeout=30
        ).content
    header = stream[: stream.index(b"moof") - 4]
    types = """async ([cases]) => {
      const { streamType } = await import("/page/mp4.js");
      return cases.map(text => streamType(Uint8Array.from(atob(text), letter => letter.charCodeAt(0))));
    }"""
    silent = header.replace(b"mp4a", b"xxxx")
    strange = header.replace(b"avc1", b"hvc1").replace(b"mp4a", b"ac-3")
    cases = [header, stream, header[:-1], header[:40], b"", b"\0\0\0\0junk" * 20, silent, strange]
    found = page.evaluate(types, [[base64.b64encode(case).decode() for case in cases]])
    codec = "avc1." + header[header.index(b"avcC") + 5 :][:3].hex()
    both = f'video/mp4; codecs="{codec},mp4a.40.2"'
    assert found == [both, both, None, None, None, None, f'video/mp4; codecs="{codec}"', ""]


# --- refusals ---


def drop(page, zone, name, content):
    data = page.evaluate_handle(
        "([name, text]) => { const data = new DataTransfer(); data.items.add(new File([text], name)); return data; }",
        [name, content],
    )
    page.dispatch_event(zone, "drop", {"dataTransfer": data})


def test_faults_stand_beside_their_fields(page, speech):
    generate(page)
    expect(page.locator("#input_audio-error")).to_be_visible()
    expect(page.locator("#prompt-error")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "input_audio"
    fill(page, speech, frames_per_second="99", seed="-4")
    page.fill("#height", "100")
    page.evaluate("document.querySelector('#more').open = false")
    generate(page)
    for name, text in (("frames_per_second", "1 to 60"), ("seed", "0 to 2^63"), ("resolution", "multiple of 64")):
        error = page.locator(f"#{name}-error")
        expect(error).to_be_visible()  # the folded part was opened
        expect(error).to_contain_text(text)
        assert page.get_attribute(f"#{name}", "aria-invalid") == "true"
        assert f"{name}-error" in page.get_attribute(f"#{name}", "aria-describedby")
    page.fill("#seed", "4")
    expect(page.locator("#seed-error")).to_be_hidden()


def test_what_the_server_refuses_stands_beside_the_field_that_it_names(page):
    drop(page, "#audio-drop", "broken.wav", "no sound at all")
    expect(page.locator("#audio-name")).to_have_text("broken.wav")
    page.fill("#prompt", "a face")
    generate(page)
    error = page.locator("#input_audio-error")
    expect(error).to_be_visible()
    expect(error).to_contain_text("allowed: a WAV, MP3")
    assert not error.inner_text().startswith("input_audio")
    assert page.evaluate("document.activeElement.id") == "audio-remove"
    expect(page.locator("#generate")).to_be_visible()
    expect(page.locator(".card")).to_have_count(0)


def test_audio_that_is_too_long_is_refused_before_it_is_sent(page, tmp_path):
    page.click("#sample")
    expect(page.locator("#estimate")).to_have_text("About 118 frames, 4.92 s")
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 8000 * 21))
    page.set_input_files("#input_audio", tmp_path / "long.wav")
    expect(page.locator("#estimate")).to_have_text("About 504 frames, 21.00 s")
    page.fill("#prompt", "a face")
    generate(page)
    expect(page.locator("#input_audio-error")).to_contain_text("Takes 504 frames at 24 frames/s; at most 481.")
    page.evaluate("document.querySelector('#more').open = true")
    page.uncheck("#match_audio_length")
    expect(page.locator("#estimate")).to_have_text("121 frames, 5.04 s")


def test_key_is_asked_for_and_kept_in_the_tab_alone(server, open_page, speech, tmp_path):
    page = open_page(f"{server.url}/")
    expect(page.locator("#key-dialog")).to_be_visible()
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The server does not know this key.")
    page.fill("#key", "secret")
    page.click("#key-use")
    fill(ready(page), speech)
    generate(page)
    done(page)
    assert page.evaluate("[{...sessionStorage}, {...localStorage}]") == [{"ltxrt-key": "secret"}, {}]
    page.click("#copy-run")
    code = page.locator("#code").inner_text()
    assert "$LTXRT_API_KEY" in code
    assert "secret" not in code
    assert ran(code, tmp_path, speech, LTXRT_API_KEY="secret")[4:8] == b"ftyp"


# --- two clips ---


def test_two_clips_play_as_one(page, speech):
    for frames in ("49", "97"):
        fill(page, speech, num_frames=frames, seed=frames)
        generate(page)
        done(page)
    page.locator(".card").nth(1).get_by_text("Compare").click()
    until(lambda: min(video(page)["width"], video(page, "b")["width"]) == 128)
    until(lambda: min(video(page)["time"], video(page, "b")["time"]) > 0.2)
    assert abs(video(page)["time"] - video(page, "b")["time"]) < 0.2
    page.click("#play")
    until(lambda: video(page)["paused"] and video(page, "b")["paused"])

    def both_at(one, other):
        close = partial(pytest.approx, abs=0.01)
        until(lambda: (video(page)["time"], video(page, "b")["time"]) == (close(one), close(other)))

    for wanted in (1.5, 0.25):
        page.locator("#seek").fill(str(wanted))
        both_at(wanted, wanted)
    page.click("#step-forward")
    both_at(7.5 / 24, 7.5 / 24)
    page.locator("#seek").fill("3")  # beyond the end of the shorter one
    both_at(3, 49 / 24)
    differing = page.locator("#facts tr.differs th").all_inner_texts()
    assert {"Seed", "Length"} <= set(differing)
    assert not {"Prompt", "Audio", "Picture", "Frame rate"} & set(differing)
    page.click("#uncompare")
    expect(page.locator("#screen-b")).to_be_hidden()


# --- requests as code ---


def ran(code, folder, speech, **environment):
    """What a piece of code writes, run as it stands beside the sound."""
    shutil.copy(speech, folder / speech.name)
    command = ["bash", "-c", code] if code.startswith("curl") else [sys.executable, "-c", code]
    (folder / "clip.mp4").unlink(missing_ok=True)
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=30
    )
    assert run.returncode == 0, run.stderr + run.stdout
    return (folder / "clip.mp4").read_bytes()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_copied_requests_run_as_they_stand(site, open_page, speech, tmp_path):
    page = ready(open_page(site.url, permissions=["clipboard-read", "clipboard-write"]))
    shutil.copy(speech, tmp_path / 'my "own" voice.wav')
    prompt = 'it\'s "quoted"; $HOME `id` @<\\ %22 été\nsecond line'
    fill(page, tmp_path / 'my "own" voice.wav', prompt, seed="9007199254740993", frames_per_second="23.976")
    page.uncheck("#generate_audio")
    generate(page)
    done(page)
    clip = site.clip()
    page.click("#copy-run")

    def copied(language, extent):
        page.check(f"input[value={language}]")
        page.check(f"input[value={extent}]")
        page.click("#code-copy")
        expect(page.locator("#code-copied")).to_have_text("Copied")
        return page.evaluate("navigator.clipboard.readText()")

    for extent in ("basic", "complete"):
        language = {"basic": "curl", "complete": "python"}[extent]
        assert ran(copied(language, extent), tmp_path, speech) == clip
        body = copied("json", extent)
        headers = {"Content-Type": "application/json"}
        assert httpx2.post(f"{site.url}v1/videos/sync", content=body, headers=headers, timeout=30).content == clip
        assert site.newest()["prompt"] == prompt
    assert len(json.loads(body)) == 11  # every field but the image, which was not given
    assert set(json.loads(copied("json", "minimal"))) == {"prompt", "input_audio"}


# --- for everyone ---


def test_phone(site, open_page, speech):
    page = ready(open_page(site.url, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True))

    def fits():
        return page.evaluate("document.documentElement.scrollWidth") <= 390

    small = """() => [...document.querySelectorAll("button, select, input:not([type=file], [type=range]), summary")]
      .filter(node => node.checkVisibility() && !node.closest(".segments, .switch, .card-acts"))
      .map(node => [node.id || node.textContent, node.getBoundingClientRect()])
      .filter(([, { width, height }]) => height < 43.5 || width < 40).map(([name]) => name)"""
    assert fits()
    generate(page)
    assert fits()
    for seed in ("1", "2"):
        fill(page, speech, seed=seed)
        generate(page)
        done(page)
        assert fits()
    assert page.evaluate(small) == []
    expect(page.locator("#screens")).to_be_in_viewport()
    expect(page.locator("#generate")).to_be_in_viewport()  # always at the thumb
    page.locator(".card").nth(1).get_by_text("Compare").tap()
    expect(page.locator("#screen-b")).to_be_in_viewport()
    assert fits()
    page.tap("#copy-run")
    box = page.locator("#request-dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


def test_everything_has_a_name(site, page, speech):
    fill(page, speech)
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(picture, "PNG")
    page.set_input_files("#input_image", {"name": "a.png", "mimeType": "image/png", "buffer": picture.getvalue()})
    expect(page.locator("#image-size")).to_contain_text("64 px")
    generate(page)
    done(page)
    session = page.context.new_cdp_session(page)
    nodes = [node for node in session.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = {"button", "textbox", "spinbutton", "combobox", "slider", "switch", "link", "checkbox", "progressbar"}
    controls = [node for node in nodes if node["role"]["value"] in roles]
    assert len(controls) > 30
    assert not [node for node in controls if not node.get("name", {}).get("value", "").strip()]
    named = {node["name"]["value"] for node in controls}
    assert {"Prompt", "Match audio length", "Image strength", "Position", "Generate", "Play the audio"} <= named
    assert page.locator("#announce").get_attribute("aria-live") == "polite"
    expect(page.locator("#announce")).to_have_text("The clip is ready.")


def test_keyboard_reaches_everything_in_order(page):
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
        if order[-1] == "generate":
            break
    wanted = ["input_audio", "record", "sample", "prompt", "input_image", "resolution", "video_quality", "generate"]
    assert [name for name in order if name in wanted] == wanted
    page.keyboard.press("Enter")
    expect(page.locator("#prompt-error")).to_be_visible()


CONTRAST = (HERE / "page_contrast.js").read_text("utf-8").split("\n\n", 1)[1]


def test_contrast_and_calm(site, open_page, speech):
    page = ready(open_page(site.url, reduced_motion="reduce"))
    found = []

    def look():
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            found.extend((ratio, name, scheme) for ratio, name in page.evaluate(CONTRAST))

    generate(page)  # error texts
    expect(page.locator("#prompt-error")).to_be_visible()
    look()
    fill(page, speech, "steps=20")
    generate(page)
    expect(page.locator("#progress-text")).to_contain_text("Denoise")
    moving = """() => [...document.querySelectorAll("*")].filter(node => getComputedStyle(node).animationName !== "none"
      || getComputedStyle(node, "::before").animationName !== "none").length"""
    assert page.evaluate(moving) == 0
    look()
    done(page)
    look()
    page.click("#copy-run")
    look()
    assert len(found) > 200
    assert [(ratio, name, scheme) for ratio, name, scheme in found if ratio < 4.5] == []
