"""Take the screenshot of the README: the page of a run in a headless Chromium.

python docs/screenshot.py runs/NAME        writes docs/images/report.png
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

TARGET = Path(__file__).parent / "images" / "report.png"
SIZE = (1200, 625)  # the header and the curves
COLORS = 128  # a palette reduces the file to a third


def take(run: Path) -> Path:
    """Write a screenshot of the page of a run; return its path."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium on this machine; install chromium")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.png")
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={SIZE[0]},{SIZE[1]}"]
        page = (run / "report.html").resolve().as_uri()
        command = [chromium, *options, f"--screenshot={file}", page]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        image = Image.open(io.BytesIO(file.read_bytes())).convert("RGB").quantize(COLORS)
    image.save(TARGET, optimize=True)
    return TARGET


if __name__ == "__main__":
    print(take(Path(sys.argv[1])))
