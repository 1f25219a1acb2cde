import subprocess
import sys


def loaded(code):
    """What a fresh process says after this code."""
    done = subprocess.run([sys.executable, "-c", "import sys\n" + code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_room_opens_without_torch():
    assert loaded("import offramp.backends; print('torch' in sys.modules)") == "False"


def test_the_backend_takes_no_transformers():
    assert loaded("from offramp.backends import TorchBackend; print('transformers' in sys.modules)") == "False"


def test_what_to_install_is_said_without_torch():
    code = """
sys.modules["torch"] = None
from offramp.errors import MissingExtraError
try:
    from offramp.backends import TorchBackend
except MissingExtraError as error:
    print(error)
"""
    assert loaded(code) == "torch is not installed - pip install 'offramp[torch]'"


def test_another_name_is_none_of_the_room():
    assert loaded("import offramp.backends; print(hasattr(offramp.backends, 'JaxBackend'))") == "False"
