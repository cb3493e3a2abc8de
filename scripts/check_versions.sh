#!/usr/bin/env bash
# The default tests and the demo with the oldest and the newest of everything that pyproject.toml allows, each in a
# fresh environment; prints a table and fails if a line of it did.
#
#     scripts/check_versions.sh [FOLDER]   # FOLDER: where the environments are made (about 12 GB), removed at the end
#
# Needs uv, and Python 3.10 and 3.13 where uv finds them.
set -uo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
mkdir -p "${1:-${TMPDIR:-/tmp}}" && folder=$(mktemp -d "${1:-${TMPDIR:-/tmp}}/check_versions.XXXXXX") || exit 1
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH VIRTUAL_ENV

names=(torch numpy pillow tokenizers safetensors diffusers huggingface_hub einops transformers peft datasets openai)
status=0
table="| Python | $(printf '%s | ' "${names[@]}")tests | demo |"
table+=$'\n'"|$(printf ' --- |%.0s' python "${names[@]}" tests demo)"

check() { # which Python, which versions
    local env="$folder/$1" tests demo=fails versions
    uv venv -q --python "$1" "$env" &&
        uv pip install -q --python "$env/bin/python" --resolution "$2" -e '.[test,train,bench]' ||
        { table+=$'\n'"| $1, $2: could not be installed |"; status=1; return; }
    "$env/bin/python" -m pytest -p no:cacheprovider 2>&1 | tee "$env/tests.log" || status=1
    tests=$(tail -n 1 "$env/tests.log")
    (mkdir "$env/demo" && cd "$env/demo" && "$env/bin/janusflow-min" demo) && demo=passes || status=1
    versions=$("$env/bin/python" -c '
import platform, sys
from importlib.metadata import version
print(platform.python_version(), *map(version, sys.argv[1:]), sep=" | ")' "${names[@]}")
    table+=$'\n'"| $versions | $tests | $demo |"
    rm -rf "$env"
}

check 3.10 lowest-direct
check 3.13 highest
echo "$table"
exit $status
