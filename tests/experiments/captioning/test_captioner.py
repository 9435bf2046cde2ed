"""Training and evaluating captioners on built-in scenes, stopped and resumed; the maps that they stand on."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvlab.data import photos, vocabulary
from cvlab.engine import device
from cvlab.experiments.captioning import checkpoint, feature_store
from cvlab.experiments.captioning.model import Captioner
from cvlab.models.features import FeatureExtractor
from cvlab.models.pretrained import build
from tests.conftest import weights_digest

SHORT = (
    *("model={name: captioner, cell: attention_lstm, embed_dim: 8, hidden_dim: 16}", "size=64", "batch_size=4"),
    *("duration={steps: 4}", "expect=[]", "log_every=1", "evaluate_test=false", "threads=1", "beam=2"),
)

WORDS = ("a", "red", "blue", "star", "ring")


def train(cvlab, *words):
    code, out, err = cvlab("train", "caption_scenes", *SHORT, *words, "--json")
    assert code == 0, err
    return json.loads(out)


class TestTraining:
    def test_metrics_and_weights_in_a_file_of_their_own(self, cvlab):
        found = train(cvlab)
        wanted = {
            "val_loss",
            "val_bleu4",
            "bleu1",
            "bleu4",
            "cider",
            "exact_match",
            "shapes_right",
            "word_loss",
            "train_loss",
        }
        assert wanted <= found["metrics"].keys()
        made = checkpoint.load(Path(found["run"]) / "captioner.safetensors", torch.device("cpu"))
        assert made.metadata.size_px == 64
        assert made.metadata.trained_on == "scene_captions"
        assert "red" in made.metadata.vocabulary
        summary = json.loads((Path(found["run"]) / "summary.json").read_text())
        assert "closest reference length" in summary["bleu_rule"]
        assert summary["beam"] == 2

    def test_layers_by_hand_train_as_those_of_torch(self, cvlab):
        sizes = "embed_dim: 8, hidden_dim: 16, dropout: 0, feature_dropout: 0"
        model = f"model={{name: captioner, cell: lstm, {sizes}, layers: %s}}"
        losses = [
            train(cvlab, model % layers, "precision=float32")["metrics"]["train_loss"] for layers in ("torch", "manual")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_stopped_and_resumed_it_ends_with_the_same_weights(self, stopped_and_resumed):
        whole, again = stopped_and_resumed("caption_scenes", *SHORT, "save_seconds=0", "mirror=true", "reward_epochs=1")
        assert weights_digest(whole) == weights_digest(again)
        assert whole["run"] != again["run"]

    def test_eval_gives_what_the_run_gave(self, cvlab):
        found = train(cvlab)
        code, out, err = cvlab("eval", found["run"], "--split", "val", "--json")
        assert code == 0, err
        metrics = json.loads(out)["metrics"]
        assert metrics["val_bleu1"] == pytest.approx(found["metrics"]["bleu1"])
        assert metrics["val_loss"] > 0

    def test_rewarded_at_the_end_it_draws_better_sentences(self, cvlab):
        model = "model={name: captioner, cell: lstm, embed_dim: 16, hidden_dim: 32, dropout: 0, feature_dropout: 0}"
        words = ("duration={steps: 60}", "data.num_train=4", "eval_every=1000", "optimizer={name: adam, lr: 1e-2}")
        found = train(cvlab, model, *words, "schedule={name: constant}", "ema=null", "reward_epochs=40")
        rows = [json.loads(line) for line in (Path(found["run"]) / "metrics.jsonl").read_text().splitlines()]
        rewards = [row["reward"] for row in rows if "reward" in row]
        assert len(rewards) == 40
        assert sum(rewards[-5:]) > sum(rewards[:5])

    def test_it_learns_a_few_sentences_by_heart(self, cvlab):
        words = ("duration={steps: 120}", "data.num_train=4", "eval_every=1000", "optimizer={name: adam, lr: 1e-2}")
        sizes = "embed_dim: 16, hidden_dim: 32, dropout: 0, feature_dropout: 0"
        model = f"model={{name: captioner, cell: attention_lstm, {sizes}}}"
        found = train(cvlab, model, *words, "schedule={name: constant}", "ema=null")
        rows = [json.loads(line) for line in (Path(found["run"]) / "metrics.jsonl").read_text().splitlines()]
        losses = [row["train_loss"] for row in rows if "train_loss" in row]
        assert losses[-1] < 0.2 * losses[0]

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("data.name=scenes",), "captioned photos are needed"),
            (("data.num_train=9999",), "has 12 photos"),
            (("data.name=captions",), "goes with a path"),
            (("model.cell=gru",), "cell"),
            (("duration={epochs: 2}", "reward_epochs=3"), "reward_epochs 3 are the last"),
            (("duration={seconds: 5}", "reward_epochs=1"), "reward_epochs are counted from the end"),
            (("min_word_count=99999",), "no word occurs 99999 times"),
            (("expect=[bleu5>0]",), "no metric"),
        ],
    )
    def test_refusals(self, cvlab, words, says):
        code, _, err = cvlab("train", "caption_scenes", *words, "--dry-run")
        assert code in (2, 4), err
        assert says in err, err


class TestCaption:
    @pytest.fixture
    def made(self, tmp_path):
        """Captioners as they start, but for the end of a sentence, in files as a training leaves them."""
        files = {}
        for cell in ("attention_lstm", "rnn"):
            arguments = {"cell": cell, "embed_dim": 8, "hidden_dim": 16}
            metadata = checkpoint.CaptionerMetadata(arguments, WORDS, 64, 12, trained_on="nothing")
            device = torch.device("cpu")
            features = checkpoint.build_feature_extractor(metadata.strides, metadata.backbone, None, device)
            files[cell] = tmp_path / f"{cell}.safetensors"
            torch.manual_seed(0)  # what comes before draws random numbers only the first time
            net = checkpoint.build(metadata, features, device).model
            net.output_projection.bias.detach()[vocabulary.END] = -4.0  # not the first word
            checkpoint.save(metadata, net, files[cell])
        return files

    def test_a_sentence_for_each_photo_and_where_it_looked(self, cvlab, made, tmp_path):
        photo, broken = tmp_path / "wide.png", tmp_path / "broken.png"
        Image.new("RGB", (90, 30), "red").save(photo)
        broken.write_bytes(b"no photo")
        images = ("sample", str(photo), str(broken))
        weights = made["attention_lstm"]
        code, out, _ = cvlab("caption", *images, "--weights", weights, "--beam", 2, "--attention", "--json")
        found = json.loads(out)
        assert code == 4
        assert found["metrics"]["num_photos"] == 2
        assert "error" in found["results"][2]
        for result in found["results"][:2]:
            said = result["sentence"].split()
            assert 1 <= len(said) <= 11
            assert set(said) <= set(WORDS)
            assert result["score"] < 0
            drawn = Image.open(Path(found["run"]) / result["picture"])
            assert drawn.width > 200
            assert drawn.getbbox() is not None

    def test_the_table_says_the_sentence(self, cvlab, made):
        code, out, err = cvlab("caption", "sample", "--weights", made["rnn"])
        assert code == 0, err
        assert re.search(r"^caption  +\w", out, re.MULTILINE), err
        assert "rnn" in err, err

    def test_one_beam_is_greedy(self, cvlab, made):
        weights = made["attention_lstm"]
        one = checkpoint.load(weights, torch.device("cpu"))
        photo = feature_store.resize_square(photos.load(photos.find_images(("sample",))[0]), one.metadata.size_px)
        seen = feature_store.extract_features(
            one.feature_extractor, photo[None], device.select_device("cpu", "float32", 1), False
        )
        state, said = one.model.initial_state(seen), [vocabulary.START]
        while len(said) < one.metadata.max_length and said[-1] != vocabulary.END:
            scores, state, _ = one.model.step(state, torch.tensor([said[-1]]))
            scores[:, [vocabulary.PAD, vocabulary.START, vocabulary.UNKNOWN]] = -torch.inf
            said.append(int(scores.argmax()))
        out = cvlab("caption", "sample", "--weights", weights, "--beam", 1, "precision=float32", "--json")[1]
        if said[-1] == vocabulary.END:
            assert json.loads(out)["results"][0]["sentence"] == " ".join(one.vocabulary.decode(said))

    @pytest.mark.parametrize(
        ("words", "code", "says"),
        [
            (("--weights", "nowhere.safetensors"), 4, "no such file"),
            (("--weights", "{folder}"), 4, "this run has no captioner.safetensors"),
            (("--weights", "{rnn}", "--attention"), 2, "has no attention weights"),
            (("--beam", "0"), 2, "beam"),
        ],
    )
    def test_refusals(self, cvlab, made, tmp_path, words, code, says):
        given = [word.format(folder=tmp_path, **made) for word in words]
        found, _, err = cvlab("caption", "sample", *given)
        assert found == code, err
        assert says in err, err
        assert err.count("\n") <= 3, err

    def test_no_photo(self, cvlab):
        code, _, err = cvlab("caption")
        assert code == 2
        assert "no photo is named" in err


class TestMaps:
    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "data"))
        path = tmp_path / "photo.png"
        photos.load(photos.SAMPLE if Path(photos.SAMPLE).is_file() else photos.find_images(("sample",))[0]).save(path)
        features, ctx = FeatureExtractor(build(), ["bn2"]), device.select_device("cpu", "float32", 1)

        def load(**changes):
            request = feature_store.FeatureSpec(64, changes.pop("pool", False), **changes)
            return feature_store.load_features(features, [path, path], ctx, request, lambda: None)

        return load, tmp_path / "data" / feature_store.FOLDER, path

    def test_they_are_kept_checked_and_mapped(self, asked, capsys):
        load, folder, _ = asked
        first = load().clone()
        assert first.shape == (2, 4, 1280)
        assert first.dtype == torch.float16
        assert len(list(folder.glob("*.npy"))) == 1
        (path,) = folder.glob("*.npy")
        stamp = path.stat().st_mtime_ns
        assert torch.equal(load(), first)
        assert path.stat().st_mtime_ns == stamp
        torch.testing.assert_close(load(pool=True)[:, 0].float(), first.float().mean(1), rtol=1e-2, atol=1e-2)
        assert not torch.equal(load(mirrored=True), first)
        assert len(list(folder.glob("*.npy"))) == 3
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        assert torch.equal(load(), first)
        assert "computed again" in capsys.readouterr().err

    def test_another_photo_of_the_same_name_is_looked_at_anew(self, asked):
        load, folder, path = asked
        load()
        photos.load(path).rotate(90).save(path)
        load()
        assert len(list(folder.glob("*.npy"))) == 2

    def test_a_disk_that_refuses_does_not_matter(self, asked, monkeypatch, tmp_path, capsys):
        load, _, _ = asked
        (tmp_path / "data").write_text("a file where the folder should be")
        assert load().shape == (2, 4, 1280)
        assert "not kept" in capsys.readouterr().err


def test_of_several_maps_the_first_says_which_cells_there_are():
    features = checkpoint.build_feature_extractor((16, 8, 32), "efficientnet_lite0", None, torch.device("cpu"))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ctx = device.select_device("cpu", "float32", 1)
    cells = feature_store.extract_features(features, pictures, ctx, False)
    maps = features.batch(pictures)
    medium, fine, coarse = (maps[name].detach() for name in features.names)
    sizes = [m.shape[1] for m in (medium, fine, coarse)]
    assert cells.shape == (2, 16, sum(sizes))
    found = [part.mT.unflatten(2, (4, 4)) for part in cells.split(sizes, 2)]
    torch.testing.assert_close(found[0], medium)
    torch.testing.assert_close(found[1][..., 1, 2], fine[..., 2:4, 4:6].mean((2, 3)))
    torch.testing.assert_close(found[2], coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))
    pooled = feature_store.extract_features(features, pictures, ctx, True)
    torch.testing.assert_close(pooled, cells.mean(1, keepdim=True))


@pytest.mark.parametrize("layers", ["torch", "manual"])
def test_cells_know_their_places_and_are_looked_at_through_a_layer_of_their_own(layers):
    torch.manual_seed(0)
    net = Captioner(5, 9, "attention_lstm", 6, 8, layers=layers, positional=True, projection="mlp")
    features, words = torch.ones(2, 9, 5), torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]])
    seen = net.eval().project(features)
    assert seen.shape == (2, 9, 8)
    assert not torch.allclose(seen[0, 0], seen[0, 8])
    loss, _ = net.train().loss(features, words, torch.arange(2))
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
