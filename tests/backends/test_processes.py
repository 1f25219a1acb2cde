"""A classifier of ONNX Runtime in other processes, and its threads."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import offramp
from offramp.errors import StoreError
from tests.forked import in_child

TEXTS = ["a good film", "a bad film", "bad"]


def threads_here():
    """The numbers of the threads of this process."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_classifier_answers_as_before(store, threads):
    """With two threads ONNX Runtime would wait for one that is not in the child."""
    with offramp.load(store, threads=threads) as classifier:
        wanted = [(result.label, result.score) for result in classifier.predict(TEXTS)]

        def check():
            for _ in range(2):
                assert [(result.label, result.score) for result in classifier.predict(TEXTS)] == wanted
            classifier.close()

        assert in_child(check) == 0
        assert [(result.label, result.score) for result in classifier.predict(TEXTS)] == wanted


@pytest.mark.parametrize("options", [{}, {"exit": "patience:1", "batch": 2}, {"batch": "bulk"}, {"budget": "1GiB"}])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_pickled_classifier_is_opened_again_in_another_process(store, tmp_path, monkeypatch, options, is_open):
    monkeypatch.chdir(store.parent)
    classifier = offramp.prepare(store.name, threads=1, **options)
    code = (
        "import pickle, sys; c = pickle.load(sys.stdin.buffer); print(c._is_open, *(r.label for r in c.open().predict"
    )
    code += f"({TEXTS!r}))); c.close()"
    with classifier:
        wanted = [result.label for result in classifier.predict(TEXTS)]
        data = pickle.dumps(classifier)
    data = data if is_open else pickle.dumps(classifier)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=data, cwd=tmp_path, capture_output=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == [str(is_open), *wanted]


def test_a_pickle_of_a_store_that_is_another_by_now_is_refused(store, monkeypatch):
    classifier = offramp.prepare(store, threads=1)
    data = pickle.dumps(classifier)
    loaded = pickle.loads(data)
    assert loaded.store.digest == classifier.store.digest
    assert loaded.settings.config == replace(classifier.settings.config)
    classifier.store.digest = "another"
    with pytest.raises(StoreError, match="another one than when the classifier was pickled"):
        pickle.loads(pickle.dumps(classifier))


def test_close_ends_all_threads_and_a_second_opening_starts_them_again(store):
    offramp.load(store, threads=1).close()  # what the first use of the libraries starts
    before = threads_here()  # some of them may end meanwhile: they belong to tests before this one
    classifier = offramp.prepare(store, threads=3)
    for _ in range(2):
        with classifier:
            found = classifier.predict(TEXTS)
            assert len(threads_here() - before) >= 2
        assert not threads_here() - before
    assert found
