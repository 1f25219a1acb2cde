"""Promises of the public page: what it exports, what it costs to import, and who may know what."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import offramp
from tests.selection import ALONE, are_alone, is_left_out

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "matplotlib", "datasets", "huggingface_hub")


def imported_by(code):
    """Modules that are there after `code`, in a fresh process."""
    report = "import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "room",
    [
        "",
        ".division",
        ".tasks",
        ".runtime",
        ".store",
        ".policies",
        ".measure",
        ".training",
        ".program",
        ".session",
        ".profiling",
        ".backends",
        ".streaming",
        ".checkpoints",
    ],
)
def test_importing_a_room_loads_nothing_heavy(room):
    assert not imported_by(f"import offramp{room}") & set(HEAVY)


def test_help_loads_no_numpy():
    code = (
        "from offramp.cli import main\nimport contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['--help'])"
    )
    assert not imported_by(code) & {"numpy", *HEAVY}


def test_run_loads_no_torch_and_no_terminal_library():
    assert not imported_by("import offramp.cli.run, offramp.backends, offramp.session") & {
        "torch",
        "rich",
        "typer",
    }


def test_every_public_name_is_there_and_sorted():
    assert offramp.__all__ == sorted(offramp.__all__)
    assert set(offramp.__all__) <= set(dir(offramp))
    for name in offramp.__all__:
        assert getattr(offramp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = offramp.frobnicate


def test_no_module_shadows_a_public_verb():
    verbs = ("divide", "load", "prepare", "verify")
    for module in pkgutil.walk_packages(offramp.__path__, "offramp."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert all(callable(getattr(offramp, verb)) for verb in verbs)


ROOT = Path(__file__).parents[1]
FAULTS = "docs/results/faults.md"
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
    FAULTS,
)


def test_pages_name_files_that_exist():
    named = [
        (page, name)
        for page in PAGES
        for name in re.findall(r"`(?:src/offramp/)?((?:[a-z_]+/)+[a-z_]+\.py)", (ROOT / page).read_text())
    ]
    assert len(named) > 10
    homes = (ROOT / "src/offramp", ROOT)
    assert [(page, name) for page, name in named if not any((home / name).exists() for home in homes)] == []


def test_pages_name_commands_that_exist():
    """Scripts and their options, modules, recipes, targets of `make`; not those of other commits, after a colon."""
    pages = [*(ROOT / name for name in PAGES), ROOT / "Makefile", *(ROOT / "docs").glob("*/*.md")]
    texts = {page.name: page.read_text() for page in pages}
    targets = re.findall(r"^([a-z-]+):", texts["Makefile"], re.MULTILINE)
    wrong, count = [], 0
    for page, text in texts.items():
        made = re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)
        files = re.findall(r"(?<![\w/:.])recipes/[\w./]+\w", text)
        calls = re.findall(r"python\)? (?:-m ((?:tests|offramp)[\w.]*)|([\w/]+\.py))([^`\n|;#]*)", text)
        wrong += [(page, target) for target in made if target not in targets]
        wrong += [(page, file) for file in files if not (ROOT / file).exists()]
        for module, script, rest in calls:
            paths = _sources_of(module) if module else [ROOT / script]
            source = next((path.read_text() for path in paths if path.is_file()), None)
            options = [] if module.startswith("offramp") else re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)
            wrong += [(page, module or script)] if source is None else []
            wrong += [(page, script, option) for option in options if f'"{option}"' not in (source or "")]
        count += len(made) + len(files) + len(calls)
    assert not wrong and count > 90


def _sources_of(module):
    homes = [home / module.replace(".", "/") for home in (ROOT, ROOT / "src")]
    return [path for home in homes for path in (home.with_suffix(".py"), home / "__main__.py")]


def test_every_kind_of_fault_has_its_mechanism_and_its_test():
    kinds = [*(f"A{number}" for number in range(1, 11)), *(f"B{number}" for number in range(11, 17))]
    kinds += [f"C{number}" for number in range(1, 7)]
    rows = re.findall(r"^\| ([ABC]\d+) [^|]+\| ([^|]+) \| ([^|]+) \|$", (ROOT / FAULTS).read_text(), re.MULTILINE)
    assert [kind for kind, _, _ in rows] == kinds
    for kind, mechanism, test in rows:
        assert mechanism == test == "not measured" or (".py`" in mechanism and "`tests/" in test), kind


DOWNLOADING = ("from_pretrained", "load_dataset", "snapshot_download", "hf_hub_download")
PINNED = {"local_files_only", "revision"}


def test_every_call_that_could_download_reads_a_folder_or_names_a_revision():
    calls = [
        (path.name, call.lineno, {keyword.arg for keyword in call.keywords})
        for path in (ROOT / "src").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute | ast.Name)
        if (call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id) in DOWNLOADING
    ]
    assert len(calls) >= 10
    assert [(file, line) for file, line, given in calls if not given & PINNED] == []


def test_temporary_folders_and_files_with_names_do_not_outlive_their_process_for_long():
    """`scratch_folder` alone makes them: it removes those of processes that were killed."""
    named = re.compile(r"TemporaryDirectory|NamedTemporaryFile|mkdtemp|mkstemp")
    found = [path.name for path in (ROOT / "src").rglob("*.py") if named.search(path.read_text())]
    assert found == ["scratch.py"]


def test_tests_that_run_alone_are_collected_alone_and_with_no_other():
    makefile = (ROOT / "Makefile").read_text()
    marks = [given or bare for given, bare in re.findall(r'-m (?:"([^"]+)"|(alone)\b)', makefile)]
    assert [are_alone(each) for each in marks] == [False, True] * 3
    files = {path for path in Path(__file__).parent.rglob("test_*.py") if not is_left_out(path)}
    assert {path.stem for path in files} == {name.partition("::")[0] for name in ALONE}
