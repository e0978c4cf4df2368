"""Measures agree with their definitions, worked out slowly."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.recipes import embed, passages, perplexity, retrieval, sequences, windows
from tests._tiny_models import byte_tokenizer


@pytest.fixture(scope="module")
def plain():
    from tokenizers import Tokenizer

    return Tokenizer.from_str(byte_tokenizer(around=False))


@pytest.fixture(scope="module")
def enclosing():
    from tokenizers import Tokenizer

    return Tokenizer.from_str(byte_tokenizer(around=True))


def bigram(params, tokens):
    """Logits that depend on the last token only."""
    return params[tokens]


def test_perplexity_is_exp_of_the_mean_over_all_predicted_tokens():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(11, 11)).astype(np.float32)
    tokens = rng.integers(0, 11, (5, 7)).astype(np.int32)
    probability = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    nll = [-np.log(probability[a, b]) for row in tokens for a, b in itertools.pairwise(row)]
    # A batch of 2 does not divide 5 windows: the last must not count twice.
    for batch in (1, 2, 5, 9):
        score = perplexity(bigram, jnp.asarray(table), tokens, batch=batch)
        assert score.tokens == len(nll) == 30
        # Float32 sums of 30 terms.
        np.testing.assert_allclose(score.perplexity, np.exp(np.mean(nll)), rtol=1e-5)


def test_the_error_of_the_likelihood_is_that_of_the_mean_over_windows():
    table = np.log(np.array([[0.9, 0.1], [0.4, 0.6]], np.float32))
    tokens = np.array([[0, 0], [0, 1], [1, 1]], np.int32)
    per_window = -np.array([np.log(0.9), np.log(0.1), np.log(0.6)])
    score = perplexity(bigram, jnp.asarray(table), tokens)
    np.testing.assert_allclose(score.error, per_window.std(ddof=1) / np.sqrt(3), rtol=1e-5)


def test_a_broken_model_has_no_perplexity():
    table = jnp.full((3, 3), jnp.nan)
    with pytest.raises(ValueError, match="2 of 2 windows gave a likelihood that is not finite"):
        perplexity(bigram, table, np.zeros((2, 3), np.int32))


def test_windows_do_not_overlap_and_follow_each_other(plain):
    text = "".join(chr(97 + i % 26) for i in range(40))
    found = windows(text, plain, count=3, length=10)
    assert plain.decode(found.ravel().tolist()) == text[:30]


def test_every_window_begins_as_the_tokenizer_begins_a_text(enclosing):
    begin = enclosing.encode("").ids
    found = windows("x" * 100, enclosing, count=3, length=10)
    assert found.shape == (3, 10)
    np.testing.assert_array_equal(found[:, : len(begin)], np.tile(begin, (3, 1)))


def test_a_text_that_is_too_short_for_its_windows_is_refused(plain):
    with pytest.raises(ValueError, match=r"the text has 19 tokens, but 2 windows of 10 need 20"):
        windows("x" * 19, plain, count=2, length=10)


def test_sequences_are_spread_over_the_text_without_overlap(plain):
    text = " ".join(f"w{i:03d}" for i in range(200))
    found = sequences(text, plain, count=4, length=20)
    starts = [plain.decode(row.tolist())[:4] for row in found]
    assert starts == ["w000", "w050", "w100", "w150"]


def test_sequences_of_an_encoder_are_closed(enclosing):
    cls, sep = enclosing.encode("").ids
    found = sequences("word " * 100, enclosing, count=2, length=16, close=True)
    assert found.shape == (2, 16)
    assert (found[:, 0] == cls).all() and (found[:, -1] == sep).all()


def test_a_text_that_is_too_short_for_its_sequences_is_refused(plain):
    with pytest.raises(ValueError, match="too few for 5 sequences of 30 tokens side by side"):
        sequences("word " * 10, plain, count=5, length=30)


def test_passages_are_the_words_that_the_definition_names():
    long = " ".join(map(str, range(300)))
    queries, targets = passages(["too short", long, long], count=2)
    assert queries == [" ".join(map(str, range(200, 240)))] * 2
    assert targets == [" ".join(map(str, range(240, 280)))] * 2


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match=r"2 documents of at least 280 words .* the text has 0"):
        passages(["short"], count=2)


def test_retrieval_counts_ranks():
    targets = np.eye(4)
    queries = np.array([[1, 0, 0, 0], [0.9, 0.3, 0, 0], [0, 0, 0, 1], [0.1, 0.2, 0.3, 0.9]])
    # Ranks: 1; 2; last of all, since 0 ties with two others; 1.
    score = retrieval(queries, targets)
    assert score.recall_at_1 == 0.5
    np.testing.assert_allclose(score.mrr, (1 + 1 / 2 + 1 / 4 + 1) / 4)


def test_embeddings_that_collapse_find_nothing():
    score = retrieval(np.ones((5, 3)), np.ones((5, 3)))
    assert score.recall_at_1 == 0.0
    np.testing.assert_allclose(score.mrr, 1 / 5)


def test_cosine_is_taken_to_the_reference():
    rows = np.array([[1.0, 0.0], [0.0, 1.0]])
    reference = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, -1.0]])
    assert retrieval(rows, rows, reference=np.concatenate([rows, rows])).cosine == 1.0
    np.testing.assert_allclose(
        retrieval(rows, rows, reference=reference).cosine, (1 + 1 + 0.6 - 1) / 4
    )


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        retrieval(np.full((2, 2), np.nan), np.eye(2))


def test_embedding_keeps_the_order_and_hides_the_padding(enclosing):
    seen = set()

    def mean_token(params, tokens, mask):
        seen.add(tokens.shape)
        total = jnp.sum(jnp.where(mask, tokens, 0), axis=1, keepdims=True)
        return total.astype(jnp.float32) / jnp.sum(mask, axis=1, keepdims=True).astype(jnp.float32)

    texts = ["b" * 90, "a", "c" * 40, "d" * 5, "e" * 33]
    rows = embed(mean_token, {}, texts, enclosing, batch=2)
    expected = [np.mean(enclosing.encode(text).ids) for text in texts]
    np.testing.assert_allclose(rows[:, 0], expected, rtol=1e-6)
    assert all(width % 16 == 0 for _, width in seen)


def test_long_passages_are_cut_but_stay_closed(enclosing):
    def last(params, tokens, mask):
        end = jnp.sum(mask, axis=1) - 1
        return jnp.stack([jnp.take_along_axis(tokens, end[:, None], 1)[:, 0], end], axis=1).astype(
            jnp.float32
        )

    rows = embed(last, {}, ["x" * 1000], enclosing)
    assert rows[0].tolist() == [enclosing.token_to_id("[SEP]"), 255]
