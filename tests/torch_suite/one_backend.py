"""Runs torch's own distributed tests on one backend: argv has the backend, the number of ranks, a file for the results.

Some of those tests only know the names of the backends that torch ships. They are taught here that "ringred" is one
which does on CPU tensors what Gloo does; what they check is theirs. The result of each goes into the file as it ends.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import unittest
import warnings
from pathlib import Path
from typing import Any


class Name(str):
    """The name of a backend that is taken for Gloo where only names are compared, or looked for in a set."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other == "gloo"

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash("gloo")


class Results(unittest.TestResult):
    """Writes a line for each test: its name, how it ended, the seconds it took, and the end of what it said."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._said, self._outcome = path, "", "passed"

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        self._began, self._outcome, self._said = time.monotonic(), "passed", ""

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        self._outcome, self._said = "failed", self._exc_info_to_string(err, test)[-3000:]

    addFailure = addError  # noqa: N815

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        self._outcome, self._said = "skipped", reason

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:  # noqa: N802
        if err is not None:
            self.addError(test, err)

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        name = test.id().rpartition(".")[2]
        row = {
            "test": name,
            "outcome": self._outcome,
            "seconds": round(time.monotonic() - self._began, 2),
            "said": self._said,
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def load(backend: str) -> Any:
    """torch's module of tests, for `backend`."""
    real = os._Environ.__getitem__

    def taught(environment: Any, key: str) -> str:
        value = real(environment, key)
        return Name(value) if key == "BACKEND" and value != "gloo" else value

    from torch.testing._internal.common_distributed import DistTestCases

    DistTestCases.backend_feature["plugin"].add("ringred")
    os._Environ.__getitem__ = taught  # type: ignore[method-assign]
    try:
        from torch.testing._internal.distributed import distributed_test
    finally:
        os._Environ.__getitem__ = real  # type: ignore[method-assign]
    if backend == "ringred":
        import torch.distributed as dist

        from ringred.torch_backend.group import monitored_barrier

        dist.monitored_barrier = monitored_barrier  # torch's takes no other backend than Gloo
    return distributed_test


def main() -> None:
    backend, ranks, path, *wanted = sys.argv[1:]
    import torch

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"BACKEND": backend, "WORLD_SIZE": ranks, "TEMP_DIR": folder, "RINGRED_TUNING": "off"}
        distributed_test = load(backend)

        class Suite(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):  # type: ignore[misc,name-defined]
            def setUp(self) -> None:
                super().setUp()
                fork = torch.multiprocessing.get_context("fork")  # what is imported is so a thousand times
                self._start_processes(fork.Process)

        names = unittest.defaultTestLoader.getTestCaseNames(Suite)
        results = Results(Path(path))
        for name in names:
            if not wanted or name in wanted:
                Suite(name).run(results)


if __name__ == "__main__":
    main()
