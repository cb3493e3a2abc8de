# SPDX-License-Identifier: MIT
"""Official scorers run out of the user's checkouts, beside ours. A helper, not a test; nothing of theirs is copied.

Functions are taken out of a script and run with stand-ins for what they import, so neither their models nor their
packages are needed. A checkout is named by an environment variable: GENEVAL_ROOT (djghosh13/geneval), ELLA_ROOT
(TencentQQGYLab/ELLA), WISE_ROOT (PKU-YuanGroup/WISE), TORCHUMM_ROOT (AIFrontierLab/TorchUMM, which has copies).
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest


def official_file(variable: str, path: str) -> Path:
    """A file of the checkout that `variable` names; skips the test where it names none."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout")
    file = Path(os.environ[variable]).expanduser() / path
    assert file.exists(), f"{variable} is set, but {file} is missing"
    return file


def functions(path: Path, *names: str, **context: Any) -> dict[str, Any]:
    """Functions, classes and constants of a script, without running the rest of it. context: their globals."""
    tree = ast.parse(path.read_bytes(), str(path))

    def wanted(node: ast.stmt) -> bool:
        if isinstance(node, ast.Assign):
            return any(getattr(target, "id", None) in names for target in node.targets)
        return getattr(node, "name", None) in names

    tree.body = [node for node in tree.body if wanted(node)]
    assert len(tree.body) >= len(names), f"{path} lacks some of {names}"
    exec(compile(tree, str(path), "exec"), context)
    return context
