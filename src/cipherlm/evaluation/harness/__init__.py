"""The model and the tasks of CipherLM for lm-evaluation-harness, which ``cipherlm[eval]`` installs.

``python -m cipherlm.evaluation.harness`` is the harness's own command line with both of them.
"""

from pathlib import Path

TASKS = Path(__file__).with_name("tasks")
"""The folder of the tasks, for ``TaskManager(include_path=...)``."""
