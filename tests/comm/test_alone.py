"""`comm/` can be lifted out: the example that uses it alone works, and brings in no other room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launch import REPO, free_port

EXAMPLE = REPO / "example_scripts" / "comm_alone.py"


def test_the_example_of_comm_alone(tmp_path: Path) -> None:
    words = ["--url", f"tcp://127.0.0.1:{free_port()}", "--interface", "lo"]
    imports = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}  # stderr names every one of them
    other = subprocess.Popen([sys.executable, EXAMPLE, "1", *words], cwd=tmp_path)
    try:
        done = subprocess.run(
            [sys.executable, EXAMPLE, "0", *words],
            cwd=tmp_path,
            env=imports,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, other.wait(60)) == (0, 0), done.stderr[-2000:]
    finally:
        other.kill()
        other.wait()
    doubled = [[[2.0 * number] * 4] * 2 for number in range(3)]
    assert done.stdout.splitlines() == [f"rank 0 got {x} over lo" for x in doubled]
    rooms = {line.split("farspan.")[1].split(".")[0].strip() for line in done.stderr.splitlines() if "farspan." in line}
    assert rooms == {"comm"}
