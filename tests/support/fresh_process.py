"""Scripts in a Python process of their own: for settings JAX reads once, such as the number of CPU devices."""

import os
import subprocess
import sys
import textwrap


def run_python(script: str, *, seconds: float = 600, **environment: str) -> str:
    """What the indented `script` prints; its errors and warnings fail the test that runs it, and a hang."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
