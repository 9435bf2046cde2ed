"""The project's vocabulary: words and phrases with a standard term in the field, which is to be used instead.

`PHRASES` are looked for in every line of text, `IDENTIFIERS` among the names in the code.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AFTER_TRAINING = "run|step|loop|set|image|batch|loss|epoch|experiment|config|split|state|task|process|accurac|data|time"

PHRASES = {  # regular expression, in any case -> what to write instead
    r"\bcom(e|es|ing) along\b": "bundled",
    r"\bso many\b": "N, up to N, the number itself",
    r"\btold\b": "given, logged, recorded",
    r"\bsure(r|st)\b": "higher-scoring, highest-scoring",
    r"\bdoubles\b": "duplicates",
    r"\bgo(es)? on\b": "continue, resume",
    r"\bsame bits\b": "bit-for-bit identical",
    r"\b(is|are) refused\b": "is rejected, raises ConfigError",
    r"\bsays? so\b": "logs a warning",
    r"\b(a|this|no|of) nets?\b": "a model",
    rf"\ba training\b(?! ?({AFTER_TRAINING}))": "a training run",
    r"\btrainings\b": "training runs",
    r"\bby hand\b": "hand-written, manually",
    r"\bwhere there is one\b": "if present",
    r"\bin the manner of\b": "style transfer, like",
}
IDENTIFIERS = {  # name in the code -> what to call it instead
    **dict.fromkeys(["told"], "metadata, description, label"),
    **dict.fromkeys(["look_up"], "should_stop, check_interrupt"),
    **dict.fromkeys(["looks"], "predict"),
    **dict.fromkeys(["sure", "surer"], "confidence"),
    **dict.fromkeys(["doubles"], "duplicates"),
    **dict.fromkeys(["wishes"], "flags"),
    **dict.fromkeys(["victim", "Victim", "aim"], "AdversarialExample, target_class"),
    **dict.fromkeys(["easel", "Easel", "stylist", "Stylist"], "ClassVisualizer, StyleTransfer"),
    **dict.fromkeys(["errand", "Errand"], "RemoteTask"),
    **dict.fromkeys(["patient"], "wait"),
    **dict.fromkeys(["settle", "circumstances", "gathered"], "resolve_dataset, fingerprint, progress"),
    **dict.fromkeys(["net"], "model"),
    **dict.fromkeys(["words"], "args, token_ids, embed_dim"),
    **dict.fromkeys(["began"], "start_time"),
    **dict.fromkeys(["most"], "max_..., limit"),
    **dict.fromkeys(["found", "made", "kept", "wanted", "given", "some", "own", "theirs", "apart"], "what it holds"),
    **dict.fromkeys(["which", "places", "here"], "what it holds"),
}


CODE_WITH_CHECKED_NAMES = [  # patterns of files whose identifiers are checked, but not their prose
    *("tests/*.py", "tests/*/**/*.py", "benchmarks/*.py", "docs/*.py"),
]


def text_files():
    files = [*ROOT.glob("cvlab/**/*.py"), *ROOT.glob("cvlab/assets/pages/*"), *ROOT.glob("configs/*.yaml")]
    return sorted([*files, *ROOT.glob("docs/**/*.md"), ROOT / "README.md"])


def identifiers(tree):
    """Yield the line and the name of everything that code names itself: variables, parameters, attributes, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def problems_of(path):
    """Yield the phrases and identifiers of a file that have a better one."""
    yield from phrase_problems(path)
    if path.suffix == ".py":
        yield from identifier_problems(path)


def phrase_problems(path):
    text = path.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, better in PHRASES.items():
            if hit := re.search(pattern, line, re.IGNORECASE):
                yield f"{path.relative_to(ROOT)}:{number}: {hit[0]!r}: write {better}"


def identifier_problems(path):
    for number, name in identifiers(ast.parse(path.read_text())):
        if name.strip("_") in IDENTIFIERS:
            yield f"{path.relative_to(ROOT)}:{number}: {name}: call it {IDENTIFIERS[name.strip('_')]}"


def test_the_words_of_the_field_are_used():
    problems = [problem for path in text_files() for problem in problems_of(path)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("pattern", CODE_WITH_CHECKED_NAMES)
def test_identifiers_of_tests_and_scripts_are_terms_of_the_field(pattern):
    paths = sorted(ROOT.glob(pattern))
    assert paths, "the pattern matches no file"
    problems = [problem for path in paths for problem in identifier_problems(path)]
    assert not problems, "\n".join(problems)
