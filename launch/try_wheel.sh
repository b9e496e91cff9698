#!/usr/bin/env bash
# try_wheel.sh [PIP_ARGUMENTS]: installs the wheel in dist/ for this processor into an empty environment, in an empty folder, and
# uses it there: a command, a page, two ranks. PIP_ARGUMENTS go to pip, such as "-c constraints.txt".
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(ls "$repository"/dist/ringred-*_"$(uname -m)".whl)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv empty
empty/bin/pip install --quiet --disable-pip-version-check "$@" torch
empty/bin/pip install --quiet --disable-pip-version-check "$@" "$wheel"
empty/bin/ringred --version
empty/bin/ringred explain all_reduce --ranks 4 --bytes 1M --algorithm ring --html ring.html > ring.txt
test -s ring.html
empty/bin/ringred help PeerFailed > help.txt
cat > two.py <<'PYTHON'
import torch, ringred
from ringred.transports.shm_player import unusable

comm = ringred.init()
data = torch.ones(1000)
comm.all_reduce(data)
assert data.sum() == 2000 and unusable() is None, unusable()
print(f"rank {comm.rank} of {comm.size}: right, by the compiled player\n", end="", flush=True)
PYTHON
empty/bin/ringred run --ranks 2 two.py
