"""Intervals hold the truth as often as they say, and a verdict follows from them."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lorakit.evaluate.metric import (
    Measure,
    bonett_price,
    compare,
    intervals,
    loss,
    mean,
    perplexity,
    row_scores,
    wilson,
)
from lorakit.evaluate.metrics.similarity import pooled_bleu

DATASETS = 1000


def covered(found, truth):
    """The share of intervals that hold the truth."""
    return np.mean([interval.low <= truth <= interval.high for interval in found])


def of_datasets(draw, seed, datasets=DATASETS):
    """The intervals of many simulated datasets; one call draws the same rows from all of them."""
    generator = np.random.default_rng(seed)
    return intervals({str(index): draw(generator) for index in range(datasets)}).values()


def scores_between(generator, rows):
    """A token F1: many rows all wrong or all right, the others anywhere between. Its mean is 0.5."""
    kind, value = generator.random(rows), generator.random(rows)
    return np.where(kind < 0.3, 0.0, np.where(kind < 0.6, 1.0, value))


@pytest.mark.parametrize("rows", [20, 100])
def test_intervals_of_a_mean_cover(rows):
    found = of_datasets(lambda generator: mean(scores_between(generator, rows)), 1)
    assert 0.93 <= covered(found, 0.5) <= 0.97
    assert {interval.method for interval in found} == {"bootstrap"}


def test_intervals_of_a_loss_cover():
    """A ratio of sums: rows with more tokens count more. The mean of exp(N(0, 0.3)) is exp(0.045)."""

    def draw(generator):
        tokens = generator.integers(5, 60, 100)
        return loss(generator.lognormal(0, 0.3, 100) * tokens, tokens)

    assert 0.93 <= covered(of_datasets(draw, 2), math.exp(0.045)) <= 0.97


def test_intervals_of_corpus_bleu_cover():
    def rows(generator, count):
        lengths = generator.integers(8, 30, count)
        quality = generator.beta(4, 2, count)
        totals = np.stack([lengths - order for order in range(4)], axis=1)
        matches = generator.binomial(totals, quality[:, None] ** np.arange(1, 5))
        return np.concatenate([np.stack([lengths, lengths + 1], axis=1), matches, totals], axis=1).astype(float)

    truth = float(pooled_bleu(rows(np.random.default_rng(3), 1_000_000).sum(0)))
    found = of_datasets(lambda generator: Measure(rows(generator, 80), pooled_bleu, "points"), 3, 400)
    assert 0.93 <= covered(found, truth) <= 0.97


@pytest.mark.parametrize(("rows", "share"), [(20, 0.5), (50, 0.9), (200, 0.97), (200, 0.3)])
def test_intervals_of_shares_cover_near_the_ends_too(rows, share):
    found = of_datasets(lambda generator: mean((generator.random(rows) < share).astype(float)), 4)
    assert 0.93 <= covered(found, share) <= 0.98
    assert {interval.method for interval in found} == {"wilson"}


def of_pairs(draw, seed, datasets=DATASETS):
    generator = np.random.default_rng(seed)
    pairs = {str(index): draw(generator) for index in range(datasets)}
    return compare({name: one for name, (one, _) in pairs.items()}, {name: other for name, (_, other) in pairs.items()})


@pytest.mark.parametrize("rows", [20, 100])
def test_paired_differences_cover(rows):
    """Skewed differences of losses on rows whose difficulty both models share. The true difference is -0.2."""

    def draw(generator):
        hard = generator.lognormal(0, 1, rows)
        other = hard - 0.3 + 0.1 * generator.exponential(1, rows)
        return mean(hard, "nats", False), mean(other, "nats", False)

    found = of_pairs(draw, 5).values()
    assert 0.92 <= covered([one.interval for one in found], -0.2) <= 0.97


def test_paired_differences_of_shares_cover_and_find_nothing_where_nothing_is():
    def draw(generator):
        both, one, other = generator.random((3, 60))
        right = both < 0.6
        return mean((right ^ (one < 0.1)).astype(float)), mean((right ^ (other < 0.1)).astype(float))

    found = of_pairs(draw, 6).values()
    assert 0.94 <= covered([one.interval for one in found], 0.0) <= 0.98
    assert np.mean([one.verdict == "cannot tell" for one in found]) == covered([one.interval for one in found], 0.0)


def test_wilson_and_bonett_price_are_those_of_the_papers():
    """Wilson at 0 of 10 is z^2 / (n + z^2); Bonett and Price worked out by hand for 8 against 2 of 50."""
    assert (wilson(0, 10).low, wilson(0, 10).high) == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert (wilson(10, 10).low, wilson(10, 10).high) == (pytest.approx(0.72247, abs=1e-5), 1.0)
    found = wilson(81, 263)  # an example of Newcombe (1998, Statistics in Medicine 17:857)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    interval, error = bonett_price(8, 2, 50)
    assert error == pytest.approx(math.sqrt((12 / 52 - (6 / 52) ** 2) / 52))
    assert interval.low == pytest.approx(6 / 52 - 1.959964 * error, abs=1e-6)


def test_all_right_has_an_interval_with_width():
    (found,) = intervals({"exact-match": mean(np.ones(20))}).values()
    assert found.low == pytest.approx(0.8389, abs=1e-4)
    comparison = compare({"x": mean(np.ones(20))}, {"x": mean(np.ones(20))})["x"]
    assert (comparison.difference, comparison.verdict, comparison.rows_needed) == (0.0, "cannot tell", None)
    assert comparison.interval.low < 0 < comparison.interval.high
    (same,) = intervals({"token-f1": mean(np.full(20, 0.5))}).values()
    assert (same.method, same.low < 0.4) == ("wilson", True)


def test_a_bootstrap_of_the_mean_is_students_interval():
    generator = np.random.default_rng(8)
    one, other = generator.normal(1, 1, (2, 40))
    found = compare({"loss": mean(one, "nats", False)}, {"loss": mean(other, "nats", False)})["loss"]
    expected = ttest_rel(other, one).confidence_interval()
    width = expected.high - expected.low
    assert found.interval.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.interval.high == pytest.approx(expected.high, abs=0.05 * width)


def test_pairing_sees_what_two_intervals_hide():
    generator = np.random.default_rng(9)
    hard, tokens = generator.lognormal(1, 1, 100), np.full(100, 10)
    base, adapter = (
        {"loss": loss(hard * 10, tokens)},
        {"loss": loss((hard - 0.05) * 10 + generator.normal(0, 1, 100), tokens)},
    )
    (one,), (other,) = intervals(base).values(), intervals(adapter).values()
    assert one.low < other.high
    assert compare(base, adapter)["loss"].verdict == "better"
    assert compare(adapter, base)["loss"].verdict == "worse"


def test_the_verdict_knows_which_way_is_better():
    low, high = np.arange(30) / 100, np.arange(30) / 100 + 0.5 + np.arange(30) % 3 / 10
    verdicts = [
        compare({"x": mean(low, "ratio", higher)}, {"x": mean(high, "ratio", higher)})["x"].verdict
        for higher in (True, False, None)
    ]
    assert verdicts == ["better", "worse", "higher"]
    assert compare({"x": mean(high, "ratio", None)}, {"x": mean(low, "ratio", None)})["x"].verdict == "lower"


def test_five_rows_or_no_variation_tell_nothing():
    nats = np.arange(5.0)
    five = compare({"loss": mean(nats, "nats", False)}, {"loss": mean(nats - 1 - nats / 9, "nats", False)})["loss"]
    assert (five.interval, five.verdict, five.rows_needed) == (None, "cannot tell", None)
    alike = np.arange(50.0)
    same = compare({"loss": mean(alike, "nats", False)}, {"loss": mean(alike, "nats", False)})["loss"]
    assert (same.interval, same.verdict) == (None, "cannot tell")
    assert intervals({"bleu": Measure(np.zeros((0, 10)), pooled_bleu, "points")}) == {"bleu": None}


def test_as_many_rows_as_said_show_the_difference():
    """Four times in five, an evaluation of `rows_needed` rows sees a difference as large as the one observed."""
    generator = np.random.default_rng(10)
    one, other = generator.normal(0, 1, 400), generator.normal(0.2, 1, 400)
    seen = compare({"x": mean(one, "nats")}, {"x": mean(other, "nats")})["x"]
    spread, rows = float(np.std(other - one)), seen.rows_needed
    assert rows == pytest.approx(((1.96 + 0.842) * spread / seen.difference) ** 2, rel=0.05)

    def draw(generator):
        return mean(np.zeros(rows), "nats"), mean(generator.normal(seen.difference, spread, rows), "nats")

    again = of_pairs(draw, 11, 500)
    assert np.mean([found.verdict == "better" for found in again.values()]) == pytest.approx(0.8, abs=0.05)


def test_the_same_seed_gives_the_same_interval():
    scores = row_scores(["token-f1", "bleu", "chrf"], ["a b c d e", "x y", "c"] * 9, ["a b c d f", "x", "c"] * 9)
    assert intervals(scores, 3) == intervals(scores, 3)
    assert intervals(scores, 3) != intervals(scores, 4)
    found = intervals(scores, 3)
    assert all(found[name].low < scores[name].value < found[name].high for name in scores)


def test_rows_without_a_score_do_not_count():
    values = np.array([np.nan, 1.0, 0.0, np.nan] * 10)
    (found,) = intervals({"x": mean(values)}).values()
    assert (found.low, found.high) == (wilson(10, 20).low, wilson(10, 20).high)
    assert compare({"x": mean(values)}, {"x": mean(values)})["x"].rows == 20


def test_perplexity_is_that_of_the_same_rows_as_the_loss():
    nats, tokens = np.random.default_rng(12).gamma(5, 2, 60), np.full(60, 7)
    found = intervals({"loss": loss(nats, tokens), "perplexity": perplexity(nats, tokens)})
    assert math.log(found["perplexity"].low) == pytest.approx(found["loss"].low, rel=1e-3)


def test_twenty_thousand_rows_take_little_memory_and_time():
    values = np.random.default_rng(13).random(20_000)
    (found,) = intervals({"x": mean(values)}).values()
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(20_000), rel=0.1)
