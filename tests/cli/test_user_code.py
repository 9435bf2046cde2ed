"""Models and functions of the user: their signatures, imports and output."""

import json

import pytest

from cvlab.runs.find import find_run, runs_root
from cvlab.runs.records import read_json

MODEL = """
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

class Kind(enum.Enum):
    A = 1

class Net(nn.Sequential):
    def __init__(self, {parameters}):
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))
"""
TINY = (
    *("data={name: scenes10, num_train: 40, val_fraction: 0.02}", "batch_size=20", "duration={steps: 2}", "threads=1"),
    "evaluate_test=false",
)


def train(cvlab, *arguments):
    return cvlab("train", "quickstart", *TINY, "expect=[]", *arguments)


@pytest.mark.parametrize(
    ("parameters", "settings"),
    [
        ("activation=nn.ReLU", {}),
        ("activation: type[nn.Module] = nn.ReLU, width=3", {"width": 3}),
        ("path=Path('a')", {}),
        ("kind: Kind = Kind.A", {}),
        ("dtype: torch.dtype = torch.float32", {}),
        ("device=torch.device('cpu'), norm=lambda n: nn.BatchNorm1d(n)", {}),
        ("sizes: 'Sequence[int]' = (1, 2)", {"sizes": [1, 2]}),
        ("hidden: int = None", {"hidden": None}),
        ("hidden: Optional[int] = None", {"hidden": None}),
        ("arguments=3, copy=1, json=2, schema=4", {"arguments": 3, "copy": 1, "json": 2, "schema": 4}),
        ("options={'a': [1, 2]}", {"options": {"a": [1, 2]}}),
        ("*, keep: float = 0.5, **others", {"keep": 0.5}),
    ],
)
def test_any_signature_can_be_a_model(cvlab, tmp_path, parameters, settings):
    (tmp_path / "net.py").write_text(MODEL.format(parameters=parameters))
    code, out, err = train(cvlab, "model=./net.py:Net", "--json", "-q")
    assert code == 0, err
    run = tmp_path / json.loads(out)["run"]
    assert run.name.split("-", 2)[2].startswith("quickstart")
    code, out, err = cvlab("config", str(run), "--json")
    assert code == 0, err
    assert json.loads(out)["config"]["model"] == {"name": "./net.py:Net", **settings}
    assert cvlab("run", str(run), "--dry-run", "-q")[0] == 0, "the model is built from the recorded settings"


@pytest.mark.parametrize("override", ["model.hidden=5", "model.hidden=null"])
def test_a_default_of_none_accepts_the_annotated_type_and_none(cvlab, tmp_path, override):
    (tmp_path / "net.py").write_text(MODEL.format(parameters="hidden: int = None"))
    assert cvlab("config", "quickstart", "model=./net.py:Net", override)[0] == 0
    code, _, err = cvlab("config", "quickstart", "model=./net.py:Net", "model.hidden=x")
    assert code == 2
    assert "model.hidden: expected a whole number or null" in err


@pytest.mark.parametrize("parameter", ["name", "builder_arguments", "model_config", "_private"])
def test_a_reserved_parameter_is_a_one_line_error(cvlab, tmp_path, parameter):
    (tmp_path / "net.py").write_text(MODEL.format(parameters=f"{parameter}=1"))
    code, _, err = cvlab("config", "quickstart", "model=./net.py:Net")
    assert code == 2
    assert f"it has a parameter {parameter!r}; the name is reserved" in err
    assert len(err.splitlines()) == 1


