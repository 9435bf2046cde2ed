"""Configurations: every shipped one is valid, and every mistake is one line with its place and the right key."""

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


def refusal(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(refused.value)
    return [str(error).replace(f"{tmp_path}/", "") for error in (refused.value, *refused.value.further_errors)]


def test_defaults_file_and_overrides(tmp_path):
    chosen = load(tmp_path, GOOD, "optimizer.lr=1e-2", "seed=7", "model.batchnorm=true", "name=mine")
    assert chosen.optimizer.lr == 0.01
    assert chosen.optimizer.betas == (0.9, 0.999)
    assert (chosen.seed, chosen.name, chosen.model.batchnorm, chosen.model.filters) == (7, "mine", True, (16, 32))
    assert load(tmp_path, GOOD).name == "f"


def test_nothing_changes_a_configuration(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, GOOD).seed = 3


def test_an_override_of_the_duration_replaces_it(tmp_path):
    assert load(tmp_path, GOOD, "duration.steps=7").duration.steps == 7
    assert load(tmp_path, GOOD, "duration.steps=7").duration.epochs is None
    assert "exactly one" in refusal(tmp_path, GOOD, "duration.steps=7", "duration.seconds=3")[0]


def test_the_resolved_configuration_repeats_itself(tmp_path):
    chosen = load(tmp_path, GOOD, "optimizer.eps=1e-9")
    again = load(tmp_path, chosen.to_yaml())
    assert again.to_yaml() == chosen.to_yaml()
    assert again.digest() == chosen.digest()


def all_paths(value, path=()):
    for key, item in value.items():
        yield (*path, key)
        if isinstance(item, dict):
            yield from all_paths(item, (*path, key))


def one_edits(word):
    for k in range(len(word)):
        yield word[:k] + word[k + 1 :]
        yield word[:k] + "z" + word[k + 1 :]
        yield word[:k] + word[k] + word[k:]
        if k + 1 < len(word):
            yield word[:k] + word[k + 1] + word[k] + word[k + 2 :]
    yield word + "s"


def test_every_one_edit_typo_of_every_key_is_refused_with_the_right_key(tmp_path):
    from cvlab.config import messages
    from cvlab.experiments.classification.config import ClassifyConfig

    full = yaml.safe_load(load(tmp_path, GOOD).to_yaml())
    top = ClassifyConfig.model_json_schema()
    asked = right = 0
    for path in all_paths(full):
        if path[0] in ("expect", "expect_fallback"):
            continue
        block = full
        for part in path[:-1]:
            block = block[part]
        for typo in sorted(set(one_edits(path[-1])) - set(block) - {""}):
            asked += 1
            fake = {"properties": dict.fromkeys(block)} if len(path) > 1 else top
            message = messages._unknown_key((*path[:-1], typo), fake, top)
            right += f"did you mean {path[-1]!r}" in message
    assert asked > 500
    assert right / asked >= 0.9, f"{right} of {asked}"


@pytest.mark.parametrize("path", ["seed", "optimizer.lr", "model.filters", "duration.epochs", "data.num_train"])
def test_typos_are_refused_end_to_end(tmp_path, path):
    for typo in [path[:-1] + "q" + path[-1], path + "s"]:
        found = refusal(tmp_path, GOOD, f"{typo}=3")
        assert any(f"unknown key {typo!r}; did you mean" in line or "exactly one" in line for line in found), found


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
def test_wrong_types_and_ranges_say_what_is_expected(tmp_path, line):
    override, expected = line.rsplit("|", 1) if " | " not in line else line.split("|", 1)
    found = refusal(tmp_path, GOOD, override)
    assert any(expected in text for text in found), found
    assert all(text.startswith(f"override {override}:") for text in found), found


def test_a_wrong_value_in_a_file_names_its_line_and_all_errors_come_at_once(tmp_path):
    text = GOOD.replace("lr: 1e-3", "lr: fast").replace("batch_size", "bach_size").replace("pools", "pool")
    found = refusal(tmp_path, text)
    assert 'f.yaml:7:25: optimizer.lr: expected a number > 0 and <= 100, got "fast"' in found
    assert "f.yaml:8:1: unknown key 'bach_size'; did you mean 'batch_size'?" in found
    assert "f.yaml:6:3: unknown key 'model.pool'; did you mean 'pools'?" in found
    assert any("missing key 'batch_size'" in line for line in found)


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=3", "seed.x=3", "model.filters.0=3", "seed=[1"])
def test_malformed_overrides_are_refused(tmp_path, override):
    assert "override" in refusal(tmp_path, GOOD, override)[0]


@pytest.mark.parametrize("text", ["", "3", "- a", "text", "{}", "experiment: classify"])
def test_too_little_is_refused(tmp_path, text):
    assert refusal(tmp_path, text)


def test_a_deleted_line_is_named(tmp_path):
    for key in ("data", "model", "optimizer", "batch_size", "duration"):
        lines = yaml.safe_load(GOOD)
        del lines[key]
        assert f"missing key '{key}'" in refusal(tmp_path, yaml.safe_dump(lines))[0]


def test_random_values_give_a_configuration_or_config_errors(tmp_path):
    pool = ["3", "-1", "1e9", "x", "[]", "{}", "null", "true", "[[1]]", "{name: adam}", ".inf", "''", "1e-30"]
    for key in yaml.safe_load(load(tmp_path, GOOD).to_yaml()):
        for value in pool:
            try:
                load(tmp_path, GOOD, f"{key}={value}")
            except ConfigError as error:
                assert str(error)


def test_a_users_own_model(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width: int, num_classes, image_size):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(3 * image_size**2, width), nn.Linear(width, num_classes))\n"
    )
    text = GOOD.replace("deep_convnet\n  filters: [16, 32]\n  pools: [0]", "./net.py:Net\n  width: 5")
    assert load(tmp_path, text).model.width == 5
    assert "expected a whole number" in refusal(tmp_path, text, "model.width=x")[0]
    assert "unknown key 'model.widht'; did you mean 'width'" in refusal(tmp_path, text, "model.widht=3")[0]
    assert "unknown name in net.py 'Nett'; did you mean 'Net'" in refusal(tmp_path, text, "model.name=./net.py:Nett")[0]
    assert "no file" in refusal(tmp_path, text, "model.name=./nett.py:Net")[0]


def test_models_of_others_take_the_keys_of_their_builders(tmp_path):
    text = GOOD.replace("deep_convnet\n  filters: [16, 32]\n  pools: [0]", "timm:resnet10t\n  drop_rate: 0.1")
    chosen = load(tmp_path, text)
    assert chosen.model.name == "timm:resnet10t"
    assert chosen.model.builder_arguments() == {
        **{"weights": None, "freeze": 0, "layer_decay": 1.0},
        "drop_rate": 0.1,
    }
    assert load(tmp_path, chosen.to_yaml()).to_yaml() == chosen.to_yaml()
    assert load(tmp_path, text.replace("timm:resnet10t", "torchvision:resnet18")).model.drop_rate == 0.1


def test_a_file_name_of_any_letters_gives_a_name(tmp_path):
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
