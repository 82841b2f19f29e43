"""Headless Chromium for tests of pages."""

import json
import os
import shutil
import subprocess
import time

CHROMIUM = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)


class Browser:
    """Headless Chromium with one page, driven over its debugging pipe."""

    FLAGS = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"

    def __init__(self, url, folder):
        flags = [f"--{flag}" for flag in (*self.FLAGS.split(), "disable-sync", f"user-data-dir={folder}")]
        theirs, self.out = os.pipe()
        self.back, answers = os.pipe()
        command = f'exec "$0" "$@" 3<&{theirs} 4>&{answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *flags, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(theirs, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs), os.close(answers)
        self.number, self.session, self.rest, self.requests = 0, None, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.querySelector('#rows tr') !== null")

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        os.write(self.out, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.back, 65536)
                assert part, "Chromium ended"
                self.rest += part
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            assert answer.get("method") != "Runtime.exceptionThrown", answer
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression):
        end = time.monotonic() + 60
        while not self.js(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def ids(self):
        return self.js("[...document.querySelectorAll('#rows tr')].map(row => row.dataset.id)")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.out), os.close(self.back)
