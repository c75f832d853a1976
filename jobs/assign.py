"""Every document's cluster, on a Ray cluster.

    ray job submit --working-dir . -- python -m jobs.assign /nfs/runs/news --corpus /nfs/corpora/more \
        --workers 8 --out /nfs/assigned/more

Options are those of `distclust assign`. --out must be given, as an absolute path on storage that every node
sees; the model and the documents must be there too. Submitted again, it goes on where it was.
"""

from __future__ import annotations

import sys

from jobs import submit

if __name__ == "__main__":
    sys.exit(submit("assign", sys.argv[1:], needed=("--out",), paths=("--out", "--corpus")))
