"""Attention, where no family's own test reaches."""

import re

import jax
import numpy as np
import pytest

from jaxspd.models import attention


@pytest.mark.parametrize("queries", [24, 23])
def test_attention_in_blocks_of_queries_is_attention(monkeypatch, queries):
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 3, 8), dtype=np.float32) for n in (queries, 40, 40))

    def program():
        # A function of its own each time: JAX keeps what it traced.
        return str(jax.make_jaxpr(lambda *inputs: attention.attention(*inputs))(query, key, value))

    whole = attention.attention(query, key, value)
    assert not re.search(r"length=(3|23)\b", program())
    # Room for 9 queries: three blocks of 8, or for a prime number of them one by one.
    for limit, size in (("SCORES", 4 * 2 * 3 * 40 * 9), ("CPU_SCORES", 4 * 40 * 9)):
        monkeypatch.setattr(attention, limit, size)
    assert re.search(r"length=3\b" if queries == 24 else r"length=23\b", program())
    np.testing.assert_allclose(attention.attention(query, key, value), whole, rtol=0, atol=1e-6)


def test_attention_by_head_is_attention():
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 3, 8), dtype=np.float32) for n in (24, 40, 40))
    for lengths in (None, np.array([40, 25])):
        ours = attention.attention_by_head(query, key, value, lengths)
        theirs = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("queries", [24, 9], ids=["at once", "in blocks"])
def test_keys_beyond_their_length_are_not_seen(monkeypatch, queries):
    monkeypatch.setattr(attention, "SCORES", 4 * 2 * 3 * 40 * queries)
    monkeypatch.setattr(attention, "CPU_SCORES", 4 * 40 * queries)
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 3, 8), dtype=np.float32) for n in (24, 40, 40))
    padded = attention.attention(query, key, value, np.array([40, 25]))
    np.testing.assert_allclose(padded[0], attention.attention(query, key, value)[0], rtol=0, atol=1e-6)
    alone = attention.attention(query, key[:, :25], value[:, :25])
    np.testing.assert_allclose(padded[1], alone[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("room", [2**24, 4 * 40 * 9, 1], ids=["at once", "in blocks", "one by one"])
def test_a_single_head_attends_as_one_of_many(monkeypatch, room):
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 8), dtype=np.float32) for n in (24, 40, 40))
    theirs = jax.nn.dot_product_attention(*(x[:, :, None] for x in (query, key, value)))[:, :, 0]
    for limit in ("SCORES", "CPU_SCORES"):
        monkeypatch.setattr(attention, limit, room)
    np.testing.assert_allclose(attention.single_head_attention(query, key, value), theirs, rtol=0, atol=1e-6)
