"""Keras' own environment: TensorFlow and embedshard never share one."""

import subprocess
import sys
from pathlib import Path

DEFAULT_CACHE = Path.home() / ".cache" / "embedshard" / "keras_side_by_side"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def keras_python(cache):
    """Returns the Python of Keras' environment, which it makes where there is none."""
    folder = cache / "env"
    ready = folder / ".ready"
    if not ready.exists():
        print(f"making an environment for Keras in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", REQUIREMENTS], check=True)
        ready.touch()
    return folder / "bin" / "python"
