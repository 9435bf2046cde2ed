"""Names and texts that are not UTF-8, control terminals or spreadsheets, or are markup are escaped."""

import csv
import http.client
import io
import json
import os
import re
import threading

import pytest
from PIL import Image

from cvlab import console
from cvlab.api import run as api_run
from cvlab.api import serve
from cvlab.cli import main
from cvlab.errors import CvlabError
from cvlab.reports import compare, html, index, tables
from cvlab.reports.tables import csv_cell
from cvlab.runs.run_dir import RunDir
from cvlab.sweeps import results
from tests.test_hostile_runs import SUMMARY, write

TEXTS = (
    *(
        "\udcff",
        "a\udc80b",
        "\x1b[31mred",
        "\x1b]0;title\x07",
        "a\nb",
        "a\rb",
        "\x9b31m",
        "\x7f",
        "\u202egnp.exe",
        "\u2028",
    ),
    *(
        "=1+1",
        "+1",
        "-1+1",
        "@x",
        "[red]x",
        "{x}",
        "%s",
        "<b>",
        "&amp;",
        "'",
        '"',
        "#a",
        "a?b",
        "a%2fb",
        " ",
        "日本",
    ),
)
NOT_IN_FILE_NAMES = ("\ud800", "\udfff\ud800", "\0", "a/b")
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]")  # must not reach a terminal or a page


def assert_clean(text):
    assert not RAW.search(text), RAW.search(text)
    text.encode()


def run_named(root, name):
    path = root / f"20261126-120000-{name}"
    write(path)
    return path


@pytest.mark.parametrize("text", [*TEXTS, *NOT_IN_FILE_NAMES], ids=ascii)
def test_printable_text_is_one_line_without_control_characters(text):
    assert_clean(console.printable(text))
    assert "\n" not in console.printable(text)
    assert console.printable_lines(f"{text}\nb").endswith("\nb")


def test_printable_text_keeps_what_can_be_printed():
    assert console.printable("Zoë's 日本 e\u0301 [x] 👩\u200d🔬\ta") == "Zoë's 日本 e\u0301 [x] 👩\u200d🔬\ta"
    assert console.printable("\udcff\x1b") == r"\xff\x1b"


