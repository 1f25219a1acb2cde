"""Selection of tests: which run by `make test-all` only, and which must run while no other test runs.

`make test` and CI run everything that is not slow: first in two processes, then the tests marked `alone` in one.

A slow test is either a parameter of a test whose other parameters CI runs (`SAMPLED`), or has a representative that CI
runs and that fails when the same law is broken (`REPRESENTED`). Both tables are checked when tests are collected: every
entry must match a test, and what CI keeps must not be slow. Names are `file::test`, without folder and `.py`; `*`: all
tests of a file.
"""

import os
import sys
from collections import defaultdict

import pytest

SAMPLED = {
    "test_families::*": ("albert",),
    "test_folder_edits::*": (  # DeBERTa-v2 takes longer than the others together
        *("bert-part0", "distilbert-part0", "roberta-part0", "xlm-roberta-part0", "electra-part0", "albert-part0"),
        *("mpnet-part0", "gpt2-part0"),
    ),
    "test_learned::test_the_cost_function_beats_thresholds_and_patience": ("0.5",),
    "test_golden::test_a_golden_store_answers_as_recorded_under_every_exit_rule": ("third",),
    "test_half::test_answers_are_those_of_the_rounded_weights_bit_for_bit": (
        "ort-bert",
        "numpy-electra",
        "torch-roberta",
    ),
    "test_half::test_numbers_that_have_no_half_are_refused_by_name": ("65520.0", "nan"),
    "test_narrow::test_divide_verify_and_ls_say_what_it_is": ("int8",),
    "test_narrow::test_run_answers_like_the_model_it_is_of": ("ort-int8", "numpy-int8", "torch-fp16"),
    "test_narrow::test_the_other_verbs_run": ("memory-int8",),
    "test_narrow::test_transcripts_are_of_the_weights_that_answered": ("int8",),
    "test_narrow_modules::test_modules_answer_nearly_as_before": ("mixed",),
    "test_no_files::test_a_store_with_what_is_no_file_is_refused_or_answers_as_before": ("run-fifo", "verify-fifo"),
    "test_outputs::test_a_model_without_padding_is_scored_text_by_text_and_not_trained": ("None",),
    "test_outputs::test_one_text_needs_no_padding": ("None",),
    "test_outputs::test_so_does_a_model_that_was_divided_by_a_run": ("regression-4",),
    "test_outputs::test_several_texts_need_padding": ("None",),
    "test_pabee::*": ("('bert', 'single')",),
    "test_pages::test_published_gains_follow_from_the_published_answers": ("rte",),
    "test_pipeline::test_bfloat16_trains_weights_of_float32": ("distilbert",),
    "test_pipeline::test_distilled_exits_learn": ("bert",),
    "test_pipeline::test_equal_seeds_give_equal_files": ("distilbert",),
    "test_pipeline::test_every_form_learns": ("bert-own-shared",),
    "test_pipeline::test_exits_are_measured_in_float32_whatever_they_were_trained_in": ("distilbert",),
    "test_pipeline::test_exits_of_a_regression_learn_a_value": ("bert",),
    "test_pipeline::test_heads_are_trained_on_alone_after_the_model": ("bert-own-shared-bfloat16",),
    "test_pipeline::test_plain_fine_tuning_leaves_no_exits_and_heads_alone_leave_the_model": ("bert",),
    "test_pipeline::test_the_last_exit_is_trained_alone_in_the_first_half_of_mixed": ("distilbert",),
    "test_readme::test_every_block_runs_as_it_stands": ("quick",),
    "test_resume::test_the_continuation_is_the_same_bit_for_bit": ("distill-2-16-8-6",),
    "test_encoder_format::test_every_value_may_be_wrong": ("some",),
    "test_format3::test_every_value_may_be_wrong": ("some",),
    "test_manifest::test_every_value_may_be_wrong": ("some",),
    "test_ring::test_a_forked_pass_goes_on_in_both_processes": ("b-1", "b-2", "bd-3"),
    "test_scheduler::test_one_process_two_jobs_and_two_workers_give_the_same_records": ("few",),
    "test_snapshot::test_everything_is_as_it_was_whether_divided_or_refused": (
        *("eager", "busy", "drawn", "fast", "keeping", "odd", "recurrent", "routed"),
        *("by list", "clipped", "counting", "failing", "normed"),
    ),
    "test_torch_limits::test_no_hostile_call_ends_or_hangs_the_process": ("sample",),
    "test_train_eval::test_every_task_of_glue_trains_and_scores_from_a_folder": ("sst2", "mnli", "stsb"),
    "test_tuning::test_a_latency_is_met_on_new_samples": ("0.07",),
    "test_tuning::test_the_drop_that_is_named_can_be_certified_with_these_rows": ("60-0.99-ucb",),
    "test_tuning::test_every_family_with_a_parameter_comes_near_the_latency": ("index",),
    "test_zoo::test_a_model_of_the_zoo_is_divided_and_streamed_bit_for_bit": ("resnet",),
    "test_verbs::test_run_prints_the_recorded_answers": ("bert-tuned",),
    "test_golden::test_a_golden_store_answers_the_same_in_batches": (
        *("bert-tuned-ort", "electra-own-torch", "gpt2-export-ort", "vit-export-torch"),
    ),
    "test_golden::test_a_golden_store_answers_the_same_under_the_smallest_budget": (
        *("bert-tuned-torch", "roberta-cls-linear-ort", "bert-bfloat16-ort", "gpt2-export-torch", "resnet-export-ort"),
    ),
    "test_golden::test_files_that_the_manifest_does_not_list_change_no_answer": (
        "bert-tuned",
        "gpt2-export",
        "vit-export",
    ),
    "test_kills::test_a_process_that_dies_at_any_call_leaves_what_the_next_completes": (
        *("file that exists", "transcript", "store that is replaced", "cache"),
    ),
    "test_tokenizing::test_a_store_gives_the_tokens_of_transformers": (
        *("vocabulary", "accents", "other special tokens", "short", "left", "split special tokens", "no types", "json"),
        *("json and words", "json, padding and cutting", "RoBERTa", "Unigram", "XLNet", "letters that are added"),
    ),
    "test_paths::test_a_wrong_path_has_one_exit_code": (
        *(
            "divide model",
            "ls store",
            "plan --profile",
            "run --input",
            "memory --out",
            "profile --out",
            "train --train",
        ),
        *(
            "eval --transcript",
            "tune --transcript",
            "bench --data",
            "sweep recipe",
            "compare second",
            "report --template",
        ),
    ),
    "test_children::test_an_error_keeps_its_class_and_its_parts": (
        "BudgetError",
        "OfframpError",
        "VersionError",
        "UsageError",
    ),
    "test_hostile_records::test_a_report_and_a_comparison_are_made_or_refused": (
        *("an exit of 2^40", "latencies that are null", "latencies of 0", "spans backwards", "memory of 2^53"),
        *("truth of texts", "truth of large numbers", "labels that are lists", "a model of no letters", "no engine"),
        *(
            "a budget of 400 digits",
            "many labels",
            "a deep option",
            "deep versions",
            "figures of 1e+300",
            "figures of 'x'",
        ),
    ),
    "test_process::test_the_measured_peak_of_images_stays_within_the_budget": ("ort",),
    "test_process::test_rows_of_megabytes_are_in_the_plan": ("tsv",),
    "test_process::test_closed_descriptors_change_no_answer": ("2>&- <&-",),
    "test_process::test_a_terminal_of_any_encoding_shows_every_label": ("ascii",),
    "test_process::test_a_limit_of_the_address_space_is_not_called_a_missing_library": ("200000",),
    "test_process::test_a_limit_of_the_address_space_is_kept_or_refused_in_one_line": ("100", "400", "4000"),
    "test_processes::test_a_pickled_classifier_is_opened_again_in_another_process": ("True-options0", "False-options2"),
    "test_closing::test_closing_leaves_nothing": (
        *("ort-texts", "torch-arrays", "numpy-texts", "ort-again", "stream-budget", "left-open", "refused"),
    ),
    "test_checkpoints::test_a_folder_and_the_loaded_model_give_the_same_shards": (
        *("BertForSequenceClassification", "T5ForConditionalGeneration", "CLIPModel"),
    ),
    "test_checkpoints::test_a_folder_is_divided_and_runs_as_from_pretrained": (
        *(
            "BertForSequenceClassification",
            "GPT2LMHeadModel",
            "ViTForImageClassification",
            "T5ForConditionalGeneration",
        ),
        *("MixtralForCausalLM",),
    ),
    "test_modules::test_dividing_twice_gives_equal_bytes": ("tied", "odd", "recurrent"),
    "test_outputs::test_keys_about_the_form_of_the_output_change_no_answer": (
        *("{'return_dict': False}", "{'torchscript': True}", "{'output_attentions': True}"),
    ),
    "test_profile::test_drift_of_the_machine_is_no_cache": ("rising-6", "waves-1"),
    "test_pipeline::test_keys_about_the_form_of_the_output_change_no_training": ("keys0",),
}
"""Parameters that CI runs, by test; each is one or more neighbouring parts of a test's id, which dashes separate."""

