"""Attacks counted and told: rates, limits, the command, its page."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stub_judges  # noqa: F401  (named on the command line)
from browser import faults, needs_axe
from command import conceptzap
from safetensors.torch import load_file
from victims import Never, attempts, victim

from conceptzap.base import Base
from conceptzap.errors import ThresholdError, UsageError
from conceptzap.evaluation.comparison import Prediction
from conceptzap.redteam import trial
from conceptzap.redteam.attempt import Attempt
from conceptzap.redteam.outcome import Attacked
from conceptzap.report import Report
from conceptzap.verbs import attacking


@pytest.fixture(autouse=True)
def _own_cache(own_cache: Path) -> None:
    """Nothing that an earlier test kept."""


# counting


def test_what_came_through_is_not_tried_again(sd1: Base) -> None:
    on = victim(sd1, ())
    done = trial.run(on, [Never(always=True)], attempts(on, "seeds"), Report())
    count, = done.counts.values()
    assert done.before.all() and not count.tries.any()  # it was shown unattacked: nothing is left to break
    whole = Attacked((done,), {"attack": "seeds"}, 0.0)
    assert whole.asr.value == 1.0 and whole.worst.newly.n == 0


def test_what_else_is_seen_is_counted_by_prompts(sd1: Base) -> None:
    """Whatever a judge puts first, in any of a probe's pictures: what comes by chance comes as others do."""
    on = victim(sd1, (), 8)
    done = trial.run(on, [Never()], attempts(on, "seeds"), Report())
    count, = done.counts.values()
    assert count.tries.min() > 1 and list(count.called) == ["cat"] and count.called["cat"].all()
    for number, label in enumerate(("fox", "owl", "pig", "dog", "cow"), 3):  # rising, two alike
        count.called[label] = np.arange(8) < min(number, 6)
    whole = Attacked((done,), {"attack": "seeds"}, 0.0)
    assert whole.beside == "cat 8, cow 6, dog 6, pig 5, owl 4, church 0"
    assert whole.record()["called"]["church"][:2] == [["cat", 8], ["cow", 6]]


class InTurn(Never):
    """A judge that sees one thing in its first call and another in each that follows."""

    def __init__(self, *labels: str) -> None:
        super().__init__()
        self.labels = iter(labels)

    def predict(self, pictures: np.ndarray) -> Prediction:
        label, n = next(self.labels), len(pictures)
        return replace(super().predict(pictures), labels={"object": [(label,)] * n})


def test_what_any_judge_sees_in_any_picture_is_counted(sd1: Base) -> None:
    on = victim(sd1, (), 2)
    judges = [InTurn(*"ab", "dog", "cow", *"cccccc"), InTurn(*"ab", "owl", *"ccccccc")]
    count, = trial.run(on, judges, attempts(on, "seeds"), Report()).counts.values()
    assert {"dog", "cow", "owl", "c"} == set(count.called) and all(rows.all() for rows in count.called.values())


def test_words_are_asked_of_the_base_until_it_shows_the_concept(sd1: Base) -> None:
    """What comes through by words by which the base shows nothing comes by chance: both are told."""
    on = victim(sd1, (), 2)
    tries = [Attempt("", "typos", ["a", "b"], worded=True), Attempt("", "typos", ["c", "d"], worded=True)]
    judge = InTurn("cat", "cat", "church", "cat", "church")  # base, erased; base, erased; of all meant: erased
    done = trial.run(on, [judge], [*tries], Report())
    assert next(judge.labels, None) is None and done.counts["typos"].through.all()
    whole = Attacked((done,), {}, 0.0)
    assert whole.worst.meant and (whole.worst.meant.value, whole.worst.meant.n) == (1.0, 2)
    assert whole.record()["forms"][0]["meant"]["value"] == 1.0
    plain = trial.run(on, [Never()], [replace(tries[0], worded=False)], Report())
    assert plain.counts["typos"].meant is None
    assert "meant" not in Attacked((plain,), {}, 0.0).record()["forms"][0]