@pytest.mark.parametrize("name", TEXTS, ids=ascii)
@pytest.mark.usefixtures("drawn_plots")
def test_a_run_directory_of_any_name_is_listed_shown_served_and_compared(tmp_path, name, capsys):
    root = tmp_path / "runs"
    path, other_run = run_named(root, name), run_named(root, "other")
    api_run._publish(RunDir(path))
    assert "warning" not in (path / "log.txt").read_text()
    page = (root / html.INDEX).read_bytes().decode()
    assert_clean(page)
    assert_clean((path / html.FILE).read_bytes().decode())
    for command in (
        ["runs"],
        ["show", str(path)],
        ["compare", str(path), str(other_run)],
        ["compare", "--csv", str(path)],
    ):
        assert main.run_command_line([*command, f"--runs-dir={root}"]) == 0
        captured = capsys.readouterr()
        assert_clean(captured.out + captured.err)
    assert main.run_command_line(["runs", "--json", f"--runs-dir={root}"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert path.name in [row["run"] for row in rows]
    assert main.run_command_line(["show", f"missing-{name}", f"--runs-dir={root}"]) == 5
    assert_clean(capsys.readouterr().err)


@pytest.mark.parametrize("name", TEXTS, ids=ascii)
def test_the_server_shows_a_run_of_any_name(tmp_path, name):
    path, other_run = run_named(tmp_path, name), run_named(tmp_path, "other")
    server = serve.Server(tmp_path, 0)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        links = re.findall(r'href="(/[^"]*)"', get_page(server, "/")[1])
        assert {html.quote(path.name), html.quote(other_run.name)} <= {link.strip("/") for link in links}
        for address in (*links, f"/compare?run={html.quote(path.name)}&run={html.quote(other_run.name)}"):
            status, page = get_page(server, address)
            assert status == 200, page
            assert_clean(page)
    finally:
        server.shutdown()
        server.server_close()


def get_page(server, address):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", address)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def summaries(text):
    """Yield summaries with the text as each of the values that can be text."""
    yield {**SUMMARY, "experiment": text}
    yield {**SUMMARY, "data": text}
    yield {**SUMMARY, "metrics": {text: 0.5}, "metric_info": {text: {"unit": text, "better": "higher"}}}
    yield {**SUMMARY, "metrics": {"val_accuracy": text}}
    yield {**SUMMARY, "expect": [{"rule": text, "measured": text, "met": False}]}
    yield {**SUMMARY, "results": [{"image": text, "objects": [{"label": text, "score": 0.5}], "picture": text}]}
    yield {**SUMMARY, "results": [{"image": "a", "error": text}]}
    yield {**SUMMARY, "columns": [{"name": text, "title": text, "unit": text}], "results": [{"image": "a", text: text}]}
    yield {**SUMMARY, "settings": [{"keys": {text: text}, "trials": 1, "status": [text], "metrics": {}}]}
    yield {**SUMMARY, "trials": [{"trial": text, "status": text, "seed": text, "metrics": {text: text}}]}


@pytest.mark.parametrize("text", [*TEXTS, *NOT_IN_FILE_NAMES], ids=ascii)
def test_texts_in_the_records_of_a_run_are_shown_escaped(tmp_path, text, capsys):
    path, other_run = run_named(tmp_path, "x"), run_named(tmp_path, "other")
    for summary in summaries(text):
        (path / "summary.json").write_text(json.dumps(summary))
        (path / "env.json").write_text(json.dumps({text: text, "time": text, "provenance": {"seed": text}}))
        (path / "metrics.jsonl").write_text(json.dumps({"step": 1, text: 2.0}) + "\n")
        (path / "log.txt").write_text(text, errors="replace")
        for page in (
            html.run_page(path),
            html.comparison_page({text: path, "y": other_run}),
            html.index_page(index.runs(tmp_path), root=tmp_path),
        ):
            assert_clean(page)
        html.write_run(path)
        tables.show_result(api_run.result(path))
        tables.show_comparison(compare.compare({text: path, "y": other_run}))
        assert_clean(capsys.readouterr().out)
        assert_clean(compare.to_csv(compare.compare({text: path, "y": other_run})))


@pytest.mark.parametrize("text", [*TEXTS, *NOT_IN_FILE_NAMES], ids=ascii)
def test_a_log_and_an_error_are_one_line_each(tmp_path, text, capsys):
    lines = []
    out = RunDir(tmp_path, on_log=lines.append)
    out.log(f"photo {text}")
    assert len((tmp_path / "log.txt").read_bytes().decode().split("\n")) == 2
    assert_clean((tmp_path / "log.txt").read_text())
    console.info(f"warning: {text}")
    console.always(str(CvlabError(text)))
    with console.Progress(text, 3) as progress:
        progress.update(1, text)
    err = capsys.readouterr().err
    assert_clean(err)


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", " =1", "\r=1", "\n=1", "\uff1d1+1", "=cmd|' /C calc'!A0"]
)
def test_no_cell_of_a_csv_file_is_a_formula(text):
    row = {"trial": text, "status": text, "diverged": False, "config": {text: text}, "metrics": {text: text}}
    comparison = {
        "runs": [{"label": text}],
        "differences": {text: [text]},
        "metrics": {text: [text]},
    }
    for table in (results.to_csv([row], [text]), compare.to_csv(comparison)):
        cells = [cell for line in csv.reader(io.StringIO(table)) for cell in line]
        assert any(text.strip()[1:] in cell for cell in cells)
        assert not any(cell.lstrip().startswith(("=", "+", "-", "@", "\uff1d")) for cell in cells)


def test_numbers_stay_numbers_in_csv_files():
    assert [csv_cell(value) for value in (-1, -0.5, 1e-7, True, None)] == [-1, -0.5, 1e-7, True, ""]
    assert [csv_cell(value) for value in ("-1", "-1.5e-3", "+2", "a-b")] == ["-1", "-1.5e-3", "+2", "a-b"]


def test_a_photo_whose_name_is_not_utf8_has_a_page(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for name in (b"\xff.jpg", b"\x1b[31m.jpg"):
        Image.new("RGB", (40, 30), "green").save(tmp_path / "photos" / os.fsdecode(name), "JPEG")
    assert main.run_command_line(["classify", str(tmp_path / "photos"), f"--runs-dir={tmp_path / 'runs'}"]) == 0
    captured = capsys.readouterr()
    assert_clean(captured.out + captured.err)
    run = next((tmp_path / "runs").glob("2*"))
    assert r"\xff.jpg" in (run / html.FILE).read_text()
    assert (tmp_path / "runs" / html.INDEX).is_file()
    assert (
        main.run_command_line(["run", str(run), f"--runs-dir={tmp_path / 'again'}"]) == 0
    )  # the recorded names can be read
