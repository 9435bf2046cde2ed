"""The notebooks of the documentation run from top to bottom in separate processes and display their results.

They run without Jupyter, whose kernel and client would be some thirty more packages for CI; the test calls
`_repr_html_` as a notebook does.
"""

import ast
import json
import os
import subprocess
import sys

import pytest

from tests.markdown import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
RUNNER = """
import ast, json, sys
sys.path.insert(0, "")
names = {"__name__": "__main__"}
for source in json.load(sys.stdin):
    tree = ast.parse(source)
    shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if shown is not None:
        value = eval(compile(ast.Expression(shown.value), "cell", "eval"), names)
        html = value._repr_html_() if hasattr(value, "_repr_html_") else None
        print(json.dumps([repr(value), html]))
"""


def cells(path):
    """Return the cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(path, folder):
    """Run a notebook in a folder; return the text and the HTML of each cell that shows a value."""
    sources = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RUNNER]
    output = subprocess.run(
        command, input=json.dumps(sources), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert output.returncode == 0, output.stderr
    return [json.loads(line) for line in output.stdout.splitlines() if line.startswith("[")]


def test_names_of_the_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["attack-and-saliency", "first-run", "manual-layer", "my-photos"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    shown = run(path, tmp_path)
    assert len(shown) >= 3
    htmls = [html for _, html in shown if html]
    assert htmls
    assert any("<svg" in html or 'src="data:image/webp;base64,' in html for html in htmls)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_cells_are_valid_python(path):
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            ast.parse("".join(cell["source"]))
    assert "".join(cells(path)[0]["source"]).startswith("# ")
