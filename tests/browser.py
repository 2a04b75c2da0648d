"""Pages in Chromium, without a window: what a script finds on one, and what it looks like."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         "--virtual-time-budget=4000"]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def run(page, profile, *flags):
    """Open a file with flags of Chromium, e.g. --screenshot=FILE; returns what it printed, (stdout, stderr)."""
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, f"file://{page}"],
                          capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def found_by(script, page, profile, *flags):
    """Run a script after those of a page; returns what it put into `found`, and fails if the console has a line."""
    text = page.read_text()
    script = f"{{ const found = {{}}; {script}\ndocument.body.dataset.found = JSON.stringify(found); }}"
    assert "</body>" in text
    clicked = page.with_name("clicked.html")
    clicked.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    stdout, stderr = run(clicked, profile, "--dump-dom", *flags)
    console = [line for line in stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', stdout)[1]))
