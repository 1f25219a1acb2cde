"""A report in headless Chromium, as it is: `python -m tests.checks.browser REPORT.html [--pictures DIR]`.

The page is opened at the width of a desktop and of a phone, light and dark, through the debugging pipe (the DevTools
protocol: NUL-terminated JSON on descriptors 3 and 4). For each, one line says when it was first painted, what the
console said, which other addresses were asked for, whether it is wider than the window, and which elements run code.
"""

import argparse
import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

MOST_SECONDS = 60
WIDTHS, SCHEMES = {"desktop": 1280, "phone": 390}, ("light", "dark")
FACTS = """({
    paint: (performance.getEntriesByName("first-paint")[0] || {}).startTime,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    code: [...document.querySelectorAll("*")].filter(each => /^(iframe|object|embed)$/i.test(each.tagName)
        || [...each.attributes].some(({name, value}) => /^on/i.test(name) || /^\\s*javascript:/i.test(value)))
        .map(each => each.outerHTML.slice(0, 80)),
    background: getComputedStyle(document.body).backgroundColor})"""


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, folder: str) -> None:
        asked, self._asks = os.pipe()
        self._answers, answered = os.pipe()
        words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        script = f'exec 3<&{asked} 4>&{answered}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *words, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(asked, answered), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(asked)
        os.close(answered)
        self._end = threading.Timer(MOST_SECONDS, self._process.kill)
        self._end.start()
        self._rest, self._count, self._session, self.events = b"", 0, None, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: object) -> dict:
        """Call a method of the protocol and return its result; what happened meanwhile is added to `events`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._asks, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._count:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return found["result"]
            self.events.append(found)

    def wait_for(self, method: str) -> None:
        """Wait for an event of the page."""
        while not any(each.get("method") == method for each in self.events):
            self.events.append(self._next())

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(RuntimeError):  # it has ended before it could answer
            self._session = None
            self.ask("Browser.close")
        self._process.wait()  # its timer still runs
        self._end.cancel()
        os.close(self._asks)
        os.close(self._answers)

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise RuntimeError("Chromium has ended")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


def look(page: Path, width: int, scheme: str, picture: Path | None = None) -> dict:
    """Return what is seen of a page: facts of FACTS, and `errors` and `requests`."""
    address = page.resolve().as_uri()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # its processes may still write there
        browser = Browser(folder)
        try:
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.ask("Emulation.setDeviceMetricsOverride", **size)
            browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.ask("Page.navigate", url=address)
            browser.wait_for("Page.loadEventFired")
            asked = "new Promise(done => requestAnimationFrame(() => setTimeout(done, 200)))"
            browser.ask("Runtime.evaluate", expression=asked, awaitPromise=True)
            found = browser.ask("Runtime.evaluate", expression=FACTS, returnByValue=True)["result"]["value"]
            if picture is not None:
                data = browser.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
                picture.write_bytes(base64.b64decode(data))
        finally:
            browser.close()
    events = [(each.get("method"), each.get("params", {})) for each in browser.events]
    addresses = [params["request"]["url"] for method, params in events if method == "Network.requestWillBeSent"]
    found["requests"] = [each[:80] for each in addresses if each != address and not each.startswith(("data:", "blob:"))]
    found["errors"] = [
        str(params.get("entry", params.get("exceptionDetails", {})).get("text"))
        for method, params in events
        if method in ("Log.entryAdded", "Runtime.exceptionThrown")
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each view")
    args = parser.parse_args()
    is_sound = True
    for name, width in WIDTHS.items():
        for scheme in SCHEMES:
            picture = args.pictures and args.pictures / f"{name}-{scheme}.png"
            found = look(args.page, width, scheme, picture)
            said = {key: found[key] for key in ("errors", "requests", "code") if found[key]}
            is_sound = is_sound and not said and found["wide"] <= 0
            paint = "not painted" if found["paint"] is None else f"first paint {found['paint']:.0f} ms"
            print(f"{name}, {scheme}: {paint}, {found['wide']} px too wide, {found['background']}", said or "")
    sys.exit(not is_sound)


if __name__ == "__main__":
    main()