REPRESENTED = {
    "test_narrow::test_a_policy_of_other_weights_is_told": (
        "test_narrow::test_a_policy_knows_the_weights_that_it_was_tuned_on"
    ),
    "test_narrow_modules::test_a_text_encoder_as_graphs": (
        "test_narrow_modules::test_a_classifier_of_images_answers_nearly_as_before"
    ),
    "test_narrow_modules::test_numbers_that_have_no_integer_are_refused": (
        "test_narrow::test_numbers_that_have_no_integer_are_refused_by_name"
    ),
    "test_narrow_modules::test_what_torch_export_does_not_take_is_refused": (
        "test_narrow_modules::test_what_has_no_product_for_integers_is_refused"
    ),
    "test_resume::test_two_processes_train_one_run": (
        "test_resume::test_two_processes_that_were_killed_go_on_with_the_same_rows"
    ),
    **dict.fromkeys(
        (
            "test_scheduler::test_a_scheduler_by_tls_runs_jobs_of_those_alone_who_have_its_certificate",
            "test_scheduler::test_the_jobs_of_a_killed_worker_are_run_by_the_other",
        ),
        "test_scheduler::test_one_process_two_jobs_and_two_workers_give_the_same_records",
    ),
    "test_scheduler::test_a_job_that_ends_its_workers_is_recorded_as_failed": (
        "test_scheduler::test_a_job_whose_workers_are_killed_fails_after_two_attempts"
    ),
    "test_scheduler::test_a_real_scheduler_that_dies_ends_the_sweep_and_another_continues_it": (
        "test_scheduler::test_a_sweep_whose_scheduler_dies_ends_without_records_of_what_is_unknown"
    ),
    "test_vision::test_rivals_are_measured_on_a_labelled_split": (
        "test_bench_task::test_rivals_are_measured_on_the_same_texts_and_scored"
    ),
    "test_tuning::test_more_time_gives_no_worse_score": "test_tuning::test_the_front_is_not_beaten",
}
"""Slow test -> the test that stands for its law in CI."""

