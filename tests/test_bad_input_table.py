"""What can be wrong with the input, and the tests that give it to the command line.

One line for each kind of bad input: the name of a test wherever it stands, with a piece of the case
in brackets where it has many. The first test of every line goes through the command line.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path

import command
import pytest

HERE = Path(__file__).parent
WAYS = ("conceptzap", "refused")
FILE, FOREIGN = "test_a_bad_erasure_file", "test_an_erasure_that_does_not_belong"
BASE, POLICY = "test_a_broken_checkpoint", "test_a_policy_without_its_base_or_its_file_draws_nothing"
ERASE, GENERATE = "test_what_erase_refuses", "test_what_generate_refuses"
OTHERS = "test_what_other_commands_refuse"
NOT_FINITE = "test_latents_that_are_not_finite_are_refused"
STOPPED = "test_stopped_and_taken_up_it_makes_the_same_bytes"

TABLE = {
    "missing file, folder instead of a file, file instead of a folder": (
        f"{FILE}[nowhere]", f"{FILE}[a folder]", f"{ERASE}[did you mean base]",
        f"{GENERATE}[is not a folder]", f"{GENERATE}[did you mean]",
    ),
    "pickle by any name": (
        f"{FILE}[pickle]", *(f"{FILE}[weights.{x}]" for x in ("ckpt", "pt", "pth", "pkl")),
        *(f"{ERASE}[weights.{x} is a pickle]" for x in ("ckpt", "pt", "bin")),
    ),
    "zip, picture, web page, LFS pointer, GGUF, empty": tuple(
        f"{FILE}[{x}]" for x in ("zip", "picture", "page", "pointer", "gguf", "empty")
    ),
    "truncated or flipped": (
        f"{FILE}[truncated]", f"{FILE}[flipped]", f"{FILE}[longer]",
        "test_every_flipped_bit_is_refused_without_torch",
        "test_every_truncation_and_extension_is_refused",
    ),
    "header: overflow, huge, duplicate keys, overlap": tuple(
        f"{FILE}[{x}]" for x in ("overflow", "huge", "twice", "overlap")
    ),
    "NaN in an erasure": (f"{FILE}[nan]",),
    "NaN in a base": (f"{BASE}[NaN or infinity]",),
    "a base that lacks weights": (f"{BASE}[conv_in.bias]",),
    "a base in pickles only": (f"{BASE}[pickled]",),
    "another architecture": (f"{FOREIGN}[another architecture]", f"{GENERATE}[architecture]"),
    "another checkpoint of the architecture": (
        f"{FOREIGN}[another checkpoint]", "test_another_checkpoint_is_warned_of_and_recorded",
        POLICY,
    ),
    "another text encoder or tokenizer": (
        f"{BASE}[40 numbers]", f"{BASE}[49408 tokens]", f"{BASE}[has no vocabulary]",
        "test_another_text_encoder_of_the_same_sizes_is_another_checkpoint",
    ),
    "unknown format version": (f"{FILE}[version]",),
    "malformed model_index.json or config.json": (
        f"{BASE}[model_index.json]", f"{BASE}[bad config]", f"{BASE}[scheduler_config.json]",
        f"{BASE}[bad tokenizer]",
    ),
    "paths in names and tensors": (
        "test_no_name_leads_out_of_the_folder", f"{FILE}[traversal]",
        f"{OTHERS}[../secrets]", f"{OTHERS}[escaping.lock]",
        "test_every_slug_is_a_safe_name",
    ),
    "full disk": (
        "test_a_disk_that_takes_nothing", "test_a_disk_that_fills_up_after_the_first_look",
    ),
    "read-only folder or disk": (
        "test_a_read_only_folder_is_noticed_before_any_work", "test_a_disk_that_takes_nothing",
    ),
    "killed while writing": (
        "test_killed_while_it_writes_nothing_is_torn_and_the_next_run_sweeps",
        "test_killed_at_random", "test_killed_at_every_stage",
    ),
    "Ctrl-C in training": (
        f"{STOPPED}[SIGINT]", "test_a_second_signal_ends_it_at_once_with_its_checkpoints_whole",
    ),
    "SIGTERM in training": (f"{STOPPED}[SIGTERM]",),
    "resuming after a crash, or with another config": (
        "test_killed_it_goes_on_to_the_same_bytes", STOPPED,
        "test_a_damaged_checkpoint_is_passed_over_for_the_one_before",
        "test_a_killed_training_goes_on_to_the_same_bits",
    ),
    "out of memory": (
        "test_out_of_memory", "test_a_training_out_of_memory_says_the_sizes",
    ),
    "several writers": (
        "test_of_several_writers_one_wins_and_the_others_are_told",
        "test_a_second_run_of_the_same_name_is_told_of_the_first", "test_two_writers_and_a_reader",
    ),
    "concept empty or without a letter": (f"{ERASE}[is empty]",),
    "concept not in the vocabulary": (f"{ERASE}[does not know 'кошка']",),
    "concept that the base cannot draw": (
        "test_a_concept_that_the_base_hardly_draws_is_warned_of",
        "test_a_concept_that_no_judge_knows_is_warned_of",
    ),
    "concept or prompt too long": (
        f"{ERASE}[tokens long]", "test_a_prompt_that_is_too_long_says_what_is_left_out",
    ),
    "empty prompt": ("test_the_empty_prompt_is_drawn_and_noted",),
    "invisible, bidirectional, composed and look-alike characters": (
        rf"{ERASE}[\u200b\u202e]", f"{ERASE}[cafe\u0301]", f"{ERASE}[c\u0430t]",
        "test_names_from_files_cannot_draw_on_the_terminal",
    ),
    "sizes out of range, asked for and a checkpoint's own": (
        f"{GENERATE}[--height]", f"{GENERATE}[--width]",
        *(f"{BASE}[size {x}]" for x in ("0", "-8", "1048576", "[8, 0]")),
    ),
    "steps out of range": (
        f"{GENERATE}[1001]", f"{GENERATE}[--steps]", f"{ERASE}[--steps]",
    ),
    "guidance out of range or NaN": tuple(
        f"{GENERATE}[{x}]" for x in ("--guidance", "'nan'", "'inf'", "'51'")
    ),
    "seeds negative, too large, fractions, words": (
        *(f"{GENERATE}[{x}]" for x in ("--seed", 2**63, 2**64, "1.5", "true")),
        f"{ERASE}[--seed]", f"{OTHERS}[--seed]",
    ),
    "no pictures, no prompts": (f"{GENERATE}[--count]", f"{GENERATE}[prompts.txt]"),
    "device that is not there": (
        f"{GENERATE}[no cuda:99]", f"{GENERATE}[is no device]", f"{ERASE}[no cuda:99]",
    ),
    "half precision on a CPU; latents and pictures that are not finite": (
        f"{BASE}[the latents are not finite]", f"{BASE}[the decoded pictures are not finite]",
        "test_half_precision_on_a_cpu_is_full_precision", NOT_FINITE,
    ),
    "loss NaN": ("test_a_training_that_diverges_writes_no_erasure",),
    "the same erasure or concept twice": (
        f"{GENERATE}[at the strengths]", "test_the_same_file_twice_counts_once",
        "test_the_same_concept_twice_is_allowed_with_a_warning",
    ),
    "too many erasures at once": (f"{GENERATE}[1100 learned tokens]",),
    "policy that names an absent file": (POLICY,),
    "hook lost after loading": (
        "test_any_single_hook_lost_leaves_no_picture",
        "test_a_hook_lost_after_the_self_test_leaves_no_picture",
        "test_any_single_hook_switched_off_is_refused",
    ),
    "config file: unknown key, wrong type, YAML tag": tuple(
        f"{ERASE}[{x}]" for x in ("unknown.toml", "kind.toml", "torn.toml", "tagged.yaml")
    ),
    "lists of prompts: byte order mark, line ends, not UTF-8; cells that are formulas": (
        "test_prompt_files_of_other_systems", "test_no_written_cell_is_a_formula",
        f"{ERASE}[latin.txt]", f"{GENERATE}[cannot read nowhere.txt]",
    ),
    "closed streams and pipes": (
        "test_a_pipe_that_closes_is_no_error", "test_closed_streams_do_no_harm",
    ),
    "no home, no terminal, C locale, odd file names": (
        "test_any_name_without_home_locale_or_terminal",
    ),
    "no network": (
        "test_without_a_network_a_hub_name_is_one_line", f"{GENERATE}[the hub cannot be reached]",
    ),
    "code in a model folder": (
        f"{BASE}[my_code.MyUNet]", "test_code_named_in_configs_is_not_run",
    ),
    "modules that the base does not have": (f"{FOREIGN}[has no module]",),
}  # fmt: skip


@cache
def functions() -> dict[str, list[str]]:
    """Every test function of this folder -> the modules that have one of that name."""
    found: dict[str, list[str]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append(path.stem)
    return found


def cases(function: object) -> list[str]:
    """What its parametrizations hand a test, each case as text."""
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    return [
        f"{value} {value!r}"
        for mark in marks
        for value in (*mark.args[1], *(mark.kwargs.get("ids") or ()))
    ]


def has(module: str, name: str, case: str, by_command_line: bool) -> bool:
    """Whether that module's test has such a case, and a way to the command line if one is asked for."""
    loaded = vars(importlib.import_module(module))
    ways = (command.conceptzap, command.refused)
    through = "program" in loaded or any(value in ways for value in map(loaded.get, WAYS))
    found = not case or any(case in text for text in cases(loaded[name]))
    return found and (through or not by_command_line)


@pytest.mark.parametrize("kind", TABLE)
def test_every_kind_of_bad_input_has_its_tests(kind: str) -> None:
    for number, wanted in enumerate(TABLE[kind]):
        name, _, case = wanted.partition("[")
        modules = functions().get(name, [])
        case = case.removesuffix("]")
        assert any(has(module, name, case, by_command_line=not number) for module in modules), wanted


def test_the_index_can_fail() -> None:
    assert has("test_cli_bad_input", ERASE, "is empty", by_command_line=True)
    assert not has("test_cli_bad_input", ERASE, "is full", by_command_line=True)
    assert not has("test_sampler", NOT_FINITE, "", by_command_line=True)


def test_the_table_is_whole() -> None:
    assert len(TABLE) == 48 and all(TABLE.values())
