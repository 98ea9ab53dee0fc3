"""Recurrent layers, each a `lax.scan` over time, as many layers and directions as there are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..dtypes import cast
from ..table import op
from .linear import product

Cell = Callable[[Any, tuple[Any, ...], Sequence[Any]], tuple[tuple[Any, ...], Any]]
"""From what the input contributes, the state and the recurrent weights, the first of them transposed, to the next state
and the output."""


def _lstm(given: Any, state: tuple[Any, ...], weights: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
    h, c = state
    w_hh, b_hh, w_hr = weights
    h, c, _ = _lstm_step(given + _affine(h, w_hh, b_hh), c)
    h = h if w_hr is None else h @ w_hr.T
    return (h, c), h


def _lstm_step(gates: Any, c: Any) -> tuple[Any, Any, list[Any]]:
    """Output, cell and the gates as they act."""
    i, f, g, o = jnp.split(gates, 4, -1)
    acting = [jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)]
    c = acting[1] * c + acting[0] * acting[2]
    return acting[3] * jnp.tanh(c), c, acting


def _gru(given: Any, state: tuple[Any, ...], weights: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
    (h,) = state
    w_hh, b_hh, _ = weights
    h, _ = _gru_step(given, _affine(h, w_hh, b_hh), h)
    return (h,), h


def _gru_step(given: Any, recurrent: Any, h: Any) -> tuple[Any, list[Any]]:
    """Output, and what a derivative needs, in torch's order."""
    r_x, z_x, n_x = jnp.split(given, 3, -1)
    r_h, z_h, n_h = jnp.split(recurrent, 3, -1)
    r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
    n = jnp.tanh(n_x + r * n_h)
    return (h - n) * z + n, [r, z, n, h, n_h]


def _plain(activation: Callable[[Any], Any]) -> Cell:
    def cell(given: Any, state: tuple[Any, ...], weights: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
        (h,) = state
        w_hh, b_hh, _ = weights
        h = activation(given + _affine(h, w_hh, b_hh))
        return (h,), h

    return cell


def _affine(x: Any, weight: Any, bias: Any, *, is_transposed: bool = False) -> Any:
    """`x @ weight + bias`, in the dtype of x, as states have to be."""
    return _sum(cast(product(x, weight, is_transposed=is_transposed), x.dtype), bias)


def _relu(x: Any) -> Any:
    return jnp.where(x > 0, x, 0)


def _layers(
    cell: Cell,
    x: Any,
    states: Sequence[Any],
    params: Sequence[Any],
    options: Sequence[Any],
    key: Any,
) -> tuple[Any, list[Any]]:
    """Output and last states, each of all layers and directions."""
    has_biases, num_layers, dropout, train, bidirectional, batch_first = options
    directions = 2 if bidirectional else 1
    per_cell = len(params) // (num_layers * directions)
    x = jnp.swapaxes(x, 0, 1) if batch_first else x
    last: list[tuple[Any, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            n = layer * directions + direction
            own = params[n * per_cell : (n + 1) * per_cell]
            w_ih, w_hh, b_ih, b_hh = (*own[:4],) if has_biases else (*own[:2], None, None)
            w_hr = own[-1] if per_cell in (3, 5) else None
            given = _affine(x, w_ih, b_ih, is_transposed=True)
            if b_hh is not None and cell is not _gru:  # the sum is all that the cell takes
                given, b_hh = given + b_hh, None
            # Transposed once: XLA would bring the weight into the order that its product wants in each step.
            weights = (lax.optimization_barrier(w_hh.T), b_hh, w_hr)
            start = tuple(s[n] for s in states)
            end, output = lax.scan(
                lambda state, g, weights=weights: cell(g, state, weights), start, given, reverse=direction == 1
            )
            last.append(end)
            outputs.append(output)
        x = jnp.concatenate(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < num_layers - 1:
            kept = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout) if dropout < 1 else 0, 0)
    x = jnp.swapaxes(x, 0, 1) if batch_first else x
    return x, [jnp.stack(each) for each in zip(*last, strict=True)]


@op("lstm.input")
def lstm(x: Any, states: Any, params: Any, *options: Any, key: Any) -> Any:
    """A long short-term memory: outputs, last outputs and last cells."""
    output, (h, c) = _layers(_lstm, x, states, params, options, key)
    return output, h, c


@op("gru.input")
def gru(x: Any, state: Any, params: Any, *options: Any, key: Any) -> Any:
    """Gated recurrent units."""
    output, (h,) = _layers(_gru, x, [state], params, options, key)
    return output, h


@op("rnn_tanh.input")
def rnn_tanh(x: Any, state: Any, params: Any, *options: Any, key: Any) -> Any:
    """A plain recurrent layer with tanh."""
    output, (h,) = _layers(_plain(jnp.tanh), x, [state], params, options, key)
    return output, h


@op("rnn_relu.input")
def rnn_relu(x: Any, state: Any, params: Any, *options: Any, key: Any) -> Any:
    """A plain recurrent layer with a ReLU."""
    output, (h,) = _layers(_plain(_relu), x, [state], params, options, key)
    return output, h


@op("_thnn_fused_lstm_cell")
def fused_lstm_cell(given: Any, recurrent: Any, cx: Any, input_bias: Any = None, hidden_bias: Any = None) -> Any:
    """What torch's LSTM cell is on a GPU: output, cell and the gates as they act."""
    h, c, acting = _lstm_step(_sum(given, input_bias) + _sum(recurrent, hidden_bias), cx)
    return h, c, jnp.concatenate(acting, -1)


@op("_thnn_fused_gru_cell")
def fused_gru_cell(given: Any, recurrent: Any, hx: Any, input_bias: Any = None, hidden_bias: Any = None) -> Any:
    """What torch's GRU cell is on a GPU: output, and what its derivative needs."""
    h, needed = _gru_step(_sum(given, input_bias), _sum(recurrent, hidden_bias), hx)
    return h, jnp.concatenate(needed, -1)


def _sum(x: Any, bias: Any) -> Any:
    return x if bias is None else x + bias
