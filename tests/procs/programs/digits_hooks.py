"""examples/train_digits.py without a hook and with each, one after the other; argv: the folder for the results."""

import sys

from examples import train_digits

if __name__ == "__main__":
    folder = sys.argv[1]
    for hook in (None, *train_digits.HOOKS):
        sys.argv = ["train_digits.py", "--json", f"{folder}/{hook}.json", *(["--hook", hook] if hook else [])]
        train_digits.main()
