"""docs/ is a site whose links all lead somewhere, which needs no network; and its first page of commands runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from launch import free_port

REPO = Path(__file__).resolve().parents[1]
DEADLINE_S = 300


def test_the_site_is_built_and_fetches_nothing(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=REPO, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = re.findall(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>", page.read_text())
        assert not fetched, page.name
    assert "Any tensor → [nbytes] uint8 on its device." in (tmp_path / "api" / "comm.html").read_text()


def test_the_road_on_a_small_model_runs_as_the_page_has_it(tmp_path: Path) -> None:
    """In a folder that shows the checkout, so that what it makes does not stay there."""
    for name in ("converters", "dist_train.py", "tests"):
        (tmp_path / name).symlink_to(REPO / name)
    blocks = re.findall(r"^```bash\n(.*?)^```", (REPO / "docs" / "first-run.md").read_text(), re.MULTILINE | re.DOTALL)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        with suppress(ProcessLookupError):  # rank 1 may outlive the script
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert "verdict: good" in out
    assert "done at step 10 of 10" in err
    assert '"step": 10' in out
    assert (tmp_path / "first-run" / "tuned" / "model.safetensors").exists()
