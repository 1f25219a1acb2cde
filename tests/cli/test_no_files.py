"""Commands on stores and inputs with what is no regular file: a refusal or the honest answer, at once."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time

import pytest

from tests.odd_files import absent, fifo, folder, link, link_to_device, no_hang, unix_socket
from tests.store.small import names_in

BUDGET = ("--budget", "2GiB")  # of this process, which has pytest in it
TEXT = ("--text", "the bank fell")


@pytest.fixture(autouse=True)
def nothing_hangs():
    with no_hang(60):
        yield


@pytest.fixture
def own(store, tmp_path):
    """A copy of the store that a test may spoil."""
    return shutil.copytree(store, tmp_path / "own")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def hard_link(path):
    os.link(path, path.parent.parent / "other")


ATTACKS = (fifo, link, link_to_device, folder, unix_socket, absent, cut)
FILES = (
    "offramp.json", "layer-02-up.safetensors", "embedding-rows.safetensors", "embedding-rows.blocks", "labels.json",
    "exits.json", "exits.safetensors", "config.json", "vocab.txt", "offramp_tokenizer.json",
    "offramp_fast_tokenizer.json",
)  # fmt: skip
VERBS = {
    "run": ("run", *BUDGET, *TEXT, "--exit", "confidence:0.99", "--threads", "1", "--json"),
    "plan": ("plan", *BUDGET, "--json"),
    "verify": ("verify",),
    "ls": ("ls", "--json"),
}
FACTS = ("label", "score", "exit_stage", "feasible", "num_stages")


def facts(said):
    """What a verb answers, without what is measured."""
    if not said.out.startswith("{"):
        return said.code, said.out
    return said.code, [{key: line.get(key) for key in FACTS} for line in said.lines]


@pytest.fixture(scope="module")
def honest():
    """Verb -> what it answers on the store as it is, filled as needed."""
    return {}


def call(run, verb, store):
    command, *options = VERBS[verb]
    return run(command, store, *options)


@pytest.mark.parametrize("attack", [*ATTACKS, hard_link], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_a_store_with_what_is_no_file_is_refused_or_answers_as_before(
    run, store, own, monkeypatch, honest, verb, attack
):
    monkeypatch.chdir(own.parent)
    if verb not in honest:
        honest[verb] = facts(call(run, verb, store))
        assert honest[verb][0] == 0
    for name in FILES if attack is fifo else FILES[:4]:
        spoilt = shutil.copytree(own, own.with_name("spoilt"))
        assert (spoilt / name).exists(), name
        attack(spoilt / name)
        said = call(run, verb, spoilt)
        if attack is hard_link:
            assert said.code == 0, said
        if said.code == 0:
            assert attack is hard_link or verb != "verify"
            assert facts(said) == honest[verb]
        else:
            assert said.code == (2 if name == "offramp.json" and attack is absent else 4), (name, said)
            assert verb == "verify" or (
                (said.err.count("\n") == 1 and name.split("/")[-1] in said.err) or attack is absent
            )
        shutil.rmtree(spoilt)
        (own.parent / "other").unlink(missing_ok=True)


@pytest.mark.parametrize("spoil", [fifo, absent], ids=lambda spoil: spoil.__name__)
def test_a_run_whose_answers_are_there_does_not_fail_at_its_end(run, own, monkeypatch, spoil):
    """Its record looks at the page cache: nothing is opened again by its name."""
    import offramp.cli.run as command

    show = command._show

    def spoil_and_show(*args):
        for path in own.glob("*.safetensors"):
            spoil(path)
        show(*args)

    monkeypatch.setattr(command, "_show", spoil_and_show)
    said = run("run", own, *BUDGET, *TEXT, "--json")
    assert said.code == 0, said
    assert "label" in said.lines[0]


def make_policy(path):
    path.write_text('{"format": 1}')


@pytest.mark.parametrize("option", ["--exit", "--profile"])
@pytest.mark.parametrize("attack", [fifo, link_to_device, folder, unix_socket], ids=lambda attack: attack.__name__)
def test_a_policy_or_a_profile_that_is_no_file_is_refused(refused, store, tmp_path, monkeypatch, option, attack):
    monkeypatch.chdir(tmp_path)
    make_policy(tmp_path / "p.json")
    attack(tmp_path / "p.json")
    kind = {fifo: "a pipe", link_to_device: "a device", folder: "a folder", unix_socket: "a socket"}[attack]
    refused(2, f"cannot be read ({kind}, not a regular file) - p.json", "run", store, *BUDGET, *TEXT, option, "p.json")


@pytest.mark.parametrize("option", ["--exit", "--profile"])
def test_a_link_to_a_policy_or_a_profile_is_as_good_as_the_file(refused, store, tmp_path, option):
    make_policy(tmp_path / "p.json")
    (tmp_path / "link.json").symlink_to("p.json")
    mentions = "policy file without 'policy'" if option == "--exit" else "no device profile"
    for name in ("p.json", "link.json"):
        refused(4, mentions, "run", store, *BUDGET, *TEXT, option, tmp_path / name)


def test_inputs_of_a_pipe_are_read_once_and_answered(run, store, tmp_path):
    lines = "the bank fell\na film won\n"
    (tmp_path / "t.txt").write_text(lines)
    os.mkfifo(tmp_path / "pipe.txt")
    writer = threading.Thread(target=(tmp_path / "pipe.txt").write_text, args=[lines])
    writer.start()
    words = ("run", store, *BUDGET, "--threads", "1", "--json", "--input")
    piped, filed = run(*words, tmp_path / "pipe.txt"), run(*words, tmp_path / "t.txt")
    writer.join()
    assert piped.code == 0 and facts(piped) == facts(filed)


COMMANDS = {
    "run": lambda store, pipe: ("run", store, *BUDGET, "--input", pipe),
    "eval": lambda store, pipe: ("eval", store, "--train", pipe, "--split", "dev"),
}


def interrupt_the_reader_of(pipe):
    """Wait until somebody waits for a writer of a pipe, and send what Ctrl-C sends."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # nobody reads it yet
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            os.close(writer)
            return
        time.sleep(0.01)


