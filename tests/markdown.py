"""Code blocks of Markdown pages, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*) -->\n\n?)?^```(?P<language>[a-z]+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: The page's path below the repository.
        line: Where the block starts.
        language: `sh`, `yaml`, `python`, `text`.
        title: The file name of the block, if it has one.
        note: The comment above it: `main`, `test`, or `over: NAME [key=value]`.
        text: The content.
    """

    page: str
    line: int
    language: str
    title: str | None
    note: str | None
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def pages():
    """Return README.md, CONTRIBUTING.md, SECURITY.md and all pages of the documentation."""
    names = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
    return [ROOT / name for name in names] + sorted((ROOT / "docs").glob("**/*.md"))


def blocks_of(path, language=None):
    """Return the code blocks of a page."""
    text = path.read_text()
    page = str(path.relative_to(ROOT))
    return [
        Block(
            page,
            text.count("\n", 0, match.start()) + 1,
            *(match[k] for k in ("language", "title", "note")),
            match["text"],
        )
        for match in FENCE.finditer(text)
        if language in (None, match["language"])
    ]


def commands_of(block):
    """Return the command lines of a shell block, each as a list of arguments."""
    lines = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    commands = []
    for args in lines:
        start = 0
        for k, word in enumerate([*args, "&&"]):
            if word in ("&&", ";"):
                commands += [args[start:k]] if k > start else []
                start = k + 1
    return [[word.removesuffix(";") for word in args] for args in split_semicolons(commands)]


def split_semicolons(commands):
    """Split commands at arguments that end with a semicolon."""
    for args in commands:
        start = 0
        for k, word in enumerate(args):
            if word.endswith(";"):
                yield args[start : k + 1]
                start = k + 1
        if start < len(args):
            yield args[start:]
