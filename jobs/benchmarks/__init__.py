"""The parts of `python -m jobs.benchmark`: each module has one or more functions `(quick) -> list[Row]`."""
