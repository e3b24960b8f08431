"""Microbenchmarks: one bench_<op>.py per op, on pytest-benchmark."""
if __name__ == "bench":
    raise ImportError("import interlace.bench, not bench: the repo root is on sys.path")
