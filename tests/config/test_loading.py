"""Configurations: every shipped one is valid; errors are one line with their location and the closest key."""

import pytest
import yaml

from cvlab.config import loading, strict_yaml
from cvlab.errors import ConfigError

GOOD = """experiment: classify
data: {name: cifar10, fallback: scenes10, num_train: 500}
model:
  name: deep_convnet
  filters: [16, 32]
  pools: [0]
optimizer: {name: adam, lr: 1e-3}
batch_size: 100
duration: {epochs: 10}
augment: {flip: true}
expect:
  - train_accuracy >= 0.85
"""


def load(tmp_path, text, *overrides):
    path = tmp_path / "f.yaml"
    path.write_text(text)
    return loading.load(str(path), overrides).config


def load_errors(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as error_info:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(error_info.value)
    return [str(error).replace(f"{tmp_path}/", "") for error in (error_info.value, *error_info.value.further_errors)]


def test_defaults_file_and_overrides(tmp_path):
    config = load(tmp_path, GOOD, "optimizer.lr=1e-2", "seed=7", "model.batchnorm=true", "name=mine")
    assert config.optimizer.lr == 0.01
    assert config.optimizer.betas == (0.9, 0.999)
    assert (config.seed, config.name, config.model.batchnorm, config.model.filters) == (7, "mine", True, (16, 32))
    assert load(tmp_path, GOOD).name == "f"


def test_a_configuration_is_immutable(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, GOOD).seed = 3


def test_an_override_of_the_duration_replaces_it(tmp_path):
    assert load(tmp_path, GOOD, "duration.steps=7").duration.steps == 7
    assert load(tmp_path, GOOD, "duration.steps=7").duration.epochs is None
    assert "exactly one" in load_errors(tmp_path, GOOD, "duration.steps=7", "duration.seconds=3")[0]


def test_the_resolved_configuration_resolves_to_itself(tmp_path):
    config = load(tmp_path, GOOD, "optimizer.eps=1e-9")
    reloaded = load(tmp_path, config.to_yaml())
    assert reloaded.to_yaml() == config.to_yaml()
    assert reloaded.digest() == config.digest()


def key_paths(value, path=()):
    for key, item in value.items():
        yield (*path, key)
        if isinstance(item, dict):
            yield from key_paths(item, (*path, key))


def typos_of(key):
    for k in range(len(key)):
        yield key[:k] + key[k + 1 :]
        yield key[:k] + "z" + key[k + 1 :]
        yield key[:k] + key[k] + key[k:]
        if k + 1 < len(key):
            yield key[:k] + key[k + 1] + key[k] + key[k + 2 :]
    yield key + "s"


def test_a_typo_of_any_key_is_rejected_with_the_right_key(tmp_path):
    from cvlab.config import messages
    from cvlab.experiments.classification.config import ClassifyConfig

    full = yaml.safe_load(load(tmp_path, GOOD).to_yaml())
    top = ClassifyConfig.model_json_schema()
    num_typos = num_right = 0
    for path in key_paths(full):
        if path[0] in ("expect", "expect_fallback"):
            continue
        block = full
        for part in path[:-1]:
            block = block[part]
        for typo in sorted(set(typos_of(path[-1])) - set(block) - {""}):
            num_typos += 1
            fake = {"properties": dict.fromkeys(block)} if len(path) > 1 else top
            message = messages._unknown_key((*path[:-1], typo), fake, top)
            num_right += f"did you mean {path[-1]!r}" in message
    assert num_typos > 500
    assert num_right / num_typos >= 0.9, f"{num_right} of {num_typos}"


@pytest.mark.parametrize("path", ["seed", "optimizer.lr", "model.filters", "duration.epochs", "data.num_train"])
def test_typos_in_overrides_are_rejected(tmp_path, path):
    for typo in [path[:-1] + "q" + path[-1], path + "s"]:
        errors = load_errors(tmp_path, GOOD, f"{typo}=3")
        assert any(f"unknown key {typo!r}; did you mean" in line or "exactly one" in line for line in errors), errors


WRONG = """
optimizer.lr=fast|a number > 0 and <= 100
optimizer.lr=-1|a number > 0
optimizer.lr=0|a number > 0
optimizer.lr=true|a number > 0
optimizer.lr=.nan|a number > 0
optimizer.lr=.inf|a number > 0
optimizer.lr=1e400|a number > 0
optimizer.lr=10**400|a number > 0
optimizer.lr=null|a number > 0
optimizer.lr=[1]|a number > 0
optimizer.lr={a: 1}|a number > 0
optimizer.betas=0.9|[a number >= 0 and < 1, a number >= 0 and < 1]
optimizer.betas=[0.9]|[a number >= 0 and < 1, a number >= 0 and < 1]
optimizer.betas=[0.9,1]|a number >= 0 and < 1
optimizer.betas=[0.9,0.9,0.9]|[a number
optimizer.weight_decay=-1|a number >= 0
optimizer.name=3|sgd
optimizer.name=adma|did you mean 'adam'
optimizer=3|a block of keys
duration.epochs=2.5|a whole number >= 1
duration.epochs=0|a whole number >= 1
duration.epochs=-3|a whole number >= 1
duration.epochs=ten|a whole number >= 1
duration.epochs=true|a whole number >= 1
duration.seconds=0|a number > 0
duration.seconds=-1|a number > 0
duration.seconds=1m|a number > 0
duration={}|exactly one of steps, epochs, seconds
duration=10|a block of keys
batch_size=true|a whole number >= 1
batch_size=0|a whole number >= 1
batch_size=1.5|a whole number >= 1
batch_size=1.0|a whole number >= 1
batch_size='100'|a whole number >= 1
batch_size=null|a whole number >= 1
seed=-1|a whole number >= 0
seed=1.5|a whole number >= 0
seed=4294967296|a whole number >= 0 and < 2147483648
seed=a|a whole number >= 0
device=gpu|text of the form
device=cuda:x|text of the form
precision=half|auto | float32 | bfloat16 | float16 | float64
precision=16|auto | float32 | bfloat16 | float16 | float64
threads=0|a whole number >= 1
threads=two|a whole number >= 1
model.filters=16|a list, each a whole number >= 1
model.filters=[0]|a whole number >= 1
model.filters=[8, a]|a whole number >= 1
model.filters=[8, 1.5]|a whole number >= 1
model.filters=null|a list
model.pools=[-1]|a whole number >= 0
model.batchnorm=1|true or false
model.batchnorm=yes|true or false
model.weight_scale=he|kaiming or a number > 0
model.weight_scale=0|kaiming or a number > 0
model.name=deep_convent|did you mean 'deep_convnet'
model.name=os.system|unknown model
model.name=torch.nn:Linear|unknown model
data.name=cifar|did you mean 'cifar10'
data.fallback=scenes|did you mean 'scenes10'
data.num_train=0|a whole number >= 1
data.val_fraction=1|a number >= 0 and < 1
data.val_fraction=-0.1|a number >= 0 and < 1
data.normalize=std|mean | mean_std
reg=-1e-5|a number >= 0
clip_norm=0|a number > 0
ema=1|a number >= 0 and < 1
warmup=2|a number >= 0 and <= 1
label_smoothing=1|a number >= 0 and < 1
augment.flip=both|true or false
augment.translate_px=17|a whole number >= 0 and <= 16
augment.translate_px=-1|a whole number >= 0
layers=hand|unknown layers 'hand'
schedule.name=cos|unknown schedule 'cos'
expect=train_accuracy > 1|a list
expect=[accuracy]|is not of the form
expect=[accuracy > 5 high]|is not of the form
expect=[3]|text
name=a/b|letters, digits
name=''|letters, digits
name=../x|letters, digits
experiment=clasify|did you mean 'classify'
experiment=3|known: adversarial_patch, attack
""".strip().splitlines()


@pytest.mark.parametrize("line", WRONG)
def test_errors_of_types_and_ranges_state_the_expected_values(tmp_path, line):
    override, expected = line.rsplit("|", 1) if " | " not in line else line.split("|", 1)
    errors = load_errors(tmp_path, GOOD, override)
    assert any(expected in text for text in errors), errors
    assert all(text.startswith(f"override {override}:") for text in errors), errors


def test_errors_in_a_file_have_line_numbers_and_are_reported_together(tmp_path):
    text = GOOD.replace("lr: 1e-3", "lr: fast").replace("batch_size", "bach_size").replace("pools", "pool")
    errors = load_errors(tmp_path, text)
    assert 'f.yaml:7:25: optimizer.lr: expected a number > 0 and <= 100, got "fast"' in errors
    assert "f.yaml:8:1: unknown key 'bach_size'; did you mean 'batch_size'?" in errors
    assert "f.yaml:6:3: unknown key 'model.pool'; did you mean 'pools'?" in errors
    assert any("missing key 'batch_size'" in line for line in errors)


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", "seed.x=3", "model.filters.0=3", "seed=[1"])
def test_malformed_overrides_are_rejected(tmp_path, override):
    assert "override" in load_errors(tmp_path, GOOD, override)[0]


@pytest.mark.parametrize("text", ["", "3", "- a", "text", "{}", "experiment: classify"])
def test_incomplete_files_are_rejected(tmp_path, text):
    assert load_errors(tmp_path, text)


def test_a_missing_key_is_named(tmp_path):
    for key in ("data", "model", "optimizer", "batch_size", "duration"):
        document = yaml.safe_load(GOOD)
        del document[key]
        assert f"missing key '{key}'" in load_errors(tmp_path, yaml.safe_dump(document))[0]


def test_random_values_load_or_raise_config_error(tmp_path):
    pool = ["3", "-1", "1e9", "x", "[]", "{}", "null", "true", "[[1]]", "{name: adam}", ".inf", "''", "1e-30"]
    for key in yaml.safe_load(load(tmp_path, GOOD).to_yaml()):
        for value in pool:
            try:
                load(tmp_path, GOOD, f"{key}={value}")
            except ConfigError as error:
                assert str(error)


def test_a_model_of_the_user(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width: int, num_classes, image_size):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(3 * image_size**2, width), nn.Linear(width, num_classes))\n"
    )
    text = GOOD.replace("deep_convnet\n  filters: [16, 32]\n  pools: [0]", "./net.py:Net\n  width: 5")
    assert load(tmp_path, text).model.width == 5
    assert "expected a whole number" in load_errors(tmp_path, text, "model.width=x")[0]
    assert "unknown key 'model.widht'; did you mean 'width'" in load_errors(tmp_path, text, "model.widht=3")[0]
    assert (
        "unknown name in net.py 'Nett'; did you mean 'Net'"
        in load_errors(tmp_path, text, "model.name=./net.py:Nett")[0]
    )
    assert "no file" in load_errors(tmp_path, text, "model.name=./nett.py:Net")[0]


