"""Layers that families share, where no family's own test reaches."""

import jax
import numpy as np
import pytest

from jaxspd.models import layers


@pytest.mark.parametrize("queries", [24, 23])
def test_attention_in_blocks_of_queries_is_attention(monkeypatch, queries):
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 3, 8), dtype=np.float32) for n in (queries, 40, 40))

    def program():
        # A function of its own each time: JAX keeps what it traced.
        return str(jax.make_jaxpr(lambda *inputs: layers.attention(*inputs))(query, key, value))

    whole = layers.attention(query, key, value)
    assert "scan" not in program()
    # Room for 9 queries: three blocks of 8, or for a prime number of them one by one.
    monkeypatch.setattr(layers, "SCORES", 4 * 2 * 3 * 40 * 9)
    assert ("length=3" if queries == 24 else "length=23") in program()
    np.testing.assert_allclose(layers.attention(query, key, value), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scores", [layers.SCORES, 4 * 2 * 3 * 40 * 9], ids=["at once", "in blocks"])
def test_keys_beyond_their_length_are_not_seen(monkeypatch, scores):
    monkeypatch.setattr(layers, "SCORES", scores)
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 3, 8), dtype=np.float32) for n in (24, 40, 40))
    padded = layers.attention(query, key, value, np.array([40, 25]))
    np.testing.assert_allclose(padded[0], layers.attention(query, key, value)[0], rtol=0, atol=1e-6)
    alone = layers.attention(query, key[:, :25], value[:, :25])
    np.testing.assert_allclose(padded[1], alone[1], rtol=0, atol=1e-6)
