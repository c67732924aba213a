"""The report in a real browser; skipped where there is none."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.configure import build_settings
from training.store import StageResult

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here"),
]

RunStages = Callable[..., dict[str, StageResult]]

RESOURCE_LOADER = 101845102
"""How Chromium's network log marks what pages ask for: the hash of `blink_resource_loader`."""

BLUE_IN_THE_DARK = "86, 180, 233"
"""The accent of the dark page."""


@pytest.fixture(scope="module")
def page(run_stages: RunStages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the default preset, trained for an epoch only: as many pictures and marks."""
    short = [
        *("pretrain.epochs=1", "finetune.epochs=1", "from_scratch.epochs=1"),
        *("pretrain.warmup_epochs=0", "finetune.warmup_epochs=0", "from_scratch.warmup_epochs=0"),
        *("linear_probe.epochs=2", "tracking.wandb=disabled"),
    ]
    settings = build_settings("drawn", overrides=short)
    made = run_stages(settings, tmp_path_factory.mktemp("outputs"), "report")
    return made["report"].directory / "index.html"


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page; what it writes to the console and its network log come back."""
    assert BROWSER is not None
    return subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--disable-extensions", "--enable-logging=stderr"),
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # what it asks for itself
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={folder / 'net.json'}",
            *("--virtual-time-budget=2000", *options),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def console(browsed: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in browsed.stderr.splitlines() if "CONSOLE" in line]


def requests(folder: Path) -> set[str]:
    """Addresses that the page asked for; those that the browser itself asks for are others."""
    log: dict[str, Any] = json.loads((folder / "net.json").read_text())
    asked = [event.get("params", {}) for event in log["events"]]
    return {row["url"] for row in asked if row.get("traffic_annotation") == RESOURCE_LOADER}


def test_it_opens_without_a_word_and_without_a_request(page: Path, tmp_path: Path) -> None:
    browsed = browse(page, tmp_path, "--dump-dom")
    assert console(browsed) == []
    assert requests(tmp_path) == set()
    assert browsed.stdout.count("<h2") == 13
    assert page.stat().st_size <= 5_000_000


def test_the_test_above_would_see_a_request_and_a_message(page: Path, tmp_path: Path) -> None:
    html = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    bad = '<img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script></body>'
    (tmp_path / "bad.html").write_text(html.replace("</body>", bad), encoding="utf-8")
    browsed = browse(tmp_path / "bad.html", tmp_path, "--dump-dom")
    assert any("no" in line for line in console(browsed))
    assert requests(tmp_path) == {"http://127.0.0.1:9/x.png"}


def measured(page: Path, folder: Path, expression: str, *options: str) -> str:
    """What a script says about a copy of the page, whose own policy allows none."""
    html = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    script = f"<script>document.body.dataset.found = {expression}</script></body>"
    copy = folder / "measured.html"
    copy.write_text(html.replace("</body>", script), encoding="utf-8")
    found = re.search(r'data-found="([^"]*)"', browse(copy, folder, "--dump-dom", *options).stdout)
    assert found
    return found[1]


def test_it_is_no_wider_than_a_phone(page: Path, tmp_path: Path) -> None:
    """In a frame: the browser's own window cannot be made that narrow."""
    html = json.dumps(page.read_text(encoding="utf-8")).replace("</", r"<\/")
    (tmp_path / "frame.html").write_text(
        '<!doctype html><iframe id="f" width="390" height="800" srcdoc=""></iframe><script>'
        f"f.srcdoc = {html};"
        "f.onload = () => { const root = f.contentDocument.documentElement;"
        "document.body.dataset.found = root.clientWidth + ' ' + root.scrollWidth }</script>",
        encoding="utf-8",
    )
    dom = browse(tmp_path / "frame.html", tmp_path, "--dump-dom").stdout
    found = re.search(r'data-found="(\d+) (\d+)"', dom)
    assert found
    assert int(found[2]) <= int(found[1]) <= 390


def test_it_is_dark_where_the_screen_is(page: Path, tmp_path: Path) -> None:
    colour = "getComputedStyle(document.querySelector('.score')).color"
    light = measured(page, tmp_path, colour)
    dark = measured(page, tmp_path, colour, "--blink-settings=preferredColorScheme=0")
    assert light == "rgb(0, 114, 178)"
    assert dark == f"rgb({BLUE_IN_THE_DARK})"


def test_it_prints(page: Path, tmp_path: Path) -> None:
    browse(page, tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
