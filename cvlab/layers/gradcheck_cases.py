"""Every hand-written layer and loss on random inputs, for `cvlab.layers.gradcheck`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.layers import attention, batchnorm, conv, linear, losses, recurrent, reference, sequence
from cvlab.layers.gradcheck import GradCheckCase


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _away_from_zero(*shape: int) -> Tensor:
    """Return random numbers that no difference carries over the kink of a ReLU."""
    x = _randn(*shape)
    return x + 0.01 * x.sign()


def _case(
    name: str,
    layer: Any,
    inputs: Sequence[Tensor],
    reference_fn: Callable[..., Tensor],
    tolerance: float,
    options: tuple[Any, ...] = (),
) -> GradCheckCase:
    """Make a case of a layer; `options` follow the inputs in its forward."""
    return GradCheckCase(
        name, lambda *x: layer.forward(*x, *options), layer.backward, tuple(inputs), reference_fn, tolerance
    )


class LinearReLU:
    """Linear, then ReLU, with hand-written passing of caches and gradients."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Any]:
        """Return relu(x w^T + b), and both caches."""
        hidden, linear_cache = linear.Linear.forward(x, w, b)
        out, relu_cache = linear.ReLU.forward(hidden)
        return out, (linear_cache, relu_cache)

    @staticmethod
    def backward(dout: Tensor, cache: Any) -> Any:
        """Return dx, dw, db."""
        (dhidden,) = linear.ReLU.backward(dout, cache[1])
        return linear.Linear.backward(dhidden, cache[0])


class SeededDropout:
    """Dropout whose mask is the same in every call, so that differences make sense."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Any]:
        """Apply dropout with p = 0.4."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return linear.Dropout.forward(x, 0.4)

    backward = linear.Dropout.backward

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        """Apply the same mask in plain torch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return x * (torch.rand(x.shape) >= 0.4).to(x.dtype) / 0.6


def _multi_margin(scores: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """Return the SVM loss: torch divides it by the number of classes too."""
    return F.multi_margin_loss(scores, labels, margin=margin) * scores.shape[1]


def _wide_margin(scores: Tensor, labels: Tensor) -> Tensor:
    return _multi_margin(scores, labels, 3.0)


def cases() -> list[GradCheckCase]:
    """Return a case of every hand-written layer and loss, on random float64 inputs."""
    return [*_feed_forward_cases(), *_sequence_cases()]


def _feed_forward_cases() -> list[GradCheckCase]:
    labels = torch.tensor([1, 0, 4, 2])
    images, gamma_beta = _randn(2, 3, 6, 5), (1 + 0.3 * _randn(3), _randn(3))

    def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, gamma, beta, training=True)

    def linear_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(F.linear(x, w, b))

    def strided_conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, stride=2, padding=1)

    gradcheck_cases = [
        _case("Linear", linear.Linear, [_randn(4, 6), _randn(5, 6), _randn(5)], F.linear, 1e-7),
        _case("ReLU", linear.ReLU, [_away_from_zero(4, 6)], F.relu, 1e-8),
        _case("Linear-ReLU", LinearReLU, [_randn(4, 6), _randn(5, 6), _randn(5)], linear_relu, 1e-8),
        _case("Dropout", SeededDropout, [_randn(5, 7)], SeededDropout.reference, 1e-8),
        _case("Conv2d", conv.Conv2d, [images, _randn(4, 3, 3, 3), _randn(4)], strided_conv, 1e-8, (2, 1)),
        _case("MaxPool2d", conv.MaxPool2d, [_randn(2, 3, 6, 6)], lambda x: F.max_pool2d(x, 2), 1e-10, (2,)),
        _case("Softmax", losses.Softmax, [_randn(4, 5), labels], F.cross_entropy, 1e-6),
        _case("SVM", losses.SVM, [_randn(4, 5), labels], _multi_margin, 1e-7),
        _case("SVM, margin 3", losses.SVM, [_randn(4, 5), labels], _wide_margin, 1e-7, (3.0,)),
    ]
    for name, tolerance, layer, x in (
        ("BatchNorm", 1e-9, batchnorm.BatchNorm, _randn(7, 3)),
        ("BatchNorm, simplified", 1e-9, batchnorm.BatchNormAlt, _randn(7, 3)),
        ("SpatialBatchNorm", 1e-6, batchnorm.SpatialBatchNorm, images),
        ("SpatialBatchNorm, simplified", 1e-6, batchnorm.SpatialBatchNormAlt, images),
    ):
        gradcheck_cases.append(_case(name, layer, [x, *gamma_beta], batch_norm, tolerance))
    return gradcheck_cases


def _sequence_cases() -> list[GradCheckCase]:
    n, steps, d, hidden, positions = 3, 4, 5, 2, 6
    x, h, c, token_ids = _randn(n, d), _randn(n, hidden), _randn(n, hidden), torch.tensor([[1, 2, 0], [3, 4, 4]])
    rnn_weights = (_randn(hidden, d), _randn(hidden, hidden), _randn(hidden))
    lstm_weights = (_randn(4 * hidden, d), _randn(4 * hidden, hidden), _randn(4 * hidden))
    attention_weights = (
        _randn(4 * hidden, d),
        _randn(4 * hidden, hidden),
        _randn(4 * hidden, hidden),
        _randn(4 * hidden),
    )

    def lstm_step(x: Tensor, h: Tensor, c: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> Tensor:
        return torch.cat(reference.lstm_step(x @ wx.T + h @ wh.T + b, c), 1)

    def embedding(w: Tensor, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, w)

    def temporal_softmax(logits: Tensor, token_ids: Tensor) -> Tensor:
        return reference.temporal_softmax(logits, token_ids, 0)

    def attend(name: str, count: int) -> GradCheckCase:
        inputs = (h if count == n else _randn(count, hidden), _randn(n, positions, hidden))
        return _case(name, attention.DotAttention, inputs, reference.attention, 1e-8)

    def dot_products(name: str, num_keys: int, is_causal: bool) -> GradCheckCase:
        inputs = (_randn(n, steps, d), _randn(n, num_keys, d), _randn(n, num_keys, d))

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

        return _case(name, attention.ScaledDotProductAttention, inputs, sdpa, 1e-8, (is_causal,))

    def attention_lstm(name: str, count: int) -> GradCheckCase:
        inputs = (_randn(count, steps, d), _randn(n, positions, hidden), *attention_weights)
        return _case(name, attention.AttentionLSTM, inputs, reference.attention_lstm, 1e-7)

    return [
        _case("RNN step", recurrent.RNNStep, (x, h, *rnn_weights), reference.rnn_step, 1e-8),
        _case("RNN", recurrent.RNN, (_randn(n, steps, d), h, *rnn_weights), reference.rnn, 1e-7),
        _case("LSTM step", recurrent.LSTMStep, (x, h, c, *lstm_weights), lstm_step, 1e-8),
        _case("LSTM", recurrent.LSTM, (_randn(n, steps, d), h, *lstm_weights), reference.lstm, 1e-7),
        attend("Attention", n),
        attention_lstm("Attention LSTM", n),
        attend("Attention, shared maps", 2 * n),
        attention_lstm("Attention LSTM, shared maps", 2 * n),
        dot_products("Scaled dot products", positions, False),
        dot_products("Scaled dot products, causal", steps, True),
        _case("Embedding", sequence.Embedding, (_randn(5, d), token_ids), embedding, 1e-8),
        _case("Temporal softmax", sequence.TemporalSoftmax, (_randn(2, 3, 5), token_ids), temporal_softmax, 1e-7, (0,)),
    ]
