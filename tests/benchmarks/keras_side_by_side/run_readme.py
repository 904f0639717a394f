"""Runs the Keras programs of pipelines/README.md, each in a process of its own, in Keras' environment.

Run: python tests/benchmarks/keras_side_by_side/run_readme.py
"""

import argparse
import re
import subprocess
from pathlib import Path

from environment import DEFAULT_CACHE, keras_python

README = Path(__file__).parents[3] / "pipelines" / "README.md"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    python = keras_python(parser.parse_args().cache)
    for program in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        subprocess.run([python, "-c", program], check=True)


if __name__ == "__main__":
    main()
