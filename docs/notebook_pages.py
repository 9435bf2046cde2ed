"""A mkdocs hook that renders the notebooks of `docs/notebooks` as pages, without a converter.

The notebooks are stored without outputs. `tests/test_notebooks.py` runs them.
"""

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def to_markdown(path: Path) -> str:
    """Return a notebook as Markdown, with a link to the file below its title."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    title, _, introduction = texts[0].partition("\n")
    parts = [f"{title}\n\n[Download the notebook]({path.name})\n\n{introduction}"]
    for cell, text in zip(cells[1:], texts[1:], strict=True):
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each notebook."""
    for path in sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        page = File.generated(config, f"notebooks/{path.stem}.md", content=to_markdown(path))
        files.append(page)
    return files
