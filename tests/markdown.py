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
        title: The name of the file that the block is, if it is one.
        note: The comment before it: `main`, `test`, or `over: NAME [key=value]`.
        text: What is in it.
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
    """Return the command lines of a shell block, split into words."""
    lines = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    commands = []
    for words in lines:
        start = 0
        for k, word in enumerate([*words, "&&"]):
            if word in ("&&", ";"):
                commands += [words[start:k]] if k > start else []
                start = k + 1
    return [[word.removesuffix(";") for word in words] for words in split_semicolons(commands)]


def split_semicolons(commands):
    """Split commands at words that end with a semicolon."""
    for words in commands:
        start = 0
        for k, word in enumerate(words):
            if word.endswith(";"):
                yield words[start : k + 1]
                start = k + 1
        if start < len(words):
            yield words[start:]
