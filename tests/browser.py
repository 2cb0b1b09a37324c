"""A real browser for the tests of the page."""

import base64
import contextlib
import json
import os
import shutil
import subprocess

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
MISSING = f"needs {' or '.join(BROWSERS)} (on Debian: apt-get install chromium)"


class Browser:
    """A headless Chromium with one page, controlled through two pipes.

    The protocol: chromedevtools.github.io/devtools-protocol
    """

    def __init__(self, profile):
        import fcntl  # not on Windows

        pipes = (*os.pipe(), *os.pipe())
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in pipes]  # bash needs 3 and 4
        for end in pipes:
            os.close(end)
        commands, self.write, self.read, answers = ends
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", CHROMIUM, *options, "about:blank"],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.buffer, self.number, self.events, self.session = b"", 0, [], {}
        targets = self.ask("Target.getTargets")["targetInfos"]
        page_id = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=page_id, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setFocusEmulationEnabled", enabled=True)

    def message(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.read, 2**16)
            assert piece, "the browser has gone"
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def send(self, number, method, **params):
        message = {"id": number, "method": method, "params": params, **self.session}
        os.write(self.write, json.dumps(message).encode() + b"\0")

    def ask(self, method, **params):
        self.number += 1
        self.send(self.number, method, **params)
        while (message := self.message()).get("id") != self.number:
            self.note(message)
        assert "error" not in message, message
        return message["result"]

    def note(self, event):
        self.events.append(event)
        if event["method"] == "Page.javascriptDialogOpening":  # an alert, which nobody would close
            self.send(0, "Page.handleJavaScriptDialog", accept=True)

    def open(self, path, width, scheme="light"):
        """Show a file. Returns what happened in the meantime, [(method, params)]."""
        self.events = []
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.note(self.message())
        self.value("new Promise(done => setTimeout(done, 200))")  # for late events
        return [(event["method"], event["params"]) for event in self.events]

    def value(self, expression):
        """What a JavaScript expression gives. Waits for a promise."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.ask("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition):
        """Wait until a JavaScript expression is true, a minute at most."""
        wait = "new Promise(done => setTimeout(done, 20))"
        assert self.value(
            f"(async () => {{ for (let i = 0; i < 3000; i++) {{ if ({condition}) return true; "
            f"await {wait}; }} return false; }})()"
        ), condition

    def press(self, *keys):
        """Type keys, each a name such as "Enter" or "ArrowDown", or a character."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32}
        codes |= {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            for kind in ("keyDown", "keyUp"):
                shown = {"text": text} if kind == "keyDown" and text else {}
                code = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
                self.ask("Input.dispatchKeyEvent", type=kind, key=key, **shown, **code)

    def picture(self, path, height=None):
        """A PNG of what is on the screen, or of the top of the page down to a height."""
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        options = {"clip": clip, "captureBeyondViewport": True} if height else {}
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", **options)["data"]))

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self.ask("Browser.close")
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
