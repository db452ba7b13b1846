# SPDX-License-Identifier: Apache-2.0
"""The README's picture of the workbench: two clips of the tiny model, made and compared in a browser.

    python benchmarks/draw_workbench.py [--bundle DIR] [--out FILE] [--phone FILE]

Starts a server of its own, opens its page in Chromium (of the system, or ``--chromium``), makes two real clips from the
speech that ships with ltxrt, plays them side by side and takes the picture where the speech is loud. The same is done
at the width of a phone, where the page must not scroll sideways; ``--phone`` keeps that picture too. Needs playwright
(``test`` extra). The last line is the picture's path.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from draw_readme import encoded
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

PICTURE = Path(__file__).parents[1] / ".github" / "workbench.png"
PROMPTS = (
    "A woman with yellow skin speaks in front of a blue wall.",
    "A man with red skin speaks in front of a green wall.",
)
WIDE, PHONE = (1280, 860), (390, 844)
#: Seconds into the speech where it is loud.
LOUD = "1.35"

_PATIENCE_MS = 300_000
_SETTLE_MS = 500
_START_SECONDS = 120


def main() -> None:
    """Make the clips and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder of a bundle; default: the one that ships")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--phone", type=Path, help="where to keep the picture of the phone")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    given = parser.parse_args()
    expect.set_options(timeout=_PATIENCE_MS)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), given.bundle) as address,
        sync_playwright() as engine,
    ):
        browser = engine.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        wide = taken(browser, address, WIDE)
        phone = taken(browser, address, PHONE)
        browser.close()
    given.out.write_bytes(encoded(wide))
    if given.phone:
        given.phone.write_bytes(encoded(phone))
    print(given.out)


@contextmanager
def serving(folder: Path, bundle: Path | None) -> Generator[str]:
    """A server on this machine; its address.

    Raises:
        SystemExit: It does not start.
    """
    command = [sys.executable, "-m", "ltxrt", "serve", "--no-auth", "--port", "0", "--data", str(folder / "data")]
    if bundle:
        command += ["--bundle", str(bundle)]
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        yield f"http://127.0.0.1:{port(process, log)}/"
    finally:
        process.terminate()
        process.wait(60)


def port(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port that a server names in its log."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text("utf-8").splitlines():
            if '"event": "listening"' in line:
                return json.loads(line)["port"]
        time.sleep(0.1)
    raise SystemExit(f"the server does not start:\n{log.read_text('utf-8')}")


def taken(browser: Browser, address: str, size: tuple[int, int]) -> Image.Image:
    """Two clips made and compared in a window of a size.

    Raises:
        SystemExit: The page is wider than the window.
    """
    phone = size == PHONE
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark", is_mobile=phone, has_touch=phone
    )
    page = context.new_page()
    page.set_default_timeout(_PATIENCE_MS)
    page.goto(address)
    page.click("#sample")
    expect(page.locator("#audio-length")).to_contain_text(" s")
    page.select_option("#resolution", "free")
    for side in ("width", "height"):
        page.fill(f"#{side}", "192")
    for seed, prompt in enumerate(PROMPTS, 1):
        made(page, prompt, seed)
    page.locator(".card").nth(1).get_by_text("Compare").click()
    while page.evaluate("document.getElementById('video-b').currentTime") < 1:
        time.sleep(0.02)
    page.click("#play")
    page.locator("#seek").fill(LOUD)
    page.wait_for_timeout(_SETTLE_MS)
    page.mouse.move(0, 0)
    widest = page.evaluate("document.documentElement.scrollWidth")
    if widest > size[0]:
        raise SystemExit(f"the page is {widest} pixels wide in a window of {size[0]}")
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    context.close()
    return picture


def made(page: Page, prompt: str, seed: int) -> None:
    """Make one clip."""
    page.fill("#prompt", prompt)
    page.evaluate("document.querySelector('#more').open = true")
    page.fill("#seed", str(seed))
    page.evaluate("document.querySelector('#more').open = false")
    page.click("#generate")
    expect(page.locator("#generate")).to_be_hidden()
    expect(page.locator("#generate")).to_be_visible()
    expect(page.locator("#result")).to_be_visible()


if __name__ == "__main__":
    main()