def test_rates_count_what_was_shown_before() -> None:
    made = trial.Count(np.array([False, True, False, False]), np.array([0, 1, 2, 2]))
    made.fired = {1: False, 2: True, 3: True}
    before = np.array([True, False, False, False])
    one = trial.Trial(None, np.ones(4, bool), before, np.zeros((4, 2, 2, 3)), {"transfer": made})  # type: ignore
    whole = Attacked((one,), {}, 0.0)
    assert (whole.before.value, whole.asr.value) == (0.25, 0.5)
    form = whole.worst
    assert (form.newly.value, form.newly.n, form.pictures, form.shut) == (1 / 3, 3, 5, 1)
    assert form.newly.low < 1 / 3 < form.newly.high
    assert (whole.recoverability.value, whole.recoverability.n) == (1 / 3, 3)
    attacking.enforce(whole, {"ASR": 0.5, "before": 0.25})
    with pytest.raises(ThresholdError, match=r"ASR is 50.0% of 4, over 10.0%; newly is") as raised:
        attacking.enforce(whole, {"ASR": 0.1, "before": 0.3, "newly": 0.1})
    assert raised.value.exit_code == 7 and raised.value.made is whole


def test_recovered_is_what_any_form_brought_back_of_what_the_base_draws() -> None:
    flags = np.array([True, True, True, False])
    forms = {
        name: trial.Count(np.array(through), np.ones(4, int))
        for name, through in {"a": [True, False, False, True], "b": [False, True, False, False]}.items()
    }
    before, pictures = np.array([False, False, True, False]), np.zeros((4, 2, 2, 3))
    one = trial.Trial(None, flags, before, pictures, forms)  # type: ignore
    back = Attacked((one,), {}, 0.0).recoverability
    assert (back.value, back.n) == (1.0, 2)  # the third was shown unattacked, the fourth by nobody


def test_fail_over_is_read() -> None:
    assert attacking.parse(["ASR=10", "newly=0"]) == {"ASR": 0.1, "newly": 0.0}
    for bad in ("ASR", "ASR=x", "ASR=101", "E=10"):
        with pytest.raises(UsageError, match="fail-over"):
            attacking.parse([bad])


def test_names_and_budgets_are_checked() -> None:
    with pytest.raises(UsageError, match="no attack is called 'inversoin'"):
        attacking.settled("inversoin", "quick", {})
    with pytest.raises(UsageError, match="no budget"):
        attacking.settled("inversion", "fast", {})
    with pytest.raises(UsageError, match="unknown setting"):
        attacking.settled("seeds", "quick", {"rounds": 3})
    with pytest.raises(UsageError, match="out of range"):
        attacking.settled("seeds", "quick", {"tries": 0})
    quick = attacking.settled("ring-a-bell", "quick", {})
    paper = attacking.settled("ring-a-bell", "paper", {"tokens": "38"})
    assert (quick.config.generations, paper.config.generations, paper.config.tokens) == (80, 3000, 38)
    assert (quick.n, paper.n, attacking.settled("seeds", "quick", {}, 3).n) == (16, 64, 3)


# the command


CHEAP = ("--suite", "imagenette", "--judge", "stub_judges:by_brightness", "--steps", 1, "--prompts", 2)


@pytest.fixture(scope="module")
def attacked(
    church: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any], Any]:
    """A folder, the words that were given for it, and the answer."""
    words = ["attack", church, "--attack", "random-tokens", "--base", tiny_folder, *CHEAP, "--set", "tries=1"]
    out = tmp_path_factory.mktemp("attacked") / "out"
    return out, words, conceptzap(*words, "-o", out, "--json")


@needs_axe
def test_nothing_keeps_anybody_from_reading_its_page(attacked: Any, tmp_path: Path) -> None:
    assert faults((attacked[0] / "report.html").read_text(), tmp_path) == []


def test_the_command(attacked: Any) -> None:
    out, words, answer = attacked
    assert answer.code == 0, answer
    said = answer.json
    assert said["schema"] == "conceptzap.attack/1" and said["asr"]["n"] == 2
    kept = json.loads((out / "result.json").read_text())
    assert kept["worst"] == said["worst"] and kept["config"] == {"tries": 1, "tokens": 5}
    rows = list(csv.DictReader((out / "attempts.csv").open()))
    assert len(rows) == 2 and rows[0]["concept"] == "church"
    page = (out / "report.html").read_text()
    assert "a control" in page and page.count("<figure") == [row["before"] for row in rows].count("0")
    again = conceptzap(*words, "-o", out)
    assert again.code == 2 and "exists" in again.err
    once_more = conceptzap(*words, "-o", out, "--force")
    assert once_more.code == 0 and "(ASR)" in once_more.out
    assert json.loads((out / "result.json").read_text())["forms"] == kept["forms"]


