"""What can be wrong with the input, and the tests that give it to the command line.

One line for each kind of bad input. Those marked "in process" need a moment that only a test inside
the program can choose.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

BAD, HOSTILE, TRAIN = "test_cli_bad_input", "test_cli_hostile", "test_cli_training"
CLI, FLOW = "test_cli", "test_cli_flow"
FILE = f"{BAD}.test_a_bad_erasure_file"
ERASE, GENERATE, OTHERS = f"{BAD}.test_erase", f"{BAD}.test_generate", f"{BAD}.test_other_commands"
BASE, FOREIGN = f"{HOSTILE}.test_a_broken_checkpoint", f"{HOSTILE}.test_an_erasure_that_does_not_belong"

TABLE = {
    "missing file, folder instead of a file": (FILE, ERASE, GENERATE),
    "pickle by any name": (FILE, ERASE),
    "zip, picture, web page, LFS pointer, GGUF, empty": (FILE,),
    "truncated or flipped": (
        FILE, "test_format_hostile.test_every_flipped_bit_is_refused_without_torch",
        "test_format_hostile.test_every_truncation_and_extension_is_refused",
    ),
    "header: overflow, huge, duplicate keys, overlap": (FILE,),
    "NaN in an erasure": (FILE,),
    "NaN in a base": (BASE,),
    "a base that lacks weights": (BASE,),
    "a base in pickles only": (BASE,),
    "another architecture": (GENERATE, FOREIGN),
    "another checkpoint of the architecture": (
        FOREIGN, f"{HOSTILE}.test_another_checkpoint_is_warned_of_and_recorded",
    ),
    "another text encoder": (BASE,),
    "unknown format version": (FILE,),
    "malformed model_index.json or config.json": (BASE,),
    "paths in names and tensors": (FILE, OTHERS, "test_naming.test_every_slug_is_a_safe_name"),
    "full disk": (f"{HOSTILE}.test_a_disk_that_takes_nothing",),
    "read-only folder or disk": (
        f"{BAD}.test_a_read_only_folder_is_noticed_before_any_work",
        f"{HOSTILE}.test_a_disk_that_takes_nothing",
    ),
    "killed while writing": (
        f"{HOSTILE}.test_killed_while_it_writes_nothing_is_torn_and_the_next_run_sweeps",
        "test_crash.test_killed_at_random",
    ),
    "Ctrl-C in training": (
        f"{TRAIN}.test_stopped_and_taken_up_it_makes_the_same_bytes",
        "test_session.test_a_second_signal_ends_at_once_with_the_last_checkpoint_whole",
    ),
    "SIGTERM in training": (f"{TRAIN}.test_stopped_and_taken_up_it_makes_the_same_bytes",),
    "resuming after a crash, or with another config": (
        f"{TRAIN}.test_stopped_and_taken_up_it_makes_the_same_bytes",
        "test_crash_training.test_a_killed_training_goes_on_to_the_same_bits",
    ),
    "out of memory": (
        f"{HOSTILE}.test_out_of_memory", f"{TRAIN}.test_a_training_out_of_memory_says_the_sizes",
    ),
    "several writers": (
        f"{HOSTILE}.test_of_several_writers_one_wins_and_the_others_are_told",
        "test_crash.test_two_writers_and_a_reader",
    ),
    "concept empty or without a letter": (ERASE,),
    "concept not in the vocabulary": (ERASE,),
    "concept that the base cannot draw": (ERASE,),
    "concept or prompt too long": (
        ERASE, f"{HOSTILE}.test_a_prompt_that_is_too_long_says_what_is_left_out",
    ),
    "empty prompt": (f"{HOSTILE}.test_the_empty_prompt_is_drawn_and_noted",),
    "invisible, bidirectional and composed characters": (
        ERASE, f"{CLI}.test_names_from_files_cannot_draw_on_the_terminal",
    ),
    "sizes: there is no option for one": (GENERATE,),
    "steps out of range": (ERASE, GENERATE),
    "guidance out of range or NaN": (GENERATE,),
    "seeds negative, too large, fractions, words": (ERASE, GENERATE, OTHERS),
    "no pictures, no prompts": (GENERATE,),
    "device that is not there": (ERASE, GENERATE),
    "half precision on a CPU; latents that diverge (in process)": (
        f"{HOSTILE}.test_half_precision_on_a_cpu_is_full_precision",
        "test_sampler.test_latents_that_are_not_finite_are_refused",
    ),
    "loss NaN": (f"{TRAIN}.test_a_training_that_diverges_writes_no_erasure",),
    "the same erasure or concept twice": (
        GENERATE, f"{FLOW}.test_the_same_concept_twice_is_allowed_with_a_warning",
    ),
    "too many erasures at once": (GENERATE,),
    "policy that names an absent file": (f"{FLOW}.test_a_policy_that_does_not_hold_draws_nothing",),
    "hook lost after loading": (
        f"{HOSTILE}.test_a_hook_lost_after_the_self_test_leaves_no_picture",
    ),
    "config file: unknown key, wrong type, YAML tag": (
        ERASE, f"{CLI}.test_a_config_file_that_is_wrong_says_where",
    ),
    "lists of prompts: byte order mark, line ends; cells that are formulas (in process)": (
        f"{HOSTILE}.test_prompt_files_of_other_systems", ERASE, GENERATE,
        "test_evaluation.test_no_cell_is_a_formula_for_a_spreadsheet",
    ),
    "closed streams and pipes": (
        f"{CLI}.test_a_pipe_that_closes_is_no_error", f"{CLI}.test_closed_streams_do_no_harm",
    ),
    "no home, no terminal, C locale, odd file names": (
        f"{HOSTILE}.test_any_name_without_home_locale_or_terminal",
        f"{CLI}.test_an_ascii_terminal_gets_ascii",
    ),
    "no network": (GENERATE, "test_hub.test_offline_is_one_line_at_once"),
    "code in a model folder": (BASE, "test_checkpoints.test_code_named_in_configs_is_not_run"),
    "modules that the base does not have": (FOREIGN,),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLE)
def test_every_kind_of_bad_input_has_its_tests(kind: str) -> None:
    for test in TABLE[kind]:
        module, _, name = test.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), Callable), test


def test_the_table_is_whole() -> None:
    assert len(TABLE) == 48
