"""Takes the pictures of TensorBoard that docs/start/tensorboard.md shows.

make screenshots RUN=outputs/digits-flow-...   # the folder of one training

Starts TensorBoard on the folder and a Chromium without a window (`apt-get install chromium`),
opens the tabs, and writes docs/start/tensorboard/*.png. Look at them before they are committed:
TensorBoard's page changes from version to version.
"""

import argparse
import asyncio
import base64
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

TARGET = Path(__file__).parents[1] / "start" / "tensorboard"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A page of this machine alone; without the last four a browser asks its maker's servers.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--remote-debugging-port=0",
)  # fmt: skip
# What all scripts use: elements below a node, also those inside of web components.
HELPERS = """
function* below(node) {
  for (const child of node.querySelectorAll("*")) {
    yield child;
    if (child.shadowRoot) yield* below(child.shadowRoot);
  }
}
const all = (css) => [...below(document)].filter((e) => e.matches(css));
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
"""


@dataclass(frozen=True)
class Shot:
    """One picture.

    Attributes:
        name: of the file.
        address: query and fragment of the page.
        script: run in the page before the picture is taken.
        size: of the window, pixels.
    """

    name: str
    address: str
    script: str
    size: tuple[int, int]


CLOSE_SETTINGS = """
all("button[aria-label='Toggle settings side pane']")[0].click();
"""
# Only these columns of the table, as a reader would tick them.
CHOOSE_COLUMNS = """
const shown = /^(solver.num_steps|fid@|nfe|summed_variance.mean)/;
for (const e of all("paper-checkbox.hparam-checkbox, paper-checkbox.metric-checkbox")) {
  const name = e.textContent.trim();
  if (e.checked !== shown.test(name)) { e.click(); await pause(30); }
}
"""
LARGE_IMAGES = """
all("paper-checkbox").filter((e) => /actual image size/.test(e.textContent))[0].click();
"""
SHOTS = (
    Shot(
        "scalars",
        "?darkMode=false&smoothing=0&tagFilter=^(train|val)/loss#timeseries",
        CLOSE_SETTINGS,
        (1280, 620),
    ),
    Shot(
        "images",
        "?darkMode=false#images&tagFilter=image_and_map",
        LARGE_IMAGES,
        (1560, 930),
    ),
    Shot("hparams", "?darkMode=false#hparams", CHOOSE_COLUMNS, (1280, 400)),
)


@contextmanager
def started(command: list[str], says: str) -> Generator[str]:
    """A process, ended afterwards, and the address that it writes when it is ready."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(says, line):
                yield match[1]
                return
        sys.exit(f"{command[0]} ended and never said where it serves")
    finally:
        process.terminate()
        process.wait()


class Page:
    """A page of the browser, driven by its DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.sent = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": params})
        while True:
            answer = await self.socket.receive_json(timeout=60)
            if answer.get("id") == self.sent:
                return answer["result"]

    async def run(self, script: str) -> None:
        """Run a script in the page to its end."""
        whole = f"(async () => {{ {HELPERS} {script} }})()"
        answer = await self.call("Runtime.evaluate", expression=whole, awaitPromise=True)
        if "exceptionDetails" in answer:
            sys.exit(f"the page's script failed: {answer['exceptionDetails']}")

    async def take(self, shot: Shot, server: str, wait: float) -> None:
        """Open a tab, prepare it and write its picture."""
        width, height = shot.size
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        # Another fragment alone would not load the page again.
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=f"{server}/{shot.address}")
        await asyncio.sleep(wait)
        await self.run(shot.script)
        await asyncio.sleep(wait / 2)
        data = (await self.call("Page.captureScreenshot", format="png"))["data"]
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        # The median cut would give a colour bar steps.
        few = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(TARGET / f"{shot.name}.png", optimize=True)


async def take_all(server: str, browser: str, wait: float) -> None:
    """Every picture, in one page after the other."""
    where = browser.replace("ws://", "http://").partition("/devtools")[0]
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{where}/json/new") as answer:
            address = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(address, max_msg_size=0) as socket:
            page = Page(socket)
            for shot in SHOTS:
                await page.take(shot, server, wait)


def main() -> None:
    """Command line: a run's folder, and how long a page may take to load."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of one training")
    parser.add_argument("--wait", type=float, default=8, help="seconds for a page to load")
    given = parser.parse_args()
    if not list(given.folder.glob("**/events.out.tfevents*")):
        sys.exit(f"{given.folder} has no event files; give RUN=outputs/... of a finished run")
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        sys.exit("there is no Chromium; apt-get install chromium")
    TARGET.mkdir(parents=True, exist_ok=True)
    board = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(given.folder),
        "--port",
        "0",
    ]
    with (
        tempfile.TemporaryDirectory() as profile,
        started(board, r"TensorBoard .* at (http://[^/]+)/") as server,
        started(
            [chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"], r"(ws://\S+)"
        ) as browser,
    ):
        asyncio.run(take_all(server, browser, given.wait))


if __name__ == "__main__":
    main()
