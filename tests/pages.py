"""Pages as a reader sees them: headless Chromium at a given width."""

import html
import shutil
import subprocess
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# A window of headless Chromium is never narrower than this; narrower pages are shown in a frame inside of it.
_LEAST_WIDTH = 500
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
    "--disable-background-networking", "--no-first-run", "--virtual-time-budget=4000",
)  # fmt: skip
_WRAPPER = """<!doctype html><html><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:{height}px" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.getElementById("page").contentDocument;
  const broken = [...page.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src);
  const body = document.body.dataset;
  body.width = page.documentElement.scrollWidth;
  body.height = Math.ceil(page.body.getBoundingClientRect().bottom);
  body.broken = broken.join(" ");
}});
</script></body></html>
"""


def browser() -> str | None:
    """Return the browser's program, None where there is none."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def look_at(page: Path, width: int, picture: Path, *, height: int = 20_000) -> dict[str, str]:
    """Take a screenshot of a page and return what the browser says of it.

    Args:
        page: an HTML file; what it refers to lies beside it.
        width: of the reader's window, in pixels.
        picture: PNG to write; cut at the end of the page, or at `height`.
        height: the most that is shown, in pixels.

    Returns:
        `width` and `height` that the page takes, and the addresses of `broken` images.
    """
    wrapper = page.with_name(f"{page.stem}.{width}.wrapper.html")
    text = html.escape(page.read_text(encoding="utf-8"), quote=True)
    wrapper.write_text(_WRAPPER.format(width=width, height=height, page=text), encoding="utf-8")
    window = f"--window-size={max(width, _LEAST_WIDTH)},{height}"
    try:
        dom = _run(window, "--dump-dom", wrapper.as_uri())
        said = {key: _attribute(dom, f"data-{key}") for key in ("width", "height", "broken")}
        _run(window, f"--screenshot={picture}", wrapper.as_uri())
    finally:
        wrapper.unlink()
    with Image.open(picture) as shot:
        shot.crop((0, 0, width, min(int(said["height"]), height))).save(picture)
    return said


def _run(*arguments: str) -> str:
    command = [browser() or BROWSERS[0], *_FLAGS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _attribute(dom: str, name: str) -> str:
    body = dom[dom.rindex("<body") :].split(">", 1)[0] if "<body" in dom else ""
    assert f'{name}="' in body, body
    return html.unescape(body.split(f'{name}="', 1)[1].split('"', 1)[0])
