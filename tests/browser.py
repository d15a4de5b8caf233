"""A real browser, headless, that opens pages of ours and tells what it sees of them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--enable-logging=stderr", "--v=0"),
)

WIDTHS = {"phone": 390, "desktop": 1280}

PROBE = r"""
(async () => {
  const drawn = () => [...document.querySelectorAll(".chart")].every((each) => each.dataset.drawn);
  while (!drawn()) await new Promise((resolve) => setTimeout(resolve, 20));
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const parts = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parts(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const ratio = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const contrasts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, style") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = parts(element.closest("svg") ? style.fill : style.color);
    contrasts.push([ratio(ink, behind(element)), node.data.trim().slice(0, 40)]);
  }
  const marks = [];
  for (const each of document.querySelectorAll(".js-line, .swatch")) {
    const style = getComputedStyle(each);
    const colour = each.matches(".swatch") ? style.backgroundColor : style.stroke;
    marks.push(ratio(parts(colour), behind(each.parentElement)));
  }
  const loss = document.getElementById("chart-loss");
  let zoomed = null;
  const plane = loss && loss.querySelector(".nsewdrag");
  if (plane) {
    const before = loss.layout.xaxis.range.slice();
    const { left, top, width, height } = plane.getBoundingClientRect();
    const whereabouts = (share) => ({ clientX: left + share * width, clientY: top + share * height });
    const at = (share) => ({ ...whereabouts(share), bubbles: true, view: window });
    plane.dispatchEvent(new MouseEvent("mousedown", { ...at(0.2), buttons: 1 }));
    for (const share of [0.4, 0.6]) document.dispatchEvent(new MouseEvent("mousemove", { ...at(share), buttons: 1 }));
    document.dispatchEvent(new MouseEvent("mouseup", at(0.6)));
    await new Promise((resolve) => setTimeout(resolve, 500));
    const after = loss.layout.xaxis.range;
    zoomed = (after[1] - after[0]) / (before[1] - before[0]);
  }
  parent.postMessage({
    name: window.name,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    charts: [...document.querySelectorAll(".chart")].map((each) => [
      each.id,
      each.querySelectorAll(".js-line, .point").length,
      Math.round(each.querySelector("svg").getBoundingClientRect().right - each.getBoundingClientRect().right),
    ]),
    buttons: [...new Set([...document.querySelectorAll(".modebar-btn")].map((each) => each.dataset.title))],
    contrast: contrasts.sort((a, b) => a[0] - b[0])[0],
    marks: Math.min(...marks),
    zoomed,
    loaded: performance.getEntriesByType("resource").length,
  }, "*");
})();
"""
"""Waits for the charts, measures the page, drags over the loss, and tells the page around it."""


def program() -> str | None:
    """The browser, if one is installed."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def look_at(pages: dict[str, Path], folder: Path, *, dark: bool = False) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What a browser sees of pages, on a phone and on a desk, by `name-phone`; and the lines on its console.

    All in one start: each page is shown twice, in frames of both widths, with the probe as its last script. The page's
    policy for scripts stays in force, and knows the probe by its hash.
    """
    frames = []
    for name, path in pages.items():
        probed = folder / f"{name}-probed.html"
        probed.write_text(_with_probe(path.read_text(encoding="utf-8")), encoding="utf-8")
        frames += [
            f"<iframe name='{name}-{where}' src='{probed.as_uri()}' style='width:{width}px;height:900px'></iframe>"
            for where, width in WIDTHS.items()
        ]
    around = folder / "around.html"
    around.write_text(
        "<!DOCTYPE html><meta charset=utf-8><body><pre id=seen></pre><script>const seen = [];"
        "onmessage = (event) => { seen.push(event.data); "
        "document.getElementById('seen').textContent = JSON.stringify(seen); };</script>" + "".join(frames),
        encoding="utf-8",
    )
    browser = program()
    assert browser, "the fixture has seen to it"
    done = subprocess.run(
        [
            *(browser, *QUIET, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"),
            *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=8000"),
            *("--dump-dom", around.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    seen = json.loads(unescape(found[1])) if found and found[1] else []
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {each["name"]: each for each in seen}, console


def _with_probe(page: str) -> str:
    allowed = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    page = page.replace("script-src ", f"script-src 'sha256-{allowed}' ", 1)
    return page.replace("</body>", f"<script>{PROBE}</script></body>")
