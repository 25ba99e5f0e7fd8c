"""The forty points of a command line that feels like the ones its users know, and the tests of each.

The points are those of `reference/ecosystem.md` of the design, 5.3; what the design decided otherwise is
said. `test_bad_input_table` reads the names of tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from test_bad_input_table import functions, has

from conceptzap import cli

MET = {
    "1 stdout is the result, stderr the rest": (
        "test_erase_ends_with_the_path_and_the_next_command", "test_closed_streams_do_no_harm",
    ),
    "2 --json on every command": ("test_every_command_takes_the_options_of_the_program_and_json",),
    "3 -q, -v, -vv, --no-progress": (
        "test_quiet_is_names_alone", "test_verbose_says_what_was_decided",
        "test_details_show_every_step_and_no_progress_none",
    ),
    "4 how erase ends": (
        "test_erase_ends_with_the_path_and_the_next_command",
        "test_it_says_what_it_did_and_how_long_and_with_how_much_memory",
    ),
    "5 colour and movement on terminals alone": (
        "test_colour_and_bars_on_a_terminal[NO_COLOR]", "test_no_terminal_no_bars",
    ),
    "6 40 and 200 columns, ASCII": (
        "test_tables_fit_narrow_and_wide_terminals[40]", "test_help_fits_too",
        "test_other_encodings_get_ascii", "test_on_a_narrow_terminal_no_word_is_broken",
    ),
    "7 errors: what, why, hint, no traceback": (
        "test_usage_errors", "test_a_traceback_only_when_asked_for", "test_a_hint_is_part_of_the_traceback",
    ),
    "8 exit codes, as the design has them": (
        "test_every_error_of_ours_has_its_code", "test_signals_have_their_exit_codes",
        "test_not_erased_is_exit_7_and_keeps_the_file",
    ),
    "9 errors in JSON": (
        "test_what_erase_refuses", "test_a_bad_file_among_several_is_reported_and_the_others_shown",
    ),
    "10 out of memory": ("test_out_of_memory", "test_a_training_out_of_memory_says_the_sizes"),
    "11 a config's unknown key: file, line, nearest": (
        "test_a_key_that_is_unknown_is_shown_by_its_line", "test_a_config_file_that_is_wrong_says_where",
        "test_bad_input_is_answered_without_torch",
    ),
    "12 typos are answered, nothing is abbreviated": (
        "test_options_are_never_abbreviated", "test_what_the_demo_has_no_word_for_is_no_doubt_but_an_error",
        "test_what_is_seldom_meant_is_warned_of", "test_a_name_that_is_near_is_proposed_without_its_ending",
    ),
    "13 nothing is overwritten, nothing is half": (
        "test_generate_never_overwrites", "test_nothing_is_overwritten_without_force",
        "test_killed_while_it_writes_nothing_is_torn_and_the_next_run_sweeps",
    ),
    "14 --dry-run": ("test_a_dry_run_does_nothing", "test_a_plan_needs_no_torch"),
    "15 Ctrl-C and --resume": (
        "test_stopped_and_taken_up_it_makes_the_same_bytes", "test_killed_it_goes_on_to_the_same_bytes",
        "test_a_second_signal_ends_it_at_once_with_its_checkpoints_whole",
    ),
    "16 no pickle, no network unasked": (
        "test_pickles_are_not_fetched", "test_only_what_is_needed_is_fetched", "test_offline_asks_nobody",
    ),
    "17 lists, @file, stdin": (
        "test_lists_come_from_files_too", "test_prompts_from_a_pipe", "test_concepts_from_a_pipe_in_a_shell",
    ),
    "18 --base takes what there is": (
        "test_single_file_says_or_is_told_what_it_predicts", "test_whatever_is_a_base",
        "test_what_was_fetched_once_works_offline", "test_verbose_says_what_was_decided",
    ),
    "19 precedence, as the design has it: options, --config, preset, defaults": (
        "test_flags_over_config_over_defaults", "test_options_win_over_the_file",
    ),
    "20 presets of kinds, fast and best; --save-config": (
        "test_fast_and_best", "test_saved_settings_make_the_same_file_again",
        "test_every_method_s_settings_can_be_saved",
    ),
    "21 the same names everywhere": ("test_an_option_means_the_same_everywhere",),
    "22 nobody is asked": ("test_closed_streams_do_no_harm", "test_a_pipe_that_cannot_be_read"),
    "23 help: alone, -h, two examples, groups": (
        "test_alone_it_shows_its_help", "test_help_leads_with_two_examples", "test_help_has_groups",
    ),
    "24 every option explained, the advanced apart": (
        "test_every_option_is_explained", "test_help_has_groups",
    ),
    "25 completion without torch": (
        "test_completion_needs_no_torch", "test_files_are_completed_wherever_they_lie",
        "test_the_completion_script_is_shown",
    ),
    "26 --version and doctor; the device is doctor's, --version has no torch": (
        "test_version", "test_doctor", "test_doctor_knows_what_works_offline",
    ),
    "27 help and README are tested": ("test_its_commands_parse", "test_it_runs_from_top_to_bottom"),
    "28 a quick start": ("test_it_starts_without_torch",),
    "29 nothing is silent for long": ("test_erase_is_never_silent",),
    "30 equal inputs, equal bytes": ("test_the_same_seed_gives_the_same_bytes", "test_stack_is_order_free"),
    "31 no telemetry, no server": (
        "test_the_tests_themselves", "test_it_fetches_nothing_and_runs_one_script_alone",
    ),
    "32 one line of progress": ("test_a_log_gets_a_line_now_and_then", "test_generate_counts_its_steps"),
    "33 samples, trackers, metrics (where asked for: the folder holds what was asked for)": (
        "test_losses_and_samples", "test_tensorboard", "test_a_stopped_run_goes_on_with_its_trackers",
    ),
    "34 a folder of each run": ("test_all_of_a_run_is_in_its_folder", "test_a_run_s_folder_is_its_own"),
    "35 early stop, and why": (
        "test_it_says_why_it_ended", "test_stopped_and_taken_up_it_ends_at_the_same_step",
    ),
    "36 a function for every command that makes, draws or measures": (
        "test_every_command_has_its_function", "test_erase_says_what_it_takes",
    ),
    "37 hub references of erasures, by revision, and their cards": (
        "test_what_a_name_means", "test_every_way_of_naming_it", "test_what_was_fetched_once_works_without_the_hub",
        "test_what_is_pushed_is_what_others_load", "test_what_the_card_says",
    ),
    "38 plug-ins by entry points": (
        "test_every_family_takes_members_of_other_packages", "test_a_method_of_another_package_erases",
    ),
    "39 renamed options of others are answered with ours": ("test_what_others_call_it_is_answered_with_ours",),
    "40 types, real pipes, odd names": (
        "test_a_type_checker_knows_every_verb", "test_concepts_from_a_pipe_in_a_shell",
        "test_any_name_without_home_locale_or_terminal",
    ),
}  # fmt: skip
# commands that tell of the program or the machine, and draw or measure nothing
TELLING = ("attacks", "doctor", "methods", "presets")
NAMED = {"demo": "demo_pipeline", "import": "import_"}


@pytest.mark.parametrize("point", MET)
def test_a_point_has_its_tests(point: str) -> None:
    for wanted in MET[point]:
        name, _, case = wanted.partition("[")
        modules = functions().get(name, [])
        assert any(has(one, name, case.removesuffix("]"), by_command_line=False) for one in modules), wanted


def test_every_point_is_met() -> None:
    assert sorted(int(point.partition(" ")[0]) for point in MET) == list(range(1, 41))


def options() -> Iterator[tuple[str, Any]]:
    for name, command in cli.program().commands.items():
        for param in command.params:
            if param.param_type_name == "option":
                yield name, param


def test_an_option_means_the_same_everywhere() -> None:
    """One short name is one long name, and one long name is of one kind, in all commands."""
    long_of, kind_of = {}, {}
    for command, param in options():
        long = next(opt for opt in param.opts if opt.startswith("--"))
        for short in (opt for opt in param.opts if not opt.startswith("--")):
            assert long_of.setdefault(short, long) == long, (command, short)
        kind = (param.is_flag, param.count)
        assert kind_of.setdefault(long, kind) == kind, (command, long)
    assert long_of["-o"] == "--output" and long_of["-n"] == "--dry-run"


def test_help_has_groups() -> None:
    from command import conceptzap

    text = conceptzap("erase", "-h").out
    usual, _, advanced = text.partition("\nAdvanced:")
    assert "\nArguments:" in usual and "\nOptions:" in usual and "--anchor" in usual
    assert "--device" in advanced and "--device" not in usual and "<list" not in text


def test_every_command_has_its_function() -> None:
    import conceptzap

    for name in cli.program().commands:
        if name not in TELLING:
            assert callable(getattr(conceptzap, NAMED.get(name, name))), name


@pytest.mark.parametrize(
    ("theirs", "ours"), [("--cfg", "--guidance"), ("--negative-prompt", "--negative"), ("--model", "--base")]
)
def test_what_others_call_it_is_answered_with_ours(theirs: str, ours: str) -> None:
    from command import conceptzap

    answer = conceptzap("generate", "a cat", theirs, "7")
    assert answer.code == 2 and answer.error.endswith(f"did you mean {ours}?")
