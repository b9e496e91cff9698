"""The `ringred` command: a file for each of the things that it does, put together by `main`."""
