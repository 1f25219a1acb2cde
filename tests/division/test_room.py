import subprocess
import sys

HEAVY = ("torch", "transformers", "onnx", "huggingface_hub")


def test_the_room_opens_without_heavy_libraries():
    code = f"import sys, offramp.division; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
