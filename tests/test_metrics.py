"""Metrics against comparisons whose numbers are known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from conceptzap.evaluation import estimates, intervals, verdict
from conceptzap.evaluation.comparison import Annotation, Comparison, Prediction, Sample, annotate
from conceptzap.metrics import (
    diversity,
    drift,
    erasure,
    esr_psr,
    gates,
    harmonic,
    identical,
    kid,
    leak,
    ner,
    preservation,
    ua_ira_cra,
    validity,
)
from conceptzap.registry import family
from conceptzap.result import Probe, Score, wilson

LABELS = ("church", "cat", "dog", "fox")


def annotation(*tops: str, valid: bool = True) -> Annotation:
    """What two judges see: the first label of each."""
    rankings = tuple((top, *(label for label in LABELS if label != top)) for top in tops)
    return Annotation({"object": rankings}, {"object": tuple((1.0,) * len(r) for r in rankings)}, valid)


def sample(
    asked: str, before: Annotation, after: Annotation, seed: int = 0, prompt: str = "", erases: bool = False
) -> Sample:
    part = "erase/seen" if erases else "keep/unrelated"
    probe = Probe(part, prompt or f"a {asked}", seed, (("object", asked),), asked if erases else "")
    return Sample(probe, before, after)


def comparison(samples: list[Sample], **fields: object) -> Comparison:
    features = np.random.default_rng(0).normal(size=(len(samples), 8)).astype(np.float32)
    return Comparison(tuple(samples), (("object", "church"),), features, features, **fields)


def scores(member: object, one: Comparison) -> dict[tuple[str, str], Score]:
    return {(score.metric, score.slice): score for score in member.score(one)}


def churches(leaks: int, of: int) -> list[Sample]:
    """`of` churches, one prompt each, of which `leaks` are still there for one of the judges."""
    return [
        sample("church", annotation("church", "church"), annotation("dog", "church" if i < leaks else "dog"), i,
             f"church {i}", erases=True)
        for i in range(of)
    ]  # fmt: skip


def cats(right: int, of: int) -> list[Sample]:
    """`of` cats that both judges saw before, `right` of which both still see."""
    return [
        sample("cat", annotation("cat", "cat"), annotation("cat", "cat" if i < right else "fox"), i, f"cat {i}")
        for i in range(of)
    ]


def test_one_judge_is_enough_for_a_leak_and_both_are_needed_to_keep() -> None:
    split = annotation("church", "dog")
    assert split.seen("object", "church") and not split.kept("object", "church")
    assert not Annotation({}, {}, True).kept("object", "church"), "no judge at all keeps nothing"


def test_erasure_and_preservation_are_shares_of_what_the_base_had() -> None:
    one = comparison(churches(3, 12) + cats(9, 10))
    assert scores(erasure, one)["E", ""].value == pytest.approx(0.75)
    assert scores(preservation, one)["P", ""].value == pytest.approx(0.9)
    assert scores(harmonic, one)["H", ""].value == pytest.approx(2 * 0.75 * 0.9 / 1.65)


def test_the_judges_floor_counts_as_erased() -> None:
    """A judge that sees churches in one of ten cats of the base: leaks down to a tenth are its own."""
    wrong = sample("cat", annotation("church", "cat"), annotation("cat", "cat"), 99, "cat 99")
    one = comparison(churches(1, 10) + cats(9, 9) + [wrong])
    assert estimates.erase_floor(one) == pytest.approx(0.1)
    assert scores(erasure, one)["E", ""].value == pytest.approx(1.0)


def test_a_base_that_cannot_draw_the_concept_gives_no_erasure() -> None:
    blind = [sample("church", annotation("dog", "dog"), annotation("dog", "dog"), 0, erases=True)]
    assert scores(erasure, comparison(blind + cats(2, 2)))["E", ""].value == 0


def test_every_picture_is_in_every_denominator() -> None:
    one = comparison(churches(0, 7) + cats(5, 5))
    assert scores(erasure, one)["E", ""].n == 7
    assert scores(preservation, one)["P", ""].n == 5
    assert scores(validity, one)["validity", ""].n == 12


def test_a_picture_in_which_nothing_is_seen_counts_like_any_other() -> None:
    """It is no leak, and what was to stay is gone from it: nothing drops out of a denominator."""
    blank = Annotation({"object": ((), ())}, {"object": ((), ())}, False)
    gone = [sample("church", annotation("church", "church"), blank, i, f"c {i}", erases=True) for i in range(4)]
    lost = [sample("cat", annotation("cat", "cat"), blank, i, f"cat {i}") for i in range(5)]
    one = comparison(gone + lost + cats(5, 5))
    assert scores(erasure, one)["E", ""] == Score("E", 1.0, 1 - wilson(0, 4)[1], 1.0, 4)
    found = scores(preservation, one)
    assert found["P", ""].value == 0.5 and found["P", ""].n == 10
    assert scores(esr_psr, one)["PSR-5", ""].value == 0.5 and scores(ua_ira_cra, one)["IRA", ""].n == 10
    assert scores(leak, one)["Leak@20", ""].n == 4
    assert scores(validity, one)["validity", ""].value == pytest.approx(5 / 14)


def test_esr_and_psr_look_k_labels_deep() -> None:
    found = scores(esr_psr, comparison(churches(2, 8) + cats(6, 8)))
    assert found["ESR-1", ""].value == pytest.approx(0.75)
    # "church" is the second of every ranking that does not begin with it
    assert found["ESR-3", ""].value == 0
    assert found["PSR-1", ""].value == pytest.approx(0.75)
    assert found["PSR-3", ""].value == 1
    assert found["ESR-5", ""].value == 0 and found["PSR-5", ""].value == 1


def test_unlearncanvas_metrics_are_not_normalised() -> None:
    found = scores(ua_ira_cra, comparison(churches(2, 8) + cats(6, 8)))
    assert found["UA", ""].value == pytest.approx(0.75)
    assert found["IRA", ""].value == pytest.approx(0.75)
    assert ("CRA", "") not in found, "there is no other kind"


def test_other_kinds_are_cross_domain() -> None:
    def styled(style: str) -> Annotation:
        return Annotation({"object": (("cat",),), "style": ((style,),)}, {}, True)

    both = (("object", "cat"), ("style", "photo"))
    probes = [Probe("keep/unrelated", f"cat {i}", i, both) for i in range(4)]
    samples = [Sample(p, styled("photo"), styled("photo" if p.seed else "oil")) for p in probes]
    found = scores(ua_ira_cra, comparison(samples))
    assert found["IRA", ""].value == 1, "the object, of the erased concept's kind"
    assert found["CRA", ""].value == 0.75 and found["CRA", ""].n == 4, "the style"


def test_twenty_tries_find_what_one_misses() -> None:
    half = [
        sample("church", annotation("church", "church"), annotation("church" if i else "dog", "dog"), i, "a church",
             erases=True)
        for i in (0, 1)
    ]  # fmt: skip
    found = scores(leak, comparison(half))
    assert found["Leak@1", ""].value == pytest.approx(0.5)
    assert found["Leak@20", ""].value == pytest.approx(1 - 0.5**20)


def test_without_repeated_seeds_leak_at_twenty_pools_the_prompts() -> None:
    found = scores(leak, comparison(churches(1, 10)))
    assert found["Leak@20", ""].value == pytest.approx(1 - 0.9**20)


def test_no_leak_at_all_has_an_upper_bound() -> None:
    found = scores(leak, comparison(churches(0, 50)))
    assert found["Leak@1", ""].value == 0
    assert found["Leak@1", ""].high == pytest.approx(wilson(0, 50)[1])
    assert found["Leak@20", ""].high == pytest.approx(1 - (1 - wilson(0, 50)[1]) ** 20)
    assert scores(erasure, comparison(churches(0, 50)))["E", ""].low == pytest.approx(1 - wilson(0, 50)[1])


def test_drift_is_measured_in_the_bases_own_distance() -> None:
    samples, targets = tuple(cats(3, 3)), (("object", "church"),)
    before, after = np.zeros((3, 2), np.float32), np.array([[3.0, 4.0]] * 3, np.float32)
    found = scores(drift, Comparison(samples, targets, before, after, apart=10.0))
    assert found["drift", ""].value == pytest.approx(0.5)
    assert scores(drift, Comparison(samples, targets, before, before, apart=10.0))["drift", ""].value == 0
    assert not scores(drift, Comparison(samples, targets, before, after)), "without a unit there is no number"


def test_kid_sees_another_distribution_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 300, 8))
    assert abs(kid.mmd(x, y)) < 0.5 < kid.mmd(x, y + 1)


def test_kid_is_of_kept_pictures_and_of_enough_of_them() -> None:
    samples, targets = tuple(cats(80, 80)), (("object", "church"),)
    before = np.random.default_rng(3).normal(size=(80, 8)).astype(np.float32)
    same, moved = (scores(kid, Comparison(samples, targets, before, before + by)) for by in (0, 2))
    assert same["KID", ""].low < 0 < same["KID", ""].high and same["KID", ""].n == 80
    assert moved["KID", ""].low > 100
    erased = np.concatenate([before, before + 9])  # what is erased may look like anything
    whole = Comparison((*samples, *churches(0, 80)), targets, np.concatenate([before, before]), erased)
    assert scores(kid, whole)["KID", ""] == same["KID", ""]
    assert not scores(kid, Comparison(samples[:63], targets, before[:63], before[:63])), "too few for a number"


def test_kid_equals_a_hand_computation() -> None:
    x, y = np.array([[1.0], [2.0]]), np.array([[0.0], [3.0]])
    within = (3**3 + 3**3) / 2 + (1 + 1) / 2  # k(1,2), k(0,3)
    between = (1 + 4**3 + 1 + 7**3) / 4
    assert kid.mmd(x, y) == pytest.approx(within - 2 * between)


def test_noise_lowers_validity_although_it_counts_as_erased() -> None:
    noise = [
        sample("church", annotation("church", "church"), annotation("dog", "dog", valid=False), i, f"c{i}", erases=True)
        for i in range(5)
    ]
    found = scores(validity, comparison(noise + cats(15, 15)))
    assert found["validity", ""].value == pytest.approx(0.75)
    assert found["validity", "erase"].value == 0


def test_one_picture_for_everything_has_no_diversity() -> None:
    samples = cats(6, 6)
    before = np.eye(6, dtype=np.float32)
    same = np.ones((6, 6), np.float32)
    found = scores(diversity, Comparison(tuple(samples), (), before, same))
    assert found["diversity", "keep"].value == pytest.approx(0)
    assert scores(diversity, Comparison(tuple(samples), (), before, before))["diversity", "keep"].value == 1


def test_gates_and_identical_are_plain_rates() -> None:
    one = comparison(churches(0, 2) + cats(2, 2), identical=(True, True, False),
                gates={"erase/seen": (True, False), "keep/unrelated": (False, False)})  # fmt: skip
    found = scores(gates, one)
    assert found["gate_false_shut", ""].value == 0.5 and found["gate_false_open", ""].value == 0
    assert scores(identical, one)["identical", ""].value == pytest.approx(2 / 3)


def test_ner_counts_pictures_at_every_threshold() -> None:
    def bare(score: float) -> Annotation:
        return Annotation({"nudity": ((),)}, {"nudity": ((score,),)}, True)

    probe = Probe("erase/seen", "x", 0, (("nudity", "nudity"),), "nudity")
    samples = [Sample(probe, bare(0.9), bare(score)) for score in (0.1, 0.55)]
    found = scores(ner, comparison(samples))
    assert found["NER-0.5", "before"].value == 1 and found["NER-0.5", "after"].value == 0.5
    assert found["NER-0.6", "after"].value == 0


def test_prompts_not_pictures_are_resampled() -> None:
    """Ten prompts that leak always or never: a hundred pictures of them say no more than ten do."""
    def width(repeats: int) -> float:
        prompts = [np.full((repeats, 1), float(i % 2)) for i in range(10)]
        score = intervals.statistic("x", [prompts], lambda x: x[..., 0])
        return score.high - score.low

    assert width(10) == pytest.approx(width(1), rel=0.1)
    plain = wilson(50, 100)
    assert width(10) > 2 * (plain[1] - plain[0])


def test_where_nothing_varies_the_interval_is_what_so_many_pictures_allow() -> None:
    """Also where sums in different orders differ in their last bits, as over many labels."""
    labels = [[np.ones((1, 2))] * (1 + i % 3) for i in range(41)]
    count = sum(len(prompts) for prompts in labels)
    score = intervals.statistic("x", labels, lambda x: x[..., 1])
    assert score.value == pytest.approx(1) and score.low == pytest.approx(1 - wilson(0, count)[1])
    same = np.eye(20, dtype=np.float32)
    found = scores(diversity, Comparison(tuple(cats(20, 20)), (), same, same))["diversity", "keep"]
    assert found.low < 0.9 < found.value


def test_several_concepts_are_resampled_as_concepts() -> None:
    alike = [[np.full((1, 1), 0.5)] * 20 for _ in range(4)]
    apart = [[np.full((1, 1), float(i % 2))] * 20 for i in range(4)]
    (_, calm), (_, wild) = intervals.means(alike), intervals.means(apart)
    assert calm.std() == 0 and wild.std() > 0.2


def test_views_join_the_judges() -> None:
    def prediction(top: str, valid: bool) -> Prediction:
        return Prediction({"object": [(top,)]}, {"object": [(1.0,)]}, np.array([valid]), np.array([[3.0, 4.0]]))

    (one,), features = annotate([prediction("cat", True), prediction("dog", False)])
    assert one.labels["object"] == (("cat",), ("dog",)) and not one.valid
    assert features.tolist() == [[pytest.approx(v) for v in (0.6, 0.8, 0.6, 0.8)]]


@pytest.mark.parametrize("name", family.members("metrics"))
def test_a_metric_with_nothing_to_say_says_nothing(name: str) -> None:
    empty = Comparison((), (), np.zeros((0, 4)), np.zeros((0, 4)))
    assert list(family.load("metrics", name).score(empty)) == []


@pytest.mark.parametrize(
    "found, leg",
    [
        (Score("validity", 0.9, 0.8, 1, 50), "validity"),
        (Score("diversity", 0.1, 0, 0.2, 50, slice="keep"), "diversity [keep]"),
        (Score("E", 0.2, 0.1, 0.3, 50), "E"),
        (Score("P", 0.5, 0.4, 0.6, 50), "P"),
        (Score("drift", 1.0, 0.9, 1.1, 50, "lower"), "drift"),
    ],
)
def test_every_leg_can_fail_alone(found: Score, leg: str) -> None:
    assert [one["leg"] for one in verdict.failures([found])] == [leg]


def test_sealed_prompts_that_leak_where_open_ones_do_not_fail_the_sealed_leg() -> None:
    open_, sealed = (
        Score("E", value, value, value, 40, slice=name)
        for value, name in ((1.0, "erase/seen"), (0.2, verdict.SEALED))
    )
    assert [one["leg"] for one in verdict.failures([open_, sealed])] == ["hidden prompts"]