DEVICE = ("test_verbs",)
"""Files whose tests CI runs in the environment of a device alone: verbs that tests/cli runs in this one."""

ALONE = (
    "test_guard::test_a_disk_that_becomes_slow_leads_to_earlier_exits",
    "test_process::test_the_measured_peak_stays_within_the_prediction_and_the_budget",
    "test_process::test_the_measured_peak_of_images_stays_within_the_budget",
)
"""Tests with a deadline in real time, or of the memory of a whole process."""


FIRST = (
    *("test_readme", "test_golden", "test_pipeline", "test_tuning", "test_folder_edits", "test_resume", "test_tune"),
    *("test_train_eval", "test_vision", "test_remedies", "test_own", "test_system_faults"),
)
"""Files that take longest, which start first, so that no process is left with one of them at the end."""


def examples(whole):
    """How many examples hypothesis draws: a third of `whole`, and five at least, where a sample is asked for."""
    return max(whole // 3, 5) if os.environ.get("OFFRAMP_TESTS") == "sample" else whole


def are_alone(marks):
    """Whether an expression of marks asks for tests that run alone, and for no others."""
    return "alone" in marks.split() and "not alone" not in marks


def is_left_out(path):
    """Whether a file has no test that runs alone."""
    return path.name.startswith("test_") and path.stem not in {name.partition("::")[0] for name in ALONE}


def select(items, is_whole):
    """Mark collected tests `slow` and `alone`, and put long files first.

    Stale entries are errors if `is_whole`: if all tests were collected.
    """
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    names = {item: f"{item.path.stem}::{getattr(item, 'originalname', item.name)}" for item in items}
    for item, name in names.items():
        kept = [SAMPLED[pattern] for pattern in (name, f"{item.path.stem}::*") if pattern in SAMPLED]
        is_elsewhere = item.path.stem in DEVICE and sys.version_info >= (3, 10)
        if is_elsewhere or name in REPRESENTED or not all(_is_kept(item, keep) for keep in kept):
            item.add_marker(pytest.mark.slow)
        if name in ALONE:
            item.add_marker(pytest.mark.alone)
    if is_whole:
        errors = list(_stale(names))
        if errors:
            raise pytest.UsageError("tests/selection.py: " + "; ".join(errors))


def _is_kept(item, keep):
    return not hasattr(item, "callspec") or any(_has_parameter(item, part) for part in keep)


def _has_parameter(item, part):
    return hasattr(item, "callspec") and f"-{part}-" in f"-{item.callspec.id}-"


def _stale(names):
    fast = {name for item, name in names.items() if not item.get_closest_marker("slow")}
    items_of = defaultdict(list)
    for item, name in names.items():
        items_of[name].append(item)
        items_of[f"{item.path.stem}::*"].append(item)
    for name in (*SAMPLED, *REPRESENTED, *ALONE):
        if name not in items_of:
            yield f"no test is named {name}"
    for pattern, keep in SAMPLED.items():
        kept = {part for item in items_of[pattern] for part in keep if _has_parameter(item, part)}
        yield from (f"no parameter of {pattern} is {part}" for part in keep if part not in kept)
    for name in REPRESENTED.values():
        if name not in fast:
            yield f"{name} represents a slow test and is slow, or is no test"