def test_a_model_can_import_files_of_its_folder(cvlab, tmp_path):
    folder = tmp_path / "code"
    (folder / "parts" / "deep").mkdir(parents=True)
    (folder / "net.py").write_text(
        "from torch import nn\nfrom layers import head\nfrom parts import WIDTH\n"
        "class Net(nn.Sequential):\n    def __init__(self):\n        super().__init__(nn.Flatten(), *head(WIDTH))\n"
    )
    (folder / "layers.py").write_text(
        "import sizes\nfrom torch import nn\n"
        "def head(n):\n    return [nn.Linear(3072, n), nn.Linear(n, sizes.CLASSES)]\n"
    )
    (folder / "sizes.py").write_text("CLASSES = 10\n")
    (folder / "parts" / "__init__.py").write_text("from parts.deep.width import WIDTH\n")
    (folder / "parts" / "deep" / "__init__.py").write_text("")
    (folder / "parts" / "deep" / "width.py").write_text("WIDTH = 4\n")
    (folder / "unused.py").write_text("raise RuntimeError\n")
    code, _, err = train(cvlab, "model=code/net.py:Net", "-q")
    assert code == 0, err
    run = find_run("latest", runs_root())
    for name in ("net.py", "layers.py", "sizes.py", "parts/__init__.py", "parts/deep/width.py"):
        assert (run / name).read_text() == (folder / name).read_text()
    assert not (run / "unused.py").exists()
    digest = read_json(run / "summary.json")["weights_sha256"]
    (folder / "sizes.py").write_text("raise RuntimeError\n")  # the run has its own copy
    assert cvlab("run", str(run), "-q")[0] == 0
    assert read_json(find_run("latest", runs_root()) / "summary.json")["weights_sha256"] == digest


def test_output_of_user_code_is_not_in_the_json_document(cvlab, tmp_path):
    (tmp_path / "net.py").write_text(
        MODEL.format(parameters="") + "        print('constructed')\n"
        "    def forward(self, x):\n        print('called')\n        return super().forward(x)\n"
    )
    code, out, err = train(cvlab, "model=./net.py:Net", "--json", "-q")
    assert code == 0, err
    assert json.loads(out)["ok"]
    assert "constructed" in err
    assert "called" in err


def test_a_file_in_an_override_is_relative_to_the_current_folder(cvlab, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.yaml").write_text(
        "experiment: classify\ndata: scenes10\nmodel: ./mine.py:Net\n"
        "optimizer: sgd\nbatch_size: 10\nduration: {steps: 1}\n"
    )
    (tmp_path / "elsewhere" / "mine.py").write_text(MODEL.format(parameters="width=1"))
    (tmp_path / "mine.py").write_text(MODEL.format(parameters="width=2"))
    config = json.loads(cvlab("config", "elsewhere/a.yaml", "--json")[1])["config"]
    assert config["model"]["width"] == 1
    for override in ("model=./mine.py:Net", "model={name: './mine.py:Net'}", "model.name=mine.py:Net"):
        config = json.loads(cvlab("config", "elsewhere/a.yaml", override, "--json")[1])["config"]
        assert config["model"]["width"] == 2
    code, _, err = cvlab("config", "quickstart", "model=./none.py:Net")
    assert code == 2
    assert str(tmp_path / "none.py") in err


@pytest.mark.parametrize(
    ("override", "value"),
    [("name=20261126_", "20261126_"), ("name=a_1", "a_1"), ("seed=1_000", 1000), ("seed=12", 12)],
)
def test_underscores_in_numbers(cvlab, override, value):
    config = json.loads(cvlab("config", "quickstart", override, "--json")[1])["config"]
    assert config[override.partition("=")[0]] == value


def test_unusual_values_on_the_command_line(cvlab, tmp_path, monkeypatch):
    code, _, err = cvlab("config", "quickstart", "seed=1_")
    assert code == 2
    assert "whole number" in err
    code, _, err = cvlab("config", "quickstart", "name=a #b")
    assert code == 2
    assert "a run's name has letters" in err
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert train(cvlab, "--runs-dir=~/r", "-q")[0] == 0
    assert list((tmp_path / "home" / "r").glob("*quickstart*"))
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("command", "override", "expected"),
    [
        ("attack", "target=9", "9"),
        ("saliency", "target=9", "9"),
        ("class_visualization", "targets=[1,130]", ["1", "130"]),
    ],
)
def test_a_class_can_be_given_by_its_number(cvlab, command, override, expected):
    code, out, err = cvlab("config", command, override, "--json")
    assert code == 0, err
    assert json.loads(out)["config"][override.partition("=")[0]] == expected
    assert cvlab("config", command, override.replace("9", "1000").replace("130", "1000"))[0] == 2


NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 20)
        self.fc2 = nn.Linear(20, 10)
        EXTRA

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        return LAST
"""


def write_network(tmp_path, extra="pass", last="self.fc2(x)"):
    (tmp_path / "net.py").write_text(NETWORK.replace("EXTRA", extra).replace("LAST", last))


@pytest.mark.parametrize(
    "extra",
    [
        "pass",
        "self.volume = nn.Parameter(torch.zeros(1, 2, 3, 4, 5))",
        "self.register_buffer('volume', torch.zeros(1, 2, 3, 4, 5))",
        "self.conv1 = nn.LazyConv2d(6, 5)",
    ],
)
def test_a_model_with_a_flattening_view_trains(cvlab, tmp_path, extra):
    write_network(tmp_path, extra)
    code, _, err = train(cvlab, "model=./net.py:Net")
    assert code == 0, err
    assert "trained on contiguous tensors, because it cannot take channels_last ones" in err


@pytest.mark.parametrize(
    ("extra", "last", "overrides", "message"),
    [
        ("pass", "(self.fc2(x), x) if self.training else self.fc2(x)", (), "returns tuple in training"),
        ("pass", "self.fc2(x)[:, :3]", (), "returns (2, 3), expected logits (N, 10)"),
        ("self.fc1 = nn.Linear(16 * 4 * 4, 20)", "self.fc2(x)", (), "fails on images of 3 x 32 x 32: RuntimeError: "),
        (
            "self.norm = nn.BatchNorm1d(20)",
            "self.fc2(self.norm(x))",
            ("batch_size=1",),
            "ValueError: Expected more than 1",
        ),
        ("pass", "self.fc2(x) if not self.training else 1 / 0", (), "ZeroDivisionError: division by zero; "),
    ],
)
def test_a_model_that_cannot_be_trained_is_rejected_before_the_run(cvlab, tmp_path, extra, last, overrides, message):
    write_network(tmp_path, extra, last)
    for dry in ((), ("--dry-run",)):
        code, _, err = train(cvlab, "model=./net.py:Net", *overrides, *dry)
        assert code == 2, err
        assert message in err
        assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
        assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_the_check_changes_neither_weights_nor_random_numbers(tmp_path):
    import torch
    from torch import nn

    from cvlab.experiments.classification.models import checks

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3600, 10))

    expected, state = build().state_dict(), torch.get_rng_state()
    model = checks.prepare(build(), "net", 8, 3, 32, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


TIED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.second.weight = self.first.weight
        self.pool, self.last = nn.AdaptiveAvgPool2d(4), nn.Linear(48, 10)

    def forward(self, x):
        x = self.second(torch.relu(self.first(self.pool(x).flatten(1))))
        BRANCH
        return self.last(x)
"""


def test_tied_weights_are_exported(cvlab, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "net.py").write_text(TIED.replace("BRANCH", "pass"))
    assert train(cvlab, "model=./net.py:Net", "-q")[0] == 0
    code, out, err = cvlab("export", "latest", "--to", "safetensors", "--json")
    assert code == 0, err
    tensors = load_file(json.loads(out)["files"][0])
    assert (tensors["first.weight"] == tensors["second.weight"]).all()


