#!/usr/bin/env bash
# Run the tests with the oldest versions that requirements.txt allows, in an environment of their own.
#     bash tests/oldest.sh [pytest options]
# Python 3.11 or 3.12; about 5 GB of downloads the first time.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${OLDEST_VENV:-.venv-oldest}
if [ ! -x "$environment/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
fi
# Each line "name>=lowest,<next" becomes "name==lowest".
"$environment/bin/python" -m pip install -q $(sed -E '/^(#|$)/d; s/>=([^,]+),.*/==\1/' requirements.txt) "pytest>=8,<10"
"$environment/bin/python" -m pytest "$@"