@pytest.mark.parametrize("verb", COMMANDS)
def test_ctrl_c_ends_the_wait_for_a_pipe(run, store, tmp_path, verb):
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    thread = threading.Thread(target=interrupt_the_reader_of, args=[pipe])
    thread.start()
    said = run(*COMMANDS[verb](store, pipe))
    thread.join()
    assert (said.code, said.err.splitlines()[-1]) == (130, "offramp: error: interrupted")


@pytest.mark.parametrize("name", ["pipe.npz", "pipe.zip", "pipe.png"])
def test_a_pipe_of_what_cannot_be_read_in_order_is_refused(refused, store, tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused(2, name, "run", store, *BUDGET, "--input", tmp_path / name)


@pytest.mark.parametrize("attack", [fifo, link_to_device, unix_socket], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize(("verb", "option"), [("memory", "--out"), ("ls", "--graph")])
def test_a_picture_is_not_written_to_what_is_no_file(refused, store, tmp_path, monkeypatch, verb, option, attack):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.svg").touch()
    attack(tmp_path / "p.svg")
    words = BUDGET if verb == "memory" else ()
    refused(2, "is a pipe, a device or a folder", verb, store, *words, option, "p.svg")


@pytest.mark.parametrize("name", ["trace.json", "trace.jsonl"])
def test_a_trace_waits_for_no_reader_of_a_pipe(run, store, tmp_path, name):
    """With a reader the pipe is as good as a file."""
    os.mkfifo(tmp_path / name)
    words = ("run", store, *BUDGET, *TEXT, "--trace", tmp_path / name)
    said = run(*words)
    assert (said.code, said.out != "") == (2, True)
    assert f"no process reads this pipe - {tmp_path / name} - start its reader first" in said.err
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / name).read_text()))
    reader.start()
    assert run(*words).code == 0
    reader.join()
    assert "compute" in read[0]


def table(path):
    texts = ("the bank fell", "a film won", "match today", "shares rose")
    rows = [f"{texts[n % 4]} {n},{('business', 'film', 'sport', 'business')[n % 4]}" for n in range(60)]
    path.write_text("\n".join(["text,label", *rows]))
    return path


STRANGERS = {
    "train.json": json.dumps({"max_length": 3, "data": {"task": "mine", "split_seed": 7, "cuts_dev": True}}),
    "exits.json": json.dumps({"form": "no such form"}),
    "adapter_config.json": "{}",
    "tokenizer_config.json": json.dumps({"do_lower_case": False, "model_max_length": 3}),
    "model.safetensors": "not a checkpoint",
    "trained-rows.json": "{}",
    "generation_config.json": None,
}
"""File beside a store that its manifest does not list -> its content; None: a pipe."""


def test_eval_reads_no_file_that_a_store_does_not_list(run, tmp_path_factory, tmp_path):
    import offramp
    from tests.cli.conftest import write_tiny

    model = write_tiny(tmp_path / "model", exits=False, num_hidden_layers=2)
    store = offramp.divide(model, tmp_path / "store")
    words = ("eval", store, "--train", table(tmp_path / "mine.csv"), "--split", "dev", "--json")
    before = run(*words)
    assert before.code == 0, before
    for name, content in STRANGERS.items():
        assert not (store / name).exists()
        fifo(store / name) if content is None else (store / name).write_text(content)
    after = run(*words)
    assert (after.code, after.out) == (0, before.out), after
    for name in ("config.json", "vocab.txt", "model.safetensors.index.json", "head.safetensors"):
        spoilt = shutil.copytree(store, tmp_path / "spoilt", ignore=shutil.ignore_patterns(*STRANGERS))
        fifo(spoilt / name)
        said = run("eval", spoilt, *words[2:])
        assert said.code == 4 and name in said.err.splitlines()[-1], said
        shutil.rmtree(spoilt)
    assert names_in(tmp_path) == ["mine.csv", "model", "store"]