def test_exporting_a_graph_with_a_data_dependent_branch_is_a_one_line_error(cvlab, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    (tmp_path / "net.py").write_text(TIED.replace("BRANCH", "x = x * 2 if x.sum() > 0 else x"))
    assert train(cvlab, "model=./net.py:Net", "-q")[0] == 0
    code, _, err = cvlab("export", "latest", "--to", "onnx")
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "onnx: this model cannot be exported" in errors[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("splits", ["val_fraction: 0", "val_fraction: 0.02"])
def test_weights_that_are_not_finite_are_a_divergence(cvlab, tmp_path, splits):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(3072, 10)\n"
        "    def forward(self, x):\n        x = super().forward(x.flatten(1))\n"
        "        return x if self.training else x * float('nan')\n"
    )
    data = "data={name: scenes10, num_train: 40, " + splits + "}"
    code, _, err = train(cvlab, "model=./net.py:Net", data, "evaluate_test=true", "-q")
    assert code == 6
    assert "is not finite at step 2" in err
    assert "Traceback" not in err


def interrupt(cvlab, monkeypatch, *arguments):
    """Train until a signal arrives in the second step; return the run directory."""
    import signal

    from cvlab.engine import trainer

    between_steps = trainer.Trainer._between_steps

    def interrupting(self, step, save_due):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return between_steps(self, step, save_due)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_between_steps", interrupting)
        code, _, err = cvlab("train", "quickstart", *arguments, "expect=[]", "log_every=1")
    assert code == 130, err
    return find_run("latest", runs_root())


USER_DATA = """
import torch
from cvlab import ImageDataset

def data():
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randint(0, 256, (60, 8, 8, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (60,), generator=generator)
    return ImageDataset("custom", images, labels, images[:9], labels[:9], tuple("abcdefghij"))
"""


@pytest.mark.parametrize("change", ["data", "code", "sibling", "nothing"])
def test_a_run_is_not_resumed_on_changed_data_or_code(cvlab, tmp_path, monkeypatch, change):
    (tmp_path / "data.py").write_text(USER_DATA.replace("SEED", "0"))
    (tmp_path / "size.py").write_text("WIDTH = 192\n")
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom size import WIDTH\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(WIDTH, 10))\n"
    )
    arguments = ("model=./net.py:Net", "data=./data.py:data", "batch_size=20", "duration={steps: 6}", "threads=1")
    run = interrupt(cvlab, monkeypatch, *arguments)
    if change == "data":
        (run / "data.py").write_text(USER_DATA.replace("SEED", "1"))
    elif change == "code":
        (run / "net.py").write_text((run / "net.py").read_text() + "\n# changed\n")
    elif change == "sibling":
        (run / "size.py").write_text("WIDTH = 192  # changed\n")
    code, _, err = cvlab("resume")
    if change == "nothing":
        assert code == 0, err
        assert "changed_inputs" not in read_json(run / "summary.json")
        return
    assert code == 5
    assert "--trust" in err
    code, _, err = cvlab("resume", run.name, "--trust")
    assert code == 7
    assert "changed after the run began" in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1
    code, _, err = cvlab("resume", run.name, "--allow-changes")
    assert code == 0, err
    changed = read_json(run / "summary.json")["changed_inputs"]
    assert changed == (["data", "code"] if change == "data" else ["code"])


@pytest.mark.parametrize(
    ("construct", "use", "names"),
    [
        ("self.calls = 0", "self.calls += 1", ["calls"]),
        (
            "self.generator = torch.Generator()",
            "x = x + torch.rand(1, generator=self.generator).to(x.device)",
            ["generator"],
        ),
        ("self.a = self.b = None", "self.a, self.b = [1], torch.zeros(1)", []),
        ("self.register_buffer('calls', torch.zeros(1))", "self.calls += 1", []),
    ],
)
def test_state_outside_the_checkpoint_gives_one_warning(cvlab, tmp_path, construct, use, names):
    (tmp_path / "net.py").write_text(
        MODEL.format(parameters="") + f"        {construct}\n    def forward(self, x):\n"
        f"        if self.training:\n            {use}\n        return super().forward(x)\n"
    )
    code, _, err = train(cvlab, "model=./net.py:Net", "duration={steps: 5}", "ema=0.9")
    assert code == 0, err
    warnings = [line for line in err.splitlines() if "warning: the model's" in line]
    assert len(warnings) == len(names)
    assert all(f"`{name}`" in warnings[0] for name in names)
    log = (find_run("latest", runs_root()) / "log.txt").read_text()
    assert log.count("outside its state_dict") == len(names)


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("nn.Linear(3072, 10)", ("precision=float64",)),
        ("nn.Linear(3072, 12)", ()),  # two outputs stand for no class
    ],
    ids=["float64", "more outputs than classes"],
)
def test_commands_on_photos_accept_the_run_of_any_model(cvlab, tmp_path, model, overrides):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        f"        super().__init__(nn.Flatten(), {model})\n"
        "        nn.init.constant_(self[1].bias[-1], 50)\n"  # the last output is predicted for every photo
    )
    code, _, err = train(cvlab, "model=./net.py:Net", "-q", *overrides)
    assert code == 0, err
    code, out, err = cvlab("classify", "sample", "--model", "latest", "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["label"] == ("output 11" if "12" in model else "crescent")
    for command in (("saliency", "sample", "--model", "latest"), ("attack", "sample", "--model", "latest", "steps=1")):
        code, _, err = cvlab(*command, "threads=1")
        assert code in (0, 3), err
    code, _, err = cvlab("look", "latest", "num_images=20", "tsne_steps=10", "threads=1")
    assert code == 0, err


def test_a_file_is_not_a_model_for_photos(cvlab, tmp_path):
    (tmp_path / "net.py").write_text(MODEL.format(parameters=""))
    code, _, err = cvlab("classify", "sample", "--model", "./net.py:Net")
    assert code == 2
    assert "train it first" in err
