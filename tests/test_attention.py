"""Attention, where no family's own test reaches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspd.errors import UsageError
from jaxspd.generator import DiffGenerator
from jaxspd.models import attention as choice
from jaxspd.models.attention import attention
from jaxspd.models.kernels import Unserved, cudnn, splash, xla
from jaxspd.target import Target, forced_attention


@pytest.mark.parametrize("queries", [24, 23])
def test_attention_in_blocks_of_queries_is_attention(monkeypatch, queries):
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 3, 8), dtype=np.float32) for n in (queries, 40, 40))

    def program():
        # A function of its own each time: JAX keeps what it traced.
        return str(jax.make_jaxpr(lambda *inputs: attention(*inputs))(query, key, value))

    whole = attention(query, key, value)
    assert not re.search(r"length=(3|23)\b", program())
    # Room for 9 queries: three blocks of 8, or for a prime number of them one by one.
    for limit, size in (("SCORES", 4 * 2 * 3 * 40 * 9), ("CPU_SCORES", 4 * 40 * 9)):
        monkeypatch.setattr(xla, limit, size)
    assert re.search(r"length=3\b" if queries == 24 else r"length=23\b", program())
    np.testing.assert_allclose(attention(query, key, value), whole, rtol=0, atol=1e-6)


def test_attention_by_head_is_attention():
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 3, 8), dtype=np.float32) for n in (24, 40, 40))
    for lengths in (None, np.array([40, 25])):
        ours = xla.attention_by_head(query, key, value, lengths)
        theirs = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("queries", [24, 9], ids=["at once", "in blocks"])
def test_keys_beyond_their_length_are_not_seen(monkeypatch, queries):
    monkeypatch.setattr(xla, "SCORES", 4 * 2 * 3 * 40 * queries)
    monkeypatch.setattr(xla, "CPU_SCORES", 4 * 40 * queries)
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 3, 8), dtype=np.float32) for n in (24, 40, 40))
    padded = attention(query, key, value, np.array([40, 25]))
    np.testing.assert_allclose(padded[0], attention(query, key, value)[0], rtol=0, atol=1e-6)
    alone = attention(query, key[:, :25], value[:, :25])
    np.testing.assert_allclose(padded[1], alone[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("room", [2**24, 4 * 40 * 9, 1], ids=["at once", "in blocks", "one by one"])
def test_a_single_head_attends_as_one_of_many(monkeypatch, room):
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, n, 8), dtype=np.float32) for n in (24, 40, 40))
    theirs = jax.nn.dot_product_attention(*(x[:, :, None] for x in (query, key, value)))[:, :, 0]
    for limit in ("CODER_SCORES", "CPU_SCORES"):
        monkeypatch.setattr(xla, limit, room)
    np.testing.assert_allclose(xla.single_head_attention(query, key, value), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [None, (300, 211)], ids=["whole", "padded"])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (520, 300)], ids=["self", "cross"])
def test_splash_attention_is_attention(queries, keys, lengths):
    draw = np.random.default_rng(0)
    query, key, value = (
        draw.standard_normal((2, n, 2, 128), dtype=np.float32) for n in (queries, keys, keys)
    )
    lengths = None if lengths is None else np.array(lengths)
    ours = splash.attend(query, key, value, lengths, interpret=True)
    theirs = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)


def test_splash_attention_leaves_other_heads_to_others():
    with pytest.raises(Unserved, match="128 channels, not of 96"):
        splash.attend(*[np.zeros((1, 8, 2, 96), np.float32)] * 3)


@pytest.fixture
def warned(monkeypatch, caplog):
    """On what says it is a GPU, without one: the log."""
    monkeypatch.setattr(choice, "platform", lambda: "gpu")
    choice._warn.cache_clear()
    yield caplog
    choice._warn.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "reason"), [(np.float32, "half precision, not in float32"), (jnp.bfloat16, "cuDNN")]
)
def test_the_next_backend_serves_where_the_best_cannot_and_says_so_once(warned, dtype, reason):
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.standard_normal((1, 24, 3, 8)), dtype) for _ in range(3))
    out = [attention(query, key, value) for _ in range(2)]
    np.testing.assert_array_equal(*out)
    [message] = warned.messages
    assert reason in message


def test_a_forced_backend_serves_or_says_why_not(warned):
    inputs = [np.ones((1, 8, 2, 16), np.float32)] * 3
    with Target(attention_backend="cudnn").tracing(), pytest.raises(UsageError, match="half precision"):
        attention(*inputs)
    with Target(attention_backend="xla").tracing():
        attention(*inputs)
    assert not warned.messages


@pytest.mark.parametrize(
    ("name", "reason"), [("flash", "use one of cudnn, splash, xla"), ("splash", "needs a TPU")]
)
def test_an_impossible_backend_is_refused_at_once(flux1_folder, name, reason):
    with pytest.raises(UsageError, match=reason):
        DiffGenerator.from_pretrained(str(flux1_folder), attention_backend=name, compilation_cache=False)


def test_what_is_traced_for_one_target_is_not_used_for_another():
    traced = []

    @jax.jit
    def spy(x):
        traced.append(forced_attention())
        return x

    for backend in ("xla", None, "xla"):
        with Target(attention_backend=backend).tracing():
            spy(1.0)
    assert traced == ["xla", None]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, (1000, 777)], ids=["whole", "padded"])
def test_cudnn_attention_is_attention(lengths):
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.standard_normal((2, 1000, 4, 128)), jnp.bfloat16) for _ in range(3))
    lengths = None if lengths is None else jnp.array(lengths)
    ours = cudnn.attend(query, key, value, lengths)
    exact = xla.attend(*(x.astype(jnp.float32) for x in (query, key, value)), lengths)
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=0, atol=1e-2)
