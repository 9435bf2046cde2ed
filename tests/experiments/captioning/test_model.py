"""The captioning models: hand-written layers agree with torch's, and single steps with whole captions."""

import pytest
import torch

from cvlab.errors import ConfigError
from cvlab.experiments.captioning import base
from cvlab.experiments.captioning.model import Captioner
from cvlab.experiments.captioning.transformer import TransformerCaptioner


@pytest.mark.parametrize("cell", ["rnn", "lstm", "attention_lstm", "transformer"])
class TestCaptioner:
    def build(self, cell):
        """Return a model with torch's layers, the same with hand-written ones, and the arguments of `forward`."""
        torch.manual_seed(0)
        models = []
        for layers in ("torch", "manual"):
            options = {"dropout": 0.0, "feature_dropout": 0.0, "layers": layers}
            if cell == "transformer":
                model = TransformerCaptioner(6, 9, hidden_dim=8, num_layers=2, num_heads=2, **options)
            else:
                model = Captioner(6, 9, cell, embed_dim=4, hidden_dim=3, **options)
            models.append(model.double())
        models[1].load_state_dict(models[0].state_dict())
        positions = 9 if models[0].has_attention else 1
        token_ids = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0], [1, 4, 8, 5, 2]])
        return *models, torch.randn(2, positions, 6, dtype=torch.float64), token_ids, torch.tensor([0, 1, 1])

    def test_manual_and_torch_layers_agree_in_losses_and_gradients(self, cell):
        reference, manual, *batch = self.build(cell)
        losses = [model.loss(*batch) for model in (reference, manual)]
        torch.testing.assert_close(losses[0], losses[1])
        for loss, _ in losses:
            loss.backward()
        for actual, expected in zip(manual.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)

    def test_the_loss_is_a_sum_over_tokens_and_a_mean_over_captions(self, cell):
        model, _, features, token_ids, photo_indices = self.build(cell)
        log_p = model(features, token_ids[:, :-1], photo_indices).log_softmax(-1)
        targets = token_ids[:, 1:]
        total = -sum(log_p[n, t, targets[n, t]] for n in range(3) for t in range(4) if targets[n, t] != 0)
        loss, token_loss = model.loss(features, token_ids, photo_indices)
        torch.testing.assert_close(loss, total / 3)
        torch.testing.assert_close(token_loss, (total / 9).detach())

    def test_the_loss_projects_a_padded_number_of_rows(self, cell, monkeypatch):
        model, _, *batch = self.build(cell)
        project, shapes = model.project_output, []
        monkeypatch.setattr(model, "project_output", lambda rows: shapes.append(rows.shape[0]) or project(rows))
        model.loss(*batch)
        assert shapes == [base.ROWS_MULTIPLE]

    def test_steps_agree_with_the_whole_caption(self, cell):
        model, _, features, token_ids, photo_indices = self.build(cell)
        expected = model(features, token_ids[:, :-1], photo_indices).log_softmax(-1)
        state = model.initial_state(features[photo_indices])
        for t in range(4):
            logits, state, weights = model.step(state, token_ids[:, t])
            torch.testing.assert_close(logits.log_softmax(1), expected[:, t])
            assert (weights is not None) == model.has_attention
            if weights is not None:
                torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("layers", ["torch", "manual"])
def test_positional_features_and_the_mlp_projection(layers):
    torch.manual_seed(0)
    model = Captioner(5, 9, "attention_lstm", 6, 8, layers=layers, positional=True, projection="mlp")
    features, token_ids = torch.ones(2, 9, 5), torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]])
    context = model.eval().project(features)
    assert context.shape == (2, 9, 8)
    assert not torch.allclose(context[0, 0], context[0, 8])
    loss, _ = model.train().loss(features, token_ids, torch.arange(2))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_transformer_is_causal():
    torch.manual_seed(0)
    model = TransformerCaptioner(6, 9, hidden_dim=8, num_heads=2, layers="manual").eval()
    features, photo_indices = torch.randn(1, 4, 6), torch.tensor([0, 0])
    logits = model(features, torch.tensor([[1, 4, 5, 6], [1, 4, 7, 8]]), photo_indices)
    torch.testing.assert_close(logits[0, :2], logits[1, :2])
    assert not torch.allclose(logits[0, 2], logits[1, 2])


def test_hidden_dim_must_be_a_multiple_of_num_heads():
    with pytest.raises(ConfigError, match="hidden_dim 10 is not an even multiple of num_heads 4"):
        TransformerCaptioner(6, 9, hidden_dim=10, num_heads=4)
