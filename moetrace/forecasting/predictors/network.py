"""The network of `lstm` and its training; the only module that imports jax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH = 256
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
# Where the loss turns from squared to absolute, in units of the layer's movement: `error_rate` is an
# absolute error, and single windows of a wild phase must not steer the training.
HUBER = 0.5


class Network(eqx.Module):
    """An LSTM over the blocks and a linear layer on its last state."""

    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self, hidden: int, segments: int, key: Any) -> None:
        cell_key, head_key = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(1, hidden, key=cell_key)
        head = eqx.nn.Linear(hidden, segments, key=head_key)
        self.head = jax.tree.map(jnp.zeros_like, head)

    def __call__(self, inputs: Any) -> Any:
        """Moves (segments,) for the *inputs* (lookback,) of one expert."""
        state = (jnp.zeros(self.cell.hidden_size), jnp.zeros(self.cell.hidden_size))
        (last, _), _ = jax.lax.scan(lambda held, x: (self.cell(x[None], held), None), state, inputs)
        return self.head(last)


def train(batches: Sequence[Any], hidden: int, segments: int, seed: int) -> Network:
    """A network trained by one update for each batch; the same *seed* gives the same one.

    *batches* are inputs, targets, known and weight, each (updates, BATCH, ...).
    """
    key = jax.random.key(seed)
    network = Network(hidden, segments, key)
    optimiser = _optimiser(max(1, len(batches[0])))
    state = optimiser.init(eqx.filter(network, eqx.is_array))
    for batch in zip(*batches):
        network, state = _update(network, state, batch, optimiser)
    return network


@cache
def _optimiser(updates: int) -> Any:
    """The same object for as many updates: with another one `_update` is compiled anew, which takes seconds."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, updates)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY))


@eqx.filter_jit
def _update(network: Network, state: Any, batch: tuple[Any, ...], optimiser: Any) -> tuple[Network, Any]:
    gradient = eqx.filter_grad(_loss)(network, *batch)  # type: ignore[no-untyped-call]
    step, state = optimiser.update(gradient, state, eqx.filter(network, eqx.is_array))
    return eqx.apply_updates(network, step), state


def _loss(network: Network, inputs: Any, targets: Any, known: Any, weight: Any) -> Any:
    wrong = optax.huber_loss(jax.vmap(network)(inputs), targets, delta=HUBER)  # (batch, segments)
    weighted = wrong * known * weight[:, None]
    return weighted.sum() / jnp.maximum((known * weight[:, None]).sum(), 1.0)


@eqx.filter_jit
def apply(network: Network, inputs: Any) -> Any:
    """Moves (experts, segments) for *inputs* (experts, lookback) of 32 bits, as jax has arrays."""
    return jax.vmap(network)(inputs)


def arrays_of(network: Network) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of *network* by their place in it."""
    leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(network, eqx.is_array))[0]
    return {jax.tree_util.keystr(place): np.asarray(leaf) for place, leaf in leaves}


def from_arrays(arrays: dict[str, np.ndarray[Any, Any]], hidden: int, segments: int) -> Network:
    """The network with the weights that `arrays_of` gave; raises `ValueError` where they do not fit it."""
    network = Network(hidden, segments, jax.random.key(0))
    mine = arrays_of(network)
    if {name: a.shape for name, a in mine.items()} != {name: a.shape for name, a in arrays.items()}:
        raise ValueError("weights of another network")
    weights = iter([arrays[name] for name in mine])
    filled: Network = jax.tree.map(lambda leaf: jnp.asarray(next(weights)) if eqx.is_array(leaf) else leaf, network)
    return filled
