"""Promises of the room: a registry by name that imports a library only when its backend is opened."""

import subprocess
import sys

import pytest

from offramp.backends import BACKENDS, THREAD_VARIABLES, open_backend, thread_variables
from offramp.runtime.backend import Backend
from offramp.store import Store


def loaded(code):
    """What a fresh process prints after this code."""
    done = subprocess.run([sys.executable, "-c", "import sys\n" + code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_room_opens_without_torch_and_numpy():
    heavy = ("torch", "numpy", "onnxruntime")
    assert loaded(f"import offramp.backends; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_the_torch_backend_takes_no_transformers():
    assert loaded("import offramp.backends.torch; print('transformers' in sys.modules)") == "False"


def test_the_numpy_backend_takes_nothing_but_numpy():
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "scipy")
    assert loaded(f"import offramp.backends.numpy; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_what_to_install_is_said_without_torch():
    code = """
sys.modules["torch"] = None
from offramp.errors import MissingExtraError
from offramp.backends import open_backend
try:
    open_backend("torch", None, 1)
except MissingExtraError as error:
    print(error)
"""
    assert loaded(code) == "torch is not installed - pip install 'offramp[torch]'"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_the_name_that_opens_it(store, name):
    with Store(store) as opened:
        backend = open_backend(name, opened, 1)
        assert open_backend(name, opened, 1, trust_kernels=True).trust_kernels and not backend.trust_kernels
    assert isinstance(backend, Backend) and backend.name == name and backend.num_threads == 1
    assert backend.program is opened.program


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend must be one of \('ort', 'torch', 'numpy'\), not 'jax'"):
        open_backend("jax", None, 1)


@pytest.mark.parametrize("name", BACKENDS)
def test_only_numpy_reads_its_threads_from_the_environment(name):
    assert thread_variables(name, 3) == (dict.fromkeys(THREAD_VARIABLES, "3") if name == "numpy" else {})


@pytest.mark.parametrize("num_threads", [1, 2])
def test_numpy_starts_the_threads_of_the_environment(num_threads):
    code = f"""
import os
from offramp.backends import thread_variables
os.environ.update(thread_variables("numpy", {num_threads}))
assert "numpy" not in sys.modules
from offramp.backends.numpy import _thread_functions
functions = _thread_functions()
print(functions[0]() if functions else {num_threads})
"""
    assert loaded(code) == str(num_threads)


def test_the_command_line_sets_the_threads_before_numpy_is_imported(tmp_path):
    code = f"""
import os
from offramp.cli import main
import offramp.cli.run
assert "numpy" not in sys.modules
offramp.cli.run.main = lambda args: print("numpy" in sys.modules, os.environ["OPENBLAS_NUM_THREADS"]) or 0
main(["run", {str(tmp_path)!r}, "--text", "a", "--backend", "numpy", "--threads", "3"])
"""
    assert loaded(code) == "False 3"
