"""Pictures of an HTML page as people meet it: light and dark, a desk and a phone, and printed. Needs Chromium.

    python examples/benchmark/screenshots.py report.html [OUT]

Prints whether anything is wider than the window. Look at the pictures: a script sees no ugliness.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
WIDTHS = {"desk": 1280, "phone": 390}
SCHEMES = {"dark": 0, "light": 1}
MEASURE = "<script>e = document.documentElement; document.title = `size ${e.scrollHeight} ${e.scrollWidth}`</script>"


def chromium(page: Path, *options: str) -> str:
    """Open a page with a profile of its own; what it says of itself afterwards."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        raise SystemExit("Chromium is not installed (Debian: apt-get install chromium).")
    with tempfile.TemporaryDirectory() as profile:
        command = [found, *QUIET, f"--user-data-dir={profile}", *options, page.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def narrowed(page: Path, width: int, folder: Path) -> Path:
    """A copy of a page that is as wide as that, for a headless window is 500 pixels at least, and measures itself."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())  # the policy that lets no script run
    style = f"<style>html {{ width: {width}px }}</style>"
    copy = folder / f"{width}.html"
    copy.write_text(text.replace("</body>", f"{style}{MEASURE}</body>"))
    return copy


def main(page: Path, out: Path) -> None:
    page, out = page.resolve(), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, width in WIDTHS.items():
            copy, window = narrowed(page, width, Path(scratch)), max(width, 500)
            found = re.search(r"size (\d+) (\d+)", chromium(copy, "--dump-dom", f"--window-size={window},900"))
            height, wide = map(int, found.groups())
            if wide > window:
                print(f"{name}: {wide} pixels wide, {window} are there")
            for scheme, number in SCHEMES.items():
                shot = out / f"{page.stem}-{name}-{scheme}.png"
                look = f"--window-size={window},{height}", f"--blink-settings=preferredColorScheme={number}"
                chromium(copy, f"--screenshot={shot}", *look)
                print(shot)
    chromium(page, "--no-pdf-header-footer", f"--print-to-pdf={out / page.stem}.pdf")
    print(out / f"{page.stem}.pdf")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "."))