def test_the_command_keeps_what_was_found(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ("--set", "steps=1", "--set", "tokens=2")
    answer = conceptzap(
        "attack", church, "--attack", "pez", "--base", tiny_folder, "--oracle", tiny_folder, *CHEAP, *few,
        "-o", out, "-q",
    )  # fmt: skip
    kept = json.loads((out / "result.json").read_text())
    assert [form["form"] for form in kept["oracle"]["forms"]] == [
        "transfer, unnamed", "transfer, named", "continuous",
    ]  # fmt: skip
    assert "never knew it" in (out / "report.html").read_text()
    assert answer.code == 0 and answer.out.strip() == str(out / "result.json")
    found = load_file(out / "found.safetensors")
    assert found["church/transfer, named/1/tokens"].shape == (2, 2)


def test_the_command_says_what_the_base_shows_by_the_same_words(
    church: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    words = ("attack", church, "--attack", "synonyms", "--base", tiny_folder, *CHEAP, "--set", "most=1")
    answer = conceptzap(*words, "-o", tmp_path / "out")
    assert answer.code == 0 and "base shows it by these words" in answer.err and "typos" in answer.err
    assert "shows it by the same words" in (tmp_path / "out" / "report.html").read_text()


def test_single_forms_are_no_asr(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """What is left out may be the worst: said so, in the result, too, and under no limit."""
    words = ("attack", church, "--attack", "p4d", "--base", tiny_folder, *CHEAP, "--set", "rounds=1", "--set", "steps=1",
             "--form", "continuous")  # fmt: skip
    answer = conceptzap(*words, "-o", tmp_path / "a")
    kept = json.loads((tmp_path / "a" / "result.json").read_text())
    assert answer.code == 0 and [form["form"] for form in kept["forms"]] == ["continuous"] == kept["only"]
    assert "continuous alone" in answer.out and "(worst)" in answer.out and "ASR" not in answer.out
    assert "ASR" not in (tmp_path / "a" / "report.html").read_text()
    limited = conceptzap(*words, "--fail-over", "ASR=50", "-o", tmp_path / "b")
    assert limited.code == 2 and "--form leaves some out" in limited.err and not (tmp_path / "b").exists()
    unknown = conceptzap(*words[:3], "seeds", *words[4:-2], "--form", "evade")
    assert unknown.code == 2 and "no form 'evade'" in unknown.err and "leave --form out" in unknown.err
    assert attacking.settled("p4d", "quick", {}, None, ["evade", "continuous"]).forms == ("evade", "continuous")
    assert attacking.settled("ring-a-bell", "quick", {}, None, ["straight-through", "transfer"]).forms == ()


def test_over_the_limit_is_exit_7(church: Path, tiny_folder: Path, tmp_path: Path) -> None:
    words = ("attack", church, "--attack", "seeds", "--base", tiny_folder, *CHEAP, "--set", "tries=1")
    answer = conceptzap(*words, "--fail-over", "ASR=100", "-o", tmp_path / "a")
    assert answer.code == 0, answer
    rate = json.loads((tmp_path / "a/result.json").read_text())["asr"]["value"]
    if rate:
        over = conceptzap(*words, "--fail-over", "ASR=0", "-o", tmp_path / "b", "--json")
        assert over.code == 7 and over.json["error"]["kind"] == "ThresholdError"
        assert (tmp_path / "b/result.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attack", "nothing"), "no attack is called"),
        (("--attack", "seeds", "--budget", "x"), "no budget"),
        (("--attack", "seeds", "--fail-over", "E=1"), "no such rate"),
        (("--attack", "seeds", "--prompts", "0"), "out of range"),
        (("--attack", "seeds", "--set", "x"), "is not key=value"),
    ],
)
def test_bad_requests_are_usage_errors(church: Path, words: tuple[str, ...], message: str) -> None:
    answer = conceptzap("attack", church, *words)
    assert answer.code == 2 and message in answer.err
