"""Runs one after the other in the same processes, which start once: python in_turn.py FILE.

The file holds, as JSON, a list of arguments for each run.
"""

import json
import sys
from pathlib import Path

from conftest import compose_list

from bayesdiff import pipeline

if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text()):
        pipeline.run(compose_list(words))