def test_models_of_timm_and_torchvision_take_the_keys_of_their_builders(tmp_path):
    text = GOOD.replace("deep_convnet\n  filters: [16, 32]\n  pools: [0]", "timm:resnet10t\n  drop_rate: 0.1")
    config = load(tmp_path, text)
    assert config.model.name == "timm:resnet10t"
    assert config.model.builder_arguments() == {
        **{"weights": None, "freeze": 0, "layer_decay": 1.0},
        "drop_rate": 0.1,
    }
    assert load(tmp_path, config.to_yaml()).to_yaml() == config.to_yaml()
    assert load(tmp_path, text.replace("timm:resnet10t", "torchvision:resnet18")).model.drop_rate == 0.1


def test_the_name_is_derived_from_any_file_name(tmp_path):
    path = tmp_path / "Mein (Lauf) ü.yaml"
    path.write_text(GOOD)
    assert loading.load(str(path)).config.name == "Mein-Lauf-ü"


def test_references(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        loading.find("cifar_bn") == loading.find("configs/cifar_bn.yaml") == loading.shipped_folder() / "cifar_bn.yaml"
    )
    with pytest.raises(ConfigError, match="did you mean 'cifar_bn'"):
        loading.find("cifar_bm")
    (tmp_path / "cifar_bn.yaml").write_text(GOOD)
    assert loading.find("cifar_bn.yaml").parent == strict_yaml.Path(".")
