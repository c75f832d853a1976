"""The whole job on a Ray cluster: prepare, train, assign, score.

    ray job submit --working-dir . -- python -m jobs.train damic-text source.name=files
    source.files=[/nfs/news/*.parquet] \
        source.text=body clusters=50 cluster.workers=8 cluster.gpus_per_worker=1 --run /nfs/runs/news

Options and recipes are those of `distclust train`, except that --run must be given, and as an absolute path
on storage that every node sees: what a job writes elsewhere is lost with it. The job's exit code is the
training's; submitted again, it goes on where it was.
"""

from __future__ import annotations

import sys

from jobs import submit

if __name__ == "__main__":
    sys.exit(submit("train", sys.argv[1:], needed=("--run",), paths=("--run", "--corpus")))
