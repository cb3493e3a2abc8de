# SPDX-License-Identifier: MIT
"""JanusFlow in other people's programs: lmms-eval and ComfyUI. Each module is loaded by its program alone."""
